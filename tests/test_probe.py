"""probe.py, readers.py and alignment.py against scikit-learn, double loops, Gram matrices, texts one by one, and a study end to end."""
import contextlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignment
import common
import data
import features
import maps
import probe
import readers
import scenes
from conftest import VISION
from features import Frozen, Pictures
from model import Encoder, InputError


def blobs(n=240, D=5, C=3, seed=0, spread=.5):
    """Overlapping classes in features of very different scales, as float32 rows and labels"""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    means = np.random.default_rng(99).normal(0, spread, (C, D))                             # the same for every seed
    return ((means[y] + rng.normal(0, 1, (n, D))) * 10.**np.arange(-2, D - 2) + 3).astype(np.float32), y


@pytest.fixture(params=("kept", "in parts", "from disk"))
def hold(request, monkeypatch, tmp_path):
    """hold(x) -> the same rows: kept in memory; read in parts; or read in parts from a memory-mapped file"""
    def hold(x):
        if request.param != "kept" and readers.CHUNK > 2**20:
            monkeypatch.setattr(readers, "CHUNK", (x.size - 1) // 4)                          # just too few to keep the first set
        if request.param != "from disk":
            return x
        np.save(tmp_path / f"{len(os.listdir(tmp_path))}.npy", x)
        return np.load(tmp_path / f"{len(os.listdir(tmp_path)) - 1}.npy", mmap_mode="r")
    return hold


# ---- linear probes ---------------------------------------------------------------------------------------------------------


def test_rows_are_standardised_by_the_training_rows(hold):
    # mean 0 and deviation 1 of the columns of train, a constant column stays finite; test rows by the very same numbers
    x, other = np.hstack([blobs()[0], np.full((240, 1), 7, np.float32)]), np.random.default_rng(1).normal(9, 4, (50, 6)).astype(np.float32)
    rows = readers.Standardised(hold(x))
    more, mean, std = readers.Standardised(hold(other), like=rows), x.astype(float).mean(0), x.astype(float).std(0) + 1e-6
    assert (rows.kept is None) == (readers.CHUNK < 2**20)
    for mine, numbers, source in ((rows, np.array([3, 239, 0, 3]), x), (more, np.arange(50), other)):
        expected = ((source[numbers] - mean) / std)[:, :5]
        np.testing.assert_allclose(mine[numbers].numpy()[:, :5], expected, rtol=2e-3, atol=2e-3)
    assert abs(rows[np.arange(240)][:, :5].mean(0)).max() < 1e-3 and torch.isfinite(rows[np.arange(240)]).all()


def test_logistic_regression_is_scikit_learns(hold):
    # mean cross-entropy + s |W|^2 is scikit-learn's C sum cross-entropy + |W|^2 / 2 at C = 1 / (2 s n); softmax ignores a common shift
    x, y = blobs()
    rows, numbers = readers.Standardised(hold(x)), np.random.default_rng(0).permutation(240)[:200]
    standard = ((x - x.astype(float).mean(0)) / (x.astype(float).std(0) + 1e-6))[numbers]
    weights = readers.fit_linear(rows, numbers, y[numbers], 3)
    assert weights.shape == (5, 6, 3)
    for w, strength in zip(weights.double().numpy(), readers.STRENGTHS):
        own = LogisticRegression(C=1 / (2 * strength * 200), tol=1e-10, max_iter=10_000).fit(standard, y[numbers])
        ours, expected = w - w.mean(1, keepdims=True), np.vstack([own.coef_.T, own.intercept_])
        np.testing.assert_allclose(ours, expected - expected.mean(1, keepdims=True), rtol=1e-3, atol=1e-3)
        chances = torch.from_numpy(standard @ w[:-1] + w[-1]).softmax(-1).numpy()
        np.testing.assert_allclose(chances, own.predict_proba(standard), atol=5e-4)


def test_fit_linear_is_the_optimum_of_each_strength_alone(hold):
    # the gradient of cross-entropy + s |W|^2 by hand; the bias is not regularised
    x, y = blobs()
    rows, numbers, strengths = readers.Standardised(hold(x)), np.arange(20, 220), [1e-3, 1e-1]
    inputs = rows[numbers].double()
    for w, strength in zip(readers.fit_linear(rows, numbers, y[numbers], 3, strengths).double(), strengths):
        error = ((inputs @ w[:-1] + w[-1]).softmax(-1) - torch.eye(3).double()[y[numbers]]) / 200
        assert (inputs.T @ error + 2 * strength * w[:-1]).abs().max() < 1e-4
        assert error.sum(0).abs().max() < 1e-4


def test_many_features_are_fitted_to_the_optimum_too():
    # more features than rows, the weakest strengths: there the optimum is far away
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (60, 100)).astype(np.float32), rng.integers(0, 4, 60)
    rows = readers.Standardised(x)
    standard, numbers = rows[np.arange(60)].double().numpy(), np.arange(60)
    objective = lambda w, s: np.mean(np.log(np.exp(standard @ w[:-1] + w[-1]).sum(1)) - (standard @ w[:-1] + w[-1])[numbers, y]) + s * (w[:-1]**2).sum()
    for w, strength in zip(readers.fit_linear(rows, numbers, y, 4).double().numpy(), readers.STRENGTHS):
        own = LogisticRegression(C=1 / (2 * strength * 60), tol=1e-10, max_iter=10_000).fit(standard, y)
        best = objective(np.vstack([own.coef_.T, own.intercept_]), strength)
        assert best - 1e-6 < objective(w, strength) < best + 5e-6


