"""Both trainers, run as a user runs them (their own main), on tiny models; and the equations by hand."""
import importlib.util
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import common
import data
import model as model_file
import scenes
import train_dpo
import train_sft
import training
from model import MLLM, InputError
from train_dpo import dpo_loss

SCRIPTS = {"sft": train_sft, "dpo": train_dpo}
PAIRS = "scenes/train/foreign"
both = pytest.mark.parametrize("stage", SCRIPTS)


@pytest.fixture
def start_run(start_run, tmp_path_factory):
    """The run to start from, a copy for each test: what DPO remembers of its reference is kept beside it"""
    return shutil.copytree(start_run, str(tmp_path_factory.mktemp("runs") / "start"))


@pytest.fixture
def train(start_run, tmp_path, monkeypatch):
    """train("sft", "--steps", 2, ...) -> (folder of the finished run, its log lines); 12 pairs, 6 a step, from `start_run`"""
    def train(stage, *flags, init=start_run, out="out"):
        argv = [f"train_{stage}.py", "--init", init, "--data", PAIRS, "--out", tmp_path / out, "--n", 12, "--batch_size", 6, "--epochs", 1,
                "--lr", 1e-3, "--log_every", 1, "--compile", "false", "--max_bad", 1, *flags]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        SCRIPTS[stage].main()
        with open(tmp_path / out / "log.jsonl") as f:
            return str(tmp_path / out), [json.loads(line) for line in f]
    return train


def row_order(rows, per_tree=4):
    """The rows of each step, in order, of a run with the flags above"""
    return [sum(step, []) for step in data.order(rows.trees(per_tree), 6, 1, 0)]


def weights(run):
    """{name: tensor} of a whole run directory"""
    return {f"{part}.{k}": v for part, file in (("vision", "vision/model"), ("llm", "llm/model"), ("connector", "connector"))
            for k, v in load_file(os.path.join(run, file + ".safetensors")).items()}


# ---- the equations ---------------------------------------------------------------------------------------------------------


def by_hand(pc, pr, rc, rr, beta, smoothing):
    """One pair in Python floats: PIVOT Eq. 1, with a share `smoothing` of the swapped pair (cDPO)"""
    z = beta * ((pc - rc) - (pr - rr))
    log_sigmoid = lambda z: -math.log(1 + math.exp(-z))
    return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)


@pytest.mark.parametrize("beta, smoothing", [(.1, 0.), (.5, 0.), (.1, .2), (1., .5)])
def test_dpo_loss_is_the_equation(beta, smoothing):
    # values, rewards and gradient in float64 against Python floats and central differences
    torch.manual_seed(0)
    logps = (torch.randn(4, 7, dtype=torch.double) * 5 - 20).requires_grad_(True)
    losses, chosen, rejected = dpo_loss(*logps, beta, label_smoothing=smoothing)
    rows = logps.detach().T.tolist()
    torch.testing.assert_close(losses, torch.tensor([by_hand(*row, beta, smoothing) for row in rows], dtype=torch.double), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chosen, torch.tensor([beta * (pc - rc) for pc, _, rc, _ in rows], dtype=torch.double), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rejected, torch.tensor([beta * (pr - rr) for _, pr, _, rr in rows], dtype=torch.double), rtol=1e-12, atol=1e-12)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    for b, row in enumerate(rows):
        for i in range(4):
            up, down = ([v + d * (i == j) for j, v in enumerate(row)] for d in (1e-5, -1e-5))
            assert float(logps.grad[i, b]) == pytest.approx((by_hand(*up, beta, smoothing) - by_hand(*down, beta, smoothing)) / 2e-5, abs=1e-8)


def test_dpo_loss_starts_at_log_2_and_never_overflows():
    # policy = reference: log 2 and zero rewards for any beta and smoothing; far apart: finite, and right in the limit
    x, y = torch.tensor([-3., -70.]), torch.tensor([-5., -20.])
    for smoothing in (0., .3):
        losses, chosen, rejected = dpo_loss(x, y, x, y, beta=.1, label_smoothing=smoothing)
        assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7) and not chosen.any() and not rejected.any()
    losses, *_ = dpo_loss(torch.tensor([-1e4, 0.]), torch.tensor([0., -1e4]), torch.zeros(2), torch.zeros(2), beta=1.)
    assert losses.tolist() == [1e4, 0.]


