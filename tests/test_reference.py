"""The remembered reference is the live one: train_dpo.py run as a user runs it, on tiny models; and what is forgotten, refused or found again."""
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoints
import common
import data
import scenes
import train_dpo
from model import MLLM

ONE, FOUR = ("--data", "scenes/train/foreign"), ("--data", "scenes/train/foreign/4", "--questions_per_tree", 4)
Run = namedtuple("Run", "folder lines printed")
REWARDS = ("loss", "chosen_reward", "rejected_reward", "margin", "accuracy")
worlds = pytest.mark.parametrize("world", [ONE, FOUR, (*FOUR, "--micro_batch", 3)],
                                 ids=["one question a picture", "four questions a tree", "trees that micro-batches cut"])


@pytest.fixture
def start(start_run, tmp_path):
    """A run of its own to start from: what is remembered lies beside it"""
    return shutil.copytree(start_run, tmp_path / "start")


@pytest.fixture
def dpo(start, tmp_path, monkeypatch, capsys):
    """dpo("--seed", 1, ...) -> Run; 24 pairs, three steps an epoch of two micro-batches, one epoch"""
    def dpo(*flags):
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        argv = ["train_dpo.py", "--init", start, "--out", out, "--n", 24, "--batch_size", 8, "--micro_batch", 4, "--epochs", 1, "--lr", 1e-3,
                "--log_every", 1, "--compile", "false", "--max_bad", 1, *flags]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        capsys.readouterr()
        common.cli(train_dpo.main)
        with open(out / "log.jsonl") as f:
            return Run(out, [json.loads(line) for line in f], capsys.readouterr().out)
    return dpo


@pytest.fixture
def jsonl(tmp_path):
    """24 pairs as a file with its 12 pictures: rows 2i and 2i+1 share mine/i.png"""
    world, lines = scenes.Scenes("train", 24, "foreign", 0, 2), []
    (tmp_path / "mine").mkdir()
    for i in range(24):
        world[i]["image"].save(tmp_path / f"mine/{i // 2}.png")
        lines.append(json.dumps({"image": f"{i // 2}.png", **{field: world[i][field] for field in ("question", "chosen", "rejected")}}) + "\n")
    (tmp_path / "mine/rows.jsonl").write_text("".join(lines))
    return tmp_path / "mine/rows.jsonl"


def files(start):
    """What is remembered beside a run"""
    folder = f"{start}.reference"
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def computed(run):
    """(pairs known, computed now), as printed"""
    return tuple(map(int, re.search(r"^reference .*: (\d+) pairs, (\d+) computed now$", run.printed, re.M).groups()))


def weights(run):
    return {f"{part}.{k}": v for part, file in (("vision", "vision/model"), ("llm", "llm/model"), ("connector", "connector"))
            for k, v in load_file(os.path.join(run.folder, file + ".safetensors")).items()}


def numbers(line):
    return {key: value for key, value in line.items() if key not in ("seconds", "pairs_per_s", "peak_mb")}


# ---- the same run --------------------------------------------------------------------------------------------------------------


@worlds
def test_an_epoch_with_remembered_numbers_is_the_live_one_bit_for_bit(world, dpo, start):
    # every logged number and every weight; step 0 is log 2 with rewards of exactly 0, later steps are not
    remembered, live = dpo(*world), dpo(*world, "--reference", "live")
    assert [numbers(line) for line in remembered.lines] == [numbers(line) for line in live.lines] and len(live.lines) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(remembered).values(), weights(live).values(), strict=True))
    assert computed(remembered) == (24, 24) and "reference" not in live.printed.replace('"reference"', "")
    for line, is_first in zip(remembered.lines, (True, False, False)):
        assert (line["loss"] == round(math.log(2), 6)) == is_first
        assert (line["margin"] == line["chosen_reward"] == line["rejected_reward"] == 0) == is_first


