"""eval_vqa.py --benchmarks, from the hub's rows to the page: prompts by hand, numbers against the official scorers, real runs on tiny copies."""
import contextlib
import functools
import glob
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

import answerers
import artefacts
import benchmarks
import common
import comparison
import eval_vqa
import hub_files
import metrics
from conftest import randomise
from hub_files import EXPECTED, ODD
from model import MLLM, InputError

BENCHMARKS, PROFILES = eval_vqa.BENCHMARKS, ("paper", "lmms")
BOTH = [(name, profile) for name in BENCHMARKS for profile in PROFILES]
SOURCE = {  # benchmark -> (hub id, config, split) that both profiles read
    "mme": ("lmms-lab-encoder/MME", "default", "test"), "seed": ("lmms-lab-encoder/SEED-Bench", "default", "test"),
    "gqa": ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev"), "scienceqa": ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test"),
    "mmmu": ("lmms-lab-encoder/MMMU", "default", "validation"), "mathvista": ("AI4Math/MathVista", "default", "testmini"),
    "ai2d": ("lmms-lab-encoder/ai2d", "default", "test"), "chartqa": ("lmms-lab-encoder/ChartQA", "default", "test"),
    "ocrbench": ("echo840/OCRBench", "default", "test"), "textvqa": ("lmms-lab-encoder/textvqa", "default", "validation"),
    "docvqa": ("lmms-lab-encoder/DocVQA", "DocVQA", "validation"), "mmvp": ("lmms-lab-eval/MMVP", "default", "train"),
    "realworldqa": ("lmms-lab-encoder/RealWorldQA", "default", "test"), "cvbench2d": ("nyu-visionx/CV-Bench", "2D", "test"),
    "cvbench3d": ("nyu-visionx/CV-Bench", "3D", "test"), "pope": ("lmms-lab-encoder/POPE", "default", "test"),
    "hallusionbench": ("lmms-lab-encoder/HallusionBench", "default", "image"),
    "naturalbench": ("BaiqiL/NaturalBench-lmms-eval", "default", "test"), "blink": ("BLINK-Benchmark/BLINK", None, "val"),
    "vqav2": ("lmms-lab-encoder/VQAv2", "default", "validation"), "okvqa": ("lmms-lab-encoder/OK-VQA", "default", "val2014")}
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def source(name, profile):
    return SOURCE.get(name) or (("lmms-lab/MMBench_EN", "default", "dev") if profile == "paper" else ("lmms-lab-encoder/MMBench", "en", "dev"))


@functools.cache
def made(hub_id):
    return hub_files.SETS[hub_id]()


def stored_rows(hub_id, config, split):
    """Rows as they are written, pictures as bytes"""
    rows = made(hub_id)[config, split]
    return rows, [dict(zip(rows.column_names, values)) for part in rows.with_format("arrow").iter(100)
                  for values in zip(*(part[column].to_pylist() for column in rows.column_names))]


def put(folder, hub_id, parts):
    """Writes {(config, split): (rows as dicts, a Dataset with their features)} as hub_files does"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub_files.SETS, hub_id, lambda: {key: Dataset.from_list(rows, features=like.features) if rows else like.select([])
                                                       for key, (rows, like) in parts.items()})
        hub_files.write(str(folder), [hub_id])
    return str(folder)


def put_changed(folder, name, change):
    """Writes the set of a benchmark (paper) after change(rows), which may edit them or give others"""
    hub_id, config, split = source(name, "paper")
    like, rows = stored_rows(hub_id, config, split)
    return put(folder, hub_id, {(config, split): (change(rows) or rows, like)})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder of all sets, for --copies"""
    folder = str(tmp_path_factory.mktemp("hub"))
    hub_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def asked(hub):
    """{(benchmark, profile): its Questions}"""
    return {key: benchmarks.Questions(BENCHMARKS[key[0]], key[1], hub) for key in BOTH}


@pytest.fixture
def few_draws(monkeypatch):
    """A bootstrap of 20, where only its middle is looked at: 1000 take most of the time"""
    monkeypatch.setattr(common.bootstrap, "__defaults__", (20,))


# ---- from rows to questions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, profile", BOTH)
def test_prompts_and_golds(name, profile, asked):
    """What each profile asks, to the letter; options are those that the prompt lists; nothing goes uncounted"""
    questions = asked[name, profile]
    assert [(record["question"], record["gold"]) for record in questions.records] == EXPECTED[name][profile]
    skipped = {"seed": {"about a video": 1}, "blink": {"about several pictures": 16}}
    if profile == "lmms":
        skipped["mmmu"] = {"about several pictures": 2}
    assert (questions.skipped, questions.dropped, questions.source) == (skipped.get(name, {}), [], source(name, profile)[0])
    yes_no = name in ("mme", "pope", "hallusionbench")
    for record in questions.records:
        found = {letter: text.strip() for letter, text in re.findall(r"^\(?([A-E])[.)] (.*)$", record["question"], re.MULTILINE)}
        found = {"A": "a", "B": "b"} if "Option: A" in record["question"] else found
        found = {"Yes": "yes", "No": "no"} if yes_no or "answer Yes or No" in record["question"] else found
        if name == "mmmu" and profile == "paper":  # whose tags are not in the prompt
            found = found and {letter: re.sub("<image .>", "", record["options"][letter]) and text for letter, text in found.items()}
            assert {letter: re.sub("<image .>", "", text) for letter, text in (record["options"] or {}).items()} == found
        else:
            assert (record["options"] or {}) == found and record["options"] != {}
        assert not found or record["gold"].capitalize() in found  # of yes and no, any case
    assert (None in [record["options"] for record in questions.records]) == (name in (
        "gqa", "mmmu", "mathvista", "chartqa", "ocrbench", "textvqa", "docvqa", "realworldqa", "vqav2", "okvqa"))


def upright(stored):
    """The bytes of a picture -> how it is to be seen, by hand"""
    image = Image.open(io.BytesIO(stored))
    turned = image.getexif().get(0x0112) == 6
    return image.mode, turned, (image.transpose(Image.Transpose.ROTATE_270) if turned else image).convert("RGB")


@pytest.mark.parametrize("name, profile", BOTH)
def test_pictures(name, profile, asked):
    """Each row's own picture, RGB and upright, equal to the file; rows with the same file share it"""
    questions, (hub_id, config, split) = asked[name, profile], source(name, profile)
    seen, pictures = [], {each["id"]: each["image"] for each in stored_rows(
        SOURCE["gqa"][0], "testdev_balanced_images", "testdev")[1]}
    for record in questions.records:
        part, number = record["row"].split() if name == "blink" else (config, record["row"])
        row = stored_rows(hub_id, part, split)[1][int(number)]
        if name == "gqa":
            cell = pictures[row["imageId"]]
        else:
            column = {"mathvista": "decoded_image", "naturalbench": "Image", "mmmu": "image_1", "blink": "image_1"}.get(name, "image")
            cell = row[column][0] if name == "seed" else row[column]
        mode, turned, expected = upright(cell["bytes"])
        if name in ODD and record["row"] == str(ODD[name][0]):
            assert turned if ODD[name][1] == "turned" else mode == ODD[name][1]
        else:
            assert mode == "RGB" and not turned
        found = questions.picture(record)
        assert found.mode == "RGB" and found.size == expected.size and found.tobytes() == expected.tobytes()
        seen.append((record["shared"], cell["bytes"]))
    assert all((a == c) == (b == d) for (a, b), (c, d) in itertools.combinations(seen, 2))


def test_a_turned_picture_is_the_one_that_was_drawn(asked):
    """And not its mirror image: a JPEG is near what went into it"""
    found, drawn = asked["realworldqa", "paper"].picture(asked["realworldqa", "paper"].records[3]), hub_files.picture("realworldqa/3")
    drawn = Image.open(io.BytesIO(drawn["bytes"]))
    assert found.size == drawn.size and np.abs(np.asarray(found, int) - np.asarray(drawn, int)).mean() < 25


def test_rows_without_a_picture_and_hints_that_are_none(tmp_path):
    """ScienceQA's third copy has all its rows, most without a picture; a hint may be missing altogether"""
    like, rows = stored_rows(*SOURCE["scienceqa"])
    for row in rows[:2]:
        row["image"] = None
    rows[3]["hint"], rows[4]["hint"] = None, "nan"
    folder = put(tmp_path, "derek-thomas/ScienceQA", {("default", "test"): (rows, like)})
    for profile in PROFILES:
        questions = benchmarks.Questions(BENCHMARKS["scienceqa"], profile, folder)
        assert questions.skipped == {"without a picture": 2} and questions.source == "derek-thomas/ScienceQA"
        asked = [record["question"] for record in questions.records]
        assert [record["row"] for record in questions.records] == list("2345")
        assert asked[2:] == [text for text, _ in EXPECTED["scienceqa"][profile][4:]]
        assert asked[1].startswith("What can the two students test?\nA. the size") and "nan" not in asked[2]


def test_the_picture_of_a_question_about_one_of_several(tmp_path):
    """MMMU: paper shows the first, lmms the one that the text names; a tag in an option names one too"""
    def change(rows):
        rows[0]["question"] = "Which style does <image 2> show?"
        rows[0]["image_2"] = hub_files.picture("second")
        rows[1]["question"], rows[1]["image_1"], rows[1]["image_3"] = "How long is x?", rows[1]["image_1"], hub_files.picture("third")
    folder = put_changed(tmp_path, "mmmu", change)
    _, rows = stored_rows(*SOURCE["mmmu"])
    first, second = rows[0]["image_1"]["bytes"], hub_files.picture("second")["bytes"]
    for profile, stored in (("paper", first), ("lmms", second)):
        questions = benchmarks.Questions(BENCHMARKS["mmmu"], profile, folder)
        assert questions.picture(questions.records[0]).tobytes() == upright(stored)[2].tobytes()
        assert questions.picture(questions.records[1]).tobytes() == upright(rows[1]["image_1"]["bytes"])[2].tobytes()


def test_a_list_that_is_not_the_answer_s(tmp_path):
    """RealWorldQA: what a question lists is no choice if the answer is another word"""
    def change(rows):
        rows[1]["question"] = "How many cars?\nA. one\nB. two" + rows[1]["question"]
    folder = put_changed(tmp_path, "realworldqa", change)
    found = [record["options"] for record in benchmarks.Questions(BENCHMARKS["realworldqa"], "paper", folder).records]
    assert found == [{"A": "To the left.", "B": "Straight on.", "C": "To the right."}, None, None, {"A": "The tree", "B": "The house"}, None, None]