def tiny(make):
    return make(), SimpleNamespace(lr=1e-3, lr_vision=1e-4, lr_connector=None, lr_llm=2e-3, warmup=.25, clip=1.0, optimizer="adamw", weight_decay=0.0, shard=False)


def test_the_schedule_is_the_formula(make):
    # linear warm-up to the peak of each part, then half a cosine towards zero
    model, args = tiny(make)
    optimizer, total, warmup = training.Optimizer(model, args, 12), 12, 3
    for step in range(total):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        reported = optimizer.step(step)["lr"]
        scale = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        rates = {id(p): group["lr"] for group in optimizer.optimizers[0].param_groups for p in group["params"]}
        for part, peak in (("vision", 1e-4), ("connector", 1e-3), ("llm", 2e-3)):
            assert all(rates[id(p)] == pytest.approx(scale * peak, rel=1e-9) for p in model.parts()[part].parameters() if p.requires_grad)
        assert reported == pytest.approx(scale * 2e-3, rel=1e-9)
        assert all(p.grad is None for p in model.parameters())  # cleared for the next step


def test_clipping_and_gradient_norms(make):
    # norms are reported before clipping, each part's and the whole; the update sees a gradient of norm `clip`
    model, args = tiny(make)
    optimizer = training.Optimizer(model, args, 4)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = {name: math.sqrt(sum(float(p.grad.double().square().sum()) for p in part.parameters())) for name, part in model.parts().items()}
    seen = []
    monkey_step = optimizer.optimizers[0].step
    optimizer.optimizers[0].step = lambda: (seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))), monkey_step())
    stats = optimizer.step(0)
    assert {name: float(stats[f"grad_norm_{name}"]) for name in norm} == pytest.approx(norm, rel=1e-5)
    assert float(stats["grad_norm"]) == pytest.approx(math.sqrt(sum(n**2 for n in norm.values())), rel=1e-5)
    assert seen == [pytest.approx(1.0, rel=1e-4)]


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_muon_takes_the_matrices_inside_the_layers(llm, make):
    # every trained parameter is in exactly one optimiser; embeddings, the LM head (tied or not), vectors and convolutions stay with AdamW
    model, args = make(llm=llm), tiny(make)[1]
    args.optimizer = "muon"
    adamw, muon = ([id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in training.Optimizer(model, args, 4).optimizers)
    assert sorted(adamw + muon) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[p].startswith("connector") or "layers." in names[p] for p in muon)
    assert len(muon) == 2 + 2 * 6 + 2 * 7  # connector; 2 encoder layers (the third is off) of q k v out fc1 fc2; 2 LLM layers of q k v o gate up down


def test_drift_is_the_relative_distance(make):
    # |w - w0| / |w0| of each part: 0 at the start, exact for a known move, independent of later changes
    model = make()
    drift = training.Drift(model)
    assert drift() == {"drift_vision": 0.0, "drift_connector": 0.0, "drift_llm": 0.0}
    start = {name: torch.cat([p.detach().flatten() for p in part.parameters()]).clone() for name, part in model.parts().items()}
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(1.25)
        for parameter in model.llm.parameters():
            parameter.add_(.01)
    assert drift()["drift_connector"] == pytest.approx(.25, rel=1e-5) and drift()["drift_vision"] == 0.0
    assert drift()["drift_llm"] == pytest.approx(float(.01 * len(start["llm"])**.5 / start["llm"].norm()), rel=1e-4)