def test_linear_probe_chooses_on_a_fifth_of_train_and_keeps_pictures_together(monkeypatch, hold):
    # what is fitted: whole pictures, four fifths of them, another fifth out each seed, no row of label -1, at most max_rows
    fitted = []
    real = readers.fit_linear
    monkeypatch.setattr(readers, "fit_linear", lambda rows, numbers, y, *more: fitted.append((numbers, y)) or real(rows, numbers, y, *more))
    rng = np.random.default_rng(0)
    means, y, groups = 3 * np.eye(4, dtype=np.float32), np.arange(400) % 4, rng.permutation(400) // 8     # 50 pictures of 8 patches, mixed
    x = (means[y] + rng.normal(0, 1, (400, 4))).astype(np.float32)
    predictions = readers.linear_probe(hold(x), y, hold(means), 4, n_seeds=2, groups=groups)
    assert predictions[..., 0].tolist() == [[0, 1, 2, 3]] * 2
    for numbers, labels in fitted:
        assert len(numbers) == 320 and len(set(groups[numbers])) == 40 and (labels == y[numbers]).all()
    assert len({tuple(sorted(set(groups[numbers]))) for numbers, _ in fitted}) == 2
    fitted.clear()
    void = y.copy()
    void[rng.permutation(400)[:100]] = -1
    readers.linear_probe(hold(x), void, hold(means), 4, n_seeds=1)
    assert [(len(numbers), (void[numbers] >= 0).all()) for numbers, _ in fitted] == [(240, True)]
    fitted.clear()
    readers.linear_probe(hold(x), void, hold(means), 4, 2, max_rows=50)
    assert [len(set(numbers)) for numbers, _ in fitted] == [40, 40] and set(fitted[0][0]) != set(fitted[1][0])
    assert all((void[numbers] >= 0).all() for numbers, _ in fitted)


def test_linear_probe_takes_the_strength_that_its_held_out_rows_prefer(monkeypatch):
    # of two given heads, one right on the held-out fifth only, the other on the rest only
    x = np.random.default_rng(0).normal(0, 1, (100, 1)).astype(np.float32)
    y, held = (x[:, 0] > 0).astype(int), np.random.default_rng(0).permutation(100)[:20]     # seed 0's fifth
    y[np.setdiff1d(np.arange(100), held)] ^= 1
    heads = torch.tensor([[[1., -1], [0, 0]], [[-1., 1], [0, 0]]])                          # the second calls positive rows 1
    monkeypatch.setattr(readers, "fit_linear", lambda *_: heads)
    test_x = np.array([[-9], [9]], np.float32)
    assert readers.linear_probe(x, y, test_x, 2, 1)[0, :, 0].tolist() == [0, 1]
    monkeypatch.setattr(readers, "fit_linear", lambda *_: heads.flip(0))
    assert readers.linear_probe(x, y, test_x, 2, 1)[0, :, 0].tolist() == [0, 1]


def test_the_best_classes_in_order(hold):
    # top k by sorting the logits of all classes; more asked for than there are gives all
    rng = np.random.default_rng(0)
    x, weights = rng.normal(0, 1, (31, 4)).astype(np.float32), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    rows, numbers = readers.Standardised(hold(x)), rng.permutation(31)[:20]
    logits = rows[numbers].double().numpy() @ weights[:-1].double().numpy() + weights[-1].double().numpy()
    for k in (1, 5, 9):
        found = readers.top_k(rows, numbers, lambda x: readers.linear(x, weights), 7, k)
        assert (found == np.argsort(-logits, axis=1)[:, :k]).all()