def test_an_older_copy_will_do(hub, tmp_path):
    """lmms-lab/MME, where lmms-lab-encoder/MME is not there"""
    shutil.copytree(os.path.join(hub, "lmms-lab-encoder/MME"), tmp_path / "lmms-lab/MME")
    assert benchmarks.Questions(BENCHMARKS["mme"], "paper", str(tmp_path)).source == "lmms-lab/MME"


# ---- reading answers -----------------------------------------------------------------------------------------------------------


def best(gold):
    """A gold answer as a model may say it: of several what most people say, else the first"""
    return Counter(gold).most_common(1)[0][0] if isinstance(gold, list) else gold


@pytest.mark.parametrize("name, profile", BOTH)
def test_right_wrong_and_unreadable_answers(name, profile, asked):
    read = BENCHMARKS[name].read
    for record in asked[name, profile].records:
        right, understood = read(record, best(record["gold"]), profile)
        assert right == 1 and type(right) is float and understood is not None, record["question"]
        said_no = float(name == "hallusionbench" and record["gold"] == "no")  # its rule: what has no yes in it is a no
        for other in record["options"] or ():
            if other.lower() != record["gold"].lower():
                right, understood = read(record, other, profile)
                assert right == 0 and understood is not None, (record["question"], other)
        for nothing in ("", "#"):
            right, understood = read(record, nothing, profile)
            has_form = record["options"] or profile == "lmms" and record.get("answer_type") in ("integer", "float", "list")
            assert right == said_no and (understood is not None) == bool(nothing and not has_form), (record["question"], nothing, understood)


@pytest.mark.parametrize("name, profile, row, said, right, understood", [  # each benchmark reads in its own way
    ("mmbench", "paper", 0, "The answer is (A).", 1, "A"), ("mmbench", "paper", 0, "north", 0, None), ("mmbench", "lmms", 0, "It is north", 1, "A"),
    ("mmbench", "lmms", 0, "It must be (B)", 0, "B"), ("mmbench", "paper", 0, "C", 0, None), ("mmbench", "lmms", 0, "C", 0, None),
    ("mme", "paper", 0, "Yes.", 1, "yes"), ("mme", "paper", 0, "Yes, it is", 0, None), ("mme", "lmms", 0, "Yes, it is", 1, "yes"),
    ("seed", "paper", 1, "Cat", 1, "C"), ("seed", "paper", 1, "(C)", 1, "C"), ("seed", "lmms", 1, "(C)", 0, None),
    ("seed", "lmms", 1, "Cat", 1, "C"),
    ("gqa", "paper", 0, "No.", 1, "No."), ("gqa", "paper", 0, "No!", 0, "No!"), ("gqa", "lmms", 0, "No!", 1, "No!"),
    ("scienceqa", "paper", 0, "Maine", 1, "B"), ("scienceqa", "paper", 0, "The answer is B.", 1, "B"), ("scienceqa", "lmms", 0, "Maine", 0, None),
    ("scienceqa", "paper", 0, "Ohio", 0, "A"), ("scienceqa", "lmms", 0, "B. Maine", 1, "B"), ("scienceqa", "lmms", 0, "(B)", 0, None),
    ("scienceqa", "paper", 4, "Pair 1.", 0, "A"), ("scienceqa", "paper", 0, "b. Maine", 1, "B"),
    ("mmmu", "paper", 0, "E", 1, "E"), ("mmmu", "lmms", 0, "I say (E)", 1, "E"), ("mmmu", "paper", 0, "I say (E)", 0, None),
    ("mmmu", "paper", 1, "5.6", 1, "5.6"), ("mmmu", "lmms", 1, "5.6", 0, "5.6"), ("mmmu", "lmms", 1, "x is 5.66", 1, "x is 5.66"),
    ("mmmu", "paper", 1, "The answer is 5.66.", 1, "5.66"), ("mmmu", "paper", 4, "Six Dollars", 1, "six dollars"),
    ("mathvista", "paper", 0, "1.25", 1, "1.25"), ("mathvista", "lmms", 0, "It is 1.24", 1, "1.2"), ("mathvista", "paper", 1, "B. 8/11", 1, "b"),
    ("mathvista", "lmms", 1, "It is 8/11", 1, "8/11"), ("mathvista", "paper", 1, "It is 8/11", 0, None),
    ("mathvista", "paper", 4, "A", 1, "a"), ("mathvista", "lmms", 3, "so [2007,2008]", 1, "[2007, 2008]"),
    ("mathvista", "lmms", 2, "none", 0, None), ("mathvista", "paper", 3, "[2007, 2008]", 1, "[2007, 2008]"),
    ("ai2d", "paper", 0, "Cat", 1, "C"), ("ai2d", "lmms", 0, "Cat", 0, None), ("ai2d", "lmms", 0, "(c)", 1, "C"),
    ("ai2d", "lmms", 0, "C. c", 1, "C"),
    ("chartqa", "paper", 2, "0.25", 0, "0.25"), ("chartqa", "lmms", 2, "0.25", 1, "0.25"), ("chartqa", "paper", 0, "59", 1, "59"),
    ("ocrbench", "paper", 0, "It says Centre.", 1, "It says Centre."), ("ocrbench", "lmms", 5, r"\frac{1}{2}X+y", 1, r"\frac{1}{2}X+y"),
    ("ocrbench", "lmms", 5, r"\frac{1}{2}x+y", 0, r"\frac{1}{2}x+y"), ("ocrbench", "lmms", 2, "G Shock", 1, "G Shock"),
    ("textvqa", "paper", 0, "Clos Culombu", .3, "Clos Culombu"), ("textvqa", "lmms", 0, "dakota digital", .6, "dakota digital"),
    ("docvqa", "paper", 2, "Pall", .75, "Pall"), ("docvqa", "lmms", 3, "a. meyer", 1, "a. meyer"), ("docvqa", "lmms", 2, "Xxxl", 0, "Xxxl"),
    ("mmvp", "paper", 0, "Spread", 1, "A"), ("mmvp", "paper", 0, "Folded", 0, "B"), ("mmvp", "paper", 0, "(a)", 1, "A"),
    ("mmvp", "paper", 0, "Spreading", 0, None), ("mmvp", "lmms", 0, "option b", 0, "B"), ("mmvp", "lmms", 1, "option b", 1, "B"),
    ("mmvp", "lmms", 0, "Spread", 0, None),
    ("realworldqa", "paper", 1, "3 cars", 1, "3"), ("realworldqa", "lmms", 1, "3 cars", 0, "3 cars"), ("realworldqa", "lmms", 2, "NO.", 1, "no"),
    ("realworldqa", "paper", 2, "The answer is no.", 1, "no"), ("realworldqa", "lmms", 0, "I say (B)", 1, "B"),
    ("realworldqa", "paper", 0, "B.", 1, "b"), ("realworldqa", "paper", 0, "B. Straight on", 0, None),
    ("cvbench2d", "paper", 0, "(C", 1, "C"), ("cvbench2d", "lmms", 0, "( c1", 1, "C"), ("cvbench2d", "paper", 0, "( c1", 0, None),
    ("cvbench3d", "paper", 0, "apple", 1, "A"), ("cvbench3d", "lmms", 0, "apple", 1, "A"), ("cvbench3d", "lmms", 0, "Green", 0, None),
    ("blink", "paper", 0, "(D)", 1, "D"), ("blink", "lmms", 0, "( d", 1, "D"),
    ("pope", "paper", 0, "Yes, there is", 1, "yes"), ("pope", "paper", 0, "Yes; it is", 0, None), ("pope", "paper", 0, "Yes: there is", 1, "yes"),
    ("pope", "lmms", 0, "Yes.", 0, None), ("pope", "lmms", 1, "No", 1, "no"), ("pope", "paper", 1, "Yes.", 0, "yes"),
    ("hallusionbench", "paper", 0, "my eyes", 0, "yes"), ("hallusionbench", "lmms", 0, "No, it is not", 1, "no"),
    ("hallusionbench", "lmms", 0, "Nothing", 1, None), ("hallusionbench", "lmms", 1, "Nothing", 0, None),
    ("naturalbench", "paper", 0, "Yes, not no", 1, 1), ("naturalbench", "lmms", 1, "It is not: no", 1, 0),
    ("naturalbench", "paper", 4, "yes", 0, None), ("naturalbench", "lmms", 5, "b", 1, 0), ("naturalbench", "lmms", 6, "A", 0, 1),
    ("vqav2", "paper", 4, "Two", 1, "Two"), ("vqav2", "lmms", 0, "skateboard", .3, "skateboard"),
    ("okvqa", "paper", 0, "riding", 0, "riding"), ("okvqa", "lmms", 0, "ride", .6, "ride")])
def test_each_benchmark_reads_in_its_own_way(name, profile, row, said, right, understood, asked):
    found = BENCHMARKS[name].read(asked[name, profile].records[row], said, profile)
    assert found == (pytest.approx(right), understood)


@pytest.mark.parametrize("name, profile, row, gold, said", [
    ("mmmu", "paper", 1, "Six", "six"), ("mmmu", "paper", 1, ["7", "Six"], "SIX"), ("mathvista", "paper", 0, "North", "north"),
    ("gqa", "paper", 0, "No", "nO"), ("realworldqa", "lmms", 2, "NO", "no"), ("realworldqa", "paper", 2, "NO", "No"),
    ("mme", "paper", 0, "YES", "yes")])
def test_capitals_of_gold_answers(name, profile, row, gold, said, asked):
    assert BENCHMARKS[name].read({**asked[name, profile].records[row], "gold": gold}, said, profile)[0] == 1


@pytest.mark.parametrize("name, profile", BOTH)
def test_of_the_options_the_gold_one_is_right(name, profile, asked):
    for record in asked[name, profile].records:
        for choice in record["options"] or ():
            right = float(choice.lower() == record["gold"].lower())
            assert judged(record, choice) == {"decoded": None, "restricted": right, "score": right, "understood": choice, "blind_score": None,
                                              "blind_understood": None}
            assert judged(record, None, choice)["blind_score"] == right
        assert set(judged(record, None).values()) == {None}


def judged(record, choice, blind=None):
    """What a chosen option is worth"""
    line = {"prediction": None, "choice": choice, "blind_prediction": None, "blind_choice": blind}
    found = eval_vqa.judge({**record, "picture": "image", "place": (0, 0)}, line, None, "paper")
    assert {key: found.pop(key) for key in line} == line and not {"picture", "place"} & set(found)
    return {key: value for key, value in found.items() if key not in record}


def test_an_option_whose_text_is_a_letter():
    """AI2D asks which letter marks what: B is not right because it reads "a" and A is right"""
    row = {"question": "Which letter marks the root?", "options": ["b", "a", "C"], "answer": "0"}
    record = benchmarks.ai2d(row, "paper")
    assert record["gold"] == "A" and record["options"] == {"A": "b", "B": "a", "C": "C"}
    assert [judged(record, choice)["restricted"] for choice in "ABC"] == [1, 0, 0]