# ---- whole runs ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("pairs, micro_batches", [(PAIRS, (1, 2, 3, 4)), (PAIRS + "/2", (1, 2, 3, 4))])
def test_accumulation_is_the_full_batch_and_a_seed_is_a_run(stage, pairs, micro_batches, train, start_run):
    # micro-batches of 1, 2, 3, 4 and 6 of answers of unequal length, with a picture each or with one for two rows:
    # the same weights after two steps; the same command twice: the same bits
    start = weights(start_run)
    full, lines = train(stage, "--data", pairs, out="full")
    again, _ = train(stage, "--data", pairs, out="again")
    full = weights(full)
    assert len(lines) == 2 and all(torch.equal(a, b) for a, b in zip(full.values(), weights(again).values(), strict=True))
    for micro in micro_batches:
        run, micro_lines = train(stage, "--data", pairs, "--micro_batch", micro, out=f"micro{micro}")
        for name, value in weights(run).items():
            if name.startswith("vision") and "k_proj.bias" in name:
                continue  # softmax does not see it: its gradient is rounding noise, which Adam scales up
            moved = (full[name] - start[name]).norm()  # rounding of a near-zero gradient turns single weights, a wrong mean turns all
            assert (value - full[name]).norm() <= 1e-2 * moved, name
        for line, expected in zip(micro_lines, lines, strict=True):
            for key in {"loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward", "grad_norm"} & set(line):
                assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-5), (micro, key)
    other, _ = train(stage, "--data", pairs, "--seed", 1, out="other")
    assert not torch.equal(weights(other)["connector.up.weight"], full["connector.up.weight"])


@both
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", ["vision", "llm", "connector", None])
def test_what_is_frozen_stays_and_all_else_moves(stage, checkpointing, frozen, train, start_run):
    # bit for bit: a part with rate 0, and the encoder's unused tail, are as they were; every other tensor has changed
    flags = ([f"--lr_{frozen}", 0] if frozen else []) + (["--grad_checkpoint"] if checkpointing else [])
    run, lines = train(stage, "--steps", 1, *flags)
    before, after = weights(start_run), weights(run)
    assert before.keys() == after.keys()
    for name in before:
        unused = any(word in name for word in ("layers.2.", "post_layernorm", ".head.")) and name.startswith("vision")
        stays = unused or (frozen and name.startswith(frozen))
        assert torch.equal(before[name], after[name]) == bool(stays), name
    for part in ("vision", "connector", "llm"):
        assert (lines[0][f"drift_{part}"] == 0) == (lines[0][f"grad_norm_{part}"] == 0) == (part == frozen)


