"""probe.py against independent answers: the optimum of the logistic loss, IoU by sets, gradients answer by answer."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import probe
import scenes
from model import MLLM
from trees import pack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    scenes.tiny_vision(folder + "/vision", width=32, layers=3)
    scenes.tiny_llm(folder + "/llm", data.texts("scenes/train/sft", 100), width=32, layers=2)
    return MLLM.from_pretrained(folder + "/vision", folder + "/llm", pool=2).eval()


def test_fit_linear_is_the_optimum_of_each_strength_alone():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(0, 3, (200,))
    strengths = [1e-3, 1e-1]
    for w, strength in zip(probe.fit_linear(x, y, 3, strengths).double(), strengths):
        p = (x.double() @ w[:-1] + w[-1]).softmax(-1)                               # the gradient of cross-entropy + s |W|^2, by hand
        error = (p - torch.eye(3).double()[y]) / len(x)
        assert (x.double().T @ error + 2 * strength * w[:-1]).abs().max() < 1e-4
        assert error.sum(0).abs().max() < 1e-4                                      # the bias is not regularised


def test_linear_probe_chooses_on_train_alone_and_keeps_pictures_together(monkeypatch):
    seen = []
    real = probe.fit_linear
    monkeypatch.setattr(probe, "fit_linear", lambda x, y, c: seen.append(len(x)) or real(x, y, c))
    torch.manual_seed(0)
    means = 3 * torch.eye(4)
    y = torch.arange(400) % 4
    x, groups = means[y] + torch.randn(400, 4), torch.arange(400) // 8              # 50 pictures of 8 patches
    predictions = probe.linear_probe(x, y, means, 4, n_seeds=3, groups=groups)
    assert predictions.tolist() == [[0, 1, 2, 3]] * 3
    assert seen == [320] * 3                                                        # a fifth of the pictures is held out, whole


def test_random_labels_are_not_predicted():
    torch.manual_seed(0)
    y, test_y = torch.randint(0, 2, (300,)), torch.randint(0, 2, (2000,))
    predictions = probe.linear_probe(torch.randn(300, 20), y, torch.randn(2000, 20), 2, 1)
    assert abs((predictions == test_y).float().mean() - .5) < .05


def test_patch_labels_by_counting_pixels():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (12, 18)).astype(np.uint8)
    mask[:6, :6] = 3                                                                # a patch of void alone
    labels = probe.patch_labels(mask, (2, 3), 6, void=3)
    for n, (r, c) in enumerate((r, c) for r in range(2) for c in range(3)):
        pixels = [p for p in mask[6 * r:6 * r + 6, 6 * c:6 * c + 6].reshape(-1).tolist() if p != 3]
        assert labels[n] == (max(range(4), key=pixels.count) if pixels else -1)
    bigger = mask.repeat(3, 0).repeat(3, 1)                                         # a larger mask of the same picture: nearest pixels
    assert (probe.patch_labels(bigger, (2, 3), 6, void=3) == labels).all()


def test_mean_iou_by_sets():
    rng = np.random.default_rng(1)
    true, predicted = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    confusion = np.zeros((5, 5), int)                                               # class 4 never occurs and does not count
    np.add.at(confusion, (true, predicted), 1)
    places = lambda labels, c: set(np.nonzero(labels == c)[0].tolist())
    ious = [len(places(true, c) & places(predicted, c)) / len(places(true, c) | places(predicted, c)) for c in range(4)]
    assert abs(probe.mean_iou(confusion) - np.mean(ious)) < 1e-12


def test_box_cover_by_counting_pixels():
    cover = probe.box_cover((5, 1, 20, 13), (36, 24), (2, 3))
    inside = np.zeros((24, 36))
    inside[1:13, 5:20] = 1
    expected = inside.reshape(2, 12, 3, 12).mean((1, 3)).reshape(-1)
    assert np.allclose(cover, expected)
    assert probe.points_at(np.array([0, 9, 0, 0, 0, 0]), (13, 0, 24, 12), (36, 24), (2, 3)) == 1
    assert probe.points_at(np.array([9, 0, 0, 0, 0, 0]), (13, 0, 24, 12), (36, 24), (2, 3)) == 0


def pairs(n=3):
    """-> records, and chosen and rejected of each in turn, as (record, words)"""
    rows = data.load("scenes/test/maps", "pairs", n)
    return rows, [(rows[i], rows[i][field]) for i in range(n) for field in ("chosen", "rejected")]


def test_gradient_maps_sum_over_both_uses_of_the_picture(model):
    """Each answer alone, with its own copy of the picture's tokens and all logits: the maps are |g_chosen| and |g_chosen - g_rejected|."""
    rows, answers = pairs()
    maps, gradients = probe.gradient_maps(model, data.Collator(rows, model, ("chosen", "rejected"))([[0], [1], [2]])[0]), []
    for record, words in answers:
        prompt, response = model.chat.prompt_ids(record["question"], model.n_image), model.chat.response_ids(words)
        ids, tokens = torch.tensor([prompt + response]), model.image_tokens(model.pixels([record["image"]])).detach().requires_grad_()
        logps = model.llm(inputs_embeds=model.splice(ids, tokens)).logits.log_softmax(-1)[0]
        sum(logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])).backward()
        gradients.append(tokens.grad[0])
    for i in range(3):
        chosen, rejected = gradients[2 * i:2 * i + 2]
        torch.testing.assert_close(maps["chosen"][i], chosen.abs().sum(-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps["difference"][i], (chosen - rejected).abs().sum(-1), rtol=1e-4, atol=1e-6)


def test_chosen_copy_maps_of_sft_and_dpo_are_one_picture_at_equal_weights(model):
    """Eq. 1: at the chosen copy, DPO's gradient is beta * sigmoid(-margin) times SFT's. Encoding the picture twice hides the contrast."""
    from train_dpo import dpo_loss
    rows, answers = pairs()
    pixels = model.pixels([record["image"] for record, _ in answers])               # two copies of each picture, as in the paper's code
    trees = [[(model.chat.question_ids(record["question"]), [model.chat.response_ids(words)])] for record, words in answers]
    twice = pack([model.chat.trunk_ids(model.n_image, i) for i in range(6)], trees, pixels, model.chat.pad_id)
    tokens = model.image_tokens(pixels).detach().requires_grad_()
    chosen, rejected = twice.per_response(model.response_logps(twice, tokens)).view(3, 2).T
    losses, _, _ = dpo_loss(chosen, rejected, chosen.detach() - .7, rejected.detach() + .4, beta=.1)     # policy and reference apart
    unit = lambda m: (m - m.amin(1, keepdim=True)) / (m.amax(1, keepdim=True) - m.amin(1, keepdim=True))
    maps = [torch.autograd.grad(loss, tokens, retain_graph=True)[0].abs().sum(-1)[0::2] for loss in (losses.sum(), -chosen.sum() / 50)]
    assert torch.allclose(unit(maps[0]), unit(maps[1]), atol=1e-5)
    both = probe.gradient_maps(model, data.Collator(rows, model, ("chosen", "rejected"))([[0], [1], [2]])[0])
    assert torch.allclose(unit(both["chosen"]), unit(maps[1]), atol=1e-5)
    assert (unit(both["difference"]) - unit(both["chosen"])).abs().max() > .05      # counting the rejected use as well does make a difference


def test_random_encoder_has_the_shape_but_not_the_weights(model):
    other = probe.random_encoder(model)
    pixels = model.pixels([Image.new("RGB", (36, 36), (200, 30, 30))])
    assert other.features(pixels).shape == model.features(pixels).shape
    assert not torch.allclose(other.features(pixels), model.features(pixels))


def test_squash_keeps_boxes_in_place(model):
    """A wide picture is squeezed, not cropped: its left edge stays in the left column of patches."""
    image = Image.new("RGB", (144, 36), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 24, 36))
    pixels = probe.squash(model, [image])[0].mean(0)                                # (36,36)
    assert pixels[:, :5].min() > .9 and pixels[:, 7:].max() < -.9


