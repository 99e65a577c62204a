"""eval_vqa.py and report.py: scores by hand, choices by the slow path, pairs from own samples."""
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import answerers
import comparison
import data
import eval_vqa
import report
import scenes
from conftest import randomise
from model import MLLM, InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    scenes.tiny_vision(folder + "/vision", width=32, layers=2)
    scenes.tiny_llm(folder + "/llm", data.texts("scenes/train/sft", 100), width=32, layers=2)
    MLLM.from_pretrained(folder + "/vision", folder + "/llm", pool=2).save(folder + "/run")
    return folder + "/run"


@pytest.mark.parametrize("prediction, answer, expected", [
    ("red", "red", 1), (" Red. ", "red", 1), ("blue", "red", 0), ("", "red", 0), ("top  left", "top left", 1), ("the red one", "red", 0), ("yes, no", "yes", 0),
    ("red ring, blue cross", "red ring, green cross", .5), ("red ring", "red ring, blue cross", 2 / 3), ("empty, empty", "empty, red ring", .5)])
def test_score_by_hand(prediction, answer, expected):
    assert eval_vqa.score(prediction, answer) == pytest.approx(expected)


def test_option_logps_are_those_of_the_slow_path(run):
    """Options are branches of one question, several questions share a forward pass and a picture: each is scored as if read alone"""
    answerer = answerers.Run(run, torch.device("cpu"))
    model = answerer.model
    torch.manual_seed(0)
    randomise(model.connector, .5), randomise(model.llm, .25)                       # else the shortest option is always the likeliest
    rows = scenes.Scenes("test", 12, "vqa")
    records = [rows[i] for i in range(12)]
    images, questions = [record["image"] for record in records], [record["question"] for record in records]
    images[3] = images[2]                                                           # one picture for two questions
    options = [list(scenes.COLORS) + ["top left", "three"] * (n % 2) for n in range(12)]
    slow = [[model.logps([image], [question], [option]).item() for option in each] for image, question, each in zip(images, questions, options)]
    for order in (range(12), range(11, -1, -1), range(3)):
        found = answerer.option_logps([images[i] for i in order], [questions[i] for i in order], [options[i] for i in order])
        assert [pytest.approx(slow[i], abs=1e-4) for i in order] == found
    choices = [each[int(np.argmax(logps))] for each, logps in zip(options, slow)]
    assert len(set(choices)) > 1                                                    # the comparison could fail
    others = answerer.option_logps(images[1:] + images[:1], questions, options)    # each looks at its own picture
    assert max(abs(a - b) for one, other in zip(others, slow) for a, b in zip(one, other)) > .01


def test_a_shared_picture_is_encoded_once(run):
    """Questions about the same picture object, in one batch: one row for the encoder, and the answers of pictures of their own"""
    model = answerers.Run(run, torch.device("cpu")).model
    randomise(model.llm, .25)
    rows = scenes.Scenes("test", 4, "vqa")
    images, questions = [rows[i]["image"] for i in (0, 1, 0, 0, 1)], [rows[i]["question"] for i in (0, 1, 2, 3, 0)]
    encoded = []
    model.vision.register_forward_pre_hook(lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True)
    apart = model.generate([image.copy() for image in images], questions, 8)
    assert encoded.pop() == 5 and len(set(apart)) > 1
    shared = [images[i] for i in (0, 1, 0, 0, 1)]
    assert model.generate(shared, questions, 8) == apart and encoded.pop() == 2


def test_candidates_come_from_the_answers_of_the_kind():
    records = [{"kind": "color", "answer": a} for a in ("Red", "blue", "red")] + [{"kind": "open", "answer": str(i)} for i in range(50)]
    assert eval_vqa.candidates(records) == {"color": ["blue", "Red"]}               # each once, as first spelt


def test_compare_is_paired():
    rows = lambda right: [{"row": i, "unit": str(i), "shared": str(i), "stratum": "", "kind": "k", "category": "c", "decoded": r, "score": r,
                           "understood": "", "restricted": None, "blind_score": None} for i, r in enumerate(right)]
    questions = SimpleNamespace(benchmark=SimpleNamespace(rule=None, unit=None))
    table = comparison.compare_own(questions, {"a": rows([1, 0, 1, 0] * 25), "b": rows([1, 1, 1, 0] * 25)}, seed=0)
    cell = table["b"]["all"]
    assert cell["decoded"][0] == .75 and cell["decoded_vs_first"][0] == .25 and "restricted" not in cell
    assert .15 < cell["decoded_vs_first"][1] < .25 < cell["decoded_vs_first"][2] < .35
    assert (cell["gained"], cell["lost"], cell["n"]) == (25, 0, 100)
    assert table["a"]["k"]["decoded_vs_first"] == [0, 0, 0]