def test_own_options_are_compared_as_own_answers_are():
    """Options are spelt as they come first; "Red." is answered by "red" """
    records = [{"kind": "color", "answer": answer} for answer in ("red", "Red.", "Light  blue", "light blue")]
    options = {text: text for text in eval_vqa.candidates(records)["color"]}
    assert list(options) == ["Light  blue", "red"]
    for record, right in zip(records, ("red", "red", "Light  blue", "Light  blue")):
        record |= {"gold": record["answer"], "options": options}
        assert [judged(record, choice)["restricted"] for choice in options] == [choice == right for choice in options]


# ---- numbers -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """{(benchmark, profile): Questions} of four times as many rows, with ids and pictures of their own; MME has all its 14 categories, and
    numbers the pictures of each anew; CV-Bench has more of one source"""
    folder = str(tmp_path_factory.mktemp("many"))

    def copy(hub_id, row, k):
        name = hub_id.split("/")[1]
        change = {"MMBench_EN": lambda: {"index": row["index"] + 1000 * k}, "MMBench": lambda: {"index": row["index"] + 1000 * k},
                  "MMVP": lambda: {"Index": row["Index"] + 6 * k}, "NaturalBench-lmms-eval": lambda: {"Index": row["Index"] + 12 * k},
                  "HallusionBench": lambda: {"set_id": str(k)},
                  "CV-Bench": lambda: {"source": "COCO"} if (row["idx"], k) == (5, 0) else {}, "MME": lambda: {
                      "question_id": f"{k}/{row['question_id'].split('/')[1]}", "category": {
                      "existence": PERCEPTION[k], "count": PERCEPTION[k + 3], "OCR": PERCEPTION[k + 6], "code_reasoning": COGNITION[k],
                      "text_translation": COGNITION[3 - k]}[row["category"]]}}.get(name, dict)()
        more = bytes([k] * (not name.startswith("MMBench")))  # another file of the same picture; here the questions share theirs
        return {column: {**cell, "bytes": cell["bytes"] + more} if isinstance(cell, dict) and "bytes" in cell else cell
                for column, cell in {**row, **change}.items()}
    for hub_id in hub_files.SETS:
        parts = {part: stored_rows(hub_id, *part) for part in made(hub_id)}
        put(folder, hub_id, {part: ([copy(hub_id, row, k) for k in range(1 if "images" in part[0] else 4) for row in rows], like)
                             for part, (like, rows) in parts.items()})
    return {key: benchmarks.Questions(BENCHMARKS[key[0]], key[1], folder) for key in BOTH}


HEADLINE = {
    "mme": lambda rows, profile: metrics.mme_score(rows, profile)["perception"] / 2000,
    "mmbench": lambda rows, profile: metrics.mmbench_score(rows, profile)["circular_accuracy"],
    "mmvp": lambda rows, profile: metrics.mmvp_score(rows, profile)["pair_accuracy"],
    "cvbench2d": lambda rows, profile: metrics.cvbench_score(rows, profile)["2D" if profile == "paper" else "accuracy"],
    "cvbench3d": lambda rows, profile: metrics.cvbench_score(rows, profile)["3D" if profile == "paper" else "accuracy"],
    "pope": lambda rows, profile: metrics.pope_score(rows, profile)["f1"],
    "naturalbench": lambda rows, profile: metrics.naturalbench_score(rows)["G_Acc"],
    "hallusionbench": lambda rows, profile: metrics.hallusionbench_score(rows)["aAcc"],
    "blink": lambda rows, profile: np.mean([np.mean(part) for part in by(rows, "sub_task").values()])}


def by(rows, column):
    parts = defaultdict(list)
    for row in rows:
        parts[row[column]].append(row["score"])
    return parts


def headline(name, rows, profile):
    return HEADLINE.get(name, lambda rows, profile: np.mean([row["score"] for row in rows]))(rows, profile)


def answered(questions, profile, rng, p_right=.6, p_nothing=.15):
    """Lines with random answers: right, wrong, unreadable"""
    lines = []
    for record in questions.records:
        wrong = [key for key in record["options"] or ("#",) if key.lower() != str(record["gold"]).lower()]
        luck = rng.random()
        said = best(record["gold"]) if luck < p_right else "#" if luck < p_right + p_nothing else wrong[rng.integers(len(wrong))]
        score, understood = questions.benchmark.read(record, said, profile)
        lines.append({**record, "prediction": said, "score": score, "understood": understood})
    return lines


@pytest.mark.parametrize("name, profile", BOTH)
def test_the_number_is_the_official_scorer_s(name, profile, many, few_draws):
    questions, rng = many[name, profile], np.random.default_rng(0)
    assert len(questions.records) == 4 * len(EXPECTED[name][profile])
    found = set()
    for p_right, p_nothing in [(1, 0), (0, 0), (0, 1), (.95, .05)] + [(.3, .3), (.6, .15), (.8, .1)] * 6:
        lines = answered(questions, profile, rng, p_right, p_nothing)
        number = comparison.score_and_draws(*comparison.cluster_sums(questions.benchmark, lines, [line["score"] for line in lines]), 0)[0]
        assert number == pytest.approx(headline(name, lines, profile), abs=1e-12)
        found.add(round(number, 6))
    assert 1 in found and (0 in found or name == "hallusionbench") and len(found) > 5


@pytest.mark.parametrize("name", "mme mmbench mmvp cvbench2d pope naturalbench hallusionbench blink gqa vqav2 chartqa".split())
def test_a_resample_by_hand(name, many):
    """The rows of the drawn clusters, written out as often as they were drawn, scored anew: clusters are pictures, or units where there are units"""
    questions = many[name, "paper"]
    lines = answered(questions, "paper", np.random.default_rng(1))
    number, draws = comparison.score_and_draws(*comparison.cluster_sums(questions.benchmark, lines, [line["score"] for line in lines]), 5)
    assert len(draws) == 1000 and common.interval(number, draws) == [number, *np.quantile(draws, [.025, .975])]
    cluster = {"mme": lambda row: (row["category"], row["question_id"]), "mmbench": lambda row: row["index"] % 1_000_000,
               "mmvp": lambda row: (row["Index"] + 1) // 2, "naturalbench": lambda row: row["Index"] // 4}.get(name, lambda row: row["shared"])
    clusters = defaultdict(list)
    for line in lines:
        if name != "mme" or line["category"] in PERCEPTION:
            clusters[cluster(line)].append(line)
    assert max(map(len, clusters.values())) > 1 or name in ("blink", "cvbench2d")
    clusters, rng, column = list(clusters.values()), np.random.default_rng(5), {"mme": "question_id", "mmbench": "index"}.get(name, "Index")
    for found in draws[:8]:
        rows = []
        for copy, drawn in enumerate(rng.integers(0, len(clusters), len(clusters))):
            rename = {"mme": lambda row: f"{copy}/{row['question_id']}", "mmbench": lambda row: 1_000_000 * (row["index"] // 1_000_000) + copy,
                      "mmvp": lambda row: 2 * copy + 2 - row["Index"] % 2, "naturalbench": lambda row: 4 * copy + row["Index"] % 4}.get(name)
            rows += [{**row, **({column: rename(row)} if rename else {})} for row in clusters[drawn]]
        if name == "mme":  # of categories that were not drawn nothing is known
            points = metrics.mme_score(rows, "paper")
            assert found == pytest.approx(np.mean([points[category] / 200 for category in PERCEPTION if category in points]))
        else:
            assert found == pytest.approx(headline(name, rows, "paper"))


def test_a_difference_is_of_the_same_resamples(many):
    """Equal runs differ by exactly 0, others by what their draws differ; gained and lost count rows; blind has its own reading"""
    questions = many["pope", "lmms"]
    lines = {run: answered(questions, "lmms", np.random.default_rng(seed)) for run, seed in (("a", 0), ("same", 0), ("b", 1))}
    for run, rows in lines.items():
        blind = answered(questions, "lmms", np.random.default_rng(7), .5, .4)
        for row, other in zip(rows, blind):
            row |= {"blind_score": other["score"], "blind_understood": other["understood"], "blind": other["prediction"]}
    table = comparison.estimate(questions.benchmark, lines, ("score", "blind_score"), 3)
    assert table["same"]["score_vs_first"] == [0, 0, 0] == table["a"]["score_vs_first"] and table["b"]["blind_score_vs_first"] == [0, 0, 0]
    drawn = {run: comparison.score_and_draws(*comparison.cluster_sums(questions.benchmark, rows, [row["score"] for row in rows]), 3) for run, rows in lines.items()}
    difference = drawn["b"][1] - drawn["a"][1]
    assert table["b"]["score_vs_first"] == [drawn["b"][0] - drawn["a"][0], *np.quantile(difference, [.025, .975])]
    assert table["b"]["score"] == common.interval(*drawn["b"]) and table["b"]["score"] != comparison.estimate(
        questions.benchmark, lines, ("score",), 4)["b"]["score"]
    changed = [(a["score"], b["score"]) for a, b in zip(lines["a"], lines["b"])]
    gained, lost = changed.count((0, 1)), changed.count((1, 0))
    assert (table["b"]["gained"], table["b"]["lost"]) == (gained, lost) and gained and lost
    assert table["b"]["n"] == len(lines["b"]) and table["a"]["gained"] == table["a"]["lost"] == 0
    blind = [{**row, "prediction": row["blind"]} for row in lines["a"]]
    assert table["a"]["blind_score"][0] == pytest.approx(metrics.pope_score(blind, "lmms")["f1"])
    assert table["a"]["blind_score"][0] != pytest.approx(table["a"]["score"][0])


def test_flips_are_about_one_half():
    scores = lambda *values: [{"score": value} for value in values]
    assert comparison.flips(scores(0, 0, .3, .5, 1, 1), scores(.5, .4, .6, .6, .4, .5)) == [1, 0, 1, 0, -1, 0]
    with pytest.raises(ValueError):
        comparison.flips(scores(1), scores(1, 1))


@pytest.mark.parametrize("name, profile, expected", [
    ("mmbench", "paper", (1 / 4 + 1 / 27 + 1 / 256) / 3), ("mme", "paper", .375), ("seed", "lmms", 1 / 4), ("gqa", "paper", 0),
    ("scienceqa", "paper", (1 / 4 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 3 + 1 / 4) / 6), ("mmmu", "paper", (1 / 5 + 1 / 3 + 1 / 3 + 1 / 3 + 1 / 2) / 7),
    ("mmmu", "lmms", (1 / 5 + 1 / 3 + 1 / 2) / 5), ("mathvista", "paper", (1 / 4 + 1 / 2) / 6), ("mmvp", "paper", 1 / 4),
    ("realworldqa", "paper", (1 / 3 + 1 / 2) / 6), ("cvbench2d", "paper", ((1 / 4 + 1 / 2 + 1 / 2) / 3 + (1 / 5 + 1 / 2 + 1 / 4) / 3) / 2),
    ("cvbench2d", "lmms", (1 / 4 + 1 / 2 + 1 / 2 + 1 / 5 + 1 / 2 + 1 / 4) / 6), ("pope", "paper", 5 / (5 + .5 * 9)), ("hallusionbench", "lmms", .5),
    ("naturalbench", "paper", 1 / 16), ("blink", "paper", (1 / 4 + 1 / 4 + 1 / 2 + 1 / 2 + 1 / 3 + 1 / 2) / 6), ("vqav2", "lmms", 0)])
def test_chance_by_hand(name, profile, expected, asked):
    """POPE: half of 5 yes of 9 are found, and half of 9 are called yes; an unreadable answer of some model does not change it"""
    lines = [{**record, "understood": None} for record in asked[name, profile].records]
    assert comparison.chance(BENCHMARKS[name], lines) == pytest.approx(expected)


def test_chance_of_half_yes():
    row = lambda gold: {"unit": gold, "shared": gold, "stratum": "", "gold": gold, "options": {"Yes": "yes", "No": "no"}}
    assert comparison.chance(BENCHMARKS["pope"], [row("yes"), row("no")]) == pytest.approx(.5)


def test_groups_of_own_data():
    """A kind that is called like the whole is not counted twice"""
    lines = [{"category": category, "kind": kind} for category, kind in ((None, "all"), ("x", "x"), ("x", "y"), (None, None))]
    assert comparison.own_groups(lines) == {"all": [0, 1, 2, 3], "x": [1, 2], "y": [2]}


def test_the_groups_and_their_means():
    assert [len(names) for names in eval_vqa.PAPER.values()] == [4, 4, 4, 4] and len(eval_vqa.GROUPS["more"]) == 6
    assert sorted(sum(eval_vqa.GROUPS.values(), [])) == sorted(BENCHMARKS) and len(BENCHMARKS) == 22
    assert eval_vqa.benchmark_names(["vision", "mme", "mmvp"]) == ["mmvp", "realworldqa", "cvbench2d", "cvbench3d", "mme"]
    assert eval_vqa.benchmark_names(["all"]) == list(BENCHMARKS) and len(eval_vqa.benchmark_names(["paper"])) == 16
    rng, cells = np.random.default_rng(0), {}
    for name in sum(eval_vqa.PAPER.values(), []):
        cells[name] = {"score": [rng.random(), 0, 1]}
    points = {name: 100 * cell["score"][0] for name, cell in cells.items()}
    points["mme"] = 2000 * cells["mme"]["score"][0] / 20  # the paper's rule
    means = {group: sum(points[name] for name in names) / 4 for group, names in eval_vqa.PAPER.items()}
    assert comparison.averages(cells, eval_vqa.PAPER) == pytest.approx({**means, "overall": sum(means.values()) / 4})
    del cells["docvqa"]
    assert comparison.averages(cells, eval_vqa.PAPER) == pytest.approx({group: mean for group, mean in means.items() if group != "ocr"})


# ---- a part of the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, limit, n", [("mmvp", 5, 6), ("mmvp", 6, 6), ("naturalbench", 9, 12), ("gqa", 7, 7), ("mme", 13, 14)])
def test_limit_draws_whole_units(name, limit, n, many):
    questions = many[name, "paper"]
    rows = {record["row"]: record["unit"] for record in questions.records}
    sizes, drawn = Counter(rows.values()), []
    for seed in range(25):
        found = benchmarks.draw(questions.records, limit, seed)
        units = Counter(record["unit"] for record in found)
        assert len(found) == n and all(units[unit] == sizes[unit] for unit in units)
        assert [record["row"] for record in found] == [row for row in rows if rows[row] in units]  # the order stays
        assert found == benchmarks.draw(questions.records, limit, seed)
        drawn.append(frozenset(units))
    assert len(set(drawn)) > 20 and frozenset().union(*drawn) == set(sizes)


def test_limit_of_a_set(hub):
    """Questions draws the same; a limit that is no limit leaves all; a part of MME with no perception is worth 0, and stops nothing"""
    benchmark, rows = BENCHMARKS["mmvp"], lambda *args: [record["row"] for record in benchmarks.Questions(benchmark, "paper", hub, *args).records]
    assert rows(3, 1) == [record["row"] for record in benchmarks.draw(benchmarks.Questions(benchmark, "paper", hub).records, 3, 1)]
    assert len(rows(3, 1)) == 4 and rows(6, 1) == rows(7) == rows() == list("012345") and len({tuple(rows(2, seed)) for seed in range(9)}) == 3
    parts = comparison.cluster_sums(BENCHMARKS["mme"], [{"stratum": None, "unit": "1", "shared": "1"}], [1.])
    assert comparison.score_and_draws(*parts, 0)[0] == 0 and not comparison.score_and_draws(*parts, 0)[1].any()


# ---- the whole program -----------------------------------------------------------------------------------------------------------

LONGEST = {**dict.fromkeys("mmbench seed scienceqa mmmu mathvista ai2d mmvp realworldqa cvbench2d cvbench3d blink".split(), 512),
           "gqa": 128, "ocrbench": 128}  # tokens of an answer, else 32


@pytest.fixture(scope="module")
def clip_run(make, tmp_path_factory):
    """A second run: CLIP, whose pictures are cropped, + Qwen2"""
    run = str(tmp_path_factory.mktemp("runs") / "clip")
    make("clip").save(run)
    return run


@pytest.fixture
def ask(monkeypatch, capsys, hub, few_draws):
    """ask(arguments) -> what eval_vqa.py prints"""
    def ask(*arguments, copies=hub):
        monkeypatch.setattr(sys, "argv", ["eval_vqa.py", *map(str, arguments), *(["--copies", copies] if copies else [])])
        eval_vqa.main()
        return capsys.readouterr().out
    return ask


def saved(out, name, run):
    with open(os.path.join(out, name, f"{run}.jsonl")) as file:
        return [json.loads(line) for line in file]


def results(out):
    with open(os.path.join(out, "results.json")) as file:
        return json.load(file)


def contents(folder):
    """{file: its bytes}"""
    found = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): open(path, "rb").read() for path in found}


def refused(call, *words):
    """In one line that has all these words"""
    with pytest.raises((InputError, SystemExit)) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("profile", PROFILES)
def test_every_answer_and_every_number(profile, asked, start_run, clip_run, ask, monkeypatch, tmp_path):
    """All sets, two models with known answers: the first knows all, the second two of three, and nobody anything of a grey picture"""
    sets, out, lengths, cards = {name: asked[name, profile] for name in BENCHMARKS}, tmp_path / "out", defaultdict(set), []
    key = lambda question, image: (question, image.size, image.tobytes())
    known = {key(record["question"], questions.picture(record)): (name, best(record["gold"])) for name, questions in sets.items()
             for record in questions.records}
    lacks = lambda key: zlib.crc32(repr(key).encode()) % 3 == 0

    def generate(self, images, questions, max_new_tokens, temperature=None):
        texts = []
        for image, question in zip(images, questions, strict=True):
            grey = image.getcolors() == [(image.width * image.height, (128, 128, 128))]
            name, gold = (None, "") if grey else known[key(question, image)]
            lengths[name].add(max_new_tokens)
            is_clip = self.vision.config.model_type.startswith("clip")
            texts.append("#" if grey or is_clip and lacks(key(question, image)) else gold)
        return texts
    monkeypatch.setattr(MLLM, "generate", generate)
    write = eval_vqa.gallery.write
    monkeypatch.setattr(eval_vqa.gallery, "write", lambda *args: (cards.extend(args[-1]), write(*args)))
    printed = ask(start_run, clip_run, "--benchmarks", "all", "--profile", profile, "--gallery", 2, "--batch_size", 5, "--out", out)
    del lengths[None]
    assert lengths == {name: {LONGEST.get(name, 32)} for name in BENCHMARKS}

    found, cells = results(out), {"start": {}, "clip": {}}
    for name, questions in sets.items():
        for run in cells:
            lines, expected = saved(out, name, run), []
            assert [line["row"] for line in lines] == [record["row"] for record in questions.records]
            for line, record in zip(lines, questions.records):
                said = "#" if run == "clip" and lacks(key(record["question"], questions.picture(record))) else best(record["gold"])
                right, understood = BENCHMARKS[name].read(record, said, profile)
                nothing = BENCHMARKS[name].read(record, "#", profile)
                assert (line["prediction"], line["score"], line["decoded"], line["understood"]) == (said, right, right, understood)
                assert (line["blind_prediction"], line["blind_score"], line["blind_understood"]) == ("#", *nothing)
                assert (line["question"], line["gold"]) == (record["question"], record["gold"]) and "picture" not in line
                assert (line["choice"], line["blind_choice"], line["restricted"]) == (None, None, None)
                expected.append({**record, "prediction": said, "score": right, "understood": understood})
            cell, number = found["table"][run][name], headline(name, expected, profile)
            cells[run][name] = expected
            number = number * 2000 / 600 if name == "mme" else number  # three of ten categories
            blind = .5 if name == "hallusionbench" else 0
            assert cell["score"][0] == pytest.approx(number) and cell["blind_score"] == [blind, *(cell["blind_score"][1:] if blind else [0, 0])]
            assert cell["n"] == len(expected) and cell["source"] == source(name, profile)[0] and cell["n_logprob"] == 0
            assert cell["not_understood"] == sum(line["understood"] is None for line in expected)
            assert cell["skipped"] == questions.skipped and cell["dropped"] == []
            lost = [a["score"] >= .5 > b["score"] for a, b in zip(cells["start"][name], expected)]
            assert (cell["gained"], cell["lost"]) == (0, sum(lost))
            assert cell["chance"] == comparison.chance(BENCHMARKS[name], questions.records)
            assert cell["score_vs_first"][0] == pytest.approx(cell["score"][0] - found["table"]["start"][name]["score"][0])
            if name in HEADLINE and name != "blink":
                scorer = getattr(metrics, re.sub("bench.d", "bench", name) + "_score")
                assert cell["scorer"] == pytest.approx(scorer(expected) if name in ("hallusionbench", "naturalbench") else scorer(expected, profile))
            else:
                assert "scorer" not in cell
            flipped = [card for card in cards if card.benchmark == BENCHMARKS[name].title]
            numbers = [int(re.search(r"\d+$", card.name)[0]) if name != "blink" else card.name[4:] for card in flipped]
            if run == "clip":
                rows = [record["row"] if name == "blink" else int(record["row"]) for record, is_lost in zip(questions.records, lost) if is_lost]
                assert len(flipped) == min(2, len(rows)) and set(numbers) <= set(rows) and numbers == [row for row in rows if row in numbers]
    points = {run: {name: 100 * cell["score"][0] for name, cell in found["table"][run].items()} for run in cells}
    means = {group: np.mean([points["clip"][name] for name in names]) for group, names in eval_vqa.PAPER.items()}
    assert found["averages"]["start"] == dict.fromkeys([*eval_vqa.PAPER, "overall"], 100)
    assert found["averages"]["clip"] == pytest.approx({**means, "overall": np.mean(list(means.values()))}) and means["vision"] < 100

    for card in cards:  # each is about a question that only the first knows
        name = next(name for name in BENCHMARKS if BENCHMARKS[name].title == card.benchmark)
        record = next(record for record in sets[name].records if f"row {record['row']}" == card.name)
        gold = ", ".join(dict.fromkeys(record["gold"])) if isinstance(record["gold"], list) else record["gold"]
        assert (card.question, card.gold, card.image.tobytes()) == (record["question"], gold, sets[name].picture(record).tobytes())
        assert [(answer.model, answer.text, answer.right) for answer in card.answers] == [("start", best(record["gold"]), 1), ("clip", "#", 0)]
        assert all(answer.map.any() for answer in card.answers) and card.answers[0].map.shape == (3, 3)
    assert len({card.benchmark for card in cards}) > 15

    with open(out / "results.md") as file:
        page = file.read()
    with open(out / "report.html") as file:
        html = file.read()
    assert found["args"]["profile"] == profile
    words = {"paper": "Cambrian-1", "lmms": "lmms-eval"}
    assert f"prompts and rules of {words[profile]} (profile {profile})" in html and "blind: the same questions with a grey picture" in html
    other = PROFILES[profile == "paper"]
    for text in (printed, page, html):
        assert f"profile {profile}" in text and f"profile {other}" not in text and "random rows" not in text
        assert all(benchmark.title in text for benchmark in BENCHMARKS.values()) and "average, overall" in text
        assert "16 about several pictures" in text and "1 about a video" in text and "start, blind" in text and "logprob" not in text
    cell = found["table"]["clip"]["mme"]["score"]
    line = lambda text, start: re.sub(r"[ |]+", " ", next(line for line in text.splitlines() if line.strip(" |").startswith(start))).strip()
    low, high = found["table"]["clip"]["mme"]["score"][1:]
    blind = " ".join(["0.0 [0.0, 0.0]"] * 1)
    for text in (printed, page):
        assert line(text, "MME ") == (f"MME perception, points 12 750.0 2000.0 [2000.0, 2000.0] {blind} "
                                      f"{2000 * cell[0]:.1f} [{2000 * low:.1f}, {2000 * high:.1f}] {blind}")
        assert line(text, "average, overall").split()[2:] == ["100.0", f"{found['averages']['clip']['overall']:.1f}"]
        assert line(text, "GQA ").startswith("GQA accuracy 6 100.0 [100.0, 100.0]")  # no chance
    assert "all numbers of the official scorers" in page and "MME perception" in page and "official" not in printed
    assert sorted(os.listdir(out)) == sorted([*BENCHMARKS, "report.html", "results.json", "results.md", "settings.json"])
    assert not glob.glob(f"{out}.*")


@pytest.mark.parametrize("profile", PROFILES)
def test_all_sets_with_a_real_run(profile, asked, start_run, ask, tmp_path):
    """What the model itself writes, of three rows of each; --blind false asks once; the limit is said"""
    out, model = tmp_path / "out", MLLM.load(start_run).eval()
    printed = ask(start_run, "--benchmarks", "all", "--profile", profile, "--limit", 3, "--seed", 4, "--max_new_tokens", 3, "--blind", "false",
                  "--out", out)
    for name in BENCHMARKS:
        questions, lines = asked[name, profile], saved(out, name, "start")
        records = benchmarks.draw(questions.records, 3, 4)
        assert [line["row"] for line in lines] == [record["row"] for record in records] and len(lines) >= 3
        for record, line in zip(records[:1], lines):
            assert model.generate([questions.picture(record)], [record["question"]], 3) == [line["prediction"]]
            assert (line["score"], line["understood"]) == BENCHMARKS[name].read(record, line["prediction"], profile)
        assert all(line[key] is None for line in lines for key in (
            "blind_prediction", "blind_choice", "blind_score", "blind_understood", "choice", "restricted"))
    assert len({line["prediction"] for name in BENCHMARKS for line in saved(out, name, "start")}) > 20
    texts = [printed, *(open(out / name).read() for name in ("results.md", "report.html"))]
    assert all("about 3 random rows of each, seed 4" in text and "start, blind" not in text and "difference to" not in text for text in texts)
    assert set(results(out)["table"]["start"]["mmvp"]) & {"blind_score", "score"} == {"score"}
    assert "No question to show" in texts[2] and "grey picture" not in texts[2] and results(out)["args"]["limit"] == 3


def test_a_part_of_a_group_has_no_average(asked, start_run, ask, tmp_path):
    printed = ask(start_run, "--benchmarks", "vision", "mme", "--max_new_tokens", 1, "--blind", "false", "--out", tmp_path / "out")
    assert list(results(tmp_path / "out")["averages"]["start"]) == ["vision"] and "average, vision" in printed and "overall" not in printed


def test_logprob(asked, start_run, clip_run, ask, tmp_path):
    """The option that the model would rather write, read by the slow path; where there are none, what it writes"""
    out, names = tmp_path / "out", ["mmvp", "pope", "chartqa", "mmmu", "naturalbench"]
    printed = ask(start_run, clip_run, "--benchmarks", *names, "--score", "logprob", "--batch_size", 4, "--max_new_tokens", 2, "--out", out)
    model, chosen = MLLM.load(start_run).eval(), set()
    for name in names:
        for record, line in zip(asked[name, "paper"].records, saved(out, name, "start")):
            if record["options"] is None:
                assert line["choice"] is None is line["restricted"] and line["blind_choice"] is None
                assert (line["score"], line["understood"]) == BENCHMARKS[name].read(record, line["prediction"], "paper")
                continue
            assert line["prediction"] is None is line["decoded"] and line["blind_prediction"] is None and line["understood"] == line["choice"]
            assert line["score"] == line["restricted"] == float(line["choice"].lower() == record["gold"].lower())
            assert line["blind_score"] == float(line["blind_choice"].lower() == record["gold"].lower())
            assert line["blind_understood"] == line["blind_choice"]
            if int(record["row"]) < 3:
                picture = asked[name, "paper"].picture(record)
                for image, choice in ((picture, line["choice"]), (
                        Image.new("RGB", picture.size, (128, 128, 128)), line["blind_choice"])):
                    logps = {option: model.logps([image], [record["question"]], [option]).item() for option in record["options"]}
                    assert choice == max(logps, key=logps.get)
                chosen.add((line["choice"], line["blind_choice"]))
    assert len(chosen) > 3
    cells = results(out)["table"]["start"]
    assert [(cells[name]["n"], cells[name]["n_logprob"]) for name in names] == [(6, 6), (9, 9), (6, 0), (7, 5), (12, 12)]
    for text in (printed, open(out / "results.md").read(), open(out / "report.html").read()):
        assert "logprob: the likeliest option is scored, usually easier than what is written" in text and "F1, logprob" in text
        assert "relaxed accuracy, logprob" not in text and "accuracy, partly logprob" in text and "accuracy of pairs, logprob" in text
    lines = [{**line, "prediction": line["choice"]} for line in saved(out, "pope", "start")]
    assert cells["pope"]["scorer"] == pytest.approx(metrics.pope_score(lines, "paper"))
    assert cells["pope"]["score"][0] == pytest.approx(cells["pope"]["scorer"]["f1"])
    lines = [{**line, "prediction": line["blind_choice"]} for line in saved(out, "pope", "start")]
    assert cells["pope"]["blind_score"][0] == pytest.approx(metrics.pope_score(lines, "paper")["f1"])


# ---- stopped and gone on ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch):
    """What was really asked of which kind of encoder, a question each; heard.stop: the number of the call that Ctrl-C interrupts"""
    heard, real = SimpleNamespace(questions=[], calls=0, stop=None), MLLM.generate

    def generate(self, images, questions, *more, **named):
        heard.calls += 1
        if heard.calls == heard.stop:
            raise KeyboardInterrupt
        answers = real(self, images, questions, *more, **named)
        heard.questions += [(self.vision.config.model_type, question, image.tobytes()) for image, question in zip(images, questions)]
        return answers
    monkeypatch.setattr(MLLM, "generate", generate)
    return heard


QUICK = ("--blind", "false", "--batch_size", 4, "--max_new_tokens", 3)


@pytest.mark.parametrize("stop", [1, 4, 7, 10])
def test_a_stopped_run_goes_on(stop, start_run, clip_run, ask, heard, tmp_path):
    """Wherever it was stopped, in the end all is as if it never was; nothing is asked twice but a line that was cut off"""
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = (start_run, clip_run, "--benchmarks", "mmvp", "pope", *QUICK, "--gallery", 0)
    ask(*arguments, "--out", whole)
    every, heard.questions, heard.calls, heard.stop = heard.questions, [], 0, stop
    with pytest.raises(SystemExit, match="--resume goes on"):
        ask(*arguments, "--out", out)
    assert not out.exists() and heard.calls == stop
    written = sorted((tmp_path / "out.tmp").glob("*/*.jsonl"), key=os.path.getmtime)
    cut = [path for path in written if path.stat().st_size]
    rows = [0, 4, 6, 10, 14, 15, 19, 21, 25, 29][stop - 1]  # of calls about 4 or fewer
    assert len(heard.questions) == sum(len(path.read_text().splitlines()) for path in cut) == rows
    if cut:
        refused(lambda: ask(*arguments, "--out", out), "--resume goes on", "out.tmp")  # answers are not thrown away unasked
        text = cut[-1].read_text()
        cut[-1].write_text(text[:-20] if stop == 7 else text + text[:30])
    heard.stop = None
    ask(*arguments, "--out", out, "--resume")
    assert (Counter(heard.questions) - Counter(every)).total() == (stop == 7) and not Counter(every) - Counter(heard.questions)
    same = lambda folder: {path: text for path, text in contents(folder).items() if path.endswith((".jsonl", ".md"))}
    assert same(out) == same(whole) and not (tmp_path / "out.tmp").exists()
    assert results(out)["table"] == results(whole)["table"]


def test_what_is_new_is_answered_and_nothing_else(make, start_run, clip_run, ask, heard, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    ask(start_run, "--benchmarks", "mmvp", *QUICK, "--out", out)
    before, heard.questions = contents(out)["mmvp/start.jsonl"], []
    ask(start_run, clip_run, "--benchmarks", "mmvp", "gqa", *QUICK, "--out", out, "--resume")
    assert contents(out)["mmvp/start.jsonl"] == before
    assert Counter(kind for kind, *_ in heard.questions) == {"siglip_vision_model": 6, "clip_vision_model": 12}
    assert all(question.endswith(hub_files.SHORT) for kind, question, _ in heard.questions if kind == "siglip_vision_model")  # GQA's
    heard.questions = []
    ask(start_run, clip_run, "--benchmarks", "mmvp", "gqa", *QUICK, "--out", out, "--resume", "--gallery", 1)
    assert heard.questions == []
    ask(start_run, clip_run, "--benchmarks", "mmvp", "gqa", *QUICK, "--out", whole)
    assert results(whole)["table"] == results(out)["table"]
    ask(start_run, "--benchmarks", "gqa", *QUICK, "--out", out, "--resume")  # fewer: the others stay for another time
    assert list(results(out)["table"]) == ["start"] and list(results(out)["table"]["start"]) == ["gqa"] and (out / "mmvp/clip.jsonl").exists()
    make(feature_layer=-1).save(str(tmp_path / "other/clip"))  # and are remembered
    refused(lambda: ask(tmp_path / "other/clip", "--benchmarks", "mmvp", *QUICK, "--out", out, "--resume"), "clip is not what it was")


def test_another_run_is_not_gone_on_with(start_run, clip_run, ask, hub, heard, tmp_path):
    """Other settings, weights or data are refused, by name, and nothing is changed by it"""
    run, out, folder = str(tmp_path / "start"), tmp_path / "out", str(tmp_path / "hub")
    shutil.copytree(start_run, run)
    shutil.copytree(os.path.join(hub, "lmms-lab-eval"), os.path.join(folder, "lmms-lab-eval"))
    arguments = (run, "--benchmarks", "mmvp", *QUICK, "--out", out)
    ask(*arguments, copies=folder)
    before, heard.questions = contents(out), []
    for flag, value in (("profile", "lmms"), ("limit", 4), ("score", "logprob"), ("blind", "true"), ("max_new_tokens", 4), ("reader", clip_run),
                        ("seed", 1)):
        refused(lambda: ask(*arguments, f"--{flag}", value, "--resume", copies=folder), f"--{flag} ", str(out), "another --out")
    refused(lambda: ask(run, *QUICK, "--out", out, "--data", "scenes/test/vqa", "--n", 2, "--resume", copies=None), "--resume", str(out))
    refused(lambda: ask(*arguments, copies=folder), "--out", str(out), "exists already")
    put_changed(folder, "mmvp", lambda rows: rows[3].update(Question="Is the dog asleep?"))
    refused(lambda: ask(*arguments, "--resume", copies=folder), "mmvp is not what it was")
    put_changed(folder, "mmvp", lambda rows: rows[3].update(image=rows[2]["image"]))
    refused(lambda: ask(*arguments, "--resume", copies=folder), "mmvp is not what it was")
    put_changed(folder, "mmvp", lambda rows: rows[3].update(Options="(a) Left (b) Right (c) Up"))
    refused(lambda: ask(*arguments, "--resume", copies=folder), "mmvp is not what it was")
    put_changed(folder, "mmvp", lambda rows: None)
    path = os.path.join(run, "connector.safetensors")
    save_file({name: weight * 1.01 for name, weight in load_file(path).items()}, path)
    refused(lambda: ask(*arguments, "--resume", copies=folder), "start is not what it was")
    assert contents(out) == before and not (tmp_path / "out.tmp").exists() and heard.questions == []
    shutil.copytree(start_run, tmp_path / "reader")
    arguments = (run, "--benchmarks", "mmvp", *QUICK, "--reader", tmp_path / "reader", "--out", tmp_path / "swapped")
    ask(*arguments)
    shutil.copy(path, tmp_path / "reader/connector.safetensors")
    refused(lambda: ask(*arguments, "--resume"), "--reader")
    for_other = tmp_path / "other"
    for_other.mkdir()
    (for_other / "precious.txt").write_text("mine")
    refused(lambda: ask(run, "--benchmarks", "mmvp", *QUICK, "--out", for_other, "--resume"), "--resume", str(for_other))
    assert (for_other / "precious.txt").read_text() == "mine"


def test_a_corrected_answer_is_scored_anew(start_run, ask, heard, hub, tmp_path):
    """Nothing is asked for it; but options that are not the same are another question"""
    for i in range(4):
        Image.new("RGB", (24, 24), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "what color is it?", "answer": answer} for i, answer in enumerate(("red", "blue", "blue", "red"))]
    write = lambda: (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write()
    arguments = (start_run, "--data", tmp_path / "my.jsonl", *QUICK, "--out", tmp_path / "out")
    ask(*arguments, copies=None)
    before = saved(tmp_path / "out", "", "start")
    assert [line["gold"] for line in before] == ["red", "blue", "blue", "red"] and {line["restricted"] for line in before} == {0, 1}
    rows[1]["answer"], heard.questions = "red", []
    write()
    ask(*arguments, "--resume", copies=None)
    after = saved(tmp_path / "out", "", "start")
    assert after[1]["gold"] == "red" and after[1]["restricted"] == 1 - before[1]["restricted"] and heard.questions == []
    assert [line["restricted"] for line in after if line["row"] != 1] == [line["restricted"] for line in before if line["row"] != 1]
    assert results(tmp_path / "out")["table"]["start"]["all"]["restricted"][0] == np.mean([line["restricted"] for line in after])
    rows[2]["answer"] = "green"
    write()
    refused(lambda: ask(*arguments, "--resume", copies=None), "my.jsonl is not what it was")

    folder = put_changed(tmp_path / "hub", "mmvp", lambda rows: None)
    arguments = (start_run, "--benchmarks", "mmvp", *QUICK, "--score", "logprob", "--out", tmp_path / "mmvp")
    ask(*arguments, copies=folder)
    before = saved(tmp_path / "mmvp", "mmvp", "start")
    put_changed(folder, "mmvp", lambda rows: [row.update({"Correct Answer": "(b)"}) for row in rows] and None)
    ask(*arguments, "--resume", copies=folder)
    after = saved(tmp_path / "mmvp", "mmvp", "start")
    assert [line["choice"] for line in after] == [line["choice"] for line in before] and {line["gold"] for line in after} == {"B"}
    assert [line["score"] for line in after] == [float(line["choice"] == "B") for line in after] != [line["score"] for line in before]


def test_two_processes_answer_as_one(start_run, ask, hub, tmp_path):
    """torchrun: the same files, byte by byte"""
    arguments = [start_run, "--benchmarks", "mmvp", "gqa", "--batch_size", 2, "--max_new_tokens", 3]
    ask(*arguments, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", eval_vqa.__file__, *arguments, "--copies", hub]
    done = subprocess.run([*map(str, command), "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 == done.stdout.count("accuracy of pairs")
    one, two = ({path: text for path, text in contents(tmp_path / name).items() if path.endswith(".jsonl")} for name in ("one", "two"))
    assert one == two and sorted(two) == ["gqa/start.jsonl", "mmvp/start.jsonl"]


def test_what_several_processes_left_is_gone_on_with(start_run, ask, hub, heard, tmp_path):
    """A stopped torchrun leaves a file of each process; one alone can go on"""
    arguments = (start_run, "--benchmarks", "gqa", *QUICK)
    ask(*arguments, "--out", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "out.tmp")
    lines = (tmp_path / "out.tmp/gqa/start.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("", lines[:1]), (".rank0", lines[1:2]), (".rank1", lines[4:] + [lines[2][:50]])):
        (tmp_path / f"out.tmp/gqa/start.jsonl{name}").write_text("".join(part))
    heard.questions = []
    ask(*arguments, "--out", tmp_path / "out", "--resume")
    assert len(heard.questions) == 2 and (tmp_path / "out/gqa/start.jsonl").read_text() == "".join(lines)
    assert sorted(os.listdir(tmp_path / "out/gqa")) == ["start.jsonl"]


def test_the_share_of_a_process(asked, tmp_path):
    """Each batch is asked by one process, in a file of its own; the first is the longest, and questions about a picture stay together"""
    asked_of = {}

    def answerer(rank):
        def generate(images, questions, tokens):
            asked_of.setdefault(rank, []).append(questions)
            return ["no"] * len(questions)
        return SimpleNamespace(generate=generate)
    args = SimpleNamespace(batch_size=2, folder=str(tmp_path), score="decoded", blind=False, max_new_tokens=None, profile="paper")
    questions, path = asked["pope", "paper"], str(tmp_path / "a.jsonl")
    eval_vqa.gather(questions, path, "paper")
    for rank in range(3):
        eval_vqa.answer_all(lambda: answerer(rank), questions, path, args, contextlib.nullcontext, rank, 3)
    assert {rank: len(batches) for rank, batches in asked_of.items()} == {0: 2, 1: 2, 2: 1} and os.path.getsize(path) == 0
    assert sorted(sum(sum(asked_of.values(), []), [])) == sorted(record["question"] for record in questions.records)
    lines, dropped = eval_vqa.gather(questions, path, "paper")
    assert list(lines) == [line["row"] for line in lines.values()] == list("012345678") and dropped == {} and os.listdir(tmp_path) == ["a.jsonl"]
    for name, size in itertools.product(("pope", "gqa", "vqav2", "okvqa"), (1, 4, 100)):
        records = asked[name, "paper"].records
        batches = eval_vqa.in_batches(records, size)
        line = [record for batch in batches for record in batch]
        assert {len(batch) for batch in batches[:-1]} <= {size} and sorted(record["row"] for record in line) == [record["row"] for record in records]
        groups = [(shared, max(len(record["question"]) for record in group)) for shared, group in itertools.groupby(
            line, key=lambda record: record["shared"])]
        assert len(groups) == len(dict(groups)) and [length for _, length in groups] == sorted((length for _, length in groups), reverse=True)


# ---- models of transformers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(start_run, tmp_path_factory):
    """The first run as a LLaVA folder"""
    folder = str(tmp_path_factory.mktemp("exports") / "llava")
    artefacts.export(start_run, folder)
    return folder


@pytest.mark.parametrize("score", ["decoded", "logprob"])
@pytest.mark.parametrize("profile", PROFILES)
def test_an_export_behind_hf_answers_as_its_run(profile, score, start_run, exported, ask, tmp_path):
    """All fields of all lines: through transformers' own processor, template and generation"""
    names = ["mmvp", "mmmu", "gqa", "pope"]
    ask(start_run, "--hf", exported, "--benchmarks", *names, "--profile", profile, "--score", score, "--batch_size", 6, "--max_new_tokens", 5,
        "--limit", 5, "--gallery", 2, "--out", tmp_path / "out")
    said = set()
    for name in names:
        ours, theirs = saved(tmp_path / "out", name, "start"), saved(tmp_path / "out", name, "llava")
        assert ours == theirs and len(ours) >= 5
        said |= {line["prediction"] or line["choice"] for line in ours}
    assert len(said) > 3
    assert results(tmp_path / "out")["table"]["llava"]["gqa"]["score_vs_first"] == [0, 0, 0]


