"""
Gradient maps: where in the picture would a loss change the model? For pairs of answers with a box where they differ.

Four objectives: log p(chosen); the difference log p(chosen) - log p(rejected); and the two losses of training. By the
chain rule a loss has the gradient of its objective times one number a pair: SFT's always the same one, DPO's
beta * sigmoid(-beta * (difference - the reference's)), so that a pair which is already won counts little.
Three ways to lay a gradient over the picture: at the image tokens, L1 norm per token, as the paper does; at the pixels,
L1 norm over colours; and gradient x input at the pixels. The picture is encoded once for both answers, so a gradient
sums over every use of it.

On the maps of the paper (PIVOT, section 4.2): its pipeline encodes the picture once for each answer and draws the
gradient at the *chosen* copy. By Eq. 1 that gradient is beta * sigmoid(-margin) * d log p(chosen), one number times the
SFT gradient, and the map is rescaled to [0, 1] before it is drawn. So at equal weights the two maps are the same
picture, and published differences come from weights that had moved apart. Counted over both copies, as here, DPO's map
is that of the difference, and a loss differs from its objective only in sums over pairs. tests/test_maps.py checks it.

Baselines: the share of the picture that the box covers (a map without any preference), and looking at the centre: a
Gaussian with a deviation of a quarter of the picture, and for the pointing game its middle.
"""
import numpy as np
import torch
from einops import rearrange, reduce
from tqdm import tqdm

from data import Collator
from features import squash
from model import InputError

OBJECTIVES = ("chosen", "difference", "SFT_loss", "DPO_loss")
PLACES = ("tokens", "pixels", "input")  # where the gradient is taken: image tokens, pixels, pixels x input
N_DRAWN = 8                             # pairs whose maps are kept, for the contact sheet
SQUARES = np.linspace(-2, 2, 32)**2     # the picture is four standard deviations wide
CENTRE = np.exp(-(SQUARES[:, None] + SQUARES) / 2)  # (32,32): a map that always looks at the centre
CENTRE /= CENTRE.sum()


def gradient_maps(model, batch, reference_margins=None, beta=.1):
    """For pairs (responses 2i chosen, 2i+1 rejected of picture i) -> maps {(objective, place): (I,N) or (I,H,W)},
    margins log p(chosen) - log p(rejected) (I,).

    `reference_margins` (I,) are those of DPO's reference; without them the model is its own reference. The loss maps
    are up to a constant factor, which no score notices (the step's number of tokens, or of pairs)."""
    pixels = batch.pixels.detach().requires_grad_()                                     # (I,3,H,W)
    tokens = model.image_tokens(pixels)                                                 # (I,N,D): one copy a picture
    chosen, rejected = rearrange(batch.per_response(model.token_logps(batch, tokens)), "(i two) -> two i", two=2)
    margins = chosen - rejected
    reference = margins.detach() if reference_margins is None else reference_margins.to(margins)
    pull = beta * torch.sigmoid(-beta * (margins.detach() - reference))                 # (I,): |d DPO loss / d margin|
    maps = {}
    for name, loss, objective, weight in (("chosen", "SFT_loss", chosen, torch.ones_like(pull)),
                                          ("difference", "DPO_loss", margins, pull)):
        at_tokens, at_pixels = torch.autograd.grad(objective.sum(), (tokens, pixels), retain_graph=True)
        found = {"tokens": reduce(at_tokens.abs(), "i n d -> i n", "sum"),              # pictures do not mix in the sum
                 "pixels": reduce(at_pixels.abs(), "i c h w -> i h w", "sum"),
                 "input": reduce(at_pixels * pixels.detach(), "i c h w -> i h w", "sum").abs()}
        for place, value in found.items():
            maps[name, place] = value.detach()
            maps[loss, place] = torch.einsum("i,i...->i...", weight, value.detach())
    return maps, margins.detach()


def box_cover(box, size, grid):
    """How much of each cell lies in the box:
    box (x0,y0,x1,y1) and size (W,H) in pixels of the picture, grid (rows, columns) -> (rows, columns) in [0,1]"""
    (x0, y0, x1, y1), (W, H), (rows, columns) = box, size, grid
    overlap = lambda low, high, n, extent: np.clip(
        np.minimum(high * n / extent, np.arange(n) + 1) - np.maximum(low * n / extent, np.arange(n)), 0, 1)
    return np.outer(overlap(y0, y1, rows, H), overlap(x0, x1, columns, W))


def points_at(gradient, box, size):
    """Pointing game: does the middle of the cell with the largest gradient (rows, columns) lie in the box?"""
    row, column = np.unravel_index(np.argmax(gradient), gradient.shape)
    x, y = (column + .5) * size[0] / gradient.shape[1], (row + .5) * size[1] / gradient.shape[0]
    return float(box[0] <= x < box[2] and box[1] <= y < box[3])


def map_scores(model, pairs, batch_size, autocast, desc, reference_margins=None, beta=.1):
    """-> {measure: values of all n pairs}, maps {(objective, place): [(rows, columns), ...]} of the first N_DRAWN,
    margins (n,)

    energy_OBJECTIVE_PLACE (n,2): the gradient inside the box and in all; point_OBJECTIVE_PLACE (n,); the baselines
    area (n,), the box's share of the picture; centre (n,) and point_centre (n,), of a map that looks at the centre."""
    grid, collator = tuple(side // model.pool for side in model.grid), Collator(pairs, model, ("chosen", "rejected"))
    maps, margins, scores = {(o, p): [] for o in OBJECTIVES for p in PLACES}, [], {}
    note = lambda name, value: scores.setdefault(name, []).append(value)
    for at in tqdm(range(0, len(pairs), batch_size), desc=desc):
        part = range(at, min(at + batch_size, len(pairs)))
        records = [pairs[i] for i in part]
        batch, dropped = collator([[i] for i in part])
        if dropped:
            raise InputError(dropped[0])
        batch.pixels = squash(model, [record["image"] for record in records])           # no crop: boxes stay in place
        reference = None if reference_margins is None else reference_margins[part.start:part.stop]
        with autocast():
            found, margin = gradient_maps(model, batch.to(model.device), reference, beta)
        margins.append(margin.float().cpu())
        found = {(objective, place): rearrange(value, "i (h w) -> i h w", h=grid[0]) if place == "tokens" else value
                 for (objective, place), value in found.items()}
        found = {key: value.float().cpu().numpy() for key, value in found.items()}
        for i, record in enumerate(records):
            box, size = record["box"], record["image"].size
            cover = box_cover(box, size, CENTRE.shape)
            note("area", cover.mean())
            note("centre", (cover * CENTRE).sum())
            note("point_centre", float(box[0] <= size[0] / 2 < box[2] and box[1] <= size[1] / 2 < box[3]))
            for (objective, place), values in found.items():
                inside = (values[i] * box_cover(box, size, values[i].shape)).sum()
                note(f"energy_{objective}_{place}", (inside, values[i].sum()))
                if objective in ("chosen", "difference"):                               # a loss points where these do
                    note(f"point_{objective}_{place}", points_at(values[i], box, size))
                if at + i < N_DRAWN:
                    maps[objective, place].append(values[i])
    return {name: np.array(values) for name, values in scores.items()}, maps, torch.cat(margins)