@both
def test_gradient_checkpointing_changes_no_weight(stage, train):
    # less memory, the same run
    plain, _ = train(stage, out="plain")
    checkpointed, _ = train(stage, "--grad_checkpoint", out="checkpointed")
    for (name, a), b in zip(weights(plain).items(), weights(checkpointed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("vision, llm", [("dinov2_with_registers", "llama"), ("vit_mae", "qwen3"), ("clip_full", "smollm2")])
def test_other_families_train_whole(vision, llm, train, make, tmp_path):
    # one DPO step: every parameter that the model says is trained has moved, DINOv2's mask token (which no gradient reaches) and the tail have not
    make(vision, llm).save(tmp_path / "start")
    run, _ = train("dpo", "--steps", 1, "--grad_checkpoint", init=tmp_path / "start")
    before, after = MLLM.load(tmp_path / "start"), MLLM.load(run)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == (not a.requires_grad) == name.endswith("mask_token"), name


def slow_logps(model, rows, numbers, field):
    records = [rows[i] for i in numbers]
    with torch.no_grad():
        return model.eval().logps([r["image"] for r in records], [r["question"] for r in records], [r[field] for r in records]).double()


trees = pytest.mark.parametrize("pairs, per_tree", [(PAIRS, 4), (PAIRS + "/3", 4), (PAIRS + "/3", 2), (PAIRS + "/3", 1)])


@trees
def test_logged_sft_loss_is_the_token_mean(pairs, per_tree, train, start_run):
    # each logged loss = the slow path's mean of -log p over the tokens of that step, before its update
    rows = data.load(pairs, "sft", 12)
    model, order, flags = MLLM.load(start_run), row_order(rows, per_tree), ("--data", pairs, "--questions_per_tree", per_tree, "--warmup", 0)
    one_step, _ = train("sft", "--steps", 1, *flags, out="one")
    _, lines = train("sft", *flags, out="two")
    assert sorted(sum(order, [])) == list(range(12))
    for line, numbers, weights_then in zip(lines, order, (model, MLLM.load(one_step)), strict=True):
        n_tokens = sum(len(model.chat.response_ids(rows[i]["answer"])) for i in numbers)
        assert line["tokens"] == n_tokens
        assert line["loss"] == pytest.approx(-float(slow_logps(weights_then, rows, numbers, "answer").sum()) / n_tokens, rel=1e-5)


@trees
def test_logged_dpo_numbers_are_the_equation(pairs, per_tree, train, start_run):
    # every logged number of two steps from slow log-probs and floats; the first line is log 2, rewards 0, accuracy one half
    rows = data.load(pairs, "pairs", 12)
    reference, order = MLLM.load(start_run), row_order(rows, per_tree)
    flags = ("--beta", .3, "--label_smoothing", .1, "--warmup", 0, "--data", pairs, "--questions_per_tree", per_tree)
    one_step, _ = train("dpo", "--steps", 1, *flags, out="one")
    _, lines = train("dpo", *flags, out="two")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["accuracy"] == .5
    assert lines[0]["chosen_reward"] == lines[0]["rejected_reward"] == lines[0]["margin"] == 0
    for line, numbers, policy in zip(lines, order, (reference, MLLM.load(one_step)), strict=True):
        pc, pr, rc, rr = (slow_logps(m, rows, numbers, field) for m in (policy, reference) for field in ("chosen", "rejected"))
        margins = .3 * ((pc - rc) - (pr - rr))
        expected = {"loss": sum(by_hand(*row, .3, .1) for row in zip(*(x.tolist() for x in (pc, pr, rc, rr)))) / 6, "margin": float(margins.mean()),
                    "chosen_reward": float(.3 * (pc - rc).mean()), "rejected_reward": float(.3 * (pr - rr).mean()),
                    "chosen_logp": float(pc.mean()), "rejected_logp": float(pr.mean())}
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=2e-4)
    assert lines[1]["accuracy"] == pytest.approx(float((margins > 0).double().mean()), abs=1e-5) and abs(lines[1]["margin"]) > .01


def test_sft_weight_adds_the_token_mean(train, start_run):
    # with --sft_weight w the first loss is log 2 + w * (SFT's own loss), micro-batched or not
    model, rows = MLLM.load(start_run), data.load(PAIRS, "pairs", 12)
    numbers = row_order(rows)[0]
    n_tokens = sum(len(model.chat.response_ids(rows[i]["chosen"])) for i in numbers)
    expected = math.log(2) - .5 * float(slow_logps(model, rows, numbers, "chosen").sum()) / n_tokens
    _, lines = train("dpo", "--sft_weight", .5, "--steps", 1, "--micro_batch", 4)
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_mpo_is_its_three_terms(train, start_run, tmp_path):
    """0.8 DPO + 0.2 BCO + 1.0 SFT of each step, the mean of all earlier rewards as BCO's shift, micro-batched or not"""
    flags = ("--dpo_weight", .8, "--bco_weight", .2, "--sft_weight", 1, "--beta", .3, "--warmup", 0)
    _, lines = train("dpo", *flags, "--micro_batch", 2)
    _, whole = train("dpo", *flags, out="whole")
    assert lines[1]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-4)
    model, rows = MLLM.load(start_run), data.load(PAIRS, "pairs", 12)
    numbers = row_order(rows)[0]
    n_tokens = sum(len(model.chat.response_ids(rows[i]["chosen"])) for i in numbers)
    sft = -float(slow_logps(model, rows, numbers, "chosen").sum()) / n_tokens
    assert lines[0]["loss"] == pytest.approx(.8 * math.log(2) + .2 * 2 * math.log(2) + sft, rel=1e-5)
    weighed = {}
    for name in ("dpo", "bco", "sft"):                                            # of a second step, each term by itself
        only = [flag for key in ("dpo", "bco", "sft") for flag in (f"--{key}_weight", float(key == name))]
        weighed[name] = train("dpo", *only, "--beta", .3, "--lr", 1e-9, out=name)[1][1]["loss"]  # so small a rate: the start again
    assert weighed["dpo"] == pytest.approx(math.log(2), abs=1e-4) and weighed["bco"] == pytest.approx(2 * math.log(2), abs=1e-4)


