"""README is kept: the study runs as one command, the files and flags that it names exist, and scripts answer --help."""
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

import bench
import comparison
import data
import eval_vqa
import prepare
import report
import scenes
import sources
import train_dpo
import train_sft
from model import Connector, take_off_tail
from train_dpo import dpo_loss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ["scenes.py", "train_sft.py", "train_dpo.py", "train_grpo.py", "probe.py", "eval_vqa.py", "report.py", "grids.py", "bench.py", "prepare.py", "artefacts.py"]
COMMANDS_OF = {"data": "prepare", "model": "artefacts"}  # where the commands of a file that is read for something else are


def readme(name="README.md"):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def test_speedrun_from_another_folder(tmp_path):
    """The first command of README with small numbers, every stage for real"""
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "TORCH_COMPILE_DISABLE": "1", "STAGE1_STEPS": "3", "N_PAIRS": "10", "EPOCHS": "1", "N_TEST": "20", "PROBE_SEEDS": "1", "OUT": "study",
           "ARMS": "sft dpo"}
    done = subprocess.run(["bash", os.path.join(ROOT, "speedrun.sh")], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "n = 1: not resolved" in done.stdout and "DPO minus SFT" in done.stdout
    for arm in ("stage1", "sft", "dpo"):
        assert sorted(os.listdir(tmp_path / "study" / "seed0" / arm)) == ["config.json", "connector.safetensors", "llm", "log.jsonl", "vision"]
    report = json.load(open(tmp_path / "study" / "report.json"))
    assert set(report["rows"]["classification"]) == {"random", "stage1", "sft", "dpo"}
    first_line = json.loads(open(tmp_path / "study" / "seed0" / "dpo" / "log.jsonl").readline())
    assert first_line["loss"] == pytest.approx(0.693147, abs=1e-6) and first_line["accuracy"] == .5


STAND_IN = """#!/bin/sh
# every stage: note the command, and leave what the next one looks for
echo "$@" >> "$NOTED"
while [ $# -gt 0 ]; do
  case $1 in
    --out) mkdir -p "$2"; echo '{"drift_vision": 0.0421, "x": 1}' > "$2/log.jsonl" ;;
    --write_pairs) echo '{}' > "$2" ;;
  esac
  shift
done
"""


def run_with_stand_in(script, tmp_path, settings):
    """A shell script with a stand-in for python. -> what came of it, the commands so far in their order: [[script, flag, ...], ...]"""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python").write_text(STAND_IN)
    (tmp_path / "bin" / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTED": str(tmp_path / "noted"), **settings}
    done = subprocess.run(["bash", os.path.join(ROOT, script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    return done, [[os.path.basename(words[0]), *words[1:]] for words in map(shlex.split, (tmp_path / "noted").read_text().splitlines())]


def commands_of(script, tmp_path, **settings):
    done, commands = run_with_stand_in(script, tmp_path, settings)
    assert done.returncode == 0, done.stderr
    return commands


def test_a_study_goes_on_where_it_was_and_is_never_mixed_with_another(tmp_path):
    settings = {"ARMS": "sft dpo grpo", "OUT": "study"}
    made = commands_of("speedrun.sh", tmp_path, **settings)
    again = commands_of("speedrun.sh", tmp_path, **settings)
    assert len(made) == 8 and again == [*made, made[-1]] and made[-1][0] == "report.py"   # what is there is not made twice
    shutil.rmtree(tmp_path / "study" / "seed0" / "dpo")
    assert commands_of("speedrun.sh", tmp_path, **settings) == [*again, made[2], made[-1]]
    done, _ = run_with_stand_in("speedrun.sh", tmp_path, {**settings, "STAGE1_STEPS": "4"})
    assert done.returncode == 1 and "other settings" in done.stderr
    done, _ = run_with_stand_in("speedrun.sh", tmp_path, {"ARMS": "sft ppo"})
    assert done.returncode == 1 and "ARMS: there is no ppo" in done.stderr


@pytest.mark.parametrize("script, settings, n", [
    ("speedrun.sh", {"ARMS": "all", "SEEDS": "0 1"}, 2 * 22 + 1), ("speedrun.sh", {"PAIRS": "own", "WORLD": "large"}, 12),
    ("map.sh", {}, 3 + 3 * 5 * 2 + 3 + 4 + 3 + 3 + 8 + 1), ("map.sh", {"WIDE": "", "OWN": "", "BETAS": "", "SIZES": "", "STARTS": "9"}, 14),
    ("sweep.sh", {"RATES": "1e-4 1e-3"}, 1 + 10 + 3 + 1), ("path.sh", {"SEEDS": "0 1"}, 2 * 8 + 1)])
def test_the_studies_give_commands_that_the_scripts_know(script, settings, n, tmp_path):
    found = commands_of(script, tmp_path, **settings)
    assert len(found) == n
    for name, *flags in found:
        args = importlib.import_module(name.removesuffix(".py")).parser.parse_args(flags)
        for source in [args.data] if isinstance(getattr(args, "data", None), str) else getattr(args, "data", None) or []:
            assert source.endswith("own.jsonl") or data.load(source, "sft", 2)[0]["image"]  # the drawn world knows it
    assert len({tuple(command) for command in found}) == n


def test_the_arms_of_the_study_differ_in_what_they_say(tmp_path):
    # the same start, seed, pairs and passes, but for what the name of the arm says
    args = {}
    for name, *flags in commands_of("speedrun.sh", tmp_path, ARMS="all", OUT="o", LR_SFT="2", LR_DPO="3", LR_DPO_SFT="4", LR_MPO="5", LR_GRPO="6"):
        if name.startswith("train"):
            parsed = vars(importlib.import_module(name.removesuffix(".py")).parser.parse_args(flags))
            out = os.path.basename(parsed.pop("out"))
            args[out] = {"script": name, **parsed}
    differ = lambda a, b: {key: args[a].get(key) for key in args[a].keys() | args[b].keys() if args[a].get(key) != args[b].get(key)}
    assert args["sft"]["init"] == args["dpo"]["init"] == "o/seed0/stage1" and args["sft"]["data"] == args["dpo"]["data"] == ["scenes/train/foreign"]
    assert {k: args["sft"][k] for k in ("n", "epochs", "seed", "batch_size")} == {k: args["dpo"][k] for k in ("n", "epochs", "seed", "batch_size")}
    assert differ("more", "sft") == {"data": ["scenes/train/sft"]} and differ("sft_long", "sft") == {"epochs": 4} and differ("sft_equal", "sft") == {"epochs": 3}
    assert differ("sft_drift", "sft") == {"max_drift": .0421, "log_every": 1}               # where the DPO run's log ends
    assert differ("other", "dpo") == {"data": ["scenes/train/other"]} and differ("sft_slow", "sft") == {"lr": 3.0} and differ("dpo_fast", "dpo") == {"lr": 2.0}
    assert differ("dpo_sft", "dpo") == {"lr": 4.0, "sft_weight": .1}
    assert differ("mpo", "dpo") == {"lr": 5.0, "dpo_weight": .8, "bco_weight": .2, "sft_weight": 1.0}
    assert differ("warm", "sft") == {"lr_vision": 0.0, "seed": 2000}
    assert differ("warm_sft", "sft") == differ("warm_dpo", "dpo") == {"init": "o/seed0/warm"}
    assert differ("sft_grpo", "grpo_half") == {"init": "o/seed0/sft_half"} and differ("grpo_half", "grpo") == {"n": 10000} and differ("sft_half", "sft") == {"n": 2500}
    assert args["grpo"]["lr"] == 6.0 and args["grpo"]["n"] == 20000 and args["dpo"]["lr"] == 3.0 and args["sft"]["lr"] == 2.0


def test_the_diffs_of_readme_fit_the_files(start_run, tmp_path, monkeypatch):
    """Each ```diff block: its old lines stand in the file that was named last before it; with the new ones the file runs for a step"""
    texts, seen, name, pieces = {}, 0, "", re.split(r"```diff\n(.*?)```", readme(), flags=re.S)
    for before, diff in zip(pieces[::2], pieces[1::2]):
        name = (re.findall(r"`(\w+\.py)`", before) or [name])[-1]
        texts.setdefault(name, open(os.path.join(ROOT, name), encoding="utf-8").read())
        old, new = ("".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " " + sign) for sign in "-+")
        assert texts[name].count(old) == 1, f"{name} has not:\n{old}"
        texts[name], seen = texts[name].replace(old, new), seen + 1
    assert seen >= 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(start_run, "start")                                             # DPO remembers its reference beside it
    for name, text in texts.items():
        patched = types.ModuleType(name)
        exec(compile(text, name, "exec"), vars(patched))
        monkeypatch.setattr("sys.argv", [name, "--init", "start", "--data", "scenes/train/foreign", "--n", "4", "--epochs", "1", "--compile", "false",
                                         "--out", f"{name}.run"])
        patched.main()
        assert json.loads(open(f"{name}.run/log.jsonl").readline())["loss"] > 0


def commands(section):
    """The indented `python SCRIPT ...` lines of a section of README, continued lines joined -> [[script, flag, ...], ...]"""
    text = readme().split(f"## {section}")[1].split("\n## ")[0].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.split("\n") if line.startswith("    python ")]


def script_of(name):
    """data.py -> the module that has its commands"""
    name = name.removesuffix(".py")
    return importlib.import_module(COMMANDS_OF.get(name, name))


def test_own_data_commands_run(tmp_path, monkeypatch):
    """README's section on your own data, line by line, on a folder of that format; only steps and sizes are made small."""
    monkeypatch.chdir(tmp_path)
    for task, name in (("sft", "train"), ("vqa", "test"), ("foreign", "pairs")):
        rows = scenes.Scenes("train", 12, task)
        scenes.write_rows([rows[i] for i in range(12)], name)
        with open(f"{name}/rows.jsonl") as rows, open(f"{name}.jsonl", "w") as f:
            f.writelines(line.replace("images/", f"{name}/images/", 1) for line in rows)
    for split in ("train", "test"):
        for label in ("odd", "even"):
            os.makedirs(f"photos/{split}/{label}")
        for i in range(12):
            shutil.copy(f"train/images/{i}.png", f"photos/{split}/{('even', 'odd')[i % 2]}/{i}.png")
    os.makedirs("pictures")
    shutil.copy("test/images/0.png", "pictures/17.jpg")
    small = {"data.py": [], "model.py": ["--max_new_tokens", "3"], "train_sft.py": ["--steps", "1", "--batch_size", "4"], "train_dpo.py": ["--steps", "1", "--batch_size", "4"],
             "eval_vqa.py": ["--max_new_tokens", "3"], "probe.py": ["--seeds", "1"]}
    ran = []
    for script, *flags in commands("Your own data"):
        monkeypatch.setattr("sys.argv", [script, *flags, *small[script], *(["--compile", "false"] if script.startswith("train") else [])])
        script_of(script).main()
        ran.append(script)
    assert ran == ["train_sft.py", "train_sft.py", "train_dpo.py", "eval_vqa.py", "probe.py", "eval_vqa.py", "data.py", "model.py"]
    assert os.path.exists("runs/my/vqa/results.json") and os.path.exists("runs/my/own.jsonl")
    assert all(Image.open(f"runs/my/{name}.png").width > 200 for name in ("train", "dogs"))


def test_real_weight_commands_parse():
    """The commands for hub weights cannot run here; their flags are the scripts' own."""
    found = commands("Real weights") + commands("Take it with you")
    assert len(found) >= 10
    for script, *flags in found:
        script_of(script).parser.parse_args(flags)  # an unknown flag would exit


def test_every_named_data_set_is_in_the_readme():
    # the table and the code name the same sets
    table = readme().split("### Data sets by name")[1].split("\n#")[0]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))
    named = {name.partition("/")[0] for name in re.findall(r"`([a-z][\w.-]+(?:/CONFIG)?)`", first_cells)}
    assert named == {*sources.NAMES, *prepare.SETS}


def test_every_benchmark_is_in_its_table():
    """The table names the benchmarks in the order and the groups of the code"""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme("docs/benchmarks.md").splitlines() if re.match(r"\| .*`\w+`: ", line)]
    assert [re.match(r"`(\w+)`", row[1])[1] for row in rows] == list(eval_vqa.BENCHMARKS) == sum(eval_vqa.GROUPS.values(), [])
    heads = [i for i, row in enumerate(rows) if row[0]]
    assert heads == np.cumsum([0] + [len(names) for names in eval_vqa.GROUPS.values()])[:-1].tolist()


