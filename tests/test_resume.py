"""A run that is stopped goes on as if it had not been: the three trainers' own mains, halted in the middle by exceptions, signals, full disks and
losses that are no numbers. What must agree with an uninterrupted run agrees to the last bit."""
import glob
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoints
import common
import data
import rewards
import rows as rows_file
import scenes
import train_dpo
import train_grpo
import train_sft
import training
from model import MLLM

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}
STEPS = [sum(step, []) for step in data.order([[i] for i in range(16)], 2, 1, 0)]                   # the rows of each of 8 steps
EMPTY, MISSING, LONG = {"question": " "}, {"image": "none.png"}, {"question": "what is it? " * 300}
BAD = {STEPS[1][0]: EMPTY, STEPS[3][1]: MISSING, STEPS[6][0]: LONG, STEPS[6][1]: EMPTY}             # nothing of step 6 can be used
TIMED = ("seconds", "pairs_per_s", "samples_per_s", "peak_mb")
GO_ON = "; go on with: python "


class Halt(Exception):
    """What ends a run in the middle; nothing catches it"""


def raising(error):
    def fail(*_, **__):
        raise error
    return fail


halt = raising(Halt)
kill = lambda *signals: lambda optimizer: [os.kill(os.getpid(), number) for number in signals]
handlers = lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def write_rows(folder, n, bad):
    """n preference pairs as JSONL with pictures, those of `bad` with other fields -> the file"""
    scenes.write_rows([scenes.Scenes("train", n, "foreign")[i] for i in range(n)], str(folder))
    rows = [json.loads(line) for line in open(folder / "rows.jsonl")]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({**row, "answer": row["chosen"], **bad.get(i, {})}) for i, row in enumerate(rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows", 16, BAD)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    datasets, folder = pytest.importorskip("datasets"), tmp_path_factory.mktemp("parquet")
    rows = [{**scenes.Scenes("train", 16, "foreign")[i], **{3: EMPTY, 8: EMPTY, 12: LONG}.get(i, {})} for i in range(16)]
    table = {key: [row[key] for row in rows] for key in ("image", "question", "chosen", "rejected")}
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(folder / "0.parquet")
    return folder


@pytest.fixture(scope="module")
def argv(start_run, jsonl, tmp_path_factory):
    """argv("sft", out, *flags) -> the command line of 8 steps of 2 rows, with a save after every second"""
    start = shutil.copytree(start_run, str(tmp_path_factory.mktemp("start") / "start"))             # DPO writes beside it
    return lambda stage, out, *flags: [str(flag) for flag in (
        f"train_{stage}.py", "--init", start, "--data", jsonl, "--out", out, "--batch_size", 2, "--epochs", 1, "--lr", 1e-3, "--log_every", 1,
        "--compile", "false", "--max_bad", 1, "--save_every", 2, "--max_length", 500,
        *("--group", 3, "--max_new_tokens", 4) * (stage == "grpo"), *flags)]


def launch(argv, act={}):
    """Runs a script as its user does; before the optimiser's step number k, act[k](optimizer) is called"""
    real = training.Optimizer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Optimizer, "step", lambda self, step: (act.get(step, id)(self), real(self, step))[1])
        patch.setitem(rewards.KINDS, "exact", lambda said, record: sum(letter < "n" for letter in said) / max(1, len(said)))  # noise can earn it
        patch.setattr("sys.argv", argv)
        common.cli(SCRIPTS[argv[0].removeprefix("train_").removesuffix(".py")].main)


def stopped(argv, act={}):
    """Runs a script that is to stop -> the one line that it says"""
    try:
        launch(argv, act)
    except (SystemExit, Halt) as stop:
        assert "\n" not in str(stop)
        return str(stop)
    pytest.fail("it ran to its end")


def files(folder):
    """{path: digest} of all that lies in a folder"""
    return {os.path.relpath(path, folder): hashlib.sha256(open(path, "rb").read()).hexdigest()
            for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)}