def test_bco_shifts_by_the_mean_of_earlier_rewards(train):
    """The second step's BCO loss, from the rewards that the log tells: those of the first step are 0, so the shift is 0; the third's is not"""
    _, lines = train("dpo", "--dpo_weight", 0, "--bco_weight", 1, "--epochs", 2, "--beta", .3)
    rewards = [(line["chosen_reward"] + line["rejected_reward"]) / 2 for line in lines]
    assert rewards[0] == 0 and abs(rewards[1]) > 1e-3
    seen = []
    real = train_dpo.bco_loss
    train_dpo.bco_loss = lambda chosen, rejected, shift: (seen.append(float(shift)), real(chosen, rejected, shift))[1]
    try:
        train("dpo", "--dpo_weight", 0, "--bco_weight", 1, "--epochs", 2, "--beta", .3, "--micro_batch", 3, out="again")
    finally:
        train_dpo.bco_loss = real
    expected = [sum(rewards[:step]) / max(1, step) for step in range(4) for _ in range(2)]
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bco_by_hand():
    """-log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift)), and its gradient"""
    chosen, rejected = torch.tensor([.5, -1.], requires_grad=True), torch.tensor([.2, 3.], requires_grad=True)
    losses = train_dpo.bco_loss(chosen, rejected, .1)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    by_hand = [-math.log(sigmoid(c - .1)) - math.log(sigmoid(-(r - .1))) for c, r in ((.5, .2), (-1, 3))]
    assert losses.tolist() == pytest.approx(by_hand)
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([sigmoid(.5 - .1) - 1, sigmoid(-1.1) - 1])
    assert rejected.grad.tolist() == pytest.approx([sigmoid(.2 - .1), sigmoid(3 - .1)])


@both
def test_a_run_directory_is_complete(stage, train, start_run):
    # what later stages read: finite numbers under the promised names, settings that say what was run, nothing temporary left over
    fields = {"step", "seconds", "loss", "lr", "grad_norm", "dropped", "peak_mb"}
    fields |= {f"{kind}_{part}" for kind in ("grad_norm", "drift") for part in ("vision", "connector", "llm")}
    fields |= {"sft": {"tokens"}, "dpo": {"margin", "accuracy", "pairs_per_s", "chosen_reward", "rejected_reward", "chosen_logp",
                                          "rejected_logp"}}[stage]
    run, lines = train(stage)
    assert [line["step"] for line in lines] == [0, 1]
    assert all(set(line) == fields and all(math.isfinite(v) for v in line.values()) for line in lines)
    with open(os.path.join(run, "config.json")) as f:
        config = json.load(f)
    assert config["parent"] == start_run and config["data"] == [PAIRS] and config["args"]["batch_size"] == 6
    assert config["versions"]["torch"] == torch.__version__ and config["total_steps"] == 2 and config["rows"] == data.load(PAIRS, "pairs", 12).identity()
    assert sorted(os.listdir(run)) == ["config.json", "connector.safetensors", "llm", "log.jsonl", "vision"]
    assert os.listdir(os.path.dirname(run)) == ["out"]


@both
def test_how_often_is_logged_changes_no_weight(stage, train):
    # values stay unread between logged lines; the lines that are there say the same as those of a run that logs every step
    every, lines = train(stage, "--steps", 8, out="every")
    seldom, few = train(stage, "--steps", 8, "--log_every", 5, out="seldom")
    assert [line["step"] for line in lines] == list(range(8)) and [line["step"] for line in few] == [0, 5, 7]
    assert all(torch.equal(a, b) for a, b in zip(weights(every).values(), weights(seldom).values(), strict=True))
    for line in few:
        timed = ("seconds", "pairs_per_s", "peak_mb")
        assert {k: v for k, v in line.items() if k not in timed} == {k: v for k, v in lines[line["step"]].items() if k not in timed}


def test_precision_of_products_is_what_was_asked_for(train):
    # --matmul reaches torch, and the run says so
    for precision in ("highest", "medium", "high"):
        run, _ = train("sft", "--steps", 1, "--matmul", precision, out=precision)
        with open(os.path.join(run, "config.json")) as f:
            assert torch.get_float32_matmul_precision() == json.load(f)["args"]["matmul"] == precision