def test_files_and_flags_of_readme_exist():
    text = readme() + readme("docs/benchmarks.md") + readme("docs/study.md")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme()):
        assert os.path.exists(os.path.join(ROOT, target)), f"README links to {target}"
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in readme().splitlines() if line.startswith("#")}
    assert {*re.findall(r"\]\(#([^)]+)\)", readme())} <= headings
    code = "".join(open(os.path.join(ROOT, f), encoding="utf-8").read() for f in [*SCRIPTS, "training.py"])
    for name in set(re.findall(r"`(\w+\.(?:py|sh|md|txt))`", text)):
        assert os.path.exists(os.path.join(ROOT, name)), f"README names {name}"
    for flag in set(re.findall(r"(?<![\w-])--([a-z]\w+)", text)) - {"nproc_per_node"}:  # torchrun's own
        assert f'"--{flag}"' in code, f"README uses --{flag}"


@pytest.mark.parametrize("script", [*SCRIPTS, "training.py"])
def test_every_flag_has_help(script):
    """Each flag that a script declares carries a help text"""
    with open(os.path.join(ROOT, script), encoding="utf-8") as f:
        calls = [n for n in ast.walk(ast.parse(f.read())) if isinstance(n, ast.Call) and ast.unparse(n.func).rpartition(".")[2] in ("add", "add_argument")
                 and str(getattr(n.args[0], "value", "")).startswith("--")]
    assert calls and all(any(k.arg == "help" for k in call.keywords) for call in calls)


