"""The transplant: connectors, what is kept and what is frozen, the count of operations, and the report, against plain arithmetic."""
import importlib
import json
import os
import subprocess

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import checkpoints
import report
import train_sft
from model import MLLM, Connector, InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start(*flags):
    """The model that train_sft.py begins with, given these flags"""
    torch.manual_seed(1)
    return train_sft.start(train_sft.parser.parse_args([*map(str, flags), "--out", "unused"]))


def test_linear_connector_is_one_linear_map(start_run):
    # superposition holds for it and not for the MLP; no GELU, no second layer
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 16, 5)
    linear, mlp = Connector(5, 7, pool=2, hidden=0), Connector(5, 7, pool=2)
    additive = lambda c: torch.allclose(c(x + y, (4, 4)) + c(torch.zeros_like(x), (4, 4)), c(x, (4, 4)) + c(y, (4, 4)), atol=1e-5)
    assert additive(linear) and not additive(mlp)
    assert {k: tuple(v.shape) for k, v in linear.state_dict().items()} == {"up.weight": (7, 20), "up.bias": (7,)}


@pytest.mark.parametrize("flags, hidden", [(["--connector", "linear"], 0), (["--connector", "mlp"], 32), ([], 32)])
def test_connector_comes_back_from_a_run_as_it_was(flags, hidden, start_run, vision_dirs, llm_dirs, tmp_path, pictures):
    model = start("--vision", vision_dirs["siglip"], "--llm", llm_dirs["qwen2"], *flags)
    assert (model.connector.down.in_features if model.connector.down else 0) == hidden
    model.save(str(tmp_path / "run"))
    again, pixels = MLLM.load(str(tmp_path / "run")), model.pixels(pictures)
    assert torch.equal(again.image_tokens(pixels), model.image_tokens(pixels))


def test_first_layer_is_kept_and_the_second_is_fresh(start_run, llm_dirs):
    # "1+1": one kept and frozen, one new; 2 keeps both
    old = load_file(os.path.join(start_run, "connector.safetensors"))
    vision = os.path.join(start_run, "vision")
    fresh = start("--vision", vision, "--llm", llm_dirs["qwen2"]).connector.state_dict()
    assert all(not torch.equal(fresh[name], old[name]) for name in old)
    for flags, kept in (([], {"up.weight", "up.bias"}), (["--keep_layers", 1], {"up.weight", "up.bias"}), (["--keep_layers", 2], set(old))):
        model = start("--vision", vision, "--llm", llm_dirs["qwen2"], "--connector_from", start_run, *flags)
        assert {name for name, t in model.connector.state_dict().items() if torch.equal(t, old[name])} == kept
        assert {name for name, p in model.connector.named_parameters() if not p.requires_grad} == kept


def test_the_fresh_llm_is_the_same_whatever_the_encoder(tmp_path):
    # the random control, which draws its encoder first, and an encoder from a folder: LLM and connector start alike
    torch.manual_seed(9)
    import scenes
    scenes.tiny_vision(str(tmp_path / "vision"))
    models = [start("--vision", vision, "--lr_vision", 0, "--pool", 2) for vision in ("tiny", tmp_path / "vision")]
    for a, b in zip(*([*model.llm.parameters(), *model.connector.parameters()] for model in models)):
        assert torch.equal(a, b)
    assert not torch.equal(*(model.vision.embeddings.position_embedding.weight for model in models))


def test_a_kept_layer_may_be_as_wide_as_its_old_llm(start_run, tmp_path, pictures):
    # the new LLM has another width: the kept layer keeps its own, the new one leads over, and the run opens again
    import scenes
    scenes.tiny_llm(str(tmp_path / "llm"), ["a red ring"] * 3, width=48, layers=1)
    model = start("--vision", os.path.join(start_run, "vision"), "--llm", tmp_path / "llm", "--connector_from", start_run)
    assert (model.connector.up.out_features, model.connector.down.in_features, model.connector.down.out_features) == (32, 32, 48)
    model.save(str(tmp_path / "run"))
    pixels = model.pixels(pictures)
    assert torch.equal(MLLM.load(str(tmp_path / "run")).image_tokens(pixels), model.image_tokens(pixels))
    with pytest.raises(InputError, match=r"its down.bias is \(32,\), this model needs \(48,\)"):
        start("--vision", os.path.join(start_run, "vision"), "--llm", tmp_path / "llm", "--connector_from", start_run, "--keep_layers", 2)