def test_an_export_behind_hf_answers_own_data_as_its_run(start_run, exported, ask, tmp_path):
    ask(start_run, "--hf", exported, "--data", "scenes/test/vqa", "--n", 24, "--max_new_tokens", 5, "--out", tmp_path / "out", copies=None)
    ours, theirs = saved(tmp_path / "out", "", "start"), saved(tmp_path / "out", "", "llava")
    assert ours == theirs and len(ours) == 24 and {type(line["choice"]) for line in ours} == {str, type(None)}
    for line in ours:  # both of the picture, of the grey one the option alone
        assert type(line["prediction"]) is str and line["score"] == line["decoded"] and line["blind_prediction"] is None
        assert type(line["choice"]) is type(line["blind_choice"]) is (str if line["options"] else type(None))


def test_log_probabilities_of_a_hub_model(start_run, exported, asked):
    """Options of different lengths, padded; with and without a BOS"""
    run, hub = answerers.Run(start_run, torch.device("cpu")), answerers.HubModel(exported, torch.device("cpu"))
    questions = asked["seed", "paper"]
    images, texts = [questions.picture(record) for record in questions.records[:3]], [record["question"] for record in questions.records[:3]]
    options = [["A", "a much longer option", ""], ["yes"], ["On the wall", "C"]]
    ours, theirs = run.option_logps(images, texts, options), hub.option_logps(images, texts, options)
    assert [len(each) for each in theirs] == [3, 1, 2]
    for mine, its in zip(ours, theirs):
        assert its == pytest.approx(mine, abs=2e-4)