def test_prototypes_by_a_double_loop(hold):
    # cosine-normalised rows, their mean a class (not normalised again), the largest products first
    (x, y), test_x = blobs(60, 5, 4), blobs(30, 5, 4, seed=1)[0]
    products = np.zeros((30, 4))
    for c in range(4):
        rows = [row / np.linalg.norm(row) for row, label in zip(x.astype(float), y) if label == c]
        for i, row in enumerate(test_x.astype(float)):
            products[i, c] = row / np.linalg.norm(row) @ (sum(rows) / len(rows))
    for k in (1, 3):
        assert (readers.prototype_probe(hold(x), y, hold(test_x), 4, k=k) == np.argsort(-products, axis=1)[:, :k]).all()
    away = -abs(test_x)                                                                     # every product negative, that of no prototype would be 0
    assert (readers.prototype_probe(hold(abs(x)), y, hold(away), 5)[:, 0] < 4).all()        # a class without rows is never nearest


# ---- the two-layer head and chance -----------------------------------------------------------------------------------------


def xor(n, N=6, seed=0):
    """Patches of eight features whose label is whether two hidden numbers have one sign: no line tells it"""
    rng, mix = np.random.default_rng(seed), np.random.default_rng(9).normal(0, 1, (2, 8))
    hidden = rng.choice((-1, 1), (n, N, 2)) + rng.normal(0, .45, (n, N, 2))
    return (20 * hidden @ mix + 5).astype(np.float32), (hidden.prod(-1) > 0).astype(int)


def test_two_layers_learn_what_one_cannot():
    # XOR: the two-layer head above 90 %, the linear one at chance; each seed its own head, the same seeds the same heads
    (x, y), (test_x, test_y) = xor(60), xor(100, seed=1)
    found = readers.two_layer_probe(x, y, test_x, 2, 2)
    assert found.shape == (2, 100, 6) and ((found == test_y).mean((1, 2)) > .9).all() and (found[0] != found[1]).any()
    assert (readers.two_layer_probe(x, y, test_x, 2, 1)[0] == found[0]).all()
    linear = readers.linear_probe(x.reshape(-1, 8), y.reshape(-1), test_x.reshape(-1, 8), 2, 1)[0, :, 0]
    assert abs((linear == test_y.reshape(-1)).mean() - .5) < .1


def test_void_patches_teach_nothing():
    # most patches of class 1 are void: taken for another class they would win. Where void patches change places among themselves, so that
    # mean and deviation of all rows stay, every prediction stays
    (x, y), (test_x, test_y) = xor(60), xor(30, seed=1)
    void = (np.random.default_rng(2).random(y.shape) < .7) & (y == 1) | (np.random.default_rng(4).random(y.shape) < .2)
    void[5] = True                                                                          # a picture of void alone
    other = x.copy()
    other[void] = x[void][np.random.default_rng(3).permutation(void.sum())]
    flat = lambda x: x.reshape(-1, 8)
    two_layer = lambda x, y: readers.two_layer_probe(x, y, test_x, 2, 1)[0]
    linear = lambda x, y: readers.linear_probe(flat(x), y.reshape(-1), flat(test_x), 2, 1)[0, :, 0]
    for run in (two_layer, linear):
        masked = [run(train, np.where(void, -1, y)) for train in (x, other)]
        assert (masked[0] == masked[1]).mean() > .995                                       # the sums are added up in another order
    assert (two_layer(x, np.where(void, -1, y)) == test_y).mean() > .85


def test_random_labels_are_not_predicted():
    # what no feature tells: every probe at chance, within four standard errors
    rng = np.random.default_rng(0)
    x, y, test_x, test_y = rng.normal(0, 1, (300, 8)).astype(np.float32), rng.integers(0, 4, 300), \
        rng.normal(0, 1, (2000, 8)).astype(np.float32), rng.integers(0, 4, 2000)
    patches = lambda x: x.reshape(-1, 10, *x.shape[1:])
    found = {"logistic": readers.linear_probe(x, y, test_x, 4, 1)[0, :, 0], "prototype": readers.prototype_probe(x, y, test_x, 4)[:, 0],
             "two-layer": readers.two_layer_probe(patches(x), patches(y), patches(test_x), 4, 1)[0].reshape(-1)}
    for name, predicted in found.items():
        assert abs((predicted == test_y).mean() - .25) < 4 * (.25 * .75 / 2000)**.5, name


# ---- segmentation ----------------------------------------------------------------------------------------------------------