def saves(folder):
    return sorted((name for name in os.listdir(folder) if name.startswith(("step", "saving"))), key=lambda name: (len(name), name))


def outcome(run):
    """All of a finished run that is a function of its flags: weights, log, samples, and what config.json counts"""
    lines, config = [json.loads(line) for line in open(f"{run}/log.jsonl")], json.load(open(f"{run}/config.json"))
    weights = {name: digest for name, digest in files(run).items() if name.endswith(".safetensors") and not name.startswith("step-")}
    samples = open(f"{run}/samples.jsonl").read() if os.path.exists(f"{run}/samples.jsonl") else None
    return (weights, [{k: v for k, v in line.items() if k not in TIMED} for line in lines], samples,
            {key: config[key] for key in ("flops", "dropped", "rows")})


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """whole("sft", *flags) -> the outcome of the run that nothing stops, each run once"""
    known = {}

    def whole(*how):
        if how not in known:
            out = tmp_path_factory.mktemp("whole") / "out"
            launch(argv(how[0], out, *how[1:]))
            known[how] = outcome(out)
        return known[how]
    return whole


@pytest.fixture
def out(tmp_path):
    return tmp_path / "an out"                                                                      # a name that a command has to quote


@pytest.fixture
def halted(argv, out):
    """OUT.tmp of an SFT run that ended in step 5, with saves after 2 and 4 steps"""
    stopped(argv("sft", out, "--keep", 3), {5: halt})
    return f"{out}.tmp"


# ---- the same to the last bit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("sft", "--log_every", 2), ("dpo", "--bco_weight", .5, "--sft_weight", .2, "--beta", .3),
                                 ("sft", "--optimizer", "muon", "--micro_batch", 1, "--workers", 2, "--log_every", 3, "--weight_decay", .1),
                                 ("grpo", "--updates", 2, "--kl", .1, "--kl_target", .01, "--log_every", 3),
                                 ("sft", "--stream", 5, "--steps", 8, "--data", "parquet")], ids=["sft", "dpo", "muon", "grpo", "stream"])
def test_a_resumed_run_is_the_uninterrupted_one(how, argv, whole, out, parquet):
    # weights, log, samples, FLOPs, dropped rows; stopped before the first save, right after one, and right before one
    stage, *flags = [parquet if flag == "parquet" else flag for flag in how]
    updates = 2 if stage == "grpo" else 1
    for step in (1, 2, 5):
        assert stopped(argv(stage, out, *flags, *["--resume"] * (step > 1)), {step * updates + updates - 1: halt}) == ""
        assert saves(f"{out}.tmp") == [f"step-{step // 2 * 2}"] * (step > 1) and not out.exists()
    launch(argv(stage, out, *flags, "--resume"))
    _, lines, samples, counted = resumed = outcome(out)
    assert resumed == whole(stage, *flags) and sum(counted["dropped"].values()) == (3 if "--stream" in how else 4)
    assert (samples is not None) == (stage == "grpo") and len({line["step"] for line in lines}) == len(lines) > 2
    assert stage != "grpo" or len({line["kl_weight"] for line in lines}) > 2 and any(line["reward_std"] > 0 for line in lines)


def test_time_goes_on_where_it_was(argv, halted, out):
    # the clock of the log starts at the save's
    state = json.load(open(f"{halted}/step-4/train_state/state.json"))
    json.dump({**state, "seconds": 5000}, open(f"{halted}/step-4/train_state/state.json", "w"))
    stopped(argv("sft", out, "--resume"), {7: halt})
    launch(argv("sft", out, "--resume"))                                                            # from a save after 6 steps
    assert [json.loads(line)["seconds"] >= 5000 for line in open(out / "log.jsonl")] == [False] * 4 + [True] * 3
    assert json.load(open(out / "config.json"))["seconds"] >= 5000