@pytest.fixture(scope="module")
def gemma(tokenizers, tmp_path_factory):
    """A tiny Gemma 3: another family, whose inputs say of each token whether it is text, and whose pictures attend both ways"""
    folder, names = str(tmp_path_factory.mktemp("gemma")), {"image_token": "<image_soft>", "boi_token": "<image>", "eoi_token": "</image>"}
    tokenizers["chatml"].save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=names)
    image_id, begin, end = map(tokenizer.convert_tokens_to_ids, names.values())
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=8, sliding_window=16, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=image_id, boi_token_index=begin,
                          eoi_token_index=end, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    randomise(Gemma3ForConditionalGeneration(config), .2).save_pretrained(folder)
    template = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
                "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    Gemma3Processor(Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer, template, image_seq_length=4).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_another_family(gemma, pictures):
    """Batches answer as single questions do; options score as in a conversation that is read whole"""
    hub, questions = answerers.HubModel(gemma, torch.device("cpu")), ["what?", "which color is the ring at the top left?", "where is it?"]
    alone = [hub.generate([image], [question], 5)[0] for image, question in zip(pictures, questions)]
    assert hub.generate(pictures[:3], questions, 5) == alone and len(set(alone)) > 1 and hub.end == "<|im_end|>"
    assert hub.generate(pictures[:1], ["<image>\n" + questions[0]], 5) == alone[:1]  # where the picture goes is the template's business
    options = [["red", "a blue cross"], ["no"], ["", "top left"]]
    inputs = []
    hook = hub.model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    scores = hub.option_logps(pictures[:3], questions, options)
    hook.remove()
    for each in inputs:  # some families break on types that are fewer than the tokens
        assert each["token_type_ids"].shape == each["input_ids"].shape and each["token_type_ids"].sum() == 4 * len(each["input_ids"])
    for image, question, texts, found in zip(pictures, questions, options, scores):
        turn = lambda role, *parts: {"role": role, "content": [{"type": "image", "image": part} if part is image else {"type": "text", "text": part}
                                                              for part in parts]}
        n, slow = len(hub.inputs([image], [question])["input_ids"][0]), []
        for text in texts:
            read = hub.processor.apply_chat_template([turn("user", image, question), turn("assistant", text)], tokenize=True, return_dict=True,
                                                     return_tensors="pt")
            ids, logps = read["input_ids"][0], hub.model(**read).logits[0].log_softmax(-1)
            stop = n + ids[n:].tolist().index(hub.tokenizer.eos_token_id) + 1
            slow.append(sum(float(logps[i - 1, ids[i]]) for i in range(n, stop)))
        assert found == pytest.approx(slow, abs=1e-4)