def test_help_reads_without_a_gpu_or_a_model():
    shown = importlib.import_module("train_dpo").parser.format_help()
    assert "--beta" in shown and "reference" in shown and "(default: 0.1)" in shown


def test_the_lines_that_readme_quotes_stand_in_the_files():
    pieces, name = re.split(r"```python\n(.*?)```", readme(), flags=re.S), ""
    for before, quoted in zip(pieces[::2], pieces[1::2]):
        name = (re.findall(r"`(\w+\.py)`", before) or [name])[-1]
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            assert quoted in f.read(), f"{name} has not:\n{quoted}"
    assert len(pieces) >= 5


# ---- the numbers ---------------------------------------------------------------------------------------------------------


def tables_of(text):
    """{first cell: other cells} of every line of every table"""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {first.replace("*", ""): cells for first, *cells in lines}


def test_the_study_s_tables_are_its_seeds_numbers():
    """docs/study.json holds every seed's numbers: means, differences and intervals are made again from these, and are what the two tables say"""
    with open(os.path.join(ROOT, "docs/study.json")) as f:
        study = json.load(f)
    rows, n = study["rows"], len(study["seeds"])
    for measure, arms in rows.items():
        for arm, cell in arms.items():
            assert len(cell["per_seed"]) == n and cell["mean"] == pytest.approx(np.mean(cell["per_seed"]))
        for (a, b), found in [(pair.split(" - "), d[measure]) for pair, d in study["differences"].items() if measure in d]:
            assert found == {k: pytest.approx(v) for k, v in report.paired(arms[a]["per_seed"], arms[b]["per_seed"]).items()}
    assert comparison.markdown(report.study_tables(study, n)) in readme("docs/study.md")
    assert f'SEEDS="{" ".join(map(str, range(n)))}" OUT=runs/study bash speedrun.sh' in readme()
    lines, shown = tables_of(readme().split("## The study")[1].split("### ")[0]), ("decoded", "extracted", "restricted", "swap", "knowledge", "mIoU", "mIoU_two_layer", "classification", "drift")
    arms = {arm: lines[name] for arm, name in report.ARMS.items() if len(lines.get(name, ())) == len(shown)}
    contrasts = {(a, b): lines[f"{report.ARMS[a]} minus {report.ARMS[b]}"] for a, b in report.CONTRASTS if f"{report.ARMS[a]} minus {report.ARMS[b]}" in lines}
    assert len(arms) >= 10 and len(contrasts) >= 10
    for arm, cells in arms.items():
        assert cells == [f"{100 * rows[m][arm]['mean']:.1f}" if arm in rows[m] else "" for m in shown], arm
    for (a, b), cells in contrasts.items():
        found = study["differences"][f"{a} - {b}"]
        assert cells == [report.difference_text(found[m]) if m in found else "" for m in ("extracted", "restricted", "swap", "mIoU")], (a, b)


