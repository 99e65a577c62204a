"""The benchmark measures one and the same step: every variant's loss, gradient norm and update, and the rows that it writes."""
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

import bench
from model import MLLM
from train_dpo import dpo_loss

PAIRS, STEPS = 4, 2
ARGS = SimpleNamespace(grad_checkpoint=False, compile=False, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("models"))
    bench.make_models("drawn", folder)
    return folder


@pytest.fixture(scope="module")
def steps(folder):
    """steps(variant) -> what `our_steps` reports"""
    records = bench.make_records("drawn", PAIRS * STEPS)
    return lambda variant: bench.our_steps(variant, folder, records, PAIRS, ARGS, torch.device("cpu"), contextlib.nullcontext, False)[0]


@pytest.fixture(scope="module")
def oracle(folder):
    """Losses and gradient norms of the same steps by the slow path, one response at a time: {"dpo": [(loss, norm), ...], "sft": [...]}"""
    records, results = bench.make_records("drawn", PAIRS * STEPS), {}
    for loss_name in ("dpo", "sft"):
        model, reference = MLLM.load(folder + "/policy"), MLLM.load(folder + "/reference")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=bench.LR, weight_decay=0)
        for at in range(0, len(records), PAIRS):
            images, questions, chosen, rejected = ([r[k] for r in records[at:at + PAIRS]] for k in ("image", "question", "chosen", "rejected"))
            if loss_name == "sft":
                loss = -model.logps(images, questions, chosen).sum() / sum(len(model.chat.response_ids(text)) for text in chosen)
            else:
                with torch.no_grad():
                    fixed = [reference.logps(images, questions, texts) for texts in (chosen, rejected)]
                loss = dpo_loss(*[model.logps(images, questions, texts) for texts in (chosen, rejected)], *fixed, .1)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            results.setdefault(loss_name, []).append((float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))))
            optimizer.step()
    return results


@pytest.mark.parametrize("variant", [v for v in bench.DPO + bench.SFT if not v.startswith("trl")])
def test_every_variant_is_the_same_step(variant, steps, oracle):
    # loss and gradient norm of both steps; the second also depends on the first one's update
    measured = steps(variant)
    for step, (loss, norm) in zip(measured, oracle["sft" if variant in bench.SFT else "dpo"], strict=True):
        assert step["loss"] == pytest.approx(loss, rel=1e-5) and step["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert step["seconds"] > 0
    assert (measured[0]["reference_seconds"] > 0) == (variant in ("cached_reference", "shared_prefix", "tree"))
    assert abs(oracle["dpo"][0][0] - .6931) > 1e-3  # policy and reference are apart: at log 2 nothing would be tested


def test_variants_share_what_they_say(folder):
    # the pictures that are encoded and the tokens that are read, of 4 pairs about one picture
    model, records = MLLM.load(folder + "/policy"), bench.make_records("drawn", 4)
    size = {v: (len(b.pixels), int((b.positions > 0).sum())) for v in bench.DPO[2:] + bench.SFT for b in [bench.layout(model, records, v)]}
    assert {v: s[0] for v, s in size.items()} == {
        "naive": 8, "image_once": 4, "cached_reference": 4, "shared_prefix": 4, "tree": 1, "sft_rows": 4, "sft_tree": 1}
    assert size["naive"][1] == size["image_once"][1] == size["cached_reference"][1] > size["shared_prefix"][1] > size["tree"][1]
    assert size["sft_rows"][1] > size["sft_tree"][1]


def test_rows_and_picture(tmp_path, monkeypatch, capsys):
    # the command as a user types it: a row a variant with the promised fields, a table, a picture
    out = {name: str(tmp_path / name) for name in ("rows.json", "bench.png")}
    monkeypatch.setattr("sys.argv", ["bench.py", "--shapes", "drawn", "--variants", "tree", "--rounds", "1", "--steps", "2", "--pairs", "4",
                                     "--json", out["rows.json"], "--plot", out["bench.png"]])
    bench.main()
    with open(out["rows.json"]) as f:
        rows = json.load(f)
    row, = rows
    assert row["variant"] == row["peer"] == "tree" and row["shape"] == "drawn" and "cpu" in row["device"] and row["speed"] == [1, 1, 1]
    assert row["pairs_per_s"] > 0 and row["peak_mb"] > 0 and abs(row["loss"] - .6931) > 1e-3 and row["grad_norm"] > 0
    assert row["speed_one_epoch"][0] < 1 and all(row["gflop_per_pair"][part] > 0 for part in ("vision", "llm", "head"))
    assert "times as fast" in capsys.readouterr().out and (tmp_path / "bench.png").stat().st_size > 10_000


def test_a_variant_that_differs_stops_the_benchmark():
    good = {"losses": [.7, .6], "grad_norms": [1., 2.]}
    bench.assert_same({"naive": good, "tree": {"losses": [.7, .6 + 1e-7], "grad_norms": [1., 2.]}, "sft_rows": {"losses": [6.], "grad_norms": [1.]}}, 1e-5)
    with pytest.raises(SystemExit, match=r"tree differs from naive: grad_norms\[1\]"):
        bench.assert_same({"naive": good, "tree": {"losses": [.7, .6], "grad_norms": [1., 2.001]}}, 1e-5)


@pytest.mark.parametrize("compact", [False, True])
def test_trl_takes_the_same_steps(compact, folder, oracle):
    # TRL's own trainer on our weights, as it comes and with response tokens only; runs where TRL is installed
    pytest.importorskip("trl", reason="TRL is an optional extra of the benchmark: pip install trl==1.16.0")
    from bench_trl import trl_steps
    steps = trl_steps(folder + "/policy", folder + "/reference", bench.make_records("drawn", PAIRS * STEPS), PAIRS, STEPS, bench.LR, compact, False,
                      lambda: bench.Meter(torch.device("cpu"), False))
    for step, (loss, norm) in zip(steps, oracle["dpo"], strict=True):
        assert step["loss"] == pytest.approx(loss, rel=1e-5) and step["grad_norm"] == pytest.approx(norm, rel=1e-5)