def test_a_folder_behind_hf_that_has_changed(exported, ask, tmp_path):
    shutil.copytree(exported, tmp_path / "llava")
    arguments = ("--hf", tmp_path / "llava", "--benchmarks", "mmvp", *QUICK, "--limit", 2, "--out", tmp_path / "out")
    ask(*arguments)
    ask(*arguments, "--resume")
    with open(tmp_path / "llava/config.json", "a") as file:
        file.write("\n")
    refused(lambda: ask(*arguments, "--resume"), "llava is not what it was")


def test_what_is_no_model_of_transformers(start_run, exported, tmp_path, ask):
    bare = str(tmp_path / "bare")
    shutil.copytree(exported, bare)
    for name in glob.glob(bare + "/*template*"):
        os.remove(name)
    with open(bare + "/tokenizer_config.json") as file:
        config = json.load(file)
    config.pop("chat_template", None)
    with open(bare + "/tokenizer_config.json", "w") as file:
        json.dump(config, file)
    arguments = ("--benchmarks", "mmvp", "--out", tmp_path / "out")
    refused(lambda: ask("--hf", bare, *arguments), bare, "no chat template")
    refused(lambda: ask(exported, *arguments), exported, "is not a run directory", "--hf")
    refused(lambda: ask("--hf", start_run, *arguments), start_run, "run directory")
    refused(lambda: ask(str(tmp_path / "nothing"), *arguments), "nothing is not a run directory")
    refused(lambda: ask("--hf", str(tmp_path / "nothing"), *arguments), "nothing", "cannot be opened")
    refused(lambda: ask(*arguments), "--hf")
    refused(lambda: ask(start_run, "--benchmarks", "mmvp"), "--out is needed")


