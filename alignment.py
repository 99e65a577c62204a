"""
Likeness without training, for probe.py: of pictures and words (mutual k-NN), of two encoders (CKA, drift of weights).
"""
import os
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import features
import parallel
from model import opened

K = 10  # neighbours that alignment looks at


@torch.no_grad()
def text_features(source, texts, device, autocast, batch_size=32):
    """LLM (hub id, folder or run) and texts -> (n,L,D): mean over tokens of every hidden state"""
    source = os.path.join(source, "llm") if os.path.isdir(os.path.join(source, "llm")) else source
    tokenizer = opened(AutoTokenizer, source)
    llm = opened(AutoModelForCausalLM, source, dtype=torch.float32).base_model.to(device).eval()
    found = []
    for at in tqdm(range(0, len(texts), batch_size), desc=f"{source} texts"):
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts[at:at + batch_size]]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)            # on the right: never attended
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
        with autocast():
            states = llm(padded, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = (mask / mask.sum(1, keepdim=True))[:, None, :, None]                  # (B,1,T,1)
        found.append((torch.stack(states, 1).float() * weights).sum(2).cpu())           # (B,L,D)
    return torch.cat(found)


def neighbours(x, k=K):
    """x (n,L,D) -> numbers of the k nearest other rows by cosine, layer by layer (L,n,k). As platonic-rep: clamped at
    the 95th percentile of |x|, taken row by row and then averaged"""
    limit = x.abs().flatten(1).quantile(.95, dim=1).mean()
    x = F.normalize(x.clamp(-limit, limit), dim=-1).transpose(0, 1)                     # (L,n,D)
    return torch.stack([(layer @ layer.T).fill_diagonal_(-torch.inf).topk(k).indices for layer in x])


def overlap(a, b):
    """Neighbour lists (n,k) of the same rows -> (n,): the share that both have"""
    return (a[:, :, None] == b[:, None, :]).any(-1).float().mean(-1)


def best_pair(a, b):
    """Neighbours (L,n,k) and (L',n,k) -> overlap (n,) of the pair of layers with the largest mean, and that pair"""
    scores = torch.tensor([[overlap(x, y).mean() for y in b] for x in a])               # (L,L')
    i, j = divmod(int(scores.argmax()), len(b))
    return overlap(a[i], b[j]), (i, j)


def shuffled(neighbour, seed):
    """The neighbours (L,n,k) that the rows would have in another order: what chance does with the same geometry"""
    to = torch.from_numpy(np.random.default_rng(seed).permutation(neighbour.shape[1]))
    moved = torch.empty_like(neighbour)
    moved[:, to] = to[neighbour]
    return moved


def alignment(vision, text, n_shuffles=20):
    """Neighbours by picture (L,n,k), of which the last layer is the one the LLM reads, and by caption (L',n,k)
    -> {measure: values (1 or n_shuffles, n)}, the best pair of layers"""
    best, pair = best_pair(vision, text)
    chance = torch.stack([best_pair(vision, shuffled(text, seed))[0] for seed in range(n_shuffles)])
    return {"best pair": best[None].numpy(), "read layer": best_pair(vision[-1:], text)[0][None].numpy(),
            "best pair, captions shuffled": chance.numpy()}, pair


# ---- movement --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_layers(frozen, pictures, n_rows=4096, seed=0):
    """Patch tokens after each block, at the same random patches for every encoder with the same grid -> (L,n_rows,D)"""
    encoder, rng, found = frozen.encoder, np.random.default_rng(seed), []
    N = encoder.grid[0] * encoder.grid[1]
    n = min(len(pictures), 512)
    places = torch.from_numpy(np.stack([rng.permutation(N)[:max(1, n_rows // n)] for _ in range(n)]))    # (n,r)
    for at in tqdm(range(0, n, frozen.batch_size), desc=f"{frozen.name} layers"):
        images = [pictures[i] for i in range(at, min(at + frozen.batch_size, n))]
        with frozen.autocast():
            tokens = features.layers(encoder, features.squash(encoder, images).to(encoder.device))      # (B,L,N,D)
        at_places = places[at:at + len(images), None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        picked = tokens.gather(2, at_places.to(tokens.device)).float().cpu()
        found.append(rearrange(picked, "b l r d -> l (b r) d"))
    return torch.cat(found, 1)


def linear_cka(xs, ys, device="cpu"):
    """Two stacks of features of the same rows, (L,n,D) and (L',n,D') -> (L,L') of
    |Y'X|^2 / (|X'X| |Y'Y|) with centred columns, in [0,1] (Kornblith et al. 2019, Eq. 3)"""
    xs, ys = ([(z - z.mean(0)).to(device) for z in stack] for stack in (xs, ys))
    own_x, own_y = ([(z.T @ z).norm() for z in stack] for stack in (xs, ys))
    return [[float((y.T @ x).norm()**2 / (a * b)) for y, b in zip(ys, own_y)] for x, a in zip(xs, own_x)]


def layer_drift(start, state, n_layers):
    """Two state dicts of one encoder -> |w - w0| / |w0| of the embeddings and of each layer, n_layers + 1 numbers"""
    groups = {}
    for name in start:
        number = re.search(r"layers?\.(\d+)\.", name)
        groups.setdefault(int(number[1]) + 1 if number else 0, []).append(name)
    norm = lambda tensors: float(parallel.global_norm(tensors))
    return [norm(state[name].cpu() - start[name] for name in groups[i]) / norm(start[name] for name in groups[i])
            for i in range(n_layers + 1)]