def test_patch_labels_by_counting_pixels():
    # the commonest class of a patch's pixels that are not void, -1 where all are; a larger mask of the same picture: nearest pixels
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (12, 18)).astype(np.uint8)
    mask[:6, :6] = 3                                                                        # a patch of void alone
    labels = probe.patch_labels(mask, (2, 3), 6, void=3)
    for n, (r, c) in enumerate((r, c) for r in range(2) for c in range(3)):
        pixels = [p for p in mask[6 * r:6 * r + 6, 6 * c:6 * c + 6].reshape(-1).tolist() if p != 3]
        assert labels[n] == (max(range(4), key=pixels.count) if pixels else -1)
    bigger = mask.repeat(3, 0).repeat(3, 1)
    assert (probe.patch_labels(bigger, (2, 3), 6, void=3) == labels).all()
    assert (probe.patch_labels(np.full((12, 18), 255, np.uint8), (2, 3), 6, void=255) == -1).all()


def test_labels_of_pictures(tmp_path):
    # label pictures of any size, one row each; a picture that is none is named
    mask = np.zeros((12, 12), np.uint8)
    mask[:, 6:], mask[6:, :6] = 2, 255
    for i, m in enumerate((mask, mask.repeat(2, 0), np.stack([mask] * 3, -1))):
        Image.fromarray(m).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert probe.labels_of(Pictures(files[:2]), (2, 2), 6, 255).tolist() == [[0, 2, -1, 2]] * 2
    with pytest.raises(InputError, match="2.png is not a label picture: it has 3 channels"):
        probe.labels_of(Pictures(files), (2, 2), 6, 255)


def test_iou_and_recall_by_hand():
    # classes 0 to 2 occur, 3 is only called, 4 never: it counts in neither mean; void patches count in none
    true = np.array([[0, 0, 1, -1, 2], [0, 1, 1, -1, -1]])
    called = np.array([[0, 1, 1, 0, 3], [0, 1, 0, 2, 4]])
    counts = probe.tally(true, called, 5)
    assert counts.tolist() == [[[1, 0 + 1, 0, 0, 0], [2, 1, 1, 0, 0], [1, 2, 0, 1, 0]], [[1, 1, 0, 0, 0], [1, 2, 0, 0, 0], [2, 1, 0, 0, 0]]]
    assert abs(probe.mean_iou(counts.sum(0)) - (2 / 4 + 2 / 4 + 0 / 1 + 0 / 1) / 4) < 1e-12
    assert abs(probe.macro_recall(counts.sum(0)) - (2 / 3 + 2 / 3 + 0 / 1) / 3) < 1e-12


def test_mean_iou_by_sets():
    # intersection over union of the places of each class
    rng = np.random.default_rng(1)
    true, called = rng.integers(-1, 4, (3, 100)), rng.integers(0, 4, (3, 100))
    places = lambda labels, c: set(np.flatnonzero((labels == c) & (true >= 0)))
    ious = [len(places(true, c) & places(called, c)) / len(places(true, c) | places(called, c)) for c in range(4)]
    assert abs(probe.mean_iou(probe.tally(true, called, 5).sum(0)) - np.mean(ious)) < 1e-12


# ---- alignment with language -----------------------------------------------------------------------------------------------


def naive_alignment(x, y, k):
    """The platonic representation hypothesis' measure, in loops: (n,L,D), (n,L',D') -> best pair of layers, {pair: mean share in common}"""
    sets = []
    for z in (x, y):
        limit = np.mean([np.percentile(np.abs(row), 95) for row in z])
        z, lists = np.clip(z, -limit, limit), []
        for layer in range(z.shape[1]):
            unit = [row / np.linalg.norm(row) for row in z[:, layer]]
            lists.append([set(sorted((j for j in range(len(z)) if j != i), key=lambda j: -unit[i] @ unit[j])[:k]) for i in range(len(z))])
        sets.append(lists)
    shares = {(i, j): np.mean([len(p & q) / k for p, q in zip(a, b)]) for i, a in enumerate(sets[0]) for j, b in enumerate(sets[1])}
    return max(shares, key=shares.get), shares


@pytest.fixture(scope="module")
def two_views():
    """Two layers and three of noisy views of the same 40 points, with outliers that must be clamped"""
    rng = np.random.default_rng(0)
    points = rng.normal(0, 1, (40, 6))
    view = lambda noise: points @ rng.normal(0, 1, (6, 12)) + noise * rng.normal(0, 1, (40, 12))
    x, y = (np.stack([view(noise) for noise in noises], 1) for noises in ((9, 1), (5, .5, 2)))
    x[rng.random(x.shape) < .03] *= 40
    return x.astype(np.float32), y.astype(np.float32)