def test_what_does_not_fit_is_said(start_run, vision_dirs, llm_dirs, tmp_path):
    vision = os.path.join(start_run, "vision")
    start("--vision", vision, "--llm", llm_dirs["qwen2"], "--connector", "linear").save(str(tmp_path / "linear"))
    for flags, message in ((["--vision", "tiny", "--connector_from", start_run], r"its up.weight is \(32, 16\), this model needs \(32, 256\)"),
                           (["--vision", vision, "--keep_layers", 1], "--keep_layers needs --connector_from"),
                           (["--vision", vision, "--connector", "linear", "--connector_from", start_run], "use only one"),
                           (["--vision", vision, "--connector_from", tmp_path / "linear"], "single linear layer"),
                           (["--init", start_run, "--connector_from", start_run], "leave --connector_from out"),
                           (["--init", start_run, "--connector", "linear"], "leave --connector out")):
        with pytest.raises(InputError, match=message):
            start(*flags)
    with pytest.raises(FileNotFoundError):
        start("--vision", vision, "--connector_from", tmp_path / "nowhere")


def test_transplanted_encoder_is_frozen_and_read_at_its_own_layer(make, llm_dirs, tmp_path, monkeypatch):
    # the export says at which layer it was read; training with --lr_vision 0 leaves every byte of it, and trains the rest
    source = make(feature_layer=1)
    source.save(str(tmp_path / "run"))
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--vision", str(tmp_path / "run" / "vision"), "--llm", llm_dirs["qwen2"], "--lr_vision", "0",
                                     "--n", "8", "--batch_size", "4", "--lr", "1e-2", "--compile", "false", "--out", str(tmp_path / "new")])
    train_sft.main()
    new, file = MLLM.load(str(tmp_path / "new")), "model.safetensors"
    assert new.feature_layer == 1 and len(new.vision.state_dict()) == len(source.vision.state_dict())
    old_weights, new_weights = (load_file(str(tmp_path / run / "vision" / file)) for run in ("run", "new"))
    assert old_weights.keys() == new_weights.keys() and all(torch.equal(old_weights[k], new_weights[k]) for k in old_weights)
    assert json.load(open(tmp_path / "new" / "config.json"))["flops"] > 0
    assert not torch.equal(new.llm.get_input_embeddings().weight, make().llm.get_input_embeddings().weight)


def test_flops_are_those_of_the_second_step_times_the_steps_taken(start_run, tmp_path):
    # a matrix product by hand: 2 m n k forward, twice that backward (the input has a gradient too)
    args = train_sft.parser.parse_args(["--out", str(tmp_path / "out")])
    run, layer = checkpoints.Run(args, MLLM.load(start_run), None, range(5)), nn.Linear(30, 20, bias=False)
    for step, sizes in enumerate(((11,), (7, 3), (13,))):
        for m in run.count_flops(step, sizes):
            assert bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) == (step == 1)  # elsewhere nothing is in the way
            layer(torch.randn(m, 30, requires_grad=True)).sum().backward()
    assert run.step_flops == 3 * 2 * (7 + 3) * 30 * 20
    for step in (0, 1, 2, 4):                                                   # in step 3 was no row that could be used
        run.step(step, {"loss": torch.tensor(1.), "grad_norm": torch.tensor(1.)})
    run.finish()
    assert json.load(open(tmp_path / "out" / "config.json"))["flops"] == 4 * run.step_flops