def test_samples_after_a_save_without_any_are_taken_back(argv, tmp_path, out):
    # GRPO whose first step has no usable row: samples.jsonl begins in step 3, after the save; each is in it once
    flags = ("--data", write_rows(tmp_path / "rows", 16, {row: EMPTY for row in STEPS[0]}), "--log_every", 3, "--save_every", 3)
    launch(argv("grpo", tmp_path / "whole", *flags))
    stopped(argv("grpo", out, *flags), {4: halt})
    launch(argv("grpo", out, *flags, "--resume"))
    assert outcome(out) == outcome(tmp_path / "whole") and [json.loads(line)["step"] for line in open(out / "samples.jsonl")] == [3, 6, 7]


@pytest.mark.parametrize("streamed", [False, True])
def test_what_was_consumed_is_not_decoded_again(streamed, argv, out, parquet, monkeypatch):
    # resumed after 4 of 8 steps: first the example that is shown, then the pictures of the other steps alone
    flags = ("--stream", 5, "--steps", 8, "--data", parquet) if streamed else ()
    stopped(argv("sft", out, *flags), {5: halt})
    opened, real = [], rows_file.open_picture
    monkeypatch.setattr(rows_file, "open_picture", lambda image, folder=None: (opened.append(image), real(image, folder))[1])
    launch(argv("sft", out, *flags, "--resume"))
    rest = [f"images/{row}.png" for step in STEPS[4:] for row in step if BAD.get(row) is not EMPTY]
    if streamed:
        items = [item for step in list(data.Stream(str(parquet), "sft", 2, 8, 4, 5, 0))[4:] for tree in step for item in tree]
        rest = [row["image"]["bytes"] for _, _, row, _ in items if row["question"].strip()]
    assert opened[1:] == rest and 4 < len(rest) < 9


def test_every_generator_goes_on(tmp_path):
    # Python's, numpy's and torch's, through files; the normal numbers that come in pairs too
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist(), torch.randn(1).tolist())
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    numbers, tensors = checkpoints.random_state()
    save_file(tensors, tmp_path / "tensors")
    numbers, expected = json.dumps(numbers), draw()
    assert draw() != expected
    checkpoints.set_random_state(json.loads(numbers), load_file(tmp_path / "tensors"))
    assert draw() == expected


# ---- signals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, step, flags", [("SIGTERM", 2, ("--workers", 1)), ("SIGINT", 3, ()), ("SIGINT", 5, ("--steps", 7)),
                                               ("SIGTERM", 7, ())])
def test_a_signal_ends_the_step_and_saves(name, step, flags, argv, whole, out):
    # the step is done and saved, the message holds the command that goes on: also at a save, with only dropped rows to come, in the last step
    before = handlers()
    said = stopped(argv("sft", out, *flags), {step: kill(getattr(signal, name))})
    assert re.match(rf"stopped by {name} after {step + 1} of \d+ steps; the last save is {re.escape(str(out))}.tmp/step-{step + 1}{GO_ON}train_sft.py --init", said)
    assert saves(f"{out}.tmp") == [f"step-{step + 1}"] and handlers() == before
    assert [json.loads(line)["step"] for line in open(f"{out}.tmp/log.jsonl")] == [done for done in range(step + 1) if done != 6]
    launch(shlex.split(said.split(GO_ON)[1]))
    assert outcome(out) == whole("sft", *flags)


def test_a_second_signal_ends_at_once(argv, out):
    # no save is written, and both signals mean again what they did
    before = handlers()
    assert stopped(argv("sft", out), {3: kill(signal.SIGTERM, signal.SIGINT)}) == "stopped"
    assert saves(f"{out}.tmp") == ["step-2"] and handlers() == before


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_to_all_processes_spares_the_workers(name, argv, out):
    # Ctrl-C, timeout, systemd and Slurm tell the whole group: those who decode pictures are no reason to lose the step
    def kill_group(optimizer):
        pids = [*(child.pid for child in multiprocessing.active_children()), os.getpid()]
        subprocess.run(["kill", f"-{name}", *map(str, pids)], check=len(pids) == 3)
    assert stopped(argv("sft", out, "--workers", 2), {2: kill_group}).startswith(f"stopped by SIG{name} after 3 of 8 steps; the last save is")