def test_stage_1_from_nothing(tmp_path, monkeypatch):
    # train_sft.py alone: tiny models with a tokenizer made from the data, and the loss falls
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--vision", "tiny-24-6", "--n", "96", "--epochs", "8", "--batch_size", "16", "--lr", "3e-3",
                                     "--log_every", "1", "--compile", "false", "--out", str(tmp_path / "run")])
    train_sft.main()
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "run/log.jsonl")]
    assert sum(losses[-6:]) < .6 * sum(losses[:6])
    model = MLLM.load(tmp_path / "run")
    assert model.n_image == 4 and model.pool == 2  # 4x4 patches, folded


# ---- what goes wrong -------------------------------------------------------------------------------------------------------


@both
def test_unknown_flags_and_wrong_values_stop_with_2(stage, train, capsys):
    # argparse's exit code 2, and the flag is named
    for flags, named in ((["--learning_rate", "1"], "--learning_rate"), (["--compile", "maybe"], "maybe"), (["--optimizer", "sgd"], "sgd"),
                         (["--matmul", "low"], "low"), (["--reference", "cached"], "cached" if stage == "dpo" else "--reference")):
        with pytest.raises(SystemExit) as stop:
            train(stage, *flags)
        assert stop.value.code == 2 and named in capsys.readouterr().err


@both
def test_what_a_user_can_mend_is_one_line(stage, train, tmp_path):
    # bad data, a folder that is no run, nothing to train: one line and no run directory; a bug of ours keeps its traceback
    for flags, named in ((["--data", "none.jsonl"], "none.jsonl: no such file"), (["--init", tmp_path], "no config.json"),
                         (["--lr", 0], "every learning rate is 0"), (["--data", "scenes/train/red"], "has no column 'question'"),
                         (["--data", "scenes/train/foreign/0"], "is named scenes/SPLIT/TASK")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{named}[^\n]*$"):
            common.cli(lambda: train(stage, *flags))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError):
        common.cli(lambda: 1 / 0)


@both
def test_an_existing_out_is_refused(stage, train, tmp_path):
    # before anything is loaded, and it is not touched
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists already"):
        train(stage)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")


@both
def test_a_loss_that_is_not_a_number_stops_the_run(stage, train, tmp_path, make):
    # the step is named, the log so far is kept, no run directory appears
    with pytest.raises(SystemExit, match=r"step 1: (loss|grad_norm) is (nan|inf)"):
        train(stage, "--lr", 1e30)
    assert os.listdir(tmp_path) == ["out.tmp"] and len((tmp_path / "out.tmp/log.jsonl").read_text().splitlines()) == 1


@both
@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_loss_that_is_not_a_number_is_named_with_its_own_step(stage, log_every, train, tmp_path):
    # found at the next logged step (1, 4, or 5, the last), and still the first such step is named; nothing after it is logged or saved
    message = r"step 1: (loss|grad_norm).* is (nan|inf).* \(rows \d[\d, ]*\)\. A lower --lr usually helps\. The log so far is \S+out\.tmp/log\.jsonl; " \
              "there is no save yet"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        train(stage, "--lr", 1e30, "--epochs", 3, "--log_every", log_every)
    assert os.listdir(tmp_path) == ["out.tmp"] and os.listdir(tmp_path / "out.tmp") == ["log.jsonl"]
    assert [json.loads(line)["step"] for line in open(tmp_path / "out.tmp/log.jsonl")] == [0]


@both
def test_a_loss_that_is_not_a_number_is_found_when_the_last_step_is_dropped(stage, train, tmp_path):
    # the last step has no row that can be used, so it logs nothing: the run still does not end well
    last = data.order([[i] for i in range(4)], 1, 1, 0)[-1][0][0]
    scenes.write_rows(list(scenes.Scenes("train", 4, "foreign")), str(tmp_path / "world"))
    rows = [json.loads(line) for line in open(tmp_path / "world/rows.jsonl")]
    rows[last]["rejected"] = rows[last]["chosen"]
    (tmp_path / "world/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--data", tmp_path / "world/rows.jsonl", "--batch_size", 1, "--log_every", 100)
    _, lines = train(stage, *flags, out="fine")
    assert [line["step"] for line in lines] == [0]
    with pytest.raises(SystemExit, match=r"^step 1: (loss|grad_norm) is (nan|inf)"):
        train(stage, "--lr", 1e30, *flags)
    assert not (tmp_path / "out").exists()