def test_flags_that_do_not_go_together(ask, start_run, exported, tmp_path):
    out = ("--out", tmp_path / "out")
    for flag, value in (("data", "mine.jsonl"), ("n", 3), ("write_pairs", tmp_path / "pairs.jsonl")):
        refused(lambda: ask(start_run, "--benchmarks", "mmvp", f"--{flag}", value, *out), "--benchmarks", f"--{flag}")
    refused(lambda: ask(start_run, "--hf", exported, "--benchmarks", "mmvp", "--reader", start_run, *out), "--reader", "--hf")
    refused(lambda: ask(start_run, "--score", "logprob", *out, copies=None), "--score is for --benchmarks")
    refused(lambda: ask(start_run, "--reader", start_run, "--write_pairs", tmp_path / "pairs.jsonl", copies=None), "--write_pairs", "--reader")
    refused(lambda: ask(start_run, "--benchmarks", "mmvp", *out, copies=str(tmp_path / "nowhere")), "--copies", "nowhere")
    refused(lambda: ask("--hf", exported, "--write_pairs", tmp_path / "pairs.jsonl", copies=None), "--write_pairs")
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_broken(start_run, ask, tmp_path):
    """A weight that is not a number is no reason to choose the first option"""
    shutil.copytree(start_run, tmp_path / "broken")
    path = str(tmp_path / "broken/connector.safetensors")
    save_file({name: weight * float("nan") for name, weight in load_file(path).items()}, path)
    refused(lambda: ask(tmp_path / "broken", "--benchmarks", "mmvp", "--score", "logprob", *QUICK, "--out", tmp_path / "out"), "not a number")


# ---- what cannot be used -----------------------------------------------------------------------------------------------------------


def test_names_that_are_not_known(ask, start_run, tmp_path):
    refused(lambda: ask(start_run, "--benchmarks", "gqa", "mmvpp", "--out", tmp_path / "out"), "mmvpp is not known", "did you mean mmvp?", "docvqa")
    refused(lambda: eval_vqa.benchmark_names(["xqzzkw"]), "xqzzkw is not known", "vision")
    assert not (tmp_path / "out.tmp").exists()


def test_a_set_that_is_not_there(tmp_path):
    refused(lambda: benchmarks.Questions(BENCHMARKS["mme"], "paper"), "MME cannot be opened", "lmms-lab-encoder/MME", "lmms-lab/MME", "--copies DIR")
    refused(lambda: benchmarks.Questions(BENCHMARKS["mmvp"], "paper", str(tmp_path)), "MMVP cannot be opened", "lmms-lab-eval/MMVP")


def test_sets_of_another_form(tmp_path, hub):
    change = {"column": lambda rows: rows.remove_columns("Options"), "picture": lambda rows: rows.remove_columns("image")}
    for what, word in (("column", "no column Options; it has: Index, "), ("picture", "no column image; it has: Index, ")):
        rows = change[what](made("lmms-lab-eval/MMVP")["default", "train"])
        put(tmp_path / what, "lmms-lab-eval/MMVP", {("default", "train"): (rows.to_list(), rows)})
        refused(lambda: benchmarks.Questions(BENCHMARKS["mmvp"], "paper", str(tmp_path / what)), "lmms-lab-eval/MMVP has " + word)
    like, rows = stored_rows(*SOURCE["mmvp"])
    put(tmp_path / "split", "lmms-lab-eval/MMVP", {("default", "test"): (rows, like)})
    refused(lambda: benchmarks.Questions(BENCHMARKS["mmvp"], "paper", str(tmp_path / "split")), "MMVP cannot be opened", "train", "test")
    like, rows = stored_rows(*SOURCE["cvbench2d"])
    put(tmp_path / "config", "nyu-visionx/CV-Bench", {("2D", "test"): (rows, like)})
    refused(lambda: benchmarks.Questions(BENCHMARKS["cvbench3d"], "paper", str(tmp_path / "config")), "CV-Bench 3D cannot be opened", "3D", "2D")
    folder = tmp_path / "script/lmms-lab-eval/MMVP"
    os.makedirs(folder)
    (folder / "MMVP.py").write_text("raise SystemExit('was run')\n")
    refused(lambda: benchmarks.Questions(BENCHMARKS["mmvp"], "paper", str(tmp_path / "script")), "DIR/lmms-lab-eval/MMVP", "program", "--copies")