# ---- saves ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_says_how_many_saves_there_are(keep, argv, out):
    # the newest, by number; they are run directories with the weights of their step, in the end too; with 1 none is left
    then = {}
    note = lambda step: lambda optimizer: then.update({f"step-{step}": {k: v.clone() for k, v in optimizer.model.state_dict().items()}})
    flags = ("--data", "scenes/train/foreign", "--n", 13, "--batch_size", 1, "--save_every", 1, "--keep", keep)
    stopped(argv("sft", out, *flags), {10: note(10), 11: note(11), 12: halt})
    assert saves(f"{out}.tmp") == [f"step-{step}" for step in range(1, 13)][-keep:]
    launch(argv("sft", out, *flags, "--resume"), {12: note(12)})
    assert saves(out) == ([] if keep == 1 else list(then)) and not os.path.exists(f"{out}.tmp")
    for name in saves(out):
        found, config = MLLM.load(out / name).state_dict(), json.load(open(out / name / "config.json"))
        assert found.keys() == then[name].keys() and all(torch.equal(found[key], value) for key, value in then[name].items())
        assert f"step-{config['step']}" == name and config["args"]["keep"] == 3 and config["parent"] == argv("sft", out)[2]


def test_half_a_save_is_no_save_and_not_in_the_run(argv, whole, out, monkeypatch):
    # ended at once in the midst of one; what lies there is neither gone on from nor, as none follows it, still there at the end
    real = MLLM.write
    twice = kill(signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(MLLM, "write", lambda self, folder, settings: (real(self, folder, settings), settings["step"] < 4 or twice(None)))
    assert stopped(argv("sft", out)) == "stopped" and set(saves(f"{out}.tmp")) - {"saving"} == {"step-2"}
    monkeypatch.undo()
    launch(argv("sft", out, "--resume", "--save_every", 100))
    assert outcome(out) == whole("sft") and set(os.listdir(out)) == {"config.json", "connector.safetensors", "llm", "log.jsonl", "vision"}


@pytest.mark.parametrize("what, step", [("model", 3), ("moments", 3), ("tokenizer", 3), ("model", 7), ("tokenizer", 7)])  # second save; OUT itself
def test_a_save_that_cannot_be_written(what, step, argv, whole, out, monkeypatch):
    # one line, the save before is untouched and goes on to the same end, what is half written is no save
    full, last, before = "No space left on device (os error 28)", f"{out}.tmp/step-{step - 1}", {}
    place, name, error = {"model": (MLLM, "write", OSError(28, full)), "moments": (checkpoints, "save_file", SafetensorError(full)),
                          "tokenizer": (type(MLLM.load(argv("sft", out)[2]).tokenizer), "save_pretrained", Exception(full))}[what]  # tokenizers' own
    said = stopped(argv("sft", out, "--keep", 2), {step: lambda _: (before.update(files(last)), monkeypatch.setattr(place, name, raising(error)))})
    monkeypatch.undo()
    where = "step 4 could not be saved" if step == 3 else f"{out}.tmp could not be written"
    assert said.startswith(f"error: {where}: ") and full in said and f"; the last save is {last}{GO_ON}" in said
    assert saves(f"{out}.tmp") == (["step-2"] if step == 3 else ["step-4", "step-6"])
    assert files(last) == before != {} and not out.exists()
    launch(shlex.split(said.split(GO_ON)[1]))
    assert outcome(out) == whole("sft")


# ---- what is refused, and what is replaced -------------------------------------------------------------------------------------


def test_what_is_there_is_not_touched(argv, halted, out):
    # OUT.tmp, contradicting flags, OUT: before anything is loaded; where all is done --resume has nothing to do
    before = files(halted)
    assert stopped(argv("sft", out)) == f"error: {halted} is a run that was not finished: --resume goes on with it, --overwrite begins anew"
    assert stopped(argv("sft", out, "--resume", "--overwrite")).startswith("error: --resume goes on with a run and --overwrite begins anew")
    assert files(halted) == before
    launch(argv("sft", out, "--resume"))
    before = files(out)
    assert stopped(argv("sft", out, "--resume")) == "0"
    assert stopped(argv("sft", out)) == f"error: --out {out} exists already; choose another name, or --overwrite it"
    assert files(out) == before and os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("first, stage, flags, named", [
    ("sft", "sft", ("--lr", 2e-3), "--lr 0.001, not 0.002"), ("dpo", "dpo", ("--batch_size", 4), "--batch_size 2, not 4"), ("sft", "dpo", (), ""),
    ("sft", "sft", ("--lr_vision", 0), "--lr_vision None, not 0.0"), ("grpo", "grpo", ("--log_every", 2), "_every 1, not 2"), ("dpo", "sft", (), "")])
def test_other_flags_or_another_script_than_the_save_had(first, stage, flags, named, argv, out):
    # the flag is named with both values, and nothing is lost; SFT has no flag by which it would differ from DPO, and is another script
    stopped(argv(first, out), {3: halt})
    before = files(f"{out}.tmp")
    said = stopped(argv(stage, out, "--resume", *flags))
    assert said.startswith(f"error: {out}.tmp/step-2 ") and named in said and files(f"{out}.tmp") == before


def test_flags_that_change_no_number_may_change(argv, whole, halted, out):
    launch(argv("sft", out, "--resume", "--save_every", 7, "--keep", 2, "--workers", 1, "--max_bad", .9))
    assert outcome(out) == whole("sft") and saves(out) == ["step-4", "step-7"]                      # also after a step without rows


def test_other_rows_than_the_save_had(argv, jsonl, tmp_path, out):
    # the same file with one letter more
    mine = shutil.copytree(jsonl.parent, tmp_path / "mine") / "rows.jsonl"
    stopped(argv("sft", out, "--data", mine), {3: halt})
    mine.write_text(mine.read_text().replace("i see", "i  see", 1))
    expected = f"error: --data {mine} has changed since {out}.tmp/step-2 was written: --resume wants the same rows"
    assert stopped(argv("sft", out, "--data", mine, "--resume")) == expected


STATE, TENSORS = "train_state/state.json", "train_state/tensors.safetensors"
cut_off = lambda name: lambda save: os.truncate(f"{save}/{name}", os.path.getsize(f"{save}/{name}") // 2)
numbers = lambda change: lambda save: (held := json.load(open(f"{save}/{STATE}")), json.dump(change(held), open(f"{save}/{STATE}", "w")))
tensors = lambda change: lambda save: save_file(change(load_file(f"{save}/{TENSORS}")), f"{save}/{TENSORS}")
DAMAGES = {"state cut": cut_off(STATE), "state is a list": numbers(lambda state: [1]), "state lost": lambda save: os.remove(save + "/" + STATE),
           "state without a step": numbers(lambda state: {key: value for key, value in state.items() if key != "step"}),
           "state without numpy": numbers(lambda state: {**state, "random": {"python": state["random"]["python"]}}), "tensors cut": cut_off(TENSORS),
           "tensors of a stranger": tensors(lambda held: {**held, "0/llm.nobody/exp_avg": torch.zeros(2)}),
           "tensors with half a generator": tensors(lambda held: {**held, "rng/cpu": held["rng/cpu"][:99]}),
           "tensors of another shape": tensors(lambda held: {**held, "0/connector.up.weight/exp_avg": torch.zeros(2)}),
           "config.json": cut_off("config.json"), "connector": cut_off("connector.safetensors")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_save_is_one_line(damage, argv, whole, halted, out):
    # it names the save; without that save the one before goes on to the same end
    DAMAGES[damage](f"{halted}/step-4")
    said = stopped(argv("sft", out, "--resume"), {4: halt})
    assert said.startswith("error: ") and f"{halted}/step-4" in said
    if damage.startswith(("state", "tensors")):
        assert re.fullmatch(r"error: (\S+ out.tmp/step-4)/train_state cannot be used \(.+\): remove \1 to go on from an earlier save", said)
    if damage == "state without a step":
        shutil.rmtree(f"{halted}/step-4")
        launch(argv("sft", out, "--resume"))
        assert outcome(out) == whole("sft")


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_processes_do_not_write_one_run(flag, argv, halted, out):
    # whoever holds the log goes on, the other one changes nothing
    hold, before = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()", files(halted)
    with subprocess.Popen([sys.executable, "-c", hold, f"{halted}/log.jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        assert stopped(argv("sft", out, flag)) == f"error: {halted} is being written by another process"
    assert files(halted) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_is_whole(argv, whole, out, monkeypatch):
    # a new run that is stopped or cannot be written leaves OUT as it is, its command goes on with the new one; nothing else is left
    launch(argv("sft", out, "--lr", 2e-3))
    before = files(out)
    with monkeypatch.context() as patch:
        full = lambda _: patch.setattr("model.save_file", raising(OSError(28, "No space left")))
        assert "could not be written" in stopped(argv("sft", out, "--overwrite"), {7: full}) and files(out) == before
    said = stopped(argv("sft", out, "--overwrite"), {4: kill(signal.SIGTERM)})
    assert files(out) == before and saves(f"{out}.tmp") == ["step-5"]
    launch(shlex.split(said.split(GO_ON)[1]))
    assert outcome(out) == whole("sft") and os.listdir(out.parent) == [out.name]


def test_overwrite_after_one_that_was_killed_while_it_replaced(argv, whole, out):
    # what it had moved aside and not yet removed is in nobody's way, nor is all that OUT.tmp holds
    launch(argv("sft", out, "--lr", 2e-3))
    shutil.copytree(out, f"{out}.tmp.old")
    shutil.copytree(out, f"{out}.tmp/step-6")
    launch(argv("sft", out, "--overwrite"))
    assert outcome(out) == whole("sft") and os.listdir(out.parent) == [out.name]


def test_what_appeared_at_out_meanwhile_is_not_replaced(argv, out):
    # without --overwrite: the trained run waits in OUT.tmp
    def appear(optimizer):
        out.mkdir()
        (out / "mine").write_text("precious")
    assert stopped(argv("sft", out), {4: appear}).startswith("error: ")
    assert os.listdir(out) == ["mine"] and os.path.exists(f"{out}.tmp/connector.safetensors")


# ---- rows and numbers that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why, expected", [
    ("x.jsonl row 3: 81 tokens, --max_length is 80", "N tokens, --max_length is N"), ("a/b row 3 question 2: 'answer' is empty", "'answer' is empty"),
    ("me/set row 12 of the shuffled stream: it has no picture", "it has no picture"),
    ("x row 1: its picture cannot be read: /data/7.png (broken data stream)", "its picture cannot be read"),
    ("x row 1: 'image' is a int, must be a path or a picture", "'image' is a int, must be a path or a picture")])
def test_a_reason_has_no_names_and_no_numbers(why, expected):
    assert common.reason(why) == expected and common.reasons(Counter({"late": 1, expected: 3})) == f"3 x {expected}, 1 x late"


def test_a_finished_run_says_what_it_left_out(argv, out, capsys):
    # by reason, in config.json and in the last line on the screen
    launch(argv("sft", out))
    counts = {"'question' is empty": 2, "its picture is missing": 1, "N tokens, --max_length is N": 1}
    assert json.load(open(out / "config.json"))["dropped"] == counts
    assert capsys.readouterr().out.endswith("; dropped: 2 x 'question' is empty, 1 x its picture is missing, 1 x N tokens, --max_length is N\n")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_strict_stops_at_the_first_bad_row(stage, argv, whole, jsonl, out):
    # the row is named; without the flag the run goes on from its last save
    said = stopped(argv(stage, out, "--strict", "--save_every", 1))
    assert said == f"error: --strict: {jsonl} row {STEPS[1][0]}: 'question' is empty" and saves(f"{out}.tmp") == ["step-1"]
    launch(argv(stage, out, "--resume"))
    assert outcome(out) == whole(stage)


def test_max_bad_counts_over_the_whole_run(argv, whole, out):
    # the second bad row of 16 is one too many, also for a resumed run that met only that one; the reasons are said
    for resume in ((), ("--resume",)):
        said = stopped(argv("sft", out, "--max_bad", .12, *resume))
        assert said.startswith("error: 2 rows cannot be used, more than --max_bad 0.12 of all: 1 x 'question' is empty, 1 x its picture is missing")
        assert saves(f"{out}.tmp") == ["step-2"]
    launch(argv("sft", out, "--max_bad", .25, "--resume"))                                          # all four are exactly that share
    assert outcome(out) == whole("sft")


def test_max_bad_is_a_share_of_the_rows(argv, tmp_path, out):
    # 1 of 10 is more than 9 %, in steps of 4, 4 and 2 as well
    flags = ("--data", write_rows(tmp_path / "rows", 10, {9: EMPTY}), "--batch_size", 4)
    assert "1 rows cannot be used" in stopped(argv("sft", tmp_path / "stopped", *flags, "--max_bad", .09))
    launch(argv("sft", out, *flags, "--max_bad", .1))


@pytest.mark.parametrize("stage, step", [("sft", 3), ("dpo", 7)])
def test_weights_that_are_no_numbers_are_never_saved(stage, step, argv, out):
    # by the last update before a save, or before the end, which no loss meets any more
    def spoil(optimizer):
        optimizer.optimizers[0].param_groups[0]["peak"] = float("nan")
    said = stopped(argv(stage, out), {step: spoil})
    assert re.match(r"the last step left weights that are not numbers \(vision\.", said) and not os.path.exists(out)
    assert all(torch.isfinite(value).all() for save in saves(f"{out}.tmp") for value in MLLM.load(f"{out}.tmp/{save}").state_dict().values())


@pytest.mark.parametrize("stage, what, step", [("sft", "gradient", 5), ("dpo", "gradient", 5), ("sft", "loss", 5), ("grpo", "gradient", 10),
                                               ("grpo", "loss", 9)])
def test_a_number_that_is_none_stops_before_it_is_saved(stage, what, step, argv, out):
    # unread until the save after step 5: its own step, value and rows are named, no such save is written, the one before is finite
    def spoil(optimizer):
        weight = optimizer.model.connector.up.weight
        weight.grad[0, 0] = float("nan") if what == "gradient" else 0
        if what == "loss":                                                                          # so large that the next loss is none
            weight.data.fill_(1e38)
    flags = ("--log_every", 100, *("--updates", 2) * (stage == "grpo"))
    said = stopped(argv(stage, out, *flags), {step - (what == "loss"): spoil})
    values = "grad_norm is nan, grad_norm_connector is nan" if what == "gradient" else "loss is nan, .*grad_norm_llm is nan"
    rows = ", ".join(map(str, STEPS[step // (2 if stage == "grpo" else 1)]))
    assert re.match(rf"step {step}: {values} \(rows {rows}\)\. .*the last save is {re.escape(str(out))}\.tmp/step-4{GO_ON}", said)
    assert saves(f"{out}.tmp") == ["step-4"] and all(torch.isfinite(value).all() for value in MLLM.load(f"{out}.tmp/step-4").state_dict().values())
