"""The tables over seeds: why the intervals are what they are, contrasts against plain arithmetic, and the two grids."""
import json
import os
import sys

import numpy as np
import pytest

import grids
import report


def test_t_intervals_hold_the_truth_as_often_as_they_say():
    """Arms differ by 5 points, seeds by 3 more or less, and each seed is known by 2000 test rows. The mean of a seed's resampled rows is
    normal around what was seen, so a bootstrap over seeds and their rows is drawn from that."""
    rng, truth, row_noise, held = np.random.default_rng(0), .05, .5 / 2000**.5, np.zeros(2)
    for _ in range(2000):
        seen = rng.normal(truth, .03, 5) + rng.normal(0, row_noise, 5)
        d = report.paired(seen, np.zeros(5))
        drawn = seen[rng.integers(0, 5, (500, 5))] + rng.normal(0, row_noise, (500, 5))
        low, high = np.quantile(drawn.mean(1), [.025, .975])
        held += d["low"] <= truth <= d["high"], low <= truth <= high
    t, bootstrap = held / 2000
    assert .935 < t < .965 and .86 < bootstrap < .9


def test_the_map_compares_each_condition_with_its_start(tmp_path, monkeypatch, capsys):
    # two seeds, two starts; another beta has the SFT run of the foreign pairs
    right = {"600": .7, "600.plain.sft": .8, "600.plain.dpo": .75, "1500": .9, "1500.foreign.sft": .3, "1500.foreign.dpo": .8, "1500.beta1.dpo": .85}
    for seed in (0, 1):
        for start in ("600", "1500"):
            for file, less in (("vqa", 0), ("swap", .05)):
                os.makedirs(tmp_path / f"seed{seed}" / f"{file}-{start}")
                table = {run: {"vision-centric": {"decoded": [v / 2, 0, 1], "restricted": [v - less * ("." in run) + .02 * seed * run.endswith("dpo"), 0, 1]}}
                         for run, v in right.items() if run.split(".")[0] == start}
                (tmp_path / f"seed{seed}" / f"{file}-{start}" / "results.json").write_text(json.dumps({"table": table}))
    monkeypatch.setattr(sys, "argv", ["grids.py", "map", str(tmp_path / "seed0"), str(tmp_path / "seed1"), "--out", str(tmp_path / "out")])
    grids.main()
    found = json.load(open(tmp_path / "out" / "report.json"))["map"]
    assert list(found) == ["600.plain", "1500.foreign", "1500.beta1"]
    assert found["600.plain"]["restricted"]["sft - start"]["per_seed"] == pytest.approx([.1, .1])
    assert found["600.plain"]["swap"]["dpo - start"]["per_seed"] == pytest.approx([0, .02])
    assert found["1500.beta1"]["restricted"]["dpo - sft"]["per_seed"] == pytest.approx([.55, .57])
    assert found["1500.foreign"]["decoded"]["sft - start"]["mean"] == pytest.approx(-.3)
    assert "+56.0 [+43.3, +68.7]" in capsys.readouterr().out and os.path.getsize(tmp_path / "out" / "report.png") > 10_000


def sweep_folder(path, values):
    """What sweep.sh leaves, {run: (pairs, vision questions, drift)}, with numbers we know"""
    for file, at in (("pairs", 0), ("vqa", 1), ("swap", 1)):
        os.makedirs(path / file)
        cell = {run: {group: {m: [v[at], 0, 1] for m in ("decoded", "restricted")} for group in ("all", "vision-centric")} for run, v in values.items()}
        (path / file / "results.json").write_text(json.dumps({"table": cell}))
    for run, (_, _, drift, *reward) in values.items():
        os.makedirs(path / run)
        more = [{"reward": r} if reward else {} for r in (0, *reward)]                  # the first half does not count
        (path / run / "log.jsonl").write_text("".join(json.dumps({"step": s, "drift_vision": s * drift, **more[s * bool(reward)]}) + "\n" for s in (0, 1)))
    return str(path)


def test_the_lowest_rate_within_two_points_is_picked(tmp_path, monkeypatch, capsys):
    values = {"stage1": (.5, .9, 0), **{f"{arm}-{lr}": (.6, .9, .1) for arm in ("dpo", "dpo_sft", "mpo", "grpo") for lr in ("1e-4", "3e-3")}}
    values |= {"sft-1e-4": (.61, .9, .01), "sft-3e-4": (.781, .5, .05), "sft-1e-3": (.80, .2, .07), "sft-3e-3": (.79, .1, .2)}
    values |= {"grpo-1e-4": (.9, .80, .01, .90), "grpo-3e-3": (.1, .83, .1, .91)}       # by what its samples earned, not by pairs
    monkeypatch.setattr(sys, "argv", ["grids.py", "sweep", sweep_folder(tmp_path / "sweep", values)])
    grids.main()
    said = capsys.readouterr().out
    assert "LR_SFT=3e-4, LR_DPO=1e-4, LR_DPO_SFT=1e-4, LR_MPO=1e-4, LR_GRPO=3e-3" in said
    found = json.load(open(tmp_path / "sweep" / "report.json"))
    assert found["values"]["sft-1e-3"] == pytest.approx({"pairs": .8, "decoded": .2, "restricted": .2, "swap": .2, "drift": .07})
    assert os.path.getsize(tmp_path / "sweep" / "report.png") > 10_000 and "| SFT 3e-4 < | 78.1 |" in open(tmp_path / "sweep" / "report.md").read()


def test_the_path_reads_what_was_logged_beside_each_save(tmp_path, monkeypatch):
    for seed in (0, 1):
        for arm in grids.PATHS:
            table = {name: {"vision-centric": {"restricted": [v - .1 * seed, 0, 1]}} for name, v in (("stage1", .9), ("step-16", .5), ("step-8", .7))}
            os.makedirs(tmp_path / f"seed{seed}" / f"{arm}.swap")
            (tmp_path / f"seed{seed}" / f"{arm}.swap" / "results.json").write_text(json.dumps({"table": table}))
            os.makedirs(tmp_path / f"seed{seed}" / arm)
            lines = [json.dumps({"step": step, "loss": 3 - step / 10, "drift_vision": step / 1000}) + "\n" for step in (0, 6, 8, 14, 15)]
            (tmp_path / f"seed{seed}" / arm / "log.jsonl").write_text("".join(lines))
    monkeypatch.setattr(sys, "argv", ["grids.py", "path", str(tmp_path / "seed0"), str(tmp_path / "seed1"), "--out", str(tmp_path / "out")])
    grids.main()
    found = json.load(open(tmp_path / "out" / "report.json"))
    assert found["steps"] == [0, 8, 16] and found["path"]["dpo"]["swap"] == [pytest.approx([90, 70, 50]), pytest.approx([80, 60, 40])]
    # a save after 8 steps stands between the lines of steps 6 and 8, one after 16 has its own line, that of step 15
    assert found["path"]["sft"]["loss"][0] == pytest.approx([3, 2.4, 1.5]) and found["path"]["sft"]["drift_vision"][1] == pytest.approx([0, .6, 1.5])
    assert "| 85 | 65 | 45 |" in open(tmp_path / "out" / "report.md").read() and os.path.getsize(tmp_path / "out" / "report.png") > 10_000