def test_gqa_without_its_pictures(tmp_path):
    like, rows = stored_rows(*SOURCE["gqa"])
    put(tmp_path, "lmms-lab-encoder/GQA", {SOURCE["gqa"][1:]: (rows, like)})
    refused(lambda: benchmarks.Questions(BENCHMARKS["gqa"], "paper", str(tmp_path)), "GQA cannot be opened", "testdev_balanced_images")


def test_rows_that_are_malformed(tmp_path):
    """Named and counted; half a pair goes with its other half"""
    def mmmu(rows):
        rows[0]["options"], rows[2]["options"], rows[3]["options"], rows[4]["answer"] = "not a list", "['unclosed", "5", "[1, 2"
    questions = benchmarks.Questions(BENCHMARKS["mmmu"], "paper", put_changed(tmp_path, "mmmu", mmmu))
    assert [record["row"] for record in questions.records] == list("156") and [text.split(" cannot")[0] for text in questions.dropped] == [
        f"MMMU row {row}" for row in (0, 2, 3, 4)] and all("\n" not in text and "(" in text for text in questions.dropped)
    folder = put_changed(tmp_path, "mmvp", lambda rows: rows[1].update(Options=None))
    questions = benchmarks.Questions(BENCHMARKS["mmvp"], "lmms", folder)
    assert [record["row"] for record in questions.records] == list("2345") and len(questions.dropped) == 2
    assert "MMVP row 1 cannot be used" in questions.dropped[0] and questions.dropped[1] == "MMVP row 0 counts together with MMVP row 1"
    like, rows = stored_rows("lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev")
    changed = stored_rows(*SOURCE["gqa"])
    changed[1][1]["imageId"] = "lost"
    folder = put(tmp_path, "lmms-lab-encoder/GQA", {SOURCE["gqa"][1:]: changed[::-1], ("testdev_balanced_images", "testdev"): (rows, like)})
    questions = benchmarks.Questions(BENCHMARKS["gqa"], "paper", folder)
    assert [record["row"] for record in questions.records] == list("02345")
    assert "GQA row 1 " in questions.dropped[0] and "lost" in questions.dropped[0]
    folder = put_changed(tmp_path, "mathvista", lambda rows: rows[1].update(answer="none of the choices"))
    assert "MathVista row 1 " in benchmarks.Questions(BENCHMARKS["mathvista"], "paper", folder).dropped[0]
    folder = put_changed(tmp_path, "mmbench", lambda rows: rows[0].update(answer="C"))  # of north and south
    questions = benchmarks.Questions(BENCHMARKS["mmbench"], "paper", folder)
    assert len(questions.records) == 7 and "MMBench-en row 0 " in questions.dropped[0] and len(questions.dropped) == 2
    folder = put_changed(tmp_path, "textvqa", lambda rows: rows[2].update(answers=[]))
    assert "TextVQA row 2 " in benchmarks.Questions(BENCHMARKS["textvqa"], "lmms", folder).dropped[0]
    folder = put_changed(tmp_path, "mmmu", lambda rows: [row.update(options="x") for row in rows] and None)
    refused(lambda: benchmarks.Questions(BENCHMARKS["mmmu"], "paper", folder), "none of its rows can be used", "MMMU row 0")


def test_a_set_without_rows(tmp_path):
    like, _ = stored_rows(*SOURCE["mmvp"])
    folder = put(tmp_path, "lmms-lab-eval/MMVP", {("default", "train"): ([], like)})
    refused(lambda: benchmarks.Questions(BENCHMARKS["mmvp"], "paper", folder), "MMVP")


def test_pictures_that_cannot_be_read(start_run, ask, heard, tmp_path):
    """Broken or missing: all rows are named, their pairs left out, and nobody is asked about them again"""
    def change(rows):
        rows[2]["image"] = {**rows[2]["image"], "bytes": b"this is no picture"}

    def docvqa(rows):
        rows[0]["image"] = rows[1]["image"] = {**rows[1]["image"], "bytes": b"two questions about what is no picture"}
        rows[4]["image"] = rows[5]["image"] = None
    folder, out = put_changed(tmp_path, "mmvp", change), tmp_path / "out"
    put_changed(folder, "docvqa", docvqa)
    put_changed(folder, "mmmu", lambda rows: rows[0].update(options="5"))
    arguments = (start_run, "--benchmarks", "mmvp", "docvqa", "mmmu", *QUICK, "--out", out)
    printed = ask(*arguments, copies=folder)
    assert len(heard.questions) == 5 + 2 + 6
    lines, table = saved(out, "mmvp", "start"), results(out)["table"]["start"]
    assert [line["row"] for line in lines] == list("013452") and sorted(lines[5]) == ["dropped", "row"]
    assert table["mmvp"]["n"] == 4 and table["docvqa"]["n"] == 2
    assert [text.split(":")[0] for text in table["mmvp"]["dropped"] + table["docvqa"]["dropped"]] == [
        "MMVP row 2", "row 3 counts together with another that cannot be used", *(f"DocVQA row {row}" for row in (0, 1, 4, 5))]
    assert table["mmmu"]["n"] == 6 and len(table["mmmu"]["dropped"]) == 1
    assert all(f"dropped     {name}" in printed for name in ("MMVP row 2: ", "DocVQA row 5: ", "MMMU row 0 "))
    assert "cannot be read" in table["mmvp"]["dropped"][0] and "it has no picture" in table["docvqa"]["dropped"][3]
    kept = [{**line} for line in lines if line["row"] in "0145"]
    assert table["mmvp"]["score"][0] == metrics.mmvp_score(kept, "paper")["pair_accuracy"] and table["mmvp"]["scorer"]["accuracy"] == np.mean(
        [line["score"] for line in kept])
    assert "unreadable pictures or rows" in printed
    assert [line.split()[-1] for line in printed.split("rows that were not asked\n")[1].splitlines()[1:4]] == ["2", "4", "1"]
    ask(*arguments, "--resume", copies=folder)
    assert len(heard.questions) == 5 + 2 + 6 and re.sub("0x[0-9a-f]+", "", repr(results(out)["table"]["start"])) == re.sub(
        "0x[0-9a-f]+", "", repr(table))  # PIL names a place in memory


def test_no_picture_can_be_read(start_run, ask, tmp_path):
    folder = put_changed(tmp_path, "mmvp", lambda rows: [row.update(image={"bytes": b"x", "path": "x.png"}) for row in rows] and None)
    refused(lambda: ask(start_run, "--benchmarks", "mmvp", *QUICK, "--out", tmp_path / "out", copies=folder), "lmms-lab-eval/MMVP", "not one picture",
            "MMVP row 0")
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_a_path(tmp_path, start_run, ask, heard):
    """One that comes later is asked about then, and its pair with it"""
    (tmp_path / "a.png").touch()
    folder = put_changed(tmp_path, "mmvp", lambda rows: rows[0].update(image={"bytes": None, "path": str(tmp_path / "a.png")}))
    (tmp_path / "a.png").unlink()
    arguments = (start_run, "--benchmarks", "mmvp", *QUICK, "--out", tmp_path / "out")
    ask(*arguments, copies=folder)
    assert results(tmp_path / "out")["table"]["start"]["mmvp"]["n"] == 4 and len(heard.questions) == 5
    with open(tmp_path / "a.png", "wb") as file:
        file.write(hub_files.picture("somewhere else")["bytes"])
    ask(*arguments, "--resume", copies=folder)
    assert results(tmp_path / "out")["table"]["start"]["mmvp"]["n"] == 6 and len(heard.questions) == 6
    assert heard.questions[-1][2] == upright(hub_files.picture("somewhere else")["bytes"])[2].tobytes()


# ---- the page -----------------------------------------------------------------------------------------------------------------------


def test_maps_of_runs_and_none_of_hub_models(start_run, exported, clip_run, ask, monkeypatch, tmp_path, asked):
    """A card's maps are of each model's own answer; what it chose stands where it wrote nothing"""
    cards, write = [], eval_vqa.gallery.write
    monkeypatch.setattr(eval_vqa.gallery, "write", lambda *args: (cards.extend(args[-1]), write(*args)))
    ask(start_run, clip_run, "--hf", exported, "--benchmarks", "mmmu", "--score", "logprob", "--blind", "false", "--max_new_tokens", 3,
        "--out", tmp_path / "out")
    first, second = saved(tmp_path / "out", "mmmu", "start"), saved(tmp_path / "out", "mmmu", "clip")
    flipped = [i for i, (a, b) in enumerate(zip(first, second)) if a["score"] != b["score"]]
    assert flipped and [card.name for card in cards] == [f"row {i}" for i in flipped] and len(flipped) < 7
    models = {"start": answerers.Run(start_run, torch.device("cpu")), "clip": answerers.Run(clip_run, torch.device("cpu"))}
    for card, i in zip(cards, flipped):
        assert [(answer.model, answer.text) for answer in card.answers] == [
            ("start", first[i]["choice"]), ("clip", second[i]["choice"]), ("llava", first[i]["choice"])]
        assert card.answers[2].map is None
        for answer in card.answers[:2]:
            assert np.allclose(answer.map, models[answer.model].map(card.image, card.question, answer.text))


@pytest.mark.parametrize("size", [(28, 28), (64, 32), (32, 64), (200, 40), (41, 30), (30, 90)])
def test_the_map_of_a_cropped_picture_covers_the_picture(size, clip_run, start_run):
    """CLIP sees the middle: there lies its map, and around it is nothing, so that cells stay square on the picture"""
    run, rng = answerers.Run(clip_run, torch.device("cpu")), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    found, inner = run.map(image, "what is it?", "a ring"), artefacts.answer_map(run.model, image, "what is it?", "a ring")
    assert inner.shape == (3, 3) and inner.all()
    cells = [side / (min(size) * 24 / 28 / 3) for side in size[::-1]]  # a cell is a third of the crop, which is 24 of 28 of the shorter side
    assert all(abs(n - cell) <= 1 and (n - 3) % 2 == 0 for n, cell in zip(found.shape, cells))
    top, left = ((n - 3) // 2 for n in found.shape)
    assert np.allclose(found[top:top + 3, left:left + 3], inner) and np.count_nonzero(found) == 9
    plain = answerers.Run(start_run, torch.device("cpu"))
    assert plain.map(image, "what is it?", "a ring").shape == (3, 3)  # squashed: the whole picture
