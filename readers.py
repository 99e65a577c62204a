"""
Probes of frozen features: what can be found in them, with how much help? For probe.py.

Logistic regression and a two-layer head are trained, class prototypes only averaged. All take features as arrays, on
disk or in memory, and work through them in parts, so that ImageNet fits.
"""
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

STRENGTHS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]  # of the L2 penalty, relative to the mean cross-entropy; the strongest first
CHUNK = 2**26                               # numbers held at a time, whatever the size of the set


class Standardised:
    """Rows of a feature array (n,D), on disk or in memory, standardised by their own mean and standard deviation or by
    those of `like` (test rows by the training rows'). What fits is read once and stays on `device`."""

    def __init__(self, x, device="cpu", like=None):
        self.x, self.device = x, device
        if like is None:
            sums = torch.zeros(2, x.shape[1], dtype=torch.float64)
            for at in range(0, len(x), CHUNK // x.shape[1]):
                part = torch.from_numpy(np.array(x[at:at + CHUNK // x.shape[1]])).double()
                sums += torch.stack([part.sum(0), part.square().sum(0)])
            mean, square = sums / len(x)
            std = (square - mean**2).clamp(min=0).sqrt()
            self.mean, self.std = mean.float(), std.where(std > 1e-6 * (1 + mean.abs()), 1.).float()   # constant: as is
        else:
            self.mean, self.std = like.mean, like.std
        self.kept = self.read(np.arange(len(x))) if x.size <= 4 * CHUNK else None

    def read(self, numbers):
        return ((torch.from_numpy(np.array(self.x[numbers])) - self.mean) / self.std).to(self.device)

    def __getitem__(self, numbers):
        """Row numbers (m,) -> (m,D)"""
        return self.read(numbers) if self.kept is None else self.kept[torch.from_numpy(numbers)]


def fit_linear(rows, numbers, y, n_classes, strengths=STRENGTHS):
    """Logistic regression at each strength, on the rows `numbers` with labels y (len(numbers),)
    -> weights (S,D+1,C), the last row of each is the bias.

    Minimises mean cross-entropy + strength * |W|^2 by L-BFGS (1000 iterations at most), each strength from the solution
    of the one before. Works through the rows in parts, so that the logits always fit."""
    chunk = max(1, CHUNK // n_classes)
    parts = [(numbers[at:at + chunk], torch.from_numpy(y[at:at + chunk]).to(rows.device))
             for at in range(0, len(numbers), chunk)]
    held = [rows[parts[0][0]]] if len(parts) == 1 else None                             # one part: picked out only once
    weights = torch.zeros(len(rows.mean) + 1, n_classes, device=rows.device, requires_grad=True)
    solutions = []
    for strength in strengths:
        optimizer = torch.optim.LBFGS([weights], max_iter=1000, history_size=20, tolerance_grad=1e-5,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            penalty = strength * (weights[:-1]**2).sum()                                # the bias is free
            penalty.backward()
            total = penalty.detach()
            for i, (which, labels) in enumerate(parts):
                logits = linear(held[i] if held else rows[which], weights)            # (n,C)
                loss = F.cross_entropy(logits, labels, reduction="sum") / len(numbers)
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(closure)
        solutions.append(weights.detach().clone())
    return torch.stack(solutions)


def linear(x, weights):
    """x (n,D), weights (D+1,C) -> logits (n,C)"""
    return x @ weights[:-1] + weights[-1]


def top_k(rows, numbers, logits_of, n_classes, k=1):
    """The k classes with the largest logits for each of the rows `numbers`, the largest first: (len(numbers),k)"""
    chunk = max(1, CHUNK // max(n_classes, len(rows.mean)))
    parts = [logits_of(rows[numbers[at:at + chunk]]) for at in range(0, len(numbers), chunk)]
    return np.concatenate([logits.topk(min(k, n_classes), -1).indices.cpu().numpy() for logits in parts])


def linear_probe(train_x, train_y, test_x, n_classes, n_seeds, device="cpu", groups=None, max_rows=None, k=1):
    """-> the k best classes of every test row (n_seeds,n_test,k); each seed has its own held-out fifth of the training
    rows, on which the strength is chosen (of equals, the strongest).

    `groups` (n,) names the picture of each training row, so that patches of one picture are not split apart. Rows of
    label -1 are left out; of more than `max_rows` a random part is used."""
    train, predictions = Standardised(train_x, device), []
    test = Standardised(test_x, device, like=train)
    groups = np.arange(len(train_x)) if groups is None else groups
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        used = np.flatnonzero(train_y >= 0)
        if max_rows and len(used) > max_rows:
            used = np.sort(rng.choice(used, max_rows, replace=False))
        pictures = np.unique(groups[used])
        held_out = np.isin(groups[used], rng.permutation(pictures)[:max(1, len(pictures) // 5)])
        fit, check = used[~held_out], used[held_out]
        weights = fit_linear(train, fit, train_y[fit], n_classes)                       # (S,D+1,C)
        right = [(top_k(train, check, partial(linear, weights=w), n_classes)[:, 0] == train_y[check]).mean()
                 for w in weights]
        best = partial(linear, weights=weights[int(np.argmax(right))])
        predictions.append(top_k(test, np.arange(len(test_x)), best, n_classes, k))
    return np.stack(predictions)


def prototype_probe(train_x, train_y, test_x, n_classes, device="cpu", k=1):
    """-> the k nearest classes of every test row (n_test,k): the largest product of the normalised row with the mean of
    a class's normalised training rows (PIVOT's prototype test, with training pictures)"""
    sums, chunk = torch.zeros(n_classes, train_x.shape[1], device=device), max(1, CHUNK // train_x.shape[1])
    read = lambda x, at: F.normalize(torch.from_numpy(np.array(x[at:at + chunk])).to(device), dim=-1)
    for at in range(0, len(train_x), chunk):
        sums.index_add_(0, torch.from_numpy(train_y[at:at + chunk]).to(device), read(train_x, at))
    counts = torch.from_numpy(np.bincount(train_y, minlength=n_classes)).to(device)
    prototypes, unseen = sums / counts.clamp(min=1)[:, None], counts == 0               # (C,D), (C,)
    likeness = lambda at: (read(test_x, at) @ prototypes.T).masked_fill(unseen, -torch.inf)
    return np.concatenate([likeness(at).topk(min(k, n_classes), -1).indices.cpu().numpy()
                           for at in range(0, len(test_x), chunk)])


def two_layer_probe(train_x, train_y, test_x, n_classes, n_seeds, device="cpu", name=""):
    """-> predicted class of every test patch (n_seeds,n_test,N): Linear-GELU-Linear on standardised patch tokens
    (n,N,D) with labels (n,N), -1 left out.

    The recipe of patch-seg, which PIVOT used: AdamW, 1e-3 to 1e-4 by cosine after a warm-up (here a tenth of the
    steps), weight decay .01, hidden width 1024 (for a small D 4 D), 5 epochs; but steps of 16 pictures, not 32, and
    never fewer than 1500, since a small set is not learnt in 5 epochs. Nothing is chosen on held-out rows."""
    (n, N, D), batch = train_x.shape, min(16, len(train_x))
    train = Standardised(train_x.reshape(-1, D), device)
    test = Standardised(test_x.reshape(-1, D), device, like=train)
    hidden, steps = min(1024, 4 * D), max(1500, 5 * n // batch)
    predictions, labels = [], torch.from_numpy(train_y).to(device)
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, n_classes)).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), weight_decay=.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=.1, div_factor=10,
                                                       final_div_factor=1, cycle_momentum=False)
        pictures = np.concatenate([rng.permutation(n) for _ in range(-(-batch * steps // n))])
        for step in tqdm(range(steps), desc=f"{name} two-layer head", leave=False):
            chosen = pictures[batch * step:batch * (step + 1)]
            patches = (chosen[:, None] * N + np.arange(N)).reshape(-1)
            y = labels[chosen].flatten()
            loss = F.cross_entropy(head(train[patches]), y, ignore_index=-1, reduction="sum")
            (loss / (y >= 0).sum().clamp(min=1)).backward()                             # a step may be void altogether
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            predictions.append(top_k(test, np.arange(len(test.x)), head, n_classes)[:, 0].reshape(-1, N))
    return np.stack(predictions)