@both
def test_dropped_rows_are_counted_and_named(stage, train, start_run, capsys):
    # rows over --max_length are named on the screen and counted in the log, the others still train
    rows, model = data.load(PAIRS, "pairs", 12), MLLM.load(start_run)
    fields = ("chosen",) if stage == "sft" else ("chosen", "rejected")
    lengths = [len(model.chat.prompt_ids(r["question"], 9)) + max(len(model.chat.response_ids(r[f])) for f in fields) for r in rows]
    limit = sorted(lengths)[8]
    _, lines = train(stage, "--max_length", limit)
    n_dropped = sum(n > limit for n in lengths)
    assert 0 < n_dropped < 5 and lines[-1]["dropped"] == n_dropped
    out = capsys.readouterr().out
    for i, n in enumerate(lengths):
        assert (f"{PAIRS} row {i}: {n} tokens, --max_length is {limit}" in out) == (n > limit)


@both
def test_a_run_without_a_usable_row_fails(stage, train, tmp_path):
    # all rows dropped: nothing was trained, and no run directory pretends otherwise
    with pytest.raises(SystemExit, match="not one row"):
        train(stage, "--max_length", 10)
    assert not (tmp_path / "out").exists()


def test_run_names_stay_apart():
    # short where clear; never "random", the name of probe.py's first row
    assert common.names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert common.names(["x/dpo", "y/dpo"]) == ["x_dpo", "y_dpo"]
    assert "random" not in common.names(["runs/random", "runs/b"]) + common.names(["random"])


def test_init_brings_its_parts_along(start_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--init", str(start_run), "--pool", "1", "--out", str(tmp_path / "out")])
    with pytest.raises(model_file.InputError, match="leave --pool out"):
        train_sft.main()


def test_an_llm_that_scales_its_logits_is_refused(make):
    # the hot path takes logits straight from hidden states and head: a scale between them would be lost in silence
    model = make()
    model.llm.config.logits_scaling = 8.0
    with pytest.raises(model_file.InputError, match="logits_scaling"):
        MLLM(model.vision, model.image_processor, model.llm, model.tokenizer)


# ---- many rows, and other people's tools -----------------------------------------------------------------------------------


@both
def test_a_stream_trains_as_its_rows_would(stage, train, tmp_path):
    # parquet files read as a stream: every row once, the same with a worker, and a first loss as of a file with the stream's first rows
    datasets = pytest.importorskip("datasets")
    rows = [scenes.Scenes("train", 12, "foreign")[i] for i in range(12)]
    table = {"image": [row["image"] for row in rows], **{key: [row[key] for row in rows] for key in ("question", "chosen", "rejected")}}
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(tmp_path / "parquet/0.parquet")
    live = ("--reference", "live") if stage == "dpo" else ()
    flags = ("--data", tmp_path / "parquet", "--stream", 5, "--steps", 3, "--batch_size", 4, *live)
    run, lines = train(stage, *flags, out="streamed")
    again, _ = train(stage, *flags, "--workers", 1, out="again")
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(again).values(), strict=True))
    stream = data.Stream(str(tmp_path / "parquet"), "pairs", 4, 3, 4, 5, 0, n=12)
    records = [stream[item] for step in stream for tree in step for item in tree]
    assert sorted(record["row"] for record in records) == list(range(12)) and len(stream) == len(lines) == 3    # one pass, every row once
    assert sorted(record["chosen"] for record in records) == sorted(table["chosen"]) != [record["chosen"] for record in records]
    with open(os.path.join(run, "config.json")) as f:
        assert "stream of" in json.load(f)["rows"]
    for i, record in enumerate(records[:4]):
        record["image"].save(tmp_path / f"{i}.png")
    (tmp_path / "first.jsonl").write_text("\n".join(json.dumps({**record, "image": f"{i}.png"}) for i, record in enumerate(records[:4])))
    _, alone = train(stage, "--data", tmp_path / "first.jsonl", "--steps", 1, "--batch_size", 4, *live, out="alone")
    assert all(alone[0][key] == pytest.approx(lines[0][key], rel=1e-4) for key in ("loss", "grad_norm_vision", "grad_norm_llm"))