def test_transplant_compares_like_with_like(tmp_path):
    """What transplant.sh would run, recorded by a python that only writes down its arguments: every flag parses, and within a seed the heads
    differ in their encoder and connector alone."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$RECORD"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "SEEDS": "0 1", "OUT": str(tmp_path / "t")}
    subprocess.run(["bash", os.path.join(ROOT, "transplant.sh")], env=env, check=True, capture_output=True)
    runs = {}
    for line in open(tmp_path / "record"):
        script, *flags = line.split()
        parsed = importlib.import_module(os.path.basename(script).removesuffix(".py")).parser.parse_args(flags)
        runs[parsed.out] = (os.path.basename(script), vars(parsed))
    for seed in ("seed0", "seed1"):
        folder = f"{tmp_path}/t/{seed}/"
        arms = [runs[folder + arm] for arm in ("more", "sft", "dpo")]
        assert [script for script, _ in arms] == ["train_sft.py", "train_sft.py", "train_dpo.py"]
        assert len({(a["init"], a["n"], a["epochs"], a["lr"], a["seed"], a["batch_size"]) for _, a in arms}) == 1
        assert arms[1][1]["data"] == arms[2][1]["data"]                             # the very same pairs
        heads = {name.removeprefix(folder): a for name, (_, a) in runs.items() if name.startswith(folder) and "." in os.path.basename(name)}
        assert set(heads) == {f"{e}.{c}" for e in report.ENCODERS for c in ("linear", "mlp")} | {f"{e}.1+1" for e in ("start", "sft", "dpo")}
        same = lambda a: {k: v for k, v in a.items() if k not in ("out", "vision", "connector", "connector_from")}
        assert all(same(a) == same(heads["start.linear"]) and a["lr_vision"] == 0 for a in heads.values())
        assert all(a["vision"] == f"{folder}{name.split('.')[0]}/vision" for name, a in heads.items() if not name.startswith("random"))
        assert (probed := runs[folder + "probe"][1])["world"] == "noisy" and len(probed["encoders"]) == 5
        assert set(runs[folder + "vqa"][1]["runs"]) == {folder + name for name in heads}
    seeds = [runs[f"{tmp_path}/t/{seed}/start.mlp"][1]["seed"] for seed in ("seed0", "seed1")]
    assert len(set(seeds)) == 2 and runs[f"{tmp_path}/t"][1]["transplant"]


def test_transplant_report_is_paired_within_a_seed(tmp_path, capsys):
    """Two seeds of made-up results: means, differences to the start, a t interval by hand, and the FLOPs as shares."""
    rng, right = np.random.default_rng(0), {}
    heads = [f"{e}.{c}" for e in report.ENCODERS for c in ("linear", "mlp")] + [f"{e}.1+1" for e in ("start", "sft", "dpo")]
    for seed in (0, 1):
        for run, flops in (("start", 200.), ("more", 20.), ("sft", 10.), ("dpo", 40.), ("large", 400.), ("start.linear", 50.)):
            os.makedirs(tmp_path / f"s{seed}" / run)
            (tmp_path / f"s{seed}" / run / "config.json").write_text(json.dumps({"flops": flops * (1 + seed)}))
        right[seed] = {head: {kind: {"restricted": [float(rng.random()), 0, 1]} for kind in report.ASKED} for head in heads}
        probed = {encoder: {measure: {"value": [.1 * seed, 0, 1]} for measure in report.PROBED} for encoder in report.ENCODERS}
        for file, table in (("vqa", right[seed]), ("probe", probed)):
            os.makedirs(tmp_path / f"s{seed}" / file)
            (tmp_path / f"s{seed}" / file / "results.json").write_text(json.dumps({"table": table}))
    report.report_transplant([str(tmp_path / "s0"), str(tmp_path / "s1")], str(tmp_path / "out"))
    found = json.load(open(tmp_path / "out" / "report.json"))
    assert found["flops"]["dpo"] == 60 and "DPO, its reference apart: 60 FLOPs, 20 % of what trained the start" in capsys.readouterr().out
    value = lambda seed, head: right[seed][head]["shape"]["restricted"][0]
    row, d = found["rows"]["dpo, linear, shape"], [value(s, "dpo.linear") - value(s, "start.linear") for s in (0, 1)]
    assert row["mean"] == pytest.approx((value(0, "dpo.linear") + value(1, "dpo.linear")) / 2)
    assert row["minus_start"]["mean"] == pytest.approx(sum(d) / 2)
    half = 12.706 * abs(d[0] - d[1]) / 2                                            # t(.975, 1 degree) x sd / sqrt(2)
    assert row["minus_start"]["high"] - row["minus_start"]["low"] == pytest.approx(2 * half)
    assert found["rows"]["large, probe, logistic top-1"]["per_seed"] == [0, .1]
    assert "random, 1+1, shape" not in found["rows"] and (tmp_path / "out" / "report.png").stat().st_size > 20_000


def test_dpo_starts_at_zero_to_the_last_bit_while_operations_are_counted(start_run, tmp_path, monkeypatch):
    # compiled, as users run it: counting sets compiled code aside, and must not do so where reference and policy are still equal
    import train_dpo
    monkeypatch.setattr("sys.argv", ["train_dpo.py", "--init", str(start_run), "--n", "8", "--batch_size", "4", "--epochs", "1", "--log_every", "1",
                                     "--out", str(tmp_path / "dpo")])
    train_dpo.main()
    first = json.loads(open(tmp_path / "dpo" / "log.jsonl").readline())
    assert first["chosen_reward"] == first["rejected_reward"] == 0 and first["accuracy"] == .5
    assert json.load(open(tmp_path / "dpo" / "config.json"))["flops"] > 0