@worlds
def test_two_epochs_with_remembered_numbers_are_two_live_ones(world, dpo, start_run):
    # in the second epoch pairs meet in other batches, in which their log-probs round differently: no more than that
    flags = ("--epochs", 2, "--label_smoothing", .1, "--sft_weight", .05)
    remembered, live = dpo(*world, *flags), dpo(*world, *flags, "--reference", "live")
    assert computed(remembered) == (24, 24) and len(live.lines) == 6
    for a, b in zip(remembered.lines, live.lines, strict=True):
        assert {key: a[key] for key in REWARDS} == pytest.approx({key: b[key] for key in REWARDS}, abs=5e-6)
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-5, abs=5e-6)
    begin = weights(Run(start_run, None, None))
    for (name, a), b in zip(weights(remembered).items(), weights(live).values(), strict=True):
        if not (name.startswith("vision") and "k_proj.bias" in name):  # softmax does not see it: its gradient is rounding noise, which Adam scales up
            assert (a - b).norm() <= 1e-3 * (b - begin[name]).norm(), name


@worlds
def test_what_is_remembered_is_the_start(world, dpo, start):
    # the file holds, for every row, what the slow path says of the starting checkpoint
    dpo(*world, "--lr", .01)
    (name,), model, rows = files(start), MLLM.load(start).eval(), data.load(world[1], "pairs", 24)
    table = load_file(f"{start}.reference/{name}")
    assert sorted(table["row"].tolist()) == list(range(24)) and len(set(table["fingerprint"].tolist())) == 24
    for field in ("chosen", "rejected"):
        records = [rows[i] for i in table["row"].tolist()]
        with torch.no_grad():
            slow = model.logps([r["image"] for r in records], [r["question"] for r in records], [r[field] for r in records])
        assert table[field].dtype == torch.float32
        torch.testing.assert_close(table[field], slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reference, n_models", [("remembered", 1), ("live", 2)])
def test_one_model_in_memory(reference, n_models, dpo, monkeypatch):
    # counted at every step among all objects alive
    counts, step = [], checkpoints.Run.step
    others = {id(x) for x in gc.get_objects() if type(x) is MLLM}  # of other tests

    def counting_step(*args):
        counts.append(sum(type(x) is MLLM and id(x) not in others for x in gc.get_objects()))
        return step(*args)
    monkeypatch.setattr(checkpoints.Run, "step", counting_step)
    gc.collect()
    dpo("--reference", reference)
    assert counts == [n_models] * 3


# ---- found again ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """A list of the pairs of each forward pass without gradient: what the reference costs"""
    pairs, forward = [], MLLM.token_logps

    def counting_forward(self, batch, *args):
        if not torch.is_grad_enabled():
            pairs.append(len(batch.rows))
        return forward(self, batch, *args)
    monkeypatch.setattr(MLLM, "token_logps", counting_forward)
    return pairs


def test_a_second_run_computes_nothing(dpo, start, forwards):
    # neither a restart, nor another rate, optimiser, beta or length of training; the file is not even written
    first = dpo()
    assert forwards == [4] * 6
    (name,) = files(start)
    before = os.stat(f"{start}.reference/{name}")
    runs = [dpo(), dpo("--lr", 3e-3, "--beta", .5, "--epochs", 2), dpo("--lr_vision", 0, "--optimizer", "muon", "--steps", 2)]
    assert all(computed(run) == (24, 0) for run in runs) and forwards == [4] * 6
    after = os.stat(f"{start}.reference/{name}")
    assert files(start) == [name] and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [numbers(line) for line in runs[0].lines] == [numbers(line) for line in first.lines]
    for run in runs:
        assert run.lines[0]["margin"] == 0 and run.lines[1]["margin"] != 0


def test_other_batches_find_the_same_numbers(dpo, start, forwards):
    # another batch size or micro-batch: nothing is computed; rewards start at 0 but for the rounding of another batch
    dpo()
    forwards.clear()
    for flags in (("--batch_size", 6), ("--batch_size", 24, "--micro_batch", 24)):
        run = dpo(*flags)
        assert computed(run) == (24, 0) and run.lines[0]["loss"] == pytest.approx(math.log(2), abs=2e-6)
        assert abs(run.lines[0]["chosen_reward"]) < 1e-5 and abs(run.lines[0]["rejected_reward"]) < 1e-5
    assert forwards == []


def test_more_rows_cost_only_themselves(dpo, start, forwards):
    # the rows of the first step, then the first twelve, then all: one file, in which only what is missing is added
    assert computed(dpo("--steps", 1)) == (8, 8) and forwards == [4, 4]
    known = set(load_file(f"{start}.reference/{files(start)[0]}")["row"].tolist())
    both = known | set(range(12))
    assert computed(dpo("--n", 12)) == (len(both), len(both - known)) and len(both - known) > 2
    run = dpo()
    assert computed(run) == (24, 24 - len(both)) and len(files(start)) == 1
    live = dpo("--reference", "live")
    for a, b in zip(run.lines, live.lines, strict=True):  # numbers that were computed in batches of other runs
        assert {key: a[key] for key in REWARDS} == pytest.approx({key: b[key] for key in REWARDS}, abs=5e-6)


def test_another_seed(dpo, start, jsonl):
    # of the drawn world it draws other rows: another file; of a file it changes only the order: the same numbers
    assert computed(dpo()) == computed(dpo("--seed", 1)) == (24, 24) and len(files(start)) == 2
    assert computed(dpo("--data", jsonl)) == (24, 24) and len(files(start)) == 3
    run = dpo("--data", jsonl, "--seed", 1)
    assert computed(run) == (24, 0) and abs(run.lines[0]["margin"]) < 1e-5 and len(files(start)) == 3


def test_a_kill_loses_little(dpo, start, forwards, monkeypatch):
    # saved every minute (the clock runs fast here): what was computed before a kill is not computed again
    clock, counting_forward = iter(range(0, 10_000, 61)), MLLM.token_logps

    def killed(*args):
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return counting_forward(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "time", SimpleNamespace(time=lambda: next(clock)))
        patch.setattr(MLLM, "token_logps", killed)
        with pytest.raises(SystemExit, match="^stopped$"):
            dpo()
    assert len(files(start)) == 1 and len(load_file(f"{start}.reference/{files(start)[0]}")["row"]) == 12
    run = dpo()
    assert computed(run) == (24, 12) and forwards == [4] * 6 and run.lines[0]["margin"] == 0


def test_dropped_rows_are_not_missed(dpo, start, jsonl, tmp_path):
    # a picture that does not open, an empty answer, equal answers: the others are remembered, and the run is the live one
    lines = [json.loads(line) for line in open(jsonl)]
    lines[3]["rejected"], lines[17]["chosen"] = " ", lines[17]["rejected"]
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine/4.png").write_bytes(b"no picture")  # of rows 8 and 9
    first, second, live = dpo("--data", jsonl), dpo("--data", jsonl), dpo("--data", jsonl, "--reference", "live")
    assert computed(first) == (20, 20) and computed(second) == (20, 0) and first.lines[-1]["dropped"] == 4
    assert [numbers(line) for line in first.lines] == [numbers(line) for line in second.lines] == [numbers(line) for line in live.lines]


def test_a_row_is_known_whatever_happens_to_its_neighbours(dpo, start):
    # rows of trees of which a shorter --max_length leaves less: the same numbers, none refused
    assert computed(dpo(*FOUR)) == (24, 24)
    run = dpo(*FOUR, "--max_length", 100)
    assert computed(run) == (24, 0) and 4 < run.lines[-1]["dropped"] < 20 and abs(run.lines[0]["margin"]) < 1e-5


def test_dropped_rows_cost_nothing_later(dpo, jsonl, tmp_path, forwards):
    (tmp_path / "mine/4.png").write_bytes(b"no picture")
    dpo("--data", jsonl)
    forwards.clear()
    dpo("--data", jsonl)
    assert forwards == []


# ---- forgotten and refused -----------------------------------------------------------------------------------------------------


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def other_weights(start, jsonl):
    weights = load_file(start / "connector.safetensors")
    weights["up.bias"][3] += 1e-6  # one number
    save_file(weights, start / "connector.safetensors")


CHANGES = {
    "weights": other_weights,
    "template before the picture": lambda start, jsonl: edit(start / "llm/chat_template.jinja", "{% for", "a chat:\n{% for"),
    "template after the question": lambda start, jsonl: edit(start / "llm/chat_template.jinja", "assistant\n", "assistant:\n"),
    "template after the answer": lambda start, jsonl: edit(start / "llm/chat_template.jinja", "{{ m.content }}",
                                                           "{{ m.content }}{% if m.role == 'assistant' %} .{% endif %}"),
    "image processing": lambda start, jsonl: edit(start / "vision/preprocessor_config.json", '"rescale_factor": 0.0039', '"rescale_factor": 0.0038'),
    "rows": lambda start, jsonl: edit(jsonl, '"rejected": "', '"rejected": "no, '),
    "precision": lambda start, jsonl: ["--matmul", "highest"],
    "questions_per_tree": lambda start, jsonl: ["--questions_per_tree", 1],
    "config": lambda start, jsonl: edit(start / "llm/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_numbers_are_another_file(what, dpo, start, jsonl):
    # whatever the log-probs depend on: changed, they are computed anew in a file of their own, and rewards start at 0
    assert computed(dpo("--data", jsonl)) == (24, 24)
    run = dpo("--data", jsonl, *(CHANGES[what](start, jsonl) or []))
    assert computed(run) == (24, 24) and len(files(start)) == 2 and run.lines[0]["margin"] == 0


def refused(dpo, message, *flags):
    """The run stops with one line, and what was there is as it was"""
    with pytest.raises(SystemExit) as stop:
        dpo(*flags)
    assert re.fullmatch(f"error: {message}", str(stop.value)), stop.value


def test_a_replaced_picture_is_refused(dpo, start, jsonl, tmp_path):
    # one pixel of a picture that two rows share is another: the row and the file to remove are named, nothing is trained; then it is computed anew
    dpo("--data", jsonl)
    (name,) = files(start)
    before = load_file(f"{start}.reference/{name}")
    with Image.open(tmp_path / "mine/5.png") as picture:
        picture = picture.convert("RGB")
    picture.putpixel((20, 20), tuple(255 - x for x in picture.getpixel((20, 20))))
    picture.save(tmp_path / "mine/5.png")
    file = f"{start}.reference/{name}"
    refused(dpo, f"{jsonl} row 1[01] is not what {file} was computed from: [^\n]*remove that file", "--data", jsonl)
    assert not (tmp_path / "run1").exists() and all(torch.equal(before[key], value) for key, value in load_file(file).items())
    os.remove(file)
    assert computed(dpo("--data", jsonl)) == (24, 24)


def test_a_file_of_other_numbers_is_refused(dpo, start):
    # renamed, or of an earlier format: what differs is named
    dpo()
    (first,) = files(start)
    dpo("--seed", 1)
    (second,) = set(files(start)) - {first}
    shutil.copy(f"{start}.reference/{first}", f"{start}.reference/{second}")
    refused(dpo, f"{start}.reference/{second} was computed with other rows; remove it", "--seed", 1)
    save_file(load_file(f"{start}.reference/{first}"), f"{start}.reference/{second}")
    refused(dpo, f"{start}.reference/{second} was computed with other version, weights, [^\n]*; remove it", "--seed", 1)


@pytest.mark.parametrize("kept", [0, .5])
def test_a_file_cut_short_is_refused(kept, dpo, start):
    # a full disk or a bad copy: one line that names the file
    dpo()
    file = f"{start}.reference/{files(start)[0]}"
    with open(file, "rb") as f:
        whole = f.read()
    with open(file, "wb") as f:
        f.write(whole[:int(kept * len(whole))])
    refused(dpo, f"[^\n]*{file}[^\n]*")


def test_two_runs_may_save_at_once(dpo, start, monkeypatch):
    # a sweep in parallel: another process that saves in the middle of a save of the first hurts neither
    model, rows = MLLM.load(start), data.load("scenes/train/foreign", "pairs", 24)
    ours, theirs = (train_dpo.Reference(str(start), model, rows, "cpu high", 4) for _ in range(2))
    ours.logps, theirs.logps = {0: (7, -1., -2.)}, {0: (7, -1., -2.), 1: (8, -3., -4.)}

    def interrupted_save(*args):
        save_file(*args)
        monkeypatch.undo()
        other = multiprocessing.get_context("fork").Process(target=theirs.save)
        other.start()
        other.join()
        saved.append((other.exitcode, load_file(ours.file)["row"].tolist()))
    saved = []
    monkeypatch.setattr(train_dpo, "save_file", interrupted_save)
    ours.save()
    assert saved == [(0, [0, 1])] and load_file(ours.file)["row"].tolist() == [0] and len(files(start)) == 1


def test_live_leaves_nothing_behind(dpo, start):
    # nor does remembering, but for its one file
    dpo("--reference", "live")
    assert files(start) == [] and not os.path.exists(f"{start}.reference")
    dpo()
    assert len(files(start)) == 1 and re.fullmatch("[0-9a-f]{16}.safetensors", files(start)[0])