def test_what_a_stream_needs(train, tmp_path):
    # a length, and for DPO a second model: said before anything is loaded
    for stage, flags, message in (("sft", ("--stream", 5), "--stream needs --steps"), ("dpo", ("--stream", 5, "--steps", 2), "add --reference live"),
                                  ("sft", ("--weights", 1, 2), "--weights: give a positive number for each of several sources; there are 1")):
        with pytest.raises(InputError, match=message):
            train(stage, *flags)
    assert os.listdir(tmp_path) == []


@both
def test_a_mixture_trains_on_its_shares(stage, train, monkeypatch):
    # two sources, one three times as often: the batches hold what the weights say
    seen, collate = [], data.Collator.__call__

    def watch(self, trees):
        batch, dropped = collate(self, trees)
        seen.extend(row for row, _ in batch.rows)
        return batch, dropped
    monkeypatch.setattr(data.Collator, "__call__", watch)
    run, _ = train(stage, "--data", "scenes/train/foreign", "scenes/train/plain", "--weights", 3, 1, *(("--reference", "live") * (stage == "dpo")))
    del seen[:1]                                                                            # the example that is shown
    assert len(seen) == 24 and sum(row < 12 for row in seen) == 18 and json.load(open(run + "/config.json"))["data"][1] == "scenes/train/plain"


def test_the_log_is_passed_on(train, monkeypatch, capsys, tmp_path):
    # every line of log.jsonl, value by value, as tensorboard reads it back; a package that is not there is named before anything is loaded
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, message in (("trackio", "argument --report_to: needs that package: pip install trackio"), ("mlflow", "'mlflow' is none of tensorboard")):
        with pytest.raises(SystemExit):
            train("sft", "--report_to", name)
        assert message in capsys.readouterr().err and os.listdir(tmp_path) == []
    monkeypatch.undo()
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    run, lines = train("sft", "--report_to", "tensorboard")
    found = events.EventAccumulator(os.path.join(run, "tensorboard")).Reload()
    for line in lines:
        for key in set(line) - {"step", "seconds"}:
            values = {event.step: event.value for event in found.Scalars(key)}
            assert values[line["step"]] == pytest.approx(line[key], rel=1e-6)


def test_out_of_memory_says_at_which_line_and_what_takes_less(monkeypatch):
    monkeypatch.setattr("sys.argv", [__file__])
    with pytest.raises(SystemExit) as stop:
        common.cli(lambda: torch.empty(10**14))
    said = str(stop.value)
    assert re.search(r"^error: out of memory at line \d+ of \S+test_train.py: common.cli\(lambda: torch.empty", said) and "--micro_batch" in said
    assert "\n" not in said


def test_a_process_that_lost_another_says_so(monkeypatch):
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:4")
    with pytest.raises(RuntimeError):                                                   # alone it is our fault
        common.cli(main)
    monkeypatch.setattr(common.parallel, "WORLD", 2)
    with pytest.raises(SystemExit, match="^error: process 0 of 2 lost another one, whose own message is above"):
        common.cli(main)


def test_max_drift_stops_a_run_where_its_encoder_has_moved_so_far(train, capsys):
    # the same steps as without, up to the first that has gone far enough; and a run directory like any other
    full = train("sft", "--epochs", 3, out="full")[1]
    limit = (full[1]["drift_vision"] + full[2]["drift_vision"]) / 2
    run, lines = train("sft", "--epochs", 3, "--max_drift", limit, out="stopped")
    kept = lambda line: {key: value for key, value in line.items() if key not in ("seconds", "peak_mb")}
    assert len(full) > 3 and list(map(kept, lines)) == list(map(kept, full[:3])) and "stopped     after step 2" in capsys.readouterr().out
    assert MLLM.load(run).n_image and json.load(open(os.path.join(run, "config.json")))["flops"] > 0
    with pytest.raises(InputError, match="--max_drift 0.0 must be above 0"):
        train("sft", "--max_drift", 0, out="none")