def test_alignment_is_the_published_one(two_views):
    # mutual k-NN: clamped over all layers and channels together, cosine, best pair of layers; and the layer that the LLM reads
    x, y = two_views
    best, shares = naive_alignment(x.astype(float), y.astype(float), 5)
    a, b = (alignment.neighbours(torch.from_numpy(z), 5) for z in (x, y))
    found, pair = alignment.alignment(a, b, n_shuffles=3)
    assert pair == best and abs(found["best pair"].mean() - shares[best]) < 1e-6
    assert abs(found["read layer"].mean() - max(share for (layer, _), share in shares.items() if layer == 1)) < 1e-6
    assert found["best pair"].shape == found["read layer"].shape == (1, 40) and found["best pair, captions shuffled"].shape == (3, 40)
    assert len(set(shares.values())) > 4 and shares[best] > 2 * 5 / 39                          # the views do share something, and the layers differ


def test_identical_features_align_wholly(two_views):
    # of the same features every neighbour is common; of another order by chance few
    a = alignment.neighbours(torch.from_numpy(two_views[1]), 5)
    found, _ = alignment.alignment(a, a)
    assert found["best pair"].min() == found["read layer"].min() == 1 and found["best pair, captions shuffled"].mean() < .3
    assert not (a == torch.arange(40)[:, None]).any()                                       # nobody is their own neighbour


def test_shuffled_is_a_true_permutation(two_views):
    # the neighbours of permuted rows, computed anew
    y, k = torch.from_numpy(two_views[1]), 5
    for seed in (0, 1):
        to = np.random.default_rng(seed).permutation(40)
        moved = torch.empty_like(y)
        for i in range(40):
            moved[to[i]] = y[i]
        assert torch.equal(alignment.shuffled(alignment.neighbours(y, k), seed).sort().values, alignment.neighbours(moved, k).sort().values)


def test_shuffled_captions_are_at_chance():
    # one pair of layers: k / (n - 1); the best of 16 pairs a little above
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 1, (150, 4, 8)).astype(np.float32))
    a = alignment.neighbours(x, 10)
    one, best = (alignment.alignment(a[:n], a[:n])[0]["best pair, captions shuffled"] for n in (1, 4))
    assert abs(one.mean() - 10 / 149) < .004 and 10 / 149 < best.mean() < 10 / 149 + .02


@pytest.mark.parametrize("name", ("qwen2", "llama"))
@torch.no_grad()
def test_text_features_are_those_of_each_text_alone(name, make, llm_dirs, tmp_path):
    # the mean over a text's own tokens of every hidden state, whatever stands beside it in the batch; of a run its own LLM is meant
    texts = ["ring", "a red ring at top left, a blue cross at center", "two words", "what color is the ring?", "x"]
    if name == "qwen2":
        make().save(source := str(tmp_path / "run"))
    else:
        source = llm_dirs[name]
    found = alignment.text_features(source, texts, "cpu", contextlib.nullcontext, batch_size=3)
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dirs[name]).eval(), AutoTokenizer.from_pretrained(llm_dirs[name])
    for text, mine in zip(texts, found, strict=True):
        states = llm(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        torch.testing.assert_close(mine, torch.stack([state[0].mean(0) for state in states]), rtol=1e-4, atol=1e-5)


# ---- movement --------------------------------------------------------------------------------------------------------------


def test_linear_cka_by_gram_matrices():
    # HSIC of centred Gram matrices; 1 under rotation, scaling and shift; near 0 for independent noise
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (60, 5)) * [1, 2, 3, 4, 5] + 4, rng.normal(0, 1, (60, 7)) - 2
    y[:, :3] += x[:, :3]
    H = np.eye(60) - 1 / 60
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    stacks = lambda *a: torch.from_numpy(np.stack(a)).float()
    found = lambda a, b: alignment.linear_cka(stacks(a), stacks(b))[0][0]
    assert abs(found(x, y) - np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))) < 1e-5
    rotation = np.linalg.qr(rng.normal(0, 1, (5, 5)))[0]
    assert abs(found(x, 3 * x @ rotation + 7) - 1) < 1e-5 and found(x, x * [9, 1, 1, 1, 1]) < .99
    assert found(rng.normal(0, 1, (5000, 5)), rng.normal(0, 1, (5000, 7))) < .01
    table = alignment.linear_cka(stacks(x, x**3), stacks(y, y**2, abs(y)))                  # every layer of one with every layer of the other
    expected = [[found(a, b) for b in (y, y**2, abs(y))] for a in (x, x**3)]
    np.testing.assert_allclose(table, expected, rtol=1e-5)