def test_own_folders_end_to_end(model, tmp_path, monkeypatch, capsys):
    """--classification and --segmentation on folders that this test draws; results.json holds every row with an interval."""
    model.save(str(tmp_path / "run"))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, color in (("bright", 200), ("dark", 60)):
            os.makedirs(tmp_path / split / c)
            for i in range(12):
                Image.fromarray(rng.normal(color, 10, (40, 40, 3)).clip(0, 255).astype(np.uint8)).save(tmp_path / split / c / f"{i}.png")
    for folder in ("images", "masks"):
        os.makedirs(tmp_path / folder)
    for i in range(12):
        mask = np.zeros((36, 36), np.uint8)
        mask[:, :18] = i % 2
        mask[0, 0] = 255
        Image.fromarray(np.stack([mask % 255 * 150 + 50] * 3, -1)).save(tmp_path / f"images/{i}.jpg")
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    argv = ["probe.py", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--seeds", "2", "--classification", str(tmp_path / "train"), str(tmp_path / "test"),
            "--segmentation", str(tmp_path / "images"), str(tmp_path / "masks")]
    monkeypatch.setattr(sys, "argv", argv)
    probe.main()
    table = json.load(open(tmp_path / "out" / "results.json"))["table"]
    assert list(table) == ["random", "run"]
    assert table["run"]["classification"]["value"][0] == 1.0 and table["run"]["mIoU"]["value"][0] > .9
    monkeypatch.setattr(sys, "argv", argv[:3] + [str(tmp_path / "out2"), "--segmentation", str(tmp_path / "images"), str(tmp_path / "train" / "dark")])
    os.remove(tmp_path / "masks" / "3.png")
    with pytest.raises(SystemExit, match="not a label picture|has no mask"):
        probe.main()


def test_bootstrap_is_paired_and_covers():
    values = np.random.default_rng(0).normal(1, 1, 400)
    a, b = (common.bootstrap(lambda rows, v=v: v[rows].mean(), 400, seed=3) for v in (values, values + .25))
    assert np.allclose(b - a, .25)                                                  # the same resamples: a constant shift has no spread
    assert abs(a.std() - 1 / 20) < .01                                              # standard error of a mean of 400
