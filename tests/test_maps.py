"""maps.py against slow answers: gradients answer by answer with plain logits, boxes by counting pixels, shares by hand."""
import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import features
import maps
import scenes
from model import InputError
from rows import Rows
from train_dpo import dpo_loss
from trees import pack

BETA, REFERENCE = .5, torch.tensor([3., -8., 0.])
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
unit = lambda m: (m - m.amin(1, keepdim=True)) / (m.amax(1, keepdim=True) - m.amin(1, keepdim=True))


@pytest.fixture(scope="module", params=(("siglip", 1), ("clip", 3)), ids=("one token a patch", "pooled"))
def model(request, make):
    return make(request.param[0], pool=request.param[1])


@pytest.fixture(scope="module")
def rows():
    """Three pairs with boxes; the second picture is wide, the third tall"""
    world, wide = scenes.Scenes("test", 3, "maps"), {1: (72, 36), 2: (36, 72)}
    records = [world[i] for i in range(3)]
    records[0]["rejected"] += ", and nothing else"                                          # longer than chosen
    for i, (w, h) in wide.items():
        x0, y0, x1, y1 = records[i]["box"]
        records[i] |= {"image": records[i]["image"].resize((w, h)), "box": (x0 * w // 36, y0 * h // 36, x1 * w // 36, y1 * h // 36)}
    return Rows("own", records, "pairs")


@pytest.fixture(scope="module")
def batch(model, rows):
    found, _ = data.Collator(rows, model, ("chosen", "rejected"))([[0], [1], [2]])
    found.pixels = features.squash(model, [rows[i]["image"] for i in range(3)])
    return found


@pytest.fixture(scope="module")
def alone(model, rows, batch):
    """Each answer alone, with its own copy of the picture and all logits -> {field: [(log p, d log p / d tokens, d log p / d pixels)]}"""
    found = {}
    for field in ("chosen", "rejected"):
        for i in range(3):
            prompt, response = model.chat.prompt_ids(rows[i]["question"], model.n_image), model.chat.response_ids(rows[i][field])
            ids, pixels = torch.tensor([prompt + response]), batch.pixels[i:i + 1].clone().requires_grad_()
            tokens = model.image_tokens(pixels)
            logps = model.llm(inputs_embeds=model.splice(ids, tokens)).logits.log_softmax(-1)[0]
            total = sum(logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
            found.setdefault(field, []).append((total.detach(), *(g[0] for g in torch.autograd.grad(total, (tokens, pixels)))))
    return found


def test_gradient_maps_answer_by_answer(model, batch, alone):
    # the maps of four objectives, from gradients of single answers and the derivatives of both losses, written out; SFT's without 1 / tokens
    answers = alone
    found, margins = maps.gradient_maps(model, batch, REFERENCE, BETA)
    for i in range(3):
        (c, c_tokens, c_pixels), (r, r_tokens, r_pixels) = answers["chosen"][i], answers["rejected"][i]
        close(margins[i], c - r)
        pulled = BETA * torch.sigmoid(-BETA * (c - r - REFERENCE[i]))                       # - d DPO loss / d margin
        for objective, a, b in (("chosen", 1, 0), ("difference", 1, -1), ("SFT_loss", -1, 0), ("DPO_loss", -pulled, pulled)):
            at_tokens, at_pixels = a * c_tokens + b * r_tokens, a * c_pixels + b * r_pixels
            close(found[objective, "tokens"][i], at_tokens.abs().sum(-1))
            close(found[objective, "pixels"][i], at_pixels.abs().sum(0))
            close(found[objective, "input"][i], (at_pixels * batch.pixels[i]).sum(0).abs())
    assert found["chosen", "tokens"].shape == (3, model.n_image) and found["chosen", "input"].shape == (3, 24, 24)
    assert not any(value.requires_grad for value in found.values())


def test_a_loss_weighs_pairs_but_points_where_its_objective_does(model, batch):
    # DPO's map of a picture is the difference's times beta * sigmoid(beta (reference - margin)), SFT's is chosen's, of every picture alike
    found, margins = maps.gradient_maps(model, batch, REFERENCE, BETA)
    weights = BETA * torch.sigmoid(BETA * (REFERENCE - margins))
    assert weights.max() > 1.5 * weights.min()                                              # pairs do count differently
    for place in maps.PLACES:
        flat = lambda objective: found[objective, place].flatten(1)
        close(flat("DPO_loss"), weights[:, None] * flat("difference"))
        close(flat("SFT_loss"), flat("chosen"))
    own, _ = maps.gradient_maps(model, batch, beta=BETA)                                    # the model is its own reference: log 2, weight beta / 2
    close(own["DPO_loss", "tokens"], BETA / 2 * own["difference", "tokens"])


def test_chosen_copy_maps_of_sft_and_dpo_are_one_picture_at_equal_weights(model, rows, batch):
    # Eq. 1: at the chosen copy, DPO's gradient is beta * sigmoid(-margin) times SFT's. Encoding the picture twice hides the contrast.
    if model.pool != 1:
        return                                                                              # one token: its map is one number
    answers = [(rows[i], rows[i][field]) for i in range(3) for field in ("chosen", "rejected")]
    pixels = batch.pixels.repeat_interleave(2, 0)                                           # two copies of each picture, as in the paper's code
    trees = [[(model.chat.question_ids(record["question"]), [model.chat.response_ids(words)])] for record, words in answers]
    twice = pack([model.chat.trunk_ids(model.n_image, i) for i in range(6)], trees, pixels, model.chat.pad_id)
    tokens = model.image_tokens(pixels).detach().requires_grad_()
    chosen, rejected = twice.per_response(model.token_logps(twice, tokens)).view(3, 2).T
    losses, _, _ = dpo_loss(chosen, rejected, chosen.detach() - .7, rejected.detach() + .4, beta=.1)     # policy and reference apart
    found = [torch.autograd.grad(loss, tokens, retain_graph=True)[0].abs().sum(-1)[0::2] for loss in (losses.sum(), -chosen.sum() / 50)]
    assert torch.allclose(unit(found[0]), unit(found[1]), atol=1e-5)
    both, _ = maps.gradient_maps(model, batch)
    assert torch.allclose(unit(both["chosen", "tokens"]), unit(found[1]), atol=1e-4)
    assert (unit(both["difference", "tokens"]) - unit(both["chosen", "tokens"])).abs().max() > .05       # counting the rejected use does matter


def test_box_cover_by_counting_pixels():
    # the share of each cell's pixels that lies in the box, cells that cut through pixels included
    rng = np.random.default_rng(0)
    for size, grid in (((36, 24), (2, 3)), ((36, 24), (24, 36)), ((36, 24), (4, 9)), ((50, 30), (3, 3)), ((9, 9), (6, 6))):
        for _ in range(5):
            (x0, x1), (y0, y1) = (sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in size)
            fine = np.zeros((size[1] * grid[0], size[0] * grid[1]))                         # each pixel and each cell is a whole number of these
            fine[y0 * grid[0]:y1 * grid[0], x0 * grid[1]:x1 * grid[1]] = 1
            expected = fine.reshape(grid[0], size[1], grid[1], size[0]).mean((1, 3))
            assert np.allclose(maps.box_cover((x0, y0, x1, y1), size, grid), expected)


def test_pointing_game_takes_the_middle_of_the_strongest_cell():
    # a picture of 36 x 24 under 2 x 3 cells: the strongest cell's middle is at (18, 6)
    gradient = np.array([[0, 9, 0], [3, 1, 2.]])
    inside = {(13, 0, 24, 12): 1, (18, 6, 19, 7): 1, (0, 0, 18, 24): 0, (0, 0, 36, 6): 0, (19, 0, 36, 24): 0, (0, 7, 36, 24): 0}
    assert {box: maps.points_at(gradient, box, (36, 24)) for box in inside} == inside
    assert maps.points_at(gradient.T, (0, 8, 18, 16), (36, 24)) == 1 and maps.points_at(gradient.T, (18, 0, 36, 24), (36, 24)) == 0


@pytest.mark.parametrize("batch_size", (2, 3))
def test_scores_of_a_set_by_hand(batch_size, model, rows, batch):
    # whatever the batch: each picture keeps its own reference, map, box and size
    records = [rows[i] for i in range(3)]
    three = Rows(rows.source, records, "pairs")
    scores, found, margins = maps.map_scores(model, three, batch_size, contextlib.nullcontext, "maps", REFERENCE, BETA)
    direct, expected = maps.gradient_maps(model, batch, REFERENCE, BETA)
    close(margins, expected)
    side = 3 // model.pool
    for (objective, place), value in direct.items():
        for i, record in enumerate(records):
            one, (w, h), (x0, y0, x1, y1) = found[objective, place][i], record["image"].size, record["box"]
            close(torch.from_numpy(one).flatten(), value[i].flatten())
            n = side if place == "tokens" else 24
            assert one.shape == (n, n)
            inside = np.zeros((n * h, n * w))
            inside[y0 * n:y1 * n, x0 * n:x1 * n] = 1
            inside = (one * inside.reshape(n, h, n, w).mean((1, 3))).sum()
            assert np.allclose(scores[f"energy_{objective}_{place}"][i], (inside, one.sum()), rtol=1e-4)
            if "loss" not in objective:
                at, = np.argwhere(one == one.max())
                y, x = (at + .5) * (h / n, w / n)
                assert scores[f"point_{objective}_{place}"][i] == (x0 <= x < x1 and y0 <= y < y1)
    for i, record in enumerate(records):
        (w, h), (x0, y0, x1, y1) = record["image"].size, record["box"]
        assert scores["point_centre"][i] == (x0 <= w / 2 < x1 and y0 <= h / 2 < y1)
        assert abs(scores["area"][i] - (x1 - x0) * (y1 - y0) / (w * h)) < 1e-6
        bell = np.exp(-np.add.outer(*2 * [(np.arange(960) - 479.5)**2 / 240**2]) / 2)       # deviation: a quarter of the picture
        inside = bell[round(960 * y0 / h):round(960 * y1 / h), round(960 * x0 / w):round(960 * x1 / w)].sum() / bell.sum()
        assert abs(scores["centre"][i] - inside) < .02 * inside + .002                      # drawn in 32 x 32 cells
    assert set(scores) == {"area", "centre", "point_centre"} | {f"energy_{o}_{p}" for o in maps.OBJECTIVES for p in maps.PLACES} \
        | {f"point_{o}_{p}" for o in ("chosen", "difference") for p in maps.PLACES}


def test_a_pair_that_cannot_be_used_is_named(make):
    # a map of fewer pictures than boxes would be of the wrong ones
    model, row = make(), {"image": Image.new("RGB", (24, 24)), "question": "?", "chosen": "a", "rejected": "b", "box": (0, 0, 9, 9)}
    rows = Rows("own", [row, {**row, "rejected": "word " * 3000}], "pairs")
    with pytest.raises(InputError, match="own row 1: .* tokens"):
        maps.map_scores(model, rows, 2, contextlib.nullcontext, "maps")