@torch.no_grad()
def test_sampled_layers_are_of_one_place(vision_dirs, tmp_path):
    # each row of the last layer is a patch of `features` of its picture, all layers are of that patch, and every encoder takes the same places
    pictures, found = Pictures(scenes.Scenes("test", 4, "maps")), {}
    for name in ("siglip", "clip"):
        encoder = Encoder.from_pretrained(vision_dirs[name]).eval()
        frozen = Frozen(encoder, name, str(tmp_path), 3 if name == "siglip" else 4, 0, contextlib.nullcontext)     # pictures a batch
        sample, found[name] = alignment.sample_layers(frozen, pictures, n_rows=20), []
        pixels = features.squash(encoder, [pictures[i] for i in range(4)])
        tokens, by_layer = encoder.features(pixels), features.layers(encoder, pixels)       # (4,9,D), (4,L,9,D)
        assert sample.shape == (2, 20, 16)
        for row in range(20):
            at = int((tokens[row // 5] - sample[-1, row]).norm(dim=-1).argmin())
            torch.testing.assert_close(by_layer[row // 5, :, at], sample[:, row], rtol=1e-5, atol=1e-5)
            found[name].append((row // 5, at))
        assert len(set(found[name])) == 20
    assert found["siglip"] == found["clip"]


@pytest.mark.parametrize("name", VISION)
def test_drift_layer_by_layer(name, vision_dirs):
    # |w - w0| / |w0| of the embeddings and of each layer, its parameters taken from the module itself
    encoder = Encoder.from_pretrained(vision_dirs[name], -1)
    start = {key: value.clone() for key, value in encoder.vision.state_dict().items()}
    layers = next(list(m) for _, m in encoder.vision.named_modules() if isinstance(m, torch.nn.ModuleList))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    groups = [[p for p in encoder.vision.parameters() if id(p) not in inside and p.requires_grad]] + [list(layer.parameters()) for layer in layers]
    if encoder.vision.config.model_type.startswith("dinov2"):
        groups[0].append(encoder.vision.embeddings.mask_token)                              # never trained, yet a weight
    flat = lambda group: torch.cat([p.detach().flatten().double() for p in group])
    before, expected = [flat(group) for group in groups], []
    with torch.no_grad():
        for group, size in zip(groups, (.1, 0, .3, .01)):
            for p in group:
                p += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    expected = [float((flat(group) - w0).norm() / w0.norm()) for group, w0 in zip(groups, before)]
    found = alignment.layer_drift(start, encoder.vision.state_dict(), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[2] > found[1] == 0


# ---- tables ----------------------------------------------------------------------------------------------------------------


def test_bootstrap_is_paired_and_covers():
    values = np.random.default_rng(0).normal(1, 1, 400)
    a, b = (common.bootstrap(lambda rows, v=v: v[rows].mean(), 400, seed=3) for v in (values, values + .25))
    assert np.allclose(b - a, .25)                                                          # the same resamples: a constant shift has no spread
    assert abs(a.std() - 1 / 20) < .01                                                      # standard error of a mean of 400


def test_a_share_of_energy_is_of_each_picture_and_of_a_loss_of_all_together():
    # two pictures with shares 1/2 and 1/10, the second ten times as strong
    scores = {"energy_chosen_tokens": np.array([[1, 2], [2, 20.]]), "energy_DPO_loss_tokens": np.array([[1, 2], [2, 20.]]), "area": np.array([.2, .4])}
    value = {name: statistic(v) for name, (v, statistic) in probe.map_values(scores).items()}
    assert np.allclose([value[name] for name in scores], [(1 / 2 + 1 / 10) / 2, 3 / 22, .3])


def test_summary_by_hand():
    # means over seeds and pictures, a number a seed, and the paired difference to the first encoder
    rng = np.random.default_rng(0)
    right = rng.random((2, 200)) < .7
    table = {"random": {"other": (right[:1], probe.mean)}, "run": {"m": (right, probe.mean)}, "second": {"m": (right + .25, probe.mean)}}
    result = probe.summarise(table, "run", 0)
    cell, second = result["run"]["m"], result["second"]["m"]
    assert np.isclose(cell["value"][0], right.mean()) and np.allclose(cell["per_seed"], right.mean(1)) and cell["vs_first"] is None
    assert np.allclose(second["vs_first"], .25) and result["random"]["other"]["vs_first"] is None
    spread = right.mean(0).std() / 200**.5                                                  # pictures are drawn, not seeds
    low, high = cell["value"][1:]
    assert low < cell["value"][0] < high and abs((high - low) - 2 * 1.96 * spread) < .15 * (2 * 1.96 * spread)


# ---- end to end ------------------------------------------------------------------------------------------------------------


def run_probe(monkeypatch, out, *flags):
    """-> results.json of `probe.py FLAGS --out OUT`"""
    monkeypatch.setattr(sys, "argv", ["probe.py", "--out", str(out), "--workers", "0", *map(str, flags)])
    probe.main()
    with open(out / "results.json") as f:
        return json.load(f)


def test_the_drawn_world_end_to_end(make, vision_dirs, tmp_path, monkeypatch, capsys):
    # a run, its exported encoder and an encoder of another family: every probe; the export is the run in all that both are asked
    make().save(run := str(tmp_path / "run"))
    result = run_probe(monkeypatch, tmp_path / "out", run, f"{run}/vision", vision_dirs["clip"], "--n", 64, "--seeds", 1)
    table, movement, clip = result["table"], result["movement"], os.path.basename(vision_dirs["clip"])
    assert list(table) == ["random", f"random_{clip}", "run", "vision", clip]
    shared = {"logistic top-1", "prototype top-1", "linear mIoU", "linear recall", "two-layer mIoU", "two-layer recall",
              *(f"alignment run, {which}" for which in ("best pair", "read layer", "best pair, captions shuffled"))}
    assert all(set(table[row]) == shared for row in table if row != "run") and set(table["run"]) > shared | {"area", "energy_DPO_loss_pixels"}
    for measure in shared:
        for key in ("value", "per_seed"):
            assert table["run"][measure][key] == table["vision"][measure][key]
        assert table["vision"][measure]["vs_first"] == [0, 0, 0] and table["run"][measure]["vs_first"] is None
        assert len(table[clip][measure]["vs_first"]) == 3 and table[clip][measure]["value"][1] <= table[clip][measure]["value"][2]
    assert movement["run"]["drift"] == movement["vision"]["drift"] == [0, 0, 0] and min(movement["random"]["drift"]) > .5
    assert movement[clip]["drift"] is None and np.allclose(np.diag(movement["vision"]["cka"]), 1) and movement["random"]["cka"][1][1] < .99
    assert set(os.listdir(tmp_path / "out")) == {"results.json", "probe.png", "movement.png", "segmentation.png", "maps_run.png", "pixel_maps_run.png"}
    assert all(Image.open(tmp_path / "out" / name).size[0] > 200 for name in os.listdir(tmp_path / "out") if name.endswith(".png"))
    assert len(os.listdir(tmp_path / "features")) == 4 * 5                                  # five sets; the export found those of the run
    assert result["chance"]["alignment"] == 10 / 39 and 1 / 6 <= result["chance"]["top-1"] < .5
    said = capsys.readouterr().out
    assert "logistic top-1" in said and "difference to run, picture by picture" in said and "movement from run" in said
    with pytest.raises((SystemExit, InputError), match="exists already"):
        run_probe(monkeypatch, tmp_path / "out", run)


def test_own_folders_through_the_connector_end_to_end(make, tmp_path, monkeypatch, capsys):
    # --classification and --segmentation on folders that this test draws: what is easy is found, also in image tokens
    make(pool=3).save(run := str(tmp_path / "run"))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, color in (("bright", 200), ("dark", 60)):
            os.makedirs(tmp_path / split / c)
            for i in range(12):
                Image.fromarray(rng.normal(color, 10, (24, 24, 3)).clip(0, 255).astype(np.uint8)).save(tmp_path / split / c / f"{i}.png")
    os.makedirs(tmp_path / "images")
    os.makedirs(tmp_path / "masks")
    for i in range(15):
        mask = np.full((24, 24), i % 2, np.uint8)
        mask[0, 0] = 11                                                                     # void
        Image.fromarray(np.stack([mask % 11 * 150 + 50] * 3, -1)).save(tmp_path / f"images/{i:02}.jpg")
        Image.fromarray(mask).save(tmp_path / f"masks/{i:02}.png")
    folders = [tmp_path / name for name in ("train", "test", "images", "masks")]
    asked = ["--seeds", 2, "--void", 11, "--classification", *folders[:2], "--segmentation", *folders[2:]]
    result = run_probe(monkeypatch, tmp_path / "out", run, *asked, "--through_connector")
    assert list(result["table"]) == ["random", "run"] and "maps_run.png" not in os.listdir(tmp_path / "out")
    for measure in ("logistic top-1", "prototype top-1", "linear mIoU", "two-layer mIoU", "linear recall", "two-layer recall"):
        cell = result["table"]["run"][measure]
        assert cell["value"][0] > .95 and len(cell["per_seed"]) == (1 if "prototype" in measure else 2)
        assert len(result["table"]["random"][measure]["per_seed"]) == 2                     # of random encoders as many are drawn
    assert result["chance"] == {"top-1": .5}                                                 # of two classes, top-5 is not asked
    os.remove(tmp_path / "masks" / "03.png")
    with pytest.raises(InputError, match="03.jpg has no mask in"):
        run_probe(monkeypatch, tmp_path / "out2", run, *asked)
    assert not os.path.exists(tmp_path / "out2")


def test_the_run_that_a_run_came_from_is_its_reference(make, tmp_path, monkeypatch, capsys):
    # DPO's loss at a trained run counts pairs by its margins over the parent's; a run without a parent among the encoders is its own reference
    models = [make(), make(), make()]
    with torch.no_grad():
        for model in models[1:]:
            model.connector.up.weight += .2 * torch.randn(model.connector.up.weight.shape, generator=torch.Generator().manual_seed(0))
    runs = [str(tmp_path / name) for name in ("start", "trained", "stray")]
    for model, run, parent in zip(models, runs, (None, runs[0], "elsewhere")):
        model.save(run, {"parent": parent})
    table = run_probe(monkeypatch, tmp_path / "out", *runs, "--maps", "scenes/test/maps", "--n", 20, "--beta", 2)["table"]
    rows = data.load("scenes/test/maps", "pairs", 2)
    scores = lambda model, reference: maps.map_scores(model, rows, 2, contextlib.nullcontext, "", reference, beta=2)
    margins = scores(models[0], None)[2]
    expected = [scores(model, reference)[0]["energy_DPO_loss_tokens"].sum(0) for model, reference in zip(models, (None, margins, None))]
    for run, (inside, all_of_it) in zip(runs, expected):
        assert abs(table[os.path.basename(run)]["energy_DPO_loss_tokens"]["value"][0] - inside / all_of_it) < 1e-5
    assert abs(np.divide(*expected[1]) - np.divide(*expected[2])) > 1e-3                    # the parent does matter


def test_what_cannot_be_asked_is_said_in_a_line(make, vision_dirs, tmp_path, monkeypatch, capsys):
    make().save(run := str(tmp_path / "run"))
    world = scenes.Scenes("test", 12, "maps")
    with open(tmp_path / "rows.jsonl", "w") as f:
        for i in range(12):
            world[i]["image"].save(tmp_path / f"{i}.png")
            f.write(json.dumps({"image": f"{i}.png", "question": "?", "chosen": f"caption {i}", "rejected": "b"}) + "\n")
    rows = tmp_path / "rows.jsonl"
    for flags, message in ((["--maps", rows], "row 0: 'box' is None; it must be x0, y0, x1, y1"), (["--captions", rows, "--n", 11], "11 rows are too few for 10 neighbours"),
                           (["--captions", rows], "name the LLMs to align with by --llms")):
        with pytest.raises(InputError, match=message):
            run_probe(monkeypatch, tmp_path / "out", vision_dirs["siglip"] if "name the" in message else run, *flags)
    result = run_probe(monkeypatch, tmp_path / "out", run, "--captions", rows)               # a .jsonl of captions, by the run's own LLM
    assert set(result["table"]["run"]) == {f"alignment run, {which}" for which in ("best pair", "read layer", "best pair, captions shuffled")}


def test_movement_of_another_shape_leaves_cells_empty(capsys):
    # deeper, shallower, or on another grid: every value stays in its own row of the table
    cka = lambda n: [[.5 if i == j else .1 for j in range(n)] for i in range(2)]
    probe.print_movement({"start": {"drift": [0, 0, 0], "cka": cka(2)}, "deep": {"drift": None, "cka": cka(3)}, "flat": {"drift": None, "cka": cka(1)},
                          "wide": {"drift": None, "cka": None}, "same": {"drift": [.1, .2, .3], "cka": cka(2)}}, "start")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [["drift,", "embeddings", "0.0000", "0.1000"], ["drift,", "layer", "1", "0.0000", "0.2000"], ["drift,", "layer", "2", "0.0000", "0.3000"],
                    ["CKA,", "layer", "1", "0.5000", "0.5000", "0.5000", "0.5000"], ["CKA,", "layer", "2", "0.5000", "0.5000", "0.5000"]]


@pytest.mark.parametrize("box", (None, "a", [0, 0, 9], [0, 0, 37, 9], [10, 10, 10, 12], [-1, 0, 9, 9], [0, "1", 9, 9]))
def test_a_box_lies_in_its_picture(box):
    # a box that covers more, or nothing, would score 100 or 0 % without a word
    image = Image.new("RGB", (36, 24))
    probe.check_box({"image": image, "box": (0, 0, 36, 24)}, "fine")
    with pytest.raises(InputError, match="pairs row 3: 'box' is .* picture of 36x24"):
        probe.check_box({"image": image, "box": box}, "pairs row 3")


def test_one_encoder_under_two_names_is_refused(tmp_path):
    with pytest.raises(InputError, match="named twice"):
        common.names([str(tmp_path), str(tmp_path) + "/"])
