"""Two processes take the step that one would take: SFT, DPO and GRPO under torchrun with gloo, whole and in shards, against one process."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import MLLM

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
UNLIKE = {"seconds", "pairs_per_s", "samples_per_s", "peak_mb"}  # of a line of log.jsonl


def launch(n, *command, **how):
    """Starts a script in n processes"""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0", "--rdzv-backend=c10d",
             "--rdzv-endpoint=localhost:0", "--"] if n > 1 else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([*start, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


@pytest.fixture(scope="module")
def done(start_run, tmp_path_factory):
    """Folders with the runs of parallel_runs.py by one process and by two; what they printed"""
    folders, printed = {}, {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{n}")
        shutil.copytree(start_run, folder / "start")
        Image.new("RGB", (40, 40), "red").save(folder / "red.png")
        rows = [{"image": f"{'gone' if i in (1, 4) else 'red'}.png", "question": f"{i}?", "answer": "red " * (i + 1)} for i in range(6)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in os.listdir(folders[1] / "features") if n == 2 else ():              # as a killed run leaves them: of a part that is gone
            (folder / "features").mkdir(exist_ok=True)
            (folder / "features" / f"{name}.count1of2").write_text("13")
        process = launch(n, os.path.join(HERE, "parallel_runs.py"), folder, folder / "start", folder / "rows.jsonl")
        printed[n], folders[n] = process.communicate(timeout=300)[0], folder
        assert process.returncode == 0, printed[n][-3000:]
    return folders, printed


def lines(folder, run):
    with open(folder / run / "log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in UNLIKE} for line in f]


def weights(run):
    return {f"{part}.{k}": v for part, file in (("vision", "vision/model"), ("llm", "llm/model"), ("connector", "connector"))
            for k, v in load_file(f"{run}/{file}.safetensors").items()}


@pytest.mark.parametrize("one, two", [("sft", "sft"), ("bad", "bad"), ("dpo", "dpo"), ("grpo", "grpo"), ("sft", "sft_shard"), ("dpo_shard", "dpo_shard"),
                                      ("grpo", "grpo_shard")])
def test_two_processes_take_the_steps_of_one(one, two, done):
    # every logged number, gradient norms of each part among them, at every step, uneven and one-sided last steps included; and the weights
    (alone, both), start = done[0].values(), weights(done[0][1] / "start")
    a, b = lines(alone, one), lines(both, two)
    assert len(a) == len(b) >= 2
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x:
            assert y[key] == pytest.approx(x[key], rel=1e-3 if "reward" in key or key in ("margin", "kl", "clipped") else 2e-5, abs=2e-6), (x["step"], key)
    a, b, n = weights(alone / one), weights(both / two), 0
    for name, value in a.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding noise, which Adam scales up
            n += not torch.equal(value, start[name])
            assert (value - b[name]).norm() <= 2e-2 * (value - start[name]).norm() + 1e-7, name
    assert n > 20


def test_rows_are_counted_over_all_processes_and_the_first_one_speaks(done):
    (alone, both), (_, printed) = done[0].values(), done[1].values()
    for folder in (alone, both):
        assert lines(folder, "bad")[-1]["dropped"] == 2
        assert json.load(open(folder / "bad/config.json"))["dropped"] == {"its picture is missing": 2}
    assert printed.count("gone.png") == 2 and len(re.findall(r"^saved ", printed, re.M)) == 7 and printed.count("settings  ") == 7


def test_a_sharded_save_is_a_run_directory(done):
    # gathered to the same files; what is frozen is there and as it was
    both = done[0][2]
    saves = sorted(name for name in os.listdir(both / "dpo_shard") if name.startswith("step-"))
    assert saves == ["step-3"] and MLLM.load(str(both / "dpo_shard" / "step-3")).n_image == 9
    start, end = weights(both / "start"), weights(both / "dpo_shard")
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in start if name.startswith("vision"))
    moments = load_file(both / "dpo_shard/step-3/train_state/tensors.safetensors")
    assert {tuple(t.shape) for name, t in moments.items() if name.endswith("llm.lm_head.weight/exp_avg") or "embed_tokens" in name} >= \
        {tuple(end["llm.model.embed_tokens.weight"].shape)}


def test_stopped_on_two_goes_on_on_one_and_a_killed_one_ends_both(start_run, tmp_path):
    # SIGTERM: one save of all, and the command; then one process finishes. kill -9 of one: the other does not hang, the save is whole
    flags = (os.path.join(ROOT, "train_sft.py"), "--init", start_run, "--n", 400, "--batch_size", 4, "--micro_batch", 2, "--lr", "1e-4", "--save_every", 3,
             "--log_every", 1, "--compile", "false", "--data", "scenes/train/sft", "--out", tmp_path / "out")

    def start_and_wait_for_a_save():
        process = launch(2, *flags, "--shard")
        while not [name for name in os.listdir(tmp_path / "out.tmp") if name.startswith("step-")] if (tmp_path / "out.tmp").exists() else True:
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(.02)
        return process

    process = start_and_wait_for_a_save()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "SIGKILL" in printed
    left, = [name for name in os.listdir(tmp_path / "out.tmp") if name.startswith("step-")]
    MLLM.load(str(tmp_path / "out.tmp" / left))
    shutil.rmtree(tmp_path / "out.tmp")
    process = start_and_wait_for_a_save()
    process.terminate()
    printed = process.communicate(timeout=60)[0]
    found = re.search(r"stopped by SIGTERM after (\d+) of 100 steps; the last save is (\S+); go on with: torchrun --nproc_per_node=2 -- \S+train_sft.py", printed)
    assert found and found[2].endswith(f"step-{found[1]}") and len(lines(tmp_path, "out.tmp")) == int(found[1])
    process = launch(1, *flags, "--resume", "--shard")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed " in printed and [line["step"] for line in lines(tmp_path, "out")] == list(range(100))


def test_two_processes_probe_as_one(done):
    # each reads its share of the pictures; features and everything made of them are those of one process, and one folder is written
    alone, both = done[0].values()
    files = [sorted(os.listdir(folder / "features")) for folder in (alone, both)]
    assert files[0] == files[1] and len(files[0]) > 5 and all(name.endswith(".npy") for name in files[0])
    for name in files[0]:
        a, b = (np.load(folder / "features" / name) for folder in (alone, both))
        assert np.abs(a).min(tuple(range(1, a.ndim))).max() > 0 and np.allclose(a, b, atol=1e-5), name
    a, b = (json.load(open(folder / "probe" / "results.json"))["table"] for folder in (alone, both))
    for row in a:
        assert {m: cell["value"] for m, cell in b[row].items()} == {m: pytest.approx(cell["value"], abs=2e-3) for m, cell in a[row].items()}, row
    assert len([name for name in os.listdir(both) if name.startswith("probe")]) == 1