def test_main_saves_every_prediction(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_vqa.py", run, "--n", "30", "--max_new_tokens", "4", "--out", str(tmp_path / "vqa")])
    eval_vqa.main()
    lines = [json.loads(line) for line in open(tmp_path / "vqa" / "run.jsonl")]
    assert len(lines) == 30 and all(line["decoded"] == eval_vqa.score(line["prediction"], line["answer"]) for line in lines)
    table = json.load(open(tmp_path / "vqa" / "results.json"))["table"]["run"]
    assert table["all"]["restricted"][0] == pytest.approx(np.mean([line["restricted"] for line in lines if line["restricted"] is not None]))
    assert "vision-centric" in capsys.readouterr().out


def test_own_pairs_are_best_against_worst_and_load_again(run, tmp_path, monkeypatch, capsys):
    scenes.write_rows([scenes.Scenes("train", 12)[i] for i in range(12)], str(tmp_path / "world"))
    answers = iter([["red ring, blue cross"] * 12, ["red ring"] * 12, [""] * 12])  # the model's samples, so that what is best is known
    monkeypatch.setattr(MLLM, "generate", lambda *a, **k: next(answers))
    with open(tmp_path / "world" / "rows.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        row["answer"] = "blue cross, red ring"
    rows[3]["answer"] = "nothing of the kind"                                       # all samples equally wrong: no pair
    with open(tmp_path / "world" / "rows.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    out = tmp_path / "pairs" / "pairs.jsonl"
    monkeypatch.setattr(sys, "argv", ["eval_vqa.py", run, "--data", str(tmp_path / "world" / "rows.jsonl"), "--samples", "3", "--write_pairs", str(out)])
    eval_vqa.main()
    pairs = data.load(str(out), "pairs")
    assert len(pairs) == 11 and "1 of 12" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists already"):                         # before a model is opened
        eval_vqa.main()
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("red ring, blue cross", "red ring")
    assert pairs[0]["image"].tobytes() == scenes.Scenes("train", 12)[0]["image"].tobytes()


def test_the_swap_test_changes_the_encoder_alone(run, tmp_path):
    """--reader: the log-probs are those of the reader's own connector and LLM on the other run's features"""
    torch.manual_seed(1)
    other = MLLM.load(run)
    for parameter in other.parameters():
        parameter.data += .1 * torch.randn_like(parameter)
    other.save(str(tmp_path / "other"))
    image, question, answer = [scenes.Scenes("test", 1)[0]["image"]], ["what color is the ring?"], ["red"]
    reader, swapped = MLLM.load(run).eval(), answerers.Run(str(tmp_path / "other"), torch.device("cpu"), run).model
    before = reader.logps(image, question, answer)
    features = other.eval().features(other.pixels(image))
    reader.features = lambda pixels: features
    assert torch.allclose(swapped.logps(image, question, answer), reader.logps(image, question, answer), atol=1e-6)
    assert not torch.allclose(swapped.logps(image, question, answer), before, atol=1e-3)
    scenes.tiny_vision(str(tmp_path / "wide"), width=48, layers=2)
    MLLM.from_pretrained(str(tmp_path / "wide"), run + "/llm", pool=2).save(str(tmp_path / "wide_run"))
    with pytest.raises(ValueError, match="another shape"):
        answerers.Run(str(tmp_path / "wide_run"), torch.device("cpu"), run)


def test_sampled_answers_differ_and_greedy_ones_do_not(run):
    model = MLLM.load(run).eval()
    images, questions = [scenes.Scenes("test", 1)[0]["image"]] * 4, ["what color is the ring?"] * 4
    assert len(set(model.generate(images, questions, 6))) == 1
    assert len(set(model.generate(images, questions, 6, temperature=1.0))) > 1


def study_folder(path, shift):
    """One seed's results in the files that speedrun.sh leaves, with numbers we know"""
    arms = {"random": 0, "stage1": .5, "more": .5, "sft": .3 + shift, "dpo": .4 + 2 * shift, "grpo": .6, "sft_grpo": .35}
    for name in ("probe", "vqa", "swap"):
        os.makedirs(os.path.join(path, name))
    cell = lambda arm, v: {m: {"value": [v, v, v]} for m in ("logistic top-1", "linear mIoU", "two-layer mIoU", "alignment stage1, read layer")} | \
        ({} if arm == "random" else {m: {"value": [v, v, v]} for m in ("area", "energy_chosen_tokens", "energy_difference_tokens",
                                                                       "point_chosen_tokens", "point_difference_tokens")})
    vqa = lambda v: {g: {m: [v, v, v] for m in ("decoded", "extracted", "restricted", "blind_score")} for g in ("vision-centric", "knowledge")}
    json.dump({"table": {a: cell(a, v) for a, v in arms.items()}}, open(os.path.join(path, "probe", "results.json"), "w"))
    for name in ("vqa", "swap"):
        json.dump({"table": {a: vqa(v) for a, v in arms.items() if a != "random"}}, open(os.path.join(path, name, "results.json"), "w"))
    for n, (arm, parent) in enumerate({"stage1": None, "more": "stage1", "sft": "stage1", "dpo": "stage1", "grpo": "stage1", "sft_half": "stage1",
                                       "sft_grpo": "sft_half"}.items()):
        os.makedirs(os.path.join(path, arm, "vision"))
        save_file({"w": torch.full((4,), 2.0 + n)}, os.path.join(path, arm, "vision", "model.safetensors"))
        json.dump({"flops": n * 1e12, "parent": parent and os.path.join(path, parent)}, open(os.path.join(path, arm, "config.json"), "w"))
        with open(os.path.join(path, arm, "log.jsonl"), "w") as f:
            f.writelines(json.dumps({"step": s, "seconds": s, "loss": 1, "accuracy": .5, "reward": .5, "drift_vision": .1, "drift_llm": .1}) + "\n"
                         for s in range(3))
    from PIL import Image
    Image.new("RGB", (80, 30)).save(os.path.join(path, "probe", "maps_stage1.png"))
    return path


def test_report_pairs_seeds_and_claims_nothing_from_one(tmp_path, monkeypatch, capsys):
    folders = [study_folder(str(tmp_path / f"seed{s}"), shift) for s, shift in enumerate((0, .02, .1))]
    monkeypatch.setattr(sys, "argv", ["report.py", folders[0], "--out", str(tmp_path / "one")])
    report.main()
    assert "n = 1: not resolved" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py", *folders, "--out", str(tmp_path / "three")])
    report.main()
    d = json.load(open(tmp_path / "three" / "report.json"))["differences"]["dpo - sft"]["restricted"]
    assert d["per_seed"] == pytest.approx([.1, .12, .2]) and d["mean"] == pytest.approx(.14)
    half = 4.303 * np.std([.1, .12, .2], ddof=1) / 3**.5                            # t interval with two degrees of freedom
    assert "60 % as taught, and 35 % if half" in capsys.readouterr().out
    assert d["low"] == pytest.approx(.14 - half) and d["high"] == pytest.approx(.14 + half)
    found = json.load(open(tmp_path / "three" / "report.json"))                     # from stage 1, whatever was between
    assert report.flops_of(folders[0], "sft_grpo") == 11e12 and "sft_grpo" not in found["flops"] and found["flops"]["dpo"] == 3e12
    assert {arm: row["mean"] for arm, row in found["rows"]["drift"].items()} == \
        pytest.approx({"stage1": 0, "more": .5, "sft": 1, "dpo": 1.5, "grpo": 2, "sft_grpo": 3})
    assert os.path.getsize(tmp_path / "three" / "report.png") > 10_000


@pytest.mark.parametrize("said, decoded, extracted", [
    ("red", 1, 1), ("Red.", 1, 1), ("blue", 0, 0), ("<think> i see a ring that is blue. </think> so the answer is red.", 0, 1),
    ("the answer is blue. no, the answer is red", 0, 1), ("the answer is red. no, the answer is blue", 0, 0), ("so the answer is", 0, 0), ("", 0, 0),
    ("The Answer is: red.", 0, 1)])
def test_an_answer_is_read_out_of_any_style(said, decoded, extracted):
    questions = eval_vqa.OwnQuestions("scenes/test/vqa", 3, 0)
    record = {**questions.records[0], "answer": "red", "gold": "red"}
    line = {"prediction": said, "choice": "red", "blind_prediction": None, "blind_choice": None}
    cell = comparison.compare_own(questions, {"run": [eval_vqa.judge(record, line, questions.benchmark.read, "paper")]}, 0)["run"]["all"]
    assert (cell["decoded"][0], cell["extracted"][0], cell["restricted"][0]) == (decoded, extracted, 1)


def test_of_a_pair_the_options_are_its_two_answers():
    # is chosen likelier than rejected? and a pair is not mistaken for a question with an answer where it is trained on
    pairs, world = eval_vqa.OwnQuestions("scenes/tune/foreign", 5, 3), scenes.Scenes("tune", 5, "foreign", 3)
    for record, row in zip(pairs.records, (world[i] for i in range(5)), strict=True):
        assert list(record["options"]) == [row["chosen"], row["rejected"]] and record["gold"] == row["chosen"] and "pair" not in record
    with pytest.raises(ValueError, match="no column 'answer'"):
        data.load("scenes/tune/foreign", "vqa")