def test_small_numbers_of_readme():
    # beta: where the force of a pair has halved; the table of recipes: what a model of its shape trains and holds
    for beta, nats in ((.1, 11), (1, 1.1)):
        margin = torch.tensor([0., nats], requires_grad=True)
        dpo_loss(margin, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta)[0].sum().backward()
        assert float(margin.grad[1] / margin.grad[0]) == pytest.approx(.5, abs=.005)
    vision, llm = bench.SHAPES["middle"][:2]
    with torch.device("meta"):
        encoder = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **llm))
        connector = Connector(vision["hidden_size"], llm["hidden_size"])
    take_off_tail(encoder, vision["num_hidden_layers"] - 1)
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in (("vision", encoder), ("connector", connector), ("llm", model))}
    table = tables_of(readme().split("**Memory, measured")[1])
    for recipe, trained, references in (("connector", ["connector"], 0), ("SFT", size, 0), ("the same, LLM frozen", ["vision", "connector"], 0),
                                        ("the same, live reference", size, 1), ("GRPO, 8 answers to each of 16 questions", size, 1)):
        trained, held = sum(size[part] for part in trained), (1 + references) * sum(size.values())
        assert table[recipe][1:3] == [f"{trained / 1e6:.1f}", f"{(4 * held + 12 * trained) / 2**20:.0f}" + " MB" * (recipe == "connector")], recipe


def test_flops_of_the_study(tmp_path, monkeypatch):
    """What SFT and DPO cost is counted again: two steps of each on the study's rows, from a model of its size"""
    monkeypatch.chdir(tmp_path)
    train_sft.start(train_sft.parser.parse_args(["--data", "scenes/train/sft/4", "--out", "unused"])).save("start")
    with open(os.path.join(ROOT, "docs/study.json")) as f:
        counted = json.load(f)["flops"]
    for arm, stage in (("sft", train_sft), ("dpo", train_dpo)):
        monkeypatch.setattr("sys.argv", [f"train_{arm}.py", "--init", "start", "--data", "scenes/train/foreign", "--n", "5000", "--seed", "1000", "--steps", "2",
                                         "--batch_size", "64", "--compile", "false", "--out", arm])
        stage.main()
        with open(f"{arm}/config.json") as f:
            assert json.load(f)["flops"] / 2 * 158 == pytest.approx(counted[arm], rel=.02)
