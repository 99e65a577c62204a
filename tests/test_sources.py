"""Other people's sets: every named form against the table that it was written from, mixtures and streams against counting, `prepare` against
the paper's rules."""
import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import data
import prepare
import scenes
import sources
from sources import BadRow, Lines, expand

datasets = pytest.importorskip("datasets")
TEXT, INTEGER, PICTURE = datasets.Value("string"), datasets.Value("int64"), datasets.Image()

# ---- tables as they lie on the hub --------------------------------------------------------------------------------------------

ARRAYS = [np.random.default_rng(i).integers(0, 256, (4 + i % 3, 5 + i % 2, 3), dtype=np.uint8) for i in range(60)]
NUMBERS = {array.tobytes(): i for i, array in enumerate(ARRAYS)}


def file_of(i, form="PNG"):
    """The bytes of picture i as a file"""
    out = io.BytesIO()
    Image.fromarray(ARRAYS[i]).save(out, form)
    return out.getvalue()


def picture(i):
    """Picture i as a parquet cell"""
    return {"bytes": file_of(i), "path": f"{i}.png"}


def parquet(folder, features, *files, group=None):
    """train-0000i-of-n.parquet with these lists of rows -> the folder as text; `features`: one for all, or one a file"""
    folder.mkdir(parents=True)
    for number, rows in enumerate(files):
        schema = datasets.Features(features[number] if isinstance(features, list) else features).arrow_schema
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"train-{number:05}-of-{len(files):05}.parquet", row_group_size=group)
    return str(folder)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def result(rows, i):
    """(question, the answers, number of the picture), or the message of a bad row"""
    try:
        record = rows[i]
    except BadRow as error:
        assert "\n" not in str(error)
        return str(error)
    fields = ("chosen", "rejected") if rows_kind(rows) == "pairs" else ("answer",)
    assert record["image"].mode == "RGB"
    return (record["question"], *(record[field] for field in fields), NUMBERS[np.asarray(record["image"]).tobytes()])


def rows_kind(rows):
    return rows.parts[0].kind if isinstance(rows, data.Stream) else rows.kind


def epoch(stream, n):
    """The first n trees of a stream"""
    return list(itertools.islice(stream.trees(), n))


# ---- every form: (kind, features, files of (row, what its questions give: a record or the reason why there is none)) ------------

BMB = {"ds_name": TEXT, "image": PICTURE, **dict.fromkeys(("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"),
                                                          TEXT)}
TURN = {"content": [{"text": TEXT, "type": TEXT}], "role": TEXT}
TRL = {"images": [PICTURE], "prompt": [TURN], "chosen": [TURN], "rejected": [TURN]}
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
NOTES = {aspect: {"Rating": TEXT, "Rationale": TEXT} for aspect in ASPECTS}
RATED = {"id": TEXT, "prompt": TEXT, "models": [TEXT], "image": PICTURE}
SAID = {"from": TEXT, "value": TEXT}
FACTORY = {"conversations": [SAID], "chosen": SAID, "rejected": SAID, "images": [PICTURE]}
LLAVA = {"id": TEXT, "conversations": [SAID], "data_source": TEXT, "image": PICTURE}
CAULDRON = {"images": [PICTURE], "texts": [{"user": TEXT, "assistant": TEXT, "source": TEXT}]}
RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")
FINEVISION = {"images": [PICTURE], "texts": [{"user": TEXT, "assistant": TEXT}], "source": TEXT,
              **{f"{name}_ratings": [INTEGER] for name in RATINGS}, **{f"{name}_min": INTEGER for name in RATINGS}}


def bmb(image, question, chosen, rejected):
    return {"ds_name": "RLAIF-V", "image": image, "question": question, "chosen": chosen, "rejected": rejected, "origin_dataset": "LCS",
            "origin_split": '{"models": "llava"}', "idx": "7", "image_path": "7.jpg"}


def turns(*said, image=False):
    return [{"content": [{"text": None, "type": "image"}] * image + [{"text": text, "type": "text"}], "role": role} for role, text in said]


def trl(images, *prompt, chosen="yes", rejected="no"):
    return {"images": images, "prompt": turns(*prompt, image=True), "chosen": turns(("assistant", chosen)),
            "rejected": turns(("assistant", rejected))}


def rated(form, image, *answers):
    """answers: (response, its three ratings; None for a rating that is not there, or for all of them)"""
    note = lambda rating: None if rating is None else {"Rating": rating, "Rationale": "as I see it"}
    notes = [ratings and {aspect: note(rating) for aspect, rating in zip(ASPECTS, ratings)} for _, ratings in answers]
    listed = [{"annotations": note, "model": "m", "response": response} for note, (response, _) in zip(notes, answers)]
    return {"id": "x", "prompt": "rate?", "models": ["m"] * len(answers), "image": image,
            "completions": listed if form is list else {key: [each[key] for each in listed] for key in ("annotations", "model", "response")}}


def rated_file(form):
    return [
        (rated(form, picture(0), ("mid", "444"), ("best", "555"), ("worst", "141"), ("low", "222")), [("rate?", "best", "worst", 0)]),
        (rated(form, picture(1), ("first best", "455"), ("second best", "554"), ("first worst", "113"), ("second worst", "311")),
         [("rate?", "first best", "first worst", 1)]),                                   # of equal sums the first counts
        (rated(form, picture(2), ("good", "333"), ("wordy", ("5", "5", "N/A")), ("bad", "332"), ("unsaid", ("1", None, "1")),
               ("empty", ("1", "", "1")), ("none", None)), [("rate?", "good", "bad", 2)]),   # without three numbers: neither best nor worst
        (rated(form, picture(3), ("ten", ("10", "3", "3")), ("nine", ("9", "3", "3")), ("half", ("9", "3", "3.5"))), [("rate?", "ten", "nine", 3)]),
        (rated(form, picture(4), ("a", "345"), ("b", "543")), ["none of its 2 rated answers is better than another"]),
        (rated(form, picture(4), ("a", ("N/A",) * 3), ("b", ("four", "4", "4"))), ["none of its 0 rated answers is better than another"]),
        (rated(form, picture(4)), ["none of its 0 rated answers is better than another"]),
        (rated(form, None, ("a", "111"), ("b", "222")), ["it has no picture"]),
        (rated(form, picture(5), ("same", "111"), ("same ", "222")), ["chosen and rejected are the same text"]),
        (rated(form, picture(5), (None, "111"), ("b", "222")), ["'rejected' is missing"])]


def factory(images, chosen, rejected, *said):
    return {"conversations": [{"from": who, "value": value} for who, value in said], "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected}, "images": images}


def llava(image, *said, roles=("human", "gpt")):
    return {"id": "x", "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(said)], "data_source": "s", "image": image}


def turned(n, roles):
    return rf"turns {n} and {n + 1} are of {re.escape(str(roles))}, must be of human and gpt"


LLAVA_FILES = (
    [(llava(picture(0), "<image>\none?", "1"), [("<image>\none?", "1", 0)]),
     (llava(picture(1), "<image>\none?", "1", "two?", "2", "three?", "3"), [("<image>\none?", "1", 1), ("two?", "2", 1), ("three?", "3", 1)]),
     (llava(None, "text?", "yes", "only?", "yes"), ["it has no picture"] * 2)],
    [(llava(picture(2), "one?", "1", "left open?"), [("one?", "1", 2), turned(3, ["human"])]),
     (llava(picture(2), "left open?"), [turned(1, ["human"])]),
     (llava(picture(2)), [turned(1, [])]),
     (llava(picture(3), "hello", "one?", "1", "two?", "2", roles=("gpt", "human")),
      [turned(1, ["gpt", "human"]), turned(3, ["gpt", "human"]), turned(5, ["gpt"])]),
     (llava(picture(3), "be short", "one?", roles=("system", "human")), [turned(1, ["system", "human"])]),
     (llava(picture(4), "one?", " ", "two?", "a <image>", "", "3", "four?", "4"),
      ["'answer' is empty", "a response contains the <image> tag", "'question' is empty", ("four?", "4", 4)]),
     (llava({"bytes": b"no picture", "path": None}, "one?", "1"), [r"its picture cannot be read: bytes \(.+\)"])])


def cauldron(images, *texts):
    return {"images": images, "texts": [{"user": user, "assistant": assistant, "source": "s"} for user, assistant in texts]}


def finevision(images, *texts):
    one = [{"user": user, "assistant": assistant} for user, assistant in texts]
    return {"images": images, "texts": one, "source": "s", **{f"{name}_ratings": [5] * len(one) for name in RATINGS},
            **{f"{name}_min": 5 for name in RATINGS}}


def cauldron_files(row):
    return ([(row([picture(0)], ("one?", "1")), [("one?", "1", 0)]),
             (row([picture(1)], ("one?", "1"), ("two?", "2")), [("one?", "1", 1), ("two?", "2", 1)])],
            [(row([picture(2), picture(3)], ("one?", "1"), ("two?", "2")), ["has 2 pictures, must have exactly one"] * 2),
             (row([], ("one?", "1")), ["has 0 pictures, must have exactly one"]),
             (row([picture(3)]), [r"is not in the form of its columns \(IndexError: .+\)"]),
             (row([picture(4)], ("one?", "1"), ("two?", None), ("three?", "3")), [("one?", "1", 4), "'answer' is missing", ("three?", "3", 4)])])


TRL_FILES = (
    [(trl([picture(0)], ("user", "one?")), [("one?", "yes", "no", 0)]),
     (trl([picture(1), picture(2)], ("user", "two?")), ["has 2 pictures, must have exactly one"]),
     (trl([], ("user", "none?")), ["has 0 pictures, must have exactly one"]),
     (trl([picture(3)], ("system", "be short"), ("user", "one?")), [("one?", "yes", "no", 3)])],
    [(trl([picture(3)], ("user", "one?"), ("assistant", "1"), ("user", "two?")), ["a conversation of 3 turns, must be one question and one answer"]),
     (trl([picture(3)], ("user", "one?"), chosen="no"), ["chosen and rejected are the same text"]),
     (trl([picture(4)], ("user", "one?"), rejected="see <image>"), ["a response contains the <image> tag"])])

FORMS = {
    "openbmb": ("pairs", BMB, (
        [(bmb(picture(0), "one?", "yes", "no"), [("one?", "yes", "no", 0)]),
         (bmb(picture(1), "two?", "no", "no\n"), ["chosen and rejected are the same text"]),
         (bmb(None, "three?", "yes", "no"), ["it has no picture"]),
         (bmb(picture(1), "", "yes", "no"), ["'question' is empty"])],
        [(bmb(picture(2), "five?", "yes", None), ["'rejected' is missing"]),
         (bmb(picture(2), "six?", "<image>", "no"), ["a response contains the <image> tag"]),
         (bmb({"bytes": file_of(2)[:40], "path": "2.png"}, "seven?", "yes", "no"), [r"its picture cannot be read: bytes \(.+\)"]),
         (bmb(picture(0), "<image>\neight?", "ja", "nein"), [("<image>\neight?", "ja", "nein", 0)])])),
    "h4": ("pairs", TRL, TRL_FILES),
    "trl": ("pairs", {key: TRL[key] for key in ("rejected", "images", "chosen", "prompt")}, TRL_FILES),
    "rated, a dict of lists": ("pairs", {**RATED, "completions": {"annotations": [NOTES], "model": [TEXT], "response": [TEXT]}}, (rated_file(dict),)),
    "rated, a list of dicts": ("pairs", {**RATED, "completions": [{"annotations": NOTES, "model": TEXT, "response": TEXT}]}, (rated_file(list),)),
    "factory": ("pairs", FACTORY, (
        [(factory([picture(0)], "yes", "no", ("human", "<image>one?")), [("<image>one?", "yes", "no", 0)]),
         (factory([picture(0), picture(1)], "yes", "no", ("human", "two?")), ["has 2 pictures, must have exactly one"]),
         (factory([picture(1)], "yes", "no", ("human", "a?"), ("gpt", "b"), ("human", "c?")), ["a conversation of 3 turns, must be one question"]),
         (factory([picture(1)], "yes", "yes", ("human", "a?")), ["chosen and rejected are the same text"])],)),
    "next": ("sft", LLAVA, LLAVA_FILES),
    "ai2d(cauldron,llava_format)": ("sft", {key: LLAVA[key] for key in ("id", "image", "conversations", "data_source")}, LLAVA_FILES),
    "sharegpt": ("sft", {**LLAVA, "conversations": {"from": [TEXT], "value": [TEXT]}}, tuple(
        [({**row, "conversations": {key: [turn[key] for turn in row["conversations"]] for key in SAID}}, gives) for row, gives in file]
        for file in LLAVA_FILES)),                                                      # the same as a dict of lists
    "recap": ("sft", {key: LLAVA[key] for key in ("id", "image", "conversations")}, (
        [({key: value for key, value in llava(picture(0), "<image>\nsay.", "a ring").items() if key != "data_source"},
          [("<image>\nsay.", "a ring", 0)])],)),
    "cauldron": ("sft", CAULDRON, cauldron_files(cauldron)),
    "finevision": ("sft", [FINEVISION, dict(reversed(FINEVISION.items()))], cauldron_files(finevision)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_what_its_table_says(name, tmp_path):
    # the records of each row and its pictures, pixel for pixel; what is wrong with a bad row, in one line with its number; one tree a conversation
    kind, features, files = FORMS[name]
    folder, table = parquet(tmp_path / name, features, *([row for row, _ in file] for file in files)), sum(files, [])
    rows, several, i = data.load(folder, kind), any(len(gives) > 1 for _, gives in table), 0
    assert len(rows) == sum(len(gives) for _, gives in table)

    def agrees(found, expected, prefix):
        return found == expected if isinstance(expected, tuple) else isinstance(found, str) and re.fullmatch(re.escape(prefix) + expected, found)

    imitated = data.load(folder, "sft")
    for number, (_, gives) in enumerate(table):
        for k, expected in enumerate(gives):
            prefix = f"{folder} row {number}" + f" question {k + 1}" * (rows.first is not None) + ": "
            assert agrees(result(rows, i), expected, prefix), (result(rows, i), expected)
            if kind == "pairs":                                                         # the chosen text to imitate, and the same rows dropped
                assert agrees(result(imitated, i), expected if isinstance(expected, str) else expected[:2] + expected[3:], prefix)
            i += 1
    if several:
        starts = np.cumsum([0] + [len(gives) for _, gives in table]).tolist()
        assert rows.trees(8)[:] == [list(range(a, b)) for a, b in itertools.pairwise(starts)]
        assert rows.trees(2)[:] == [list(range(a, min(a + 2, end))) for start, end in itertools.pairwise(starts) for a in range(start, end, 2)]

    stream = data.Stream(folder, kind, 4, 1, 8, 3, 0)                                   # the same, in any order, each row once
    trees, left = epoch(stream, len(table)), list(range(len(table)))
    for tree in trees:
        at = next(at for at in left if table[at][0] == tree[0][2])
        left.remove(at)
        assert len(tree) == len(table[at][1])
        for item, expected in zip(tree, table[at][1]):
            assert agrees(result(stream, item), expected, f"{folder} row {item[1]} of the shuffled stream: ")
    assert not left and [item[1] for item, *_ in trees] == list(range(len(table)))
    split = [[gives[k] for k in range(at, min(at + 2, len(gives)))] for _, gives in table for at in range(0, len(gives), 2)]
    trees = epoch(data.Stream(folder, kind, 4, 1, 2, 3, 0), len(split))                 # at most two questions a tree
    asked = lambda trees: sorted(map(str, trees))
    assert asked([[item[3] % 2 for item in tree] for tree in trees]) == asked([[k % 2 for k, _ in enumerate(part)] for part in split])
    assert Counter(item[3] for tree in trees for item in tree) == Counter(k for _, gives in table for k, _ in enumerate(gives))


def test_vlaa_thinking_as_it_is_written(tmp_path):
    # its JSON Lines, beside the pictures, without any preparation
    (tmp_path / "clevr_math").mkdir()
    (tmp_path / "clevr_math/7.png").write_bytes(file_of(7))
    row = {"id": "c7", "image": "clevr_math/7.png", "question": "how many?", "gt": "3", "ds_answer": "<think>one, two</think>3", "caption": "a table",
           "meta": {"source": "clevr"}}
    source = lines(tmp_path / "rows.jsonl", [row, {**row, "image": "clevr_math/8.png"}, {**row, "ds_answer": None}])
    rows, stream = data.load(source, "sft"), data.Stream(source, "sft", 1, 1, 1, 5, 0)
    expected = [("how many?", "<think>one, two</think>3", 7), f"{source} row 1: its picture is missing: {tmp_path}/clevr_math/8.png",
                f"{source} row 2: 'answer' is missing"]
    assert [result(rows, i) for i in range(3)] == expected
    assert sorted(str(result(stream, item)) for item, in epoch(stream, 3)) == sorted(map(str, expected))


def test_answers_will_do_for_captions_and_questions_are_needed_elsewhere(tmp_path):
    # a conversation's first answer is a caption; a set without preferences says so in one line
    folder = parquet(tmp_path / "next", LLAVA, [llava(picture(0), "say.", "a ring")])
    assert data.load(folder, "captions")[0]["caption"] == "a ring"
    with pytest.raises(data.InputError, match=r"^\S+next has no column 'chosen', 'rejected'; it has: conversations, data_source, id, image$"):
        data.load(folder, "pairs")


def test_a_folder_for_each_config_and_slices(tmp_path, monkeypatch):
    # a local copy of a set of sets: one of its folders, or all; the first rows, or so many in a hundred, rounded up
    for config, first, n in (("ai2d(gpt4v)", 0, 21), ("st_vqa(cauldron,llava_format)", 30, 9)):
        parquet(tmp_path / "set" / config, LLAVA, [llava(picture(i), f"{config} {i}?", "1", f"{config} {i} more?", "2")
                                                   for i in range(first, first + n)])
    ai2d = str(tmp_path / "set/ai2d(gpt4v)")
    every = [f"ai2d(gpt4v) {i}{more}?" for i in range(21) for more in ("", " more")]
    questions = lambda source, n=None: [rows[i]["question"] for rows in [data.load(source, "sft", n)] for i in range(len(rows))]
    assert questions(ai2d) == every and Counter(questions(str(tmp_path / "set"))) == Counter(
        every + [f"st_vqa(cauldron,llava_format) {i}{more}?" for i in range(30, 39) for more in ("", " more")])
    for part, n_rows in (("[:3]", 3), ("[:10%]", 3), ("[:9%]", 2), ("[:100%]", 21), ("[:99]", 21), ("[:50%][:20%]", 3),
                         ("[:5][:50%]", 3), ("[:50%][:2]", 2)):
        assert questions(ai2d + part) == every[:2 * n_rows], part
    assert questions(ai2d + "[:3]", n=5) == every[:5] and questions(ai2d + "[:50%]", n=30) == every[:22]  # --n counts records
    part = data.Stream(f"{ai2d}[:3]", "sft", 4, 1, 8, 100, 0)
    assert {part[item]["question"] for tree in epoch(part, 9) for item in tree} == set(every[:6])
    rows = [{"image": "a.png", "question": f"q{i}", "answer": "a"} for i in range(30)]
    lines(tmp_path / "llava-pretrain/rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    for source in (lines(tmp_path / "rows.jsonl", rows), "llava-pretrain/rows.jsonl"):  # where `prepare` may have put it
        for part, n, expected in (("[:4]", None, 4), ("[:10%]", None, 3), ("[:50%]", 4, 4), ("[:10%]", 20, 3)):
            assert len(data.load(source + part, "sft", n)) == expected


# ---- names ----------------------------------------------------------------------------------------------------------------------


def test_names_stand_for_hub_ids():
    ids = {"rlaif-v": "openbmb/RLAIF-V-Dataset", "rlaif-v-h4": "HuggingFaceH4/rlaif-v_formatted", "rlaif-v-trl": "trl-lib/rlaif-v",
           "vlfeedback": "davanstrien/VLFeedback", "vlfeedback-pairs": "Zhihui/VLFeedback", "llava-recap": "lmms-lab/LLaVA-ReCap-558K",
           "llava-next": "lmms-lab/LLaVA-NeXT-Data", "llava-onevision/ai2d(gpt4v)": "lmms-lab/LLaVA-OneVision-Data/ai2d(gpt4v)",
           "cauldron/ai2d": "HuggingFaceM4/the_cauldron/ai2d", "finevision/CoSyn_400k_chart": "HuggingFaceM4/FineVision/CoSyn_400k_chart"}
    for name, hub_id in ids.items():
        for part in ("", "[:7]", "[:20%]"):
            assert expand(name + part) == [hub_id + part] and expand(hub_id + part) == [hub_id + part]
    assert expand("pivot-stage3") == ["lmms-lab/LLaVA-NeXT-Data", *(
        f"lmms-lab/LLaVA-OneVision-Data/{config}" for config in ("textocr(gpt4v)", "infographic_vqa", "infographic(gpt4v)"))]
    assert expand("pivot-stage3[:1%]") == [each + "[:1%]" for each in expand("pivot-stage3")]
    for untouched in ("somebody/some-set", "rows.jsonl[:3]", "/data/folder", "llava-nextt"):
        assert expand(untouched) == [untouched]


def test_pivot_stage_1_is_the_papers_mixture():
    # papers.md 6: LLaVA-NeXT and the OneVision sets that can be loaded, all of each but for these
    parts = {"sroie": 10, "k12_printing": 1, "hme100k": 10, "scienceqa(nona_context)": 5, "FigureQA(MathV360K)": 5, "IconQA(MathV360K)": 5,
             "PMC-VQA(MathV360K)": 5, "raven(cauldron)": 5, "VisualWebInstruct(filtered)": 20,
             **{f"{name}(cauldron,llava_format)": percent
                for name, percent in {"clevr": 1, "dvqa": 1, "figureqa": 1, "iconqa": 5, "tqa": 5, "tallyqa": 10}.items()}}
    first, *others = expand("pivot-stage1")
    found = {re.fullmatch(r"lmms-lab/LLaVA-OneVision-Data/([^/\[]+)(?:\[:(\d+)%\])?", each).groups() for each in others}
    assert first == "lmms-lab/LLaVA-NeXT-Data" and len(others) == len(dict(found)) == 79
    assert {name: int(percent) for name, percent in found if percent} == parts
    assert expand("pivot-stage1[:1%]")[10:13] == [each + "[:1%]" for each in expand("pivot-stage1")[10:13]]


@pytest.mark.parametrize("source, error, message", [
    ("mmpr-v1.2", data.InputError, r"--data mmpr-v1\.2 comes as archives.*: python data\.py prepare 'mmpr-v1\.2' --out DIR, then --data DIR/rows\.jsonl"),
    ("llava-pretrain[:10]", data.InputError, r".*python data\.py prepare 'llava-pretrain' --out DIR.*"),
    ("llava-pretrain/rows.jsonl", OSError, r".*llava-pretrain/rows\.jsonl.*"),            # a path that is not there, not an archive
    ("vlaa-thinking", data.InputError, r".*python data\.py prepare 'vlaa-thinking' --out DIR.*"),
    ("llava-onevision/ureader_qa", data.InputError, r".*python data\.py prepare 'llava-onevision/ureader_qa' --out DIR.*"),
    ("rlaif-v/train", data.InputError, r"--data rlaif-v/train: rlaif-v has no configs; leave /train out"),
    ("pivot-stage1/ai2d", data.InputError, r"--data pivot-stage1/ai2d: pivot-stage1 has no configs; leave /ai2d out"),
    ("rlaif", FileNotFoundError, r"--data rlaif: neither .* rlaif-v, .* nor a hub id"),
    ("cauldron", data.InputError, r"--data cauldron: the configs of HuggingFaceM4/the_cauldron cannot be listed: .+"),
    ("llava-next", data.InputError, r"--data lmms-lab/LLaVA-NeXT-Data cannot be loaded: .+"),
])
def test_a_name_that_cannot_be_used_says_what_to_do(source, error, message):
    for opened in (lambda: data.load(source, "sft"), lambda: data.Stream([source], "sft", 4, 1, 4, 10, 0)):
        with pytest.raises(error) as caught:
            opened()
        assert re.fullmatch(message, str(caught.value)), str(caught.value)


SIZES = {"ai2d(gpt4v)": 20, "st_vqa(cauldron,llava_format)": 50}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on disk in place of the real one, with two configs of LLaVA-OneVision as its page declares them -> what it was asked for"""
    asked, home = [], tmp_path / "hub/lmms-lab/LLaVA-OneVision-Data"
    for config, n in SIZES.items():
        parquet(home / config, LLAVA, [llava(picture(i), f"{config} {i}?", "1") for i in range(n)])
    configs = [{"config_name": config, "data_files": [{"split": "train", "path": f"{config}/train-*"}]} for config in SIZES]
    infos = [{"config_name": config, "splits": [{"name": "train", "num_bytes": 1, "num_examples": n}]} for config, n in SIZES.items()]
    (home / "README.md").write_text("---\n" + json.dumps({"configs": configs, "dataset_info": infos}) + "\n---\n")
    load, list_configs = datasets.load_dataset, datasets.get_dataset_config_names

    def load_from_disk(path, name=None, **how):
        asked.append((path, name, how))
        return load(path if path == "parquet" else str(tmp_path / "hub" / path), name, **how)

    monkeypatch.setattr(datasets, "load_dataset", load_from_disk)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: list_configs(str(tmp_path / "hub" / path)))
    return asked


def test_the_hub_is_asked_for_the_right_thing(hub):
    # id, config, split; all configs of a name that stands for many; slices of each
    rows = data.load("llava-onevision/ai2d(gpt4v)", "sft")
    assert hub == [("lmms-lab/LLaVA-OneVision-Data", "ai2d(gpt4v)", {"split": "train", "streaming": False})]
    assert [result(rows, i) for i in range(len(rows))] == [(f"ai2d(gpt4v) {i}?", "1", i) for i in range(20)]
    assert expand("llava-onevision[:10%]") == [f"lmms-lab/LLaVA-OneVision-Data/{config}[:10%]" for config in SIZES]
    mixed = data.load("llava-onevision[:10%]", "sft")
    assert [result(part, i)[0] for part in mixed.parts for i in range(len(part))] == [f"{c} {i}?" for c, n in SIZES.items() for i in range(n // 10)]
    hub.clear()
    stream = data.Stream("llava-onevision", "sft", 4, 1, 4, 10, 0)
    assert hub == [("lmms-lab/LLaVA-OneVision-Data", config, {"split": "train", "streaming": True}) for config in SIZES]
    assert {stream[item]["question"] for item, in epoch(stream, 300)} == {f"{c} {i}?" for c, n in SIZES.items() for i in range(n)}


def test_a_stream_takes_as_much_of_each_as_the_hub_says_there_is(hub):
    # sizes from the page, of what is left of a set after its slice and --n; --weights share a name among its parts by size
    ai2d, st_vqa = (f"llava-onevision/{config}" for config in SIZES)
    weights = lambda *sources, **more: data.Stream(list(sources), "sft", 4, 1, 4, 10, 0, **more).weights
    assert weights("llava-onevision") == [20, 50] == weights(ai2d, st_vqa)
    assert weights(ai2d, st_vqa + "[:10%]") == [20, 5] and weights(ai2d + "[:7]", st_vqa + "[:90]") == [7, 50]
    assert weights(ai2d, st_vqa, n=30) == [20, 30]
    assert weights("llava-onevision", ai2d, weights=[7, 3]) == pytest.approx([2, 5, 3])


# ---- mixtures and order ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three sources: 60 JSONL rows about 20 pictures, 30 conversations of two turns, the drawn world"""
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(file_of(i))
    generator = random.Random(0)
    pictures = [i % 20 for i in range(60)]
    generator.shuffle(pictures)
    jsonl = lines(tmp_path / "rows.jsonl", [{"image": f"{p}.png", "question": f"j{i}?", "answer": f"{p}"} for i, p in enumerate(pictures)])
    talks = [llava(picture(20 + i), f"p{i} one?", "1", f"p{i} two?", "2") for i in range(30)]
    return [jsonl, parquet(tmp_path / "talks", LLAVA, talks[:13], talks[13:18], talks[18:], group=4), "scenes/train/sft/2"]


def test_weights_are_shares_of_the_pictures(three):
    # exactly round(w * all) trees of each source in each epoch; a source that is too small comes round again, each tree as often as any other
    rows = data.load(three, "sft", 60)
    trees, sizes = rows.trees(4), [20, 30, 30]
    of = {tuple(tree): source for source, part in enumerate(np.split(np.arange(80), [20, 50])) for tree in map(trees.__getitem__, part)}
    assert len(trees) == 80 and trees.sizes == sizes
    assert all({rows.part_of(i)[0].source for i in tree} == {three[source]} for tree, source in of.items())
    for weights in ((1, 1, 1), (5, 3, 2), (.07, .02, .01), (99, 1, 1)):
        expected = [round(w / sum(weights) * 80) for w in weights]
        drawn = [tuple(tree) for step in data.order(trees, 8, 3, 0, None, weights) for tree in step]
        epochs = [drawn[at:at + sum(expected)] for at in range(0, len(drawn), sum(expected))]
        assert len(epochs) == 3 and epochs[0] != epochs[1] != epochs[2]
        for each in epochs:
            assert [sum(of[tree] == source for tree in each) for source in range(3)] == expected
            seen = Counter(each)
            times = [[seen[tree] for tree in of if of[tree] == source] for source in range(3)]
            assert all(max(each) - min(each) <= 1 for each in times)
        shuffled = [of[tree] for tree in epochs[0]]
        assert min(expected) < 5 or shuffled != sorted(shuffled)                        # the sources are mixed, not one after the other


@pytest.mark.parametrize("limit", [1, 4])
def test_shares_are_of_the_pictures_read_or_streamed(tmp_path, limit):
    # one question about each picture in one set, eight in the other: --weights 1 1 draws as many pictures, and so 1 : 8 questions, in either way
    sets = [parquet(tmp_path / name, LLAVA, [llava(picture(i), *(text for k in range(n) for text in (f"{name}{i} {k}?", "1"))) for i in range(40)])
            for name, n in (("one", 1), ("eight", 8))]
    rows = data.load(sets, "sft")
    drawn = [i for step in data.order(rows.trees(limit), 8, 5, 0, None, [1, 1]) for tree in step for i in tree]
    assert Counter(i < 40 for i in drawn) == {True: 5 * 40, False: 5 * 320}
    stream = data.Stream(sets, "sft", 8, 5, limit, 10, 0, None, [1, 1])
    items = [item for tree in epoch(stream, 3000) for item in tree]
    pictures = Counter(item[0] for item in items if item[3] == 0)
    assert abs(pictures[0] / sum(pictures.values()) - .5) < .1 and abs(sum(item[0] for item in items) / len(items) - 8 / 9) < .05
    assert data.order(data.load(sets, "sft").trees(limit), 8, 1, 0)[:] != []               # without weights: every row once, as ever
    with pytest.raises(data.InputError, match="^--weights 1e-06: so small a share is not one of 80 pictures$"):
        data.order(rows.trees(limit), 8, 1, 0, None, [1, 1e-6])


def test_without_weights_every_row_comes_once_an_epoch(three):
    rows = data.load(three, "sft", 60)
    orders = {seed: data.order(rows.trees(4), 16, 2, seed)[:] for seed in (0, 1)}
    flat = [i for step in orders[0] for tree in step for i in tree]
    assert len(rows) == len(flat) // 2 == 180 and sorted(flat[:180]) == sorted(flat[180:]) == list(range(180)) and flat[:180] != flat[180:]
    assert orders[0] == data.order(data.load(three, "sft", 60).trees(4), 16, 2, 0)[:] != orders[1]
    weighted = [data.order(rows.trees(4), 16, 1, seed, None, (1, 2, 3))[:] for seed in (0, 0, 1)]
    assert weighted[0] == weighted[1] != weighted[2]
    assert [rows[i]["row"] for i in (0, 59, 60, 119, 120)] == [0, 59, 60, 119, 120]     # numbers of the mixture
    assert rows[59]["question"] == "j59?" and rows[60]["question"] == "p0 one?" and rows.text(119)["question"] == "p29 two?"
    assert data.load(three[:2], "sft").identity() != data.load(three[:2], "sft", 59).identity() != data.load(three[1::-1], "sft").identity()


def test_a_row_of_a_mixture_is_named_by_its_own_source(three, make):
    # also one that is too long, which only the collator knows
    rows = data.load(three, "sft", 60)
    os.remove(os.path.join(os.path.dirname(three[0]), "0.png"))
    gone = next(i for i in range(60) if rows.text(i)["answer"] == "0")
    with pytest.raises(BadRow, match=f"^{re.escape(three[0])} row {gone}: its picture is missing: "):
        rows[gone]
    _, dropped = data.Collator(rows, make(), max_length=5)([[60 + 7], [120]])
    assert [reason.split(":")[0] for reason in dropped] == [f"{three[1]} row 3 question 2", f"{three[2]} row 0"]


@pytest.mark.parametrize("weights, n_sources", [((1,), 3), ((1, 2), 3), ((1, 2, 3, 4), 3), ((1,), 1), ((1, 0, 1), 3), ((1, -1, 1), 3)])
def test_weights_of_the_wrong_number(three, weights, n_sources):
    args = argparse.Namespace(data=three[:n_sources], n=60, seed=0, batch_size=4, questions_per_tree=4, epochs=1, steps=2, weights=list(weights))
    for args.stream in (None, 10):
        with pytest.raises(data.InputError, match="^--weights: give a positive number for each of several sources; there are "):
            data.plan(args, "sft")


def test_a_stream_needs_steps_and_sizes(three):
    args = argparse.Namespace(data=three, n=60, seed=0, batch_size=4, questions_per_tree=4, epochs=1, steps=None, weights=None, stream=10)
    with pytest.raises(data.InputError, match="^--stream needs --steps"):
        data.plan(args, "sft")
    args.steps = 3
    assert data.plan(args, "sft")[0].weights == [20, 30, 30]                            # parquet files know how many rows they have
    args.weights = [1, 1, 2]
    rows, steps = data.plan(args, "sft")
    assert rows is steps and len(steps) == 3 == len(list(steps)) and rows.weights == [1, 1, 2]
    tenth = data.Stream(three[1] + "[:10%]", "sft", 4, 1, 4, 10, 0)
    assert {item[1] for tree in epoch(tenth, 12) for item in tree} == {0, 1, 2}
    nobody = datasets.IterableDataset.from_generator(lambda: iter([{"x": 1}]))             # a stream whose maker said nothing
    with pytest.raises(data.InputError, match="^how many rows somebody/some has is not known before .*give --weights, and numbers of rows instead"):
        sources.length(nobody, "somebody/some")


def test_trees_are_a_naive_grouping(tmp_path):
    # random pictures in random rows, as each source stores them: rows of a picture together, at most so many, in the order of the rows
    generator = random.Random(3)
    for trial in range(3):
        n, folder = generator.randint(30, 60), tmp_path / str(trial)
        pictures = [generator.randrange(9) for _ in range(n)]
        pairs = [{"question": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(n)]
        talks = [[("q?", "a")] * generator.randint(1, 5) for _ in range(n)]
        spoken = {key: turns((role, key)) for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}
        stored = {
            "jsonl": lines(folder / "rows.jsonl", [{"image": f"{p}.png", **pair} for p, pair in zip(pictures, pairs)]),
            "jsonl of lists": lines(folder / "trl.jsonl", [{"images": [f"{p}.png"], **spoken} for p in pictures]),
            "bytes": parquet(folder / "bytes", BMB, *([bmb({"bytes": file_of(pictures[i]), "path": f"{i}.png"}, *pairs[i].values()) for i in part]
                                                      for part in (range(20), range(20, n)))),
            "paths": parquet(folder / "paths", BMB, [bmb({"bytes": None, "path": f"{p}.png"}, *pair.values()) for p, pair in zip(pictures, pairs)]),
            "lists": parquet(folder / "lists", TRL, [trl([picture(p)], ("user", "q?")) for p in pictures], group=7),
            "talks": parquet(folder / "talks", LLAVA, [llava(picture(p), *itertools.chain(*said)) for p, said in zip(pictures, talks)]),
            "texts": parquet(folder / "texts", CAULDRON, [cauldron([picture(p)], *said) for p, said in zip(pictures, talks)]),
            "drawn": "scenes/train/foreign/3"}
        for name, source in stored.items():
            for limit, first in ((1, None), (2, None), (3, 17), (100, None)):
                rows = data.load(source, "sft" if name in ("talks", "texts") else "pairs", first or (n if name == "drawn" else None))
                keys = [row for row, said in enumerate(talks) for _ in said] if name in ("talks", "texts") else \
                    [i // 3 for i in range(n)] if name == "drawn" else pictures
                groups = {}
                for i, key in enumerate(keys[:first]):
                    groups.setdefault(key, []).append(i)
                naive = [group[at:at + limit] for group in groups.values() for at in range(0, len(group), limit)]
                found = rows.trees(limit)
                assert found[:] == (naive if limit > 1 else [[i] for i in range(len(keys))]), (name, limit)
                assert isinstance(found.starts, np.ndarray) and found.values.nbytes == 8 * len(keys[:first])


def test_rows_without_a_picture_share_none(tmp_path):
    # in parquet as in JSONL: a tree is about a picture
    folder = parquet(tmp_path / "bmb", BMB, [bmb(image, "q?", "yes", "no") for image in (None, picture(0), None, picture(0), None)])
    assert data.load(folder, "pairs").trees(4)[:] == [[0], [1, 3], [2], [4]]


# ---- what millions of rows are kept in ------------------------------------------------------------------------------------------


def test_nested_is_lists_of_lists():
    generator = random.Random(0)
    for _ in range(20):
        some = lambda make: [make() for _ in range(generator.randrange(4))]
        plain = [some(lambda: some(lambda: generator.randrange(99))) for _ in range(generator.randrange(1, 9))]
        inner = [tree for step in plain for tree in step]
        numbers = np.array([i for tree in inner for i in tree], np.int64)
        starts = lambda parts: np.cumsum([0] + [len(part) for part in parts])
        trees = data.Nested(numbers, starts(inner))
        steps = data.Nested(trees, starts(plain))
        for nested, expected in ((trees, inner), (steps, plain)):
            n = len(expected)
            assert len(nested) == n and list(nested) == expected == nested[:] and list(reversed(nested)) == expected[::-1]
            assert all(nested[i] == expected[i] == nested[np.int64(i)] for i in range(-n, n))
            at, to, step = generator.randrange(-9, 9), generator.randrange(-9, 9), generator.choice((None, 1, 2, -1, -2))
            for part in (slice(at, to, step), slice(2), slice(-2, None)):
                assert nested[part] == expected[part]
            for outside in (n, -n - 1):
                with pytest.raises(IndexError):
                    nested[outside]
        assert all(type(i) is int for tree in trees for i in tree)


def test_a_row_costs_bytes_not_objects(tmp_path):
    # 20,000 rows: an offset each, and an order that costs a few numbers a row, however it is made
    n = 20_000
    source = lines(tmp_path / "rows.jsonl", [{"image": f"{i // 4}.png", "question": "what is there?", "answer": "not much"} for i in range(n)])
    tracemalloc.start()
    rows = data.load(source, "sft")
    steps = data.order(rows.trees(4), 64, 1, 0)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.rows.offsets.nbytes == 8 * n and kept < 40 * n                          # one small list alone would be 64 bytes and more
    arrays = steps.starts, steps.values.starts, steps.values.values
    assert all(isinstance(array, np.ndarray) for array in arrays) and [array.dtype.itemsize * len(array) for array in arrays][2] == 8 * n
    talks = parquet(tmp_path / "talks", LLAVA, [llava(None, "q?", "a", "q?", "a") for _ in range(1000)])
    assert data.load(talks, "sft").first.nbytes == 8 * 1001


def test_lines_are_what_json_loads_gives(tmp_path):
    # blank lines, any script, no newline at the end; n, take, any order; and a file that is written anew under our feet
    rows = [{"i": i, "text": text} for i, text in enumerate(("plain", "größer", "日本語", "a\u2028b\u0085c", '"\\n"', "🙂", "", "x" * 5000))]
    written = "\n\n".join(json.dumps(row, ensure_ascii=row["i"] % 2 == 0) for row in rows)
    path = tmp_path / "rows.jsonl"
    for start, end, newline in (("", "", "\n"), ("\n \n", "\n\n", "\n"), ("\t\n", "\n", "\r\n"), ("\ufeff", "", "\n")):
        path.write_bytes((start + written + end).replace("\n", newline).encode())
        found = Lines(str(path))
        assert len(found) == 8 and [found[i] for i in range(8)] == rows == list(found) and found.columns == {"i", "text"}
        assert [found[i] for i in (5, 0, 7, 2, -1)] == [rows[i] for i in (5, 0, 7, 2, -1)]
        for part in (Lines(str(path), 3), found.take(3)):
            assert len(part) == 3 and list(part) == rows[:3] == [part[i] for i in range(3)]
        assert len(Lines(str(path), 99)) == len(found.take(99)) == 8 and len(Lines(str(path), 0)) == 0
    names = [each.identity for each in (found, found.take(3), found.take(4), Lines(str(path), 3), Lines(str(path), 4))]
    assert len(set(names)) == len(names) and Lines(str(path)).identity == found.identity
    path.write_text(written.replace("plain", "plane"))
    assert Lines(str(path)).identity != found.identity
    for changed in ("{}\n", "", written.replace("plain", "a longer word")):
        path.write_text(changed)
        for read in (lambda: found[4], lambda: list(found)):
            with pytest.raises(data.InputError, match=r"^\S+rows\.jsonl was changed while it was in use; start again$"):
                read()


# ---- streams --------------------------------------------------------------------------------------------------------------------


def key_of(tree):
    """What a tree is about, from its stored row: (source, questions)"""
    part, number, row, _ = tree[0]
    return part, row["conversations"][0]["value"] if row else tuple(item[1] for item in tree)


@pytest.mark.parametrize("buffer", [1, 12, 1000])
def test_a_stream_passes_over_all_before_it_begins_again(three, buffer):
    # each source by itself: its trees once in any order, then once in another; the same seed the same, another seed another; and the shares
    weights = [5, 3, 2]
    make = lambda seed: data.Stream(three, "sft", 8, 5, 4, buffer, seed, 60, weights)
    keys = list(map(key_of, epoch(make(0), 400)))
    sizes = [20, 30, 30]
    for part, size in enumerate(sizes):
        own = [key for key in keys if key[0] == part]
        passes = [own[at:at + size] for at in range(0, len(own), size)]
        whole = [each for each in passes if len(each) == size]
        assert len(whole) >= 2 and all(sorted(map(str, each)) == sorted(map(str, whole[0])) and len(set(each)) == size for each in whole)
        assert (whole[0] != whole[1] or part == buffer == 1) and len(set(passes[-1])) == len(passes[-1])
        assert abs(len(own) / 400 - weights[part] / 10) < .08                           # three deviations of 400 draws
    assert keys == list(map(key_of, epoch(make(0), 400)))
    other = list(map(key_of, epoch(make(1), 400)))
    assert [part for part, _ in keys] != [part for part, _ in other]                    # which source is next
    for part in (0, 2) if buffer == 1 else (0, 1, 2):
        assert [key for key in keys if key[0] == part][:20] != [key for key in other if key[0] == part][:20]
    stream = make(0)
    assert list(stream) == list(stream) and len(list(stream)) == 5 == len(stream)       # a second look begins at the beginning
    assert [tree for step in stream for tree in step] == epoch(stream, sum(map(len, stream)))
    alone = data.Stream(three[1], "sft", 8, 5, 4, buffer, 0)
    talks = [key_of(tree)[1] for tree in epoch(alone, 90)]
    files = [next(f for f, ends in enumerate((13, 18, 30)) if int(talk[1:].split()[0]) < ends) for talk in talks]
    assert len({tuple(files[at:at + 30]) for at in (0, 30, 60)}) > 1                    # files take turns in another order each time
    if buffer == 1000:
        assert len({tuple(talks[at:at + 30]) for at in (0, 30, 60)}) == 3
        runs = sum(a != b for a, b in zip(talks[:30], sorted(talks[:30], key=lambda t: int(t[1:].split()[0]))))
        assert runs > 20                                                                # a large buffer leaves hardly a row in its place


def test_shares_of_a_stream_without_weights_are_of_the_pictures(tmp_path):
    # as without --stream: by default every source gives as many trees as it has
    jsonl = lines(tmp_path / "rows.jsonl", [{"image": f"{i // 4}.png", "question": "q?", "answer": "a"} for i in range(80)])
    stream = data.Stream([jsonl, "scenes/train/sft/2", "scenes/train/vqa"], "sft", 8, 5, 4, 10, 0, 80)
    assert [weight / sum(stream.weights) for weight in stream.weights] == pytest.approx([20 / 140, 40 / 140, 80 / 140])


def same_batches(one, other):
    for (a, reasons), (b, others) in zip(one, other, strict=True):
        assert a.rows == b.rows and reasons == others and a.n_responses == b.n_responses
        assert all(torch.equal(getattr(a, name), value) for name, value in vars(b).items() if torch.is_tensor(value))
    return True


def test_workers_do_not_change_a_stream(three, make):
    # whoever decodes the pictures: the same batches in the same order, with hub rows, JSONL and the drawn world in one stream
    model, steps = make(), {}
    for workers in (0, 1, 2):
        stream = data.Stream(three, "sft", 6, 5, 4, 16, 3, 60, [1, 1, 1])
        steps[workers] = list(data.batches(data.Collator(stream, model, max_length=300), stream, 3, workers))
    assert [len(step) for step in steps[0]] == [len(list(data.cut(step, 3))) for step in stream]
    for workers in (1, 2):
        assert len(steps[workers]) == 5 and all(same_batches(a, b) for a, b in zip(steps[0], steps[workers], strict=True))
    assert all(dropped == [] for step in steps[0] for _, dropped in step)
    questions = [stream[item]["question"] for step in stream for tree in step for item in tree]
    read = [model.tokenizer.decode([i for i in batch.input_ids.flatten().tolist() if i >= 0]) for step in steps[0] for batch, _ in step]
    assert all(sum(text.count(question) for text in read) >= questions.count(question) for question in questions)


@pytest.mark.parametrize("buffer", [8, 40])
def test_a_stream_holds_its_buffer_and_little_more(tmp_path, monkeypatch, buffer):
    # rows read from the files minus rows given out, all sources together: files are read by row groups (of 5 here)
    group, n = 5, 400
    sources = [parquet(tmp_path / name, LLAVA, *([llava(None, f"{name}{f} {i}?", "1") for i in range(n // 4)] for f in range(4)), group=group)
               for name in "ab"]
    from datasets.packaged_modules.parquet.parquet import Parquet
    generate, read = Parquet._generate_tables, [0]

    def counted(self, *args, **how):
        for key, table in generate(self, *args, **how):
            read[0] += len(table)
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", counted)
    stream, held = data.Stream(sources, "sft", 8, 5, 4, buffer, 0, None, [1, 1]), []
    for given, _ in enumerate(itertools.islice(stream.trees(), 500)):
        held.append(read[0] - given)
    assert buffer / 2 < max(held) <= buffer + 2 * 2 * group, max(held)


def test_a_stream_that_breaks_off_says_where(tmp_path):
    # a file that is damaged in its middle, and one without rows: one line each, not an endless loop
    folder = parquet(tmp_path / "broken", LLAVA, [llava(picture(i % 60), f"{i}?", "1") for i in range(400)], group=50)
    path = os.path.join(folder, "train-00000-of-00001.parquet")
    middle = pq.ParquetFile(path).metadata.row_group(4).column(0).data_page_offset
    with open(path, "r+b") as f:
        f.seek(middle)
        f.write(b"\xff" * 2000)
    stream = data.Stream(folder, "sft", 8, 5, 4, 10, 0)
    with pytest.raises(data.InputError, match=r"^--data \S+broken: the stream broke off after row \d+: [^\n]+$"):
        epoch(stream, 400)
    empty = parquet(tmp_path / "empty", LLAVA, [])
    for use in (lambda: epoch(data.Stream(empty, "sft", 8, 5, 4, 10, 0), 1), lambda: data.load(empty, "sft")):
        with pytest.raises(data.InputError, match=r"^(--data )?\S+empty(: the stream broke off after row -1| cannot be loaded): BatchSize .+$"):
            use()


def test_jsonl_slices_in_a_stream(three):
    stream = data.Stream(three[0] + "[:10%]", "sft", 8, 5, 1, 10, 0)
    assert {stream[item]["question"] for item, in epoch(stream, 60)} == {f"j{i}?" for i in range(6)}


# ---- prepare: sets that come as archives ----------------------------------------------------------------------------------------


def zipped(path, files):
    """A zip of {name: bytes} -> its bytes"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.read_bytes()


def tarred(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def in_parts(path, *ends):
    """The file cut into path_aa, path_ab, ... after these shares of its bytes"""
    content = path.read_bytes()
    ends = [0, *(round(end * len(content)) for end in ends), len(content)]
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        path.with_name(f"{path.name}_a{'abc'[number]}").write_bytes(content[start:end])
    path.unlink()


@pytest.fixture
def run(monkeypatch, capsys):
    """run("prepare", "mmpr-v1.2", ...) -> what python data.py printed"""
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, arguments)])
        capsys.readouterr()
        prepare.main()
        return capsys.readouterr().out
    return run


def refused(run, *arguments):
    """The one line of an error"""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    return str(error.value)


def read_rows(out):
    with open(out / "rows.jsonl") as f:
        return [json.loads(line) for line in f]


def files_in(folder):
    """{path: bytes} of a whole folder"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest_of(out, source, names):
    """The manifest, its hashes checked: of the rows, and of each file of the download"""
    manifest = json.loads((out / "manifest.json").read_text())
    sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["files"] == {name: {"bytes": (source / name).stat().st_size, "sha256": sha256(source / name)} for name in names}
    assert manifest["rows_sha256"] == sha256(out / "rows.jsonl") and manifest["kept"] == len(read_rows(out))
    assert manifest["pictures"] == len({row["image"] for row in read_rows(out)}) == len(files_in(out / "images"))
    return manifest


# MMPR-v1.2, as its meta.json may name things: relative to its folder, to the parent of that, to another folder; and as its archives may be packed
LAYOUTS = {"its folder": ("", "annotations/", "images/"), "the parent": ("MMPR-v1.2/", "", ""), "another folder": ("datasets/", "annotations/", ""),
           "all the way": ("MMPR-v1.2/", "MMPR-v1.2/annotations/", "MMPR-v1.2/images/")}
SUBSETS = {"vqa": 40, "geometry": 25, "charts": 45}  # of how many rows; not in the order of the alphabet


def mmpr_rows(name, n):
    """Rows with all that can be wrong with them -> rows, {path: number of a picture that is there}"""
    generator, rows, there = random.Random(name), [], {}
    for i in range(n):
        form = generator.choices(["png", "jpg", "JPEG", "gif", "webp"], [6, 3, 1, 2, 1])[0]
        image = f"{i % 3}/{i // 3 // generator.choice((1, 1, 2))}.{form}"               # the same names in all subsets, some pictures twice
        if generator.random() < .85:                                                    # else it is missing
            there.setdefault(image.replace(".gif", ".jpg"), generator.randrange(60))
        if form == "gif" and generator.random() < .5:                                   # a .gif that is there as .gif only
            there.pop(image.replace(".gif", ".jpg"), None)
            there[image] = 0
        chosen, rejected = f"the ring of row {i}", f"the cross of row {i}"
        row = {"id": i, "image": image, "question": f"what is in row {i}?", "chosen": chosen, "rejected": rejected}
        changes = {12: [{}], 1: [{"image": None}, {"image": ""}], 4: [{"chosen": "ring " * generator.randint(30, 60)}],
                   2: [{"question": f"<image>\nwhat is in row {i}?"}, {"question": "in <image>, what?"}, {"chosen": "see <image>"},
                       {"rejected": "see <image>"}, {"rejected": "cross " * 400}]}
        change = generator.choice([change for times, some in changes.items() for change in some for _ in range(times)])
        rows.append({**row, **change})
        if "image" in change and generator.random() < .5:
            del rows[-1]["image"]
    if name == "geometry":
        rows[14]["image"] = ["0/0.png", "0/1.png"]
        rows[20]["image"] = ["0/0.png"]
    return rows, there


@pytest.fixture(scope="session")
def mmpr(tmp_path_factory, tokenizers):
    """mmpr(layout) -> a folder with the files of MMPR-v1.2; beside it the tokenizer"""
    home = tmp_path_factory.mktemp("mmpr")
    tokenizers["chatml"].save_pretrained(home / "tokenizer")
    made = {}

    def mmpr(layout="its folder"):
        if layout in made:
            return made[layout]
        base, notes, images = LAYOUTS[layout]
        folder = made[layout] = home / layout / "MMPR-v1.2"
        subsets = {name: mmpr_rows(name, n) for name, n in SUBSETS.items()}
        zipped(folder / "annotations.zip", {f"{notes}{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
                                            for name, (rows, _) in subsets.items()})
        zipped(folder / "images.zip", {f"{images}{name}/{path}": file_of(i, "JPEG" if path.endswith("jpg") else "PNG")
                                       for name, (_, there) in subsets.items() for path, i in there.items()})
        in_parts(folder / "images.zip", .4, .93)
        (folder / "README.md").write_text("a card")
        (folder / "meta.json").write_text(json.dumps({
            name: {"root": f"{base}images/{name}", "annotation": f"{base}annotations/{name}.jsonl", "data_augment": False,
                   "repeat_time": 1, "length": n}
            for name, n in SUBSETS.items()}))
        return folder
    mmpr.tokenizer = str(home / "tokenizer")
    return mmpr


def the_papers_rows(tokenizer, max_tokens, seed, data_size):
    """mpo-make_jsons.py by papers.md 5 and hub-data.md B1: all rows in a list, one shuffle, a walk -> rows, reasons"""
    items, cut_off, kept, reasons = [], 0, [], Counter()
    for name, n in SUBSETS.items():
        rows, there = mmpr_rows(name, n)
        for i, row in enumerate(rows):
            if isinstance(row.get("image"), list):
                cut_off += n - i
                break
            items.append((name, i, row, there))
    random.seed(seed)
    random.shuffle(items)
    for name, i, row, there in items:
        if len(kept) == data_size:
            break
        image = row.get("image")
        if not image:
            reasons["no picture"] += 1
            continue
        image = image.replace(".gif", ".jpg")
        if os.path.splitext(image)[1].lower() not in (".jpg", ".jpeg", ".png"):
            reasons["neither .jpg, .jpeg nor .png"] += 1
        elif image not in there:
            reasons["picture not found"] += 1
        else:
            prompt = row["question"]
            if "<image>" not in prompt:
                prompt = "<image>\n" + prompt
            if "<image>" in row["chosen"] or "<image>" in row["rejected"]:
                reasons["<image> in an answer"] += 1
            elif len(tokenizer(prompt + " " + row["chosen"]).input_ids) > max_tokens:
                reasons["too long"] += 1
            else:
                kept.append((name, i, prompt, row["chosen"], row["rejected"], file_of(there[image], "JPEG" if image.endswith("jpg") else "PNG")))
    return kept, {"after a row with several pictures": cut_off, **reasons}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mmpr_is_the_papers_selection(layout, mmpr, tokenizers, tmp_path, run):
    # the same rows in the same order with the same pictures, and why the others are not among them; every layout gives the same
    folder = mmpr(layout)
    for n, seed, max_tokens in ((None, 777, 60), (25, 777, 60), (10, 1111, 45)) if layout == "its folder" else ((None, 777, 60),):
        out = tmp_path / f"{n} {seed}"
        printed = run("prepare", "mmpr-v1.2", "--from", folder, "--out", out, "--tokenizer", mmpr.tokenizer, "--max_tokens", max_tokens,
                      *(("--n", n) if n else ()), *(("--seed", seed) if seed != 777 else ()))
        kept, reasons = the_papers_rows(tokenizers["chatml"], max_tokens, seed, n or 20_000)
        found = read_rows(out)
        texts = [(row["subset"], row["line"], row["question"], row["chosen"], row["rejected"], (out / row["image"]).read_bytes()) for row in found]
        assert texts == kept and 10 <= len(kept) == (n or len(kept))
        manifest = manifest_of(out, folder, ["annotations.zip", "images.zip_aa", "images.zip_ab", "images.zip_ac", "meta.json"])
        assert manifest["dropped"] == reasons and f"mmpr-v1.2: {len(kept)} records" in printed
        if n is None:                                                                   # nothing is lost on the way, and each reason has its rows
            assert len(kept) + sum(reasons.values()) == sum(SUBSETS.values()) and len(reasons) == 6 and min(reasons.values()) > 1
            longest = max(len(tokenizers["chatml"](f"{row[2]} {row[3]}").input_ids) for row in kept)
            assert longest <= max_tokens < max(len(tokenizers["chatml"](row[4]).input_ids) for row in kept)  # rejected is not counted
        rows = data.load(str(out / "rows.jsonl"), "pairs")
        assert len(rows) == len(kept)
        for i, (*_, question, chosen, rejected, content) in enumerate(kept):
            assert (rows[i]["question"], rows[i]["chosen"], rows[i]["rejected"]) == (question, chosen, rejected)
            assert np.array_equal(rows[i]["image"], Image.open(io.BytesIO(content)))


def test_the_limit_on_tokens_is_exact(mmpr, tokenizers, tmp_path, run):
    # a row of as many tokens as are allowed is kept, with one less allowed it is not
    kept, _ = the_papers_rows(tokenizers["chatml"], 60, 777, 20_000)
    lengths = sorted(len(tokenizers["chatml"](f"{row[2]} {row[3]}").input_ids) for row in kept)
    for limit in (lengths[-1], lengths[-1] - 1):
        run("prepare", "mmpr-v1.2", "--from", mmpr(), "--out", tmp_path / str(limit), "--tokenizer", mmpr.tokenizer, "--max_tokens", limit)
        assert len(read_rows(tmp_path / str(limit))) == sum(length <= limit for length in lengths)


@pytest.mark.parametrize("inside", ["", "images/"])
@pytest.mark.parametrize("indent", [None, 2])
def test_llava_pretrain(inside, indent, tmp_path, run):
    # a JSON list and a zip
    said = [{"from": "human", "value": "Render a summary.\n<image>"}, {"from": "gpt", "value": "größe 3 ]} [{"}]
    rows = [{"id": str(i), "image": f"{i % 4:05}/{i}.jpg", "conversations": said} for i in range(12)]
    rows[2]["image"], rows[5]["conversations"] = "00002/none.jpg", said[:1]
    rows.append({"id": "text", "conversations": said})
    source, out = tmp_path / "from", tmp_path / "out"
    pictures = {f"{i % 4:05}/{i}.jpg": file_of(i, "JPEG") for i in range(12)}
    zipped(source / "images.zip", {inside + name: content for name, content in pictures.items()})
    (source / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=indent is None))
    (source / "blip_laion_cc_sbu_558k_meta.json").write_text("[]")
    run("prepare", "llava-pretrain", "--from", source, "--out", out)
    good = [i for i in range(12) if i not in (2, 5)]
    found = read_rows(out)
    assert [(row["id"], row["question"], row["answer"]) for row in found] == [(str(i), said[0]["value"], said[1]["value"]) for i in good]
    assert [(out / row["image"]).read_bytes() for row in found] == [pictures[rows[i]["image"]] for i in good]
    manifest = manifest_of(out, source, ["blip_laion_cc_sbu_558k.json", "images.zip"])
    assert manifest["dropped"] == {"picture not found": 1, "turns N and N are of ['human'], must be of human and gpt": 1, "no picture": 1}
    loaded = data.load(str(out / "rows.jsonl"), "captions")
    assert [loaded[i]["caption"] for i in range(len(loaded))] == [said[1]["value"]] * 10
    run("prepare", "llava-pretrain", "--from", source, "--out", tmp_path / "four", "--n", 4)
    assert read_rows(tmp_path / "four") == found[:4] and len(files_in(tmp_path / "four/images")) == 4


def test_vlaa_thinking_with_rewards(tmp_path, run):
    # the GRPO part: the short answer, and a reward by the picture's source; with or without the long answer
    source, out = tmp_path / "from", tmp_path / "out"
    names = ["clevr_math", "geoqa170k", "arxivqa", "synthesis", "coco", "docvqa"]
    rows = [{"id": name, "image": f"{name}/1.png", "question": "?", "gt": [1, 2, 3, 4] if name == "coco" else f"gt of {name}", "caption": "c",
             **({"ds_answer": "<think> long"} if name < "d" else {})} for name in names]
    for number, name in enumerate(names):
        tarred(source / f"images/{name}.tar.gz", {f"{name}/1.png": file_of(number)})
    (source / "VLAA-Thinking-GRPO-25K.json").write_text(json.dumps(rows))
    run("prepare", "vlaa-thinking-grpo", "--from", source, "--out", out)
    assert [(row["id"], row["answer"], row["reward"]) for row in read_rows(out)] == [
        (name, "[1, 2, 3, 4]" if name == "coco" else f"gt of {name}", reward)
        for name, reward in zip(names, ("digit", "letter", "letter", "math", "iou", "open"))]
    record = data.load(str(out / "rows.jsonl"), "vqa")[3]
    assert NUMBERS[np.asarray(record["image"]).tobytes()] == 3 and record["reward"] == "math" and "ds_answer" not in record


@pytest.mark.parametrize("inside", ["", "{name}/", "./", "./{name}/"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_vlaa_thinking(inside, form, tmp_path, run):
    # JSON Lines or a JSON list; an archive for each source, with or without its own folder inside: the same file names in both
    source, out = tmp_path / "from", tmp_path / "out"
    rows = [{"id": f"{name}{i}", "image": f"{name}/train_{i}.png", "question": f"{name} {i}?", "gt": str(i), "ds_answer": f"<think>{i}</think> {i}",
             "caption": "c", "meta": {"k": [1]}} for i in range(6) for name in ("arxivqa", "clevr_math")]
    rows[3]["image"] = ["arxivqa/train_1.png", "arxivqa/train_2.png"]
    for number, name in enumerate(("arxivqa", "clevr_math")):
        tarred(source / f"images/{name}.tar.gz", {inside.format(name=name) + f"train_{i}.png": file_of(10 * number + i) for i in range(5)})
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    (source / "VLAA-Thinking-SFT-126K.json").write_text(text)
    (source / "VLAA-Thinking-GRPO-25K.json").write_text("not needed")
    run("prepare", "vlaa-thinking", "--from", source, "--out", out)
    kept = [row for i, row in enumerate(rows) if i < 10 and i != 3]                    # the sixth of each is in no archive
    found = read_rows(out)
    assert [(row["id"], row["question"], row["answer"], row["gt"]) for row in found] == [
        (row["id"], row["question"], row["ds_answer"], row["gt"]) for row in kept]
    numbers = [NUMBERS[np.asarray(data.load(str(out / "rows.jsonl"), "sft")[i]["image"]).tobytes()] for i in range(len(found))]
    assert numbers == [10 * row["image"].startswith("clevr") + int(row["id"][-1]) for row in kept]
    manifest = manifest_of(out, source, ["VLAA-Thinking-SFT-126K.json", "images/arxivqa.tar.gz", "images/clevr_math.tar.gz"])
    assert manifest["dropped"] == {"picture not found": 2, "several pictures": 1}


def test_ureader(tmp_path, run):
    # LLaVA-OneVision's sets that are no parquet: a conversation of two turns is two records; another config is left alone
    said = [{"from": who, "value": value} for who, value in (("human", "<image>\nread?"), ("gpt", "A"), ("human", "more?"), ("gpt", "B"))]
    rows = [{"id": "u1", "image": "DocVQA/pngs/a.png", "conversations": said}, {"id": "u2", "image": "DocVQA/pngs/b.png", "conversations": said[:2]}]
    source, out = tmp_path / "from", tmp_path / "out"
    for config in ("ureader_qa", "ureader_kg"):
        zipped(source / config / f"{config}.zip", {f"{config}/DocVQA/pngs/{name}.png": file_of(i) for i, name in enumerate("ab")})
        (source / config / f"{config}_processed.json").write_text(json.dumps(rows))
    run("prepare", "llava-onevision/ureader_qa", "--from", source, "--out", out)
    assert [(row["id"], row["question"], row["answer"]) for row in read_rows(out)] == [
        ("u1", "<image>\nread?", "A"), ("u1", "more?", "B"), ("u2", "<image>\nread?", "A")]
    loaded = data.load(str(out / "rows.jsonl"), "sft")
    assert [result(loaded, i)[-1] for i in range(3)] == [0, 0, 1] and loaded.trees(4)[:] == [[0, 1], [2]]
    manifest_of(out, source, ["ureader_qa/ureader_qa.zip", "ureader_qa/ureader_qa_processed.json"])


def test_a_second_run_is_done_and_a_killed_one_goes_on(mmpr, tmp_path, run, monkeypatch):
    # stopped at any moment, with a half-written picture left behind: the next run ends as if nothing had happened
    ask = ("prepare", "mmpr-v1.2", "--from", mmpr(), "--tokenizer", mmpr.tokenizer, "--max_tokens", 60, "--n", 20, "--out")
    run(*ask, tmp_path / "whole")
    whole, replace = files_in(tmp_path / "whole"), os.replace
    pictures = [name for name in whole if name.startswith("images")]
    for moment in (1, 2, 4, 10, 3 + len(pictures), 4 + len(pictures), 5 + len(pictures)):
        out, moves = tmp_path / str(moment), itertools.count(1)

        def killed(source, target):
            if next(moves) == moment:
                os.truncate(source, os.path.getsize(source) // 2)
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit, match="^stopped$"):
            run(*ask, out)
        assert files_in(out) != whole and not (out / "manifest.json").exists()
        monkeypatch.setattr(os, "replace", replace)
        left = {name: (out / name).stat().st_mtime_ns for name in files_in(out) if name.startswith("images") and not name.endswith(".tmp")}
        run(*ask, out)
        assert files_in(out) == whole
        assert all((out / name).stat().st_mtime_ns == time for name, time in left.items())  # what was there was not written again
    before = {name: (tmp_path / "whole" / name).stat().st_mtime_ns for name in whole}
    assert run(*ask, tmp_path / "whole") == f"{tmp_path}/whole is ready\n"
    assert before == {name: (tmp_path / "whole" / name).stat().st_mtime_ns for name in files_in(tmp_path / "whole")}
    for other in (("--n", 21), ("--seed", 1), ("--max_tokens", 61), ("--tokenizer", "gpt2")):
        assert "was begun with other settings, see its asked.json" in refused(run, *ask, tmp_path / "whole", *other)
    assert files_in(tmp_path / "whole") == whole


def test_archives_cannot_write_elsewhere(tmp_path, run):
    # names that climb out of the folder are refused where a row asks for them, absolute ones too; nothing is written outside
    for number, evil in enumerate(("../../../evil.png", "x/../../../../pictures/evil.png", f"{tmp_path}/elsewhere/evil.png")):
        for make, name in ((zipped, "images/evil.zip"), (tarred, "images/evil.tar.gz")):
            source, out = tmp_path / f"from{number}{name[-1]}", tmp_path / f"deep/er/out{number}{name[-1]}"
            make(source / name, {evil: file_of(0), "good.png": file_of(1)})
            lines(source / "VLAA-Thinking-SFT-126K.json", [{"image": image, "question": "q?", "ds_answer": "a"}
                                                           for image in ("good.png", evil.split("../")[-1])])
            message = refused(run, "prepare", "vlaa-thinking", "--from", source, "--out", out)
            assert message == f"error: {name} names a file outside of its folder: {evil}"
            assert not (out / "rows.jsonl").exists()
    source, out = tmp_path / "from", tmp_path / "out"
    zipped(source / "images/a.zip", {"../rows.jsonl": b"{}"})                           # this one would stay within OUT, over its own files
    lines(source / "VLAA-Thinking-SFT-126K.json", [{"image": "../rows.jsonl", "question": "q?", "ds_answer": "a"}])
    assert "names a file outside of its folder: ../rows.jsonl" in refused(run, "prepare", "vlaa-thinking", "--from", source, "--out", out)
    assert not [path for path in tmp_path.rglob("*.png") if out not in path.parents and "deep" not in path.parts]


def test_a_picture_is_found_by_the_end_of_its_path(tmp_path):
    # the longest that agrees, then the shortest path; never one of several that are as good, never half a name
    held = ["a/x.png", "b/x.png", "x.png", "deep/a/y.png", "a/y.png", "c/z.png", "d/z.png", "e/f/1.png", "g/e/f/1.png"]
    zipped(tmp_path / "images.zip", {name: b"" for name in held})
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(b"")                                      # unpacked already, beside its archive
    files = prepare.Files(str(tmp_path), ["images*"])
    expected = {"a/x.png": "images/a/x.png", "b/x.png": "images/b/x.png", "x.png": "images/x.png", "images/b/x.png": "images/b/x.png",
                "set/images/b/x.png": "images/b/x.png", "other/images/deep/a/y.png": "images/deep/a/y.png", "a/y.png": "images/a/y.png",
                "z.png": None, "c/z.png": "images/c/z.png", "q/z.png": None, "aa/x.png": None, "ax.png": None, "f/1.png": "images/e/f/1.png",
                "g/e/f/1.png": "images/g/e/f/1.png", "./a/./x.png": "images/a/x.png", "/images//a/x.png": "images/a/x.png", "a": None, "": None,
                "none.png": None, "set/x.png": None, "images/c/d/z.png": None}
    assert {name: (found or [None])[0] for name in expected for found in [files.find(name)]} == expected


def test_joined_is_the_concatenated_file(tmp_path):
    # parts of any size, some of none: every read after every seek gives what the whole file gives
    generator = random.Random(0)
    for sizes in ((10, 1, 7), (5,), (0, 3, 0, 0, 9, 0), (8192, 1, 8191, 3000), (0,)):
        paths = [tmp_path / f"x.zip_a{letter}" for letter in "abcdef"[:len(sizes)]]
        for path, size in zip(paths, sizes):
            path.write_bytes(generator.randbytes(size))
        content = b"".join(path.read_bytes() for path in paths)
        for open_ends in (lambda: (prepare.Joined(paths), io.BytesIO(content)),
                          lambda: (io.BufferedReader(prepare.Joined(paths), 16), io.BufferedReader(io.BytesIO(content), 16))):
            found, expected = open_ends()
            assert found.read() == expected.read() == content and found.seekable() and found.readable()
            for _ in range(300):
                whence = generator.choice((0, 1, 2))
                at = generator.randrange(len(content) + 5)
                offset = {0: at, 1: at - expected.tell(), 2: at - len(content)}[whence]
                assert found.seek(offset, whence) == expected.seek(offset, whence) == found.tell()
                n = generator.choice((0, 1, 2, 5, 20, 9000, -1))
                read = found.read(n)
                if isinstance(found, prepare.Joined) and n != -1:                       # a raw file may give less, but never nothing
                    assert bool(read) == bool(n and at < len(content))
                    expected.seek(at)
                    assert read == expected.read(len(read))
                else:
                    assert read == expected.read(n)
                assert found.tell() == expected.tell()


def test_what_is_broken_or_missing_is_said_in_one_line(mmpr, tmp_path, run):
    def ask(change, name="mmpr-v1.2"):
        source = tmp_path / "from"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(mmpr(), source)
        change(source)
        return refused(run, "prepare", name, "--from", source, "--out", tmp_path / "out", "--tokenizer", mmpr.tokenizer)

    def damaged(name, at):
        def change(source):
            content = bytearray((source / name).read_bytes())
            content[at:at + 30] = b"\0" * 30
            (source / name).write_bytes(content)
        return change

    def write(name, text):
        return lambda source: (source / name).write_text(text)

    pointer = "version https://git-lfs.github.com/spec/v1\n"                             # what git leaves there without git-lfs
    for name in ("meta.json", "annotations.zip"):
        assert re.fullmatch(rf"error: \S+/from has no {re.escape(name[:11])}\S*", ask(lambda source: (source / name).unlink()))
    assert re.fullmatch(r"error: images\.zip cannot be unpacked: .+", ask(lambda source: (source / "images.zip_ac").unlink()))  # half a download
    assert re.fullmatch(r"error: annotations\.zip cannot be unpacked: .+", ask(write("annotations.zip", pointer)))
    assert re.fullmatch(r"error: annotations\.zip cannot be unpacked: .+", ask(damaged("annotations.zip", 60)))
    assert re.fullmatch(r"error: images\.zip cannot be unpacked: .+", ask(damaged("images.zip_aa", 300)))
    assert re.fullmatch(r"error: \S+meta\.json is not JSON: .+", ask(write("meta.json", pointer)))
    named = json.dumps({"vqa": {"root": "images/vqa", "annotation": "annotations/none.jsonl"}})
    assert ask(write("meta.json", named)) == "error: meta.json names annotations/none.jsonl, which is in no archive"
    assert re.fullmatch(r"error: mmpr-v1\.2: not one row can be used: \{.+\}", ask(write("meta.json", json.dumps(
        {"vqa": {"root": "elsewhere/else", "annotation": "annotations/vqa.jsonl"}}))))
    assert "sets that come as archives are mmpr-v1.2, llava-pretrain" in ask(lambda source: None, "mmpr")
    for name in ("llava-onevision", "mmpr-v1.2/x"):
        assert "sets that come as archives are" in ask(lambda source: None, name)
    assert re.fullmatch(r"error: \S+nowhere has no meta\.json", refused(run, "prepare", "mmpr-v1.2", "--from", tmp_path / "nowhere", "--out", "x"))
    assert re.fullmatch(r"error: OpenGVLab/MMPR-v1\.2 cannot be downloaded: .+ name their folder by --from", refused(
        run, "prepare", "mmpr-v1.2", "--out", tmp_path / "x"))
    assert "cannot be opened" in refused(run, "prepare", "mmpr-v1.2", "--from", mmpr(), "--out", tmp_path / "y", "--tokenizer", tmp_path / "none")
    assert not (tmp_path / "out/manifest.json").exists()


def test_broken_lists_and_tars(tmp_path, run):
    # a list whose end is missing is not a shorter list; a tar.gz that breaks off, and one that is none
    source = tmp_path / "from"
    rows = [{"image": f"a/{i}.png", "question": "q?", "ds_answer": "a"} for i in range(300)]
    good, ask = json.dumps(rows), ("prepare", "vlaa-thinking", "--from", source, "--out", tmp_path / "out")
    tarred(source / "images/a.tar.gz", {f"{i}.png": random.Random(i).randbytes(500) for i in range(300)})
    content = (source / "images/a.tar.gz").read_bytes()
    for text in (good[:-1], good[:-40], good[:-2] + ",", good.replace('"a/7.png"', "a/7.png")):
        (source / "VLAA-Thinking-SFT-126K.json").write_text(text)
        assert re.fullmatch(r"error: \S+126K\.json is not JSON: .+", refused(run, *ask))
    (source / "VLAA-Thinking-SFT-126K.json").write_text(good)
    for broken in (content[:len(content) // 2], b"version https://git-lfs", content[:90_000] + bytes(9) + content[90_009:], gzip.compress(b"no tar")):
        (source / "images/a.tar.gz").write_bytes(broken)
        assert re.fullmatch(r"error: images/a\.tar\.gz cannot be unpacked: .+", refused(run, *ask))
    assert not (tmp_path / "out/rows.jsonl").exists()


def test_as_its_user_runs_it(tmp_path):
    # python data.py in a process of its own: no traceback, one line on stderr, and a status that says so
    source = tmp_path / "from"
    zipped(source / "images.zip", {"a.png": file_of(0)})
    (source / "images.zip").write_bytes((source / "images.zip").read_bytes()[:50])
    (source / "blip_laion_cc_sbu_558k.json").write_text("[]")
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data.py")
    command = [sys.executable, script, "prepare", "llava-pretrain", "--from", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert re.fullmatch(r"error: images\.zip cannot be unpacked: .+", done.stderr.strip().splitlines()[-1])


# ---- show -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")
def test_show_draws_every_kind_of_data(three, tmp_path, run, monkeypatch):
    # a picture that opens, as many records as were asked for, of the right source; bad rows with their reason
    sheets, draw = [], scenes.contact_sheet
    monkeypatch.setattr(scenes, "contact_sheet", lambda rows, path: (sheets.append(rows), draw(rows, path)))
    texts = {"question": "how much is $5 and $6?", "chosen": "a \\$ b_c^{d " * 30, "rejected": "größe\n日本"}
    bad = lines(tmp_path / "bad.jsonl", [{"image": image, **texts} for image in ("0.png", "none.png", "1.png")])
    pairs = parquet(tmp_path / "pairs", BMB, [bmb(picture(i), f"{i}?", "yes", "no") for i in range(6)])
    cases = (((three[0],), 2, ()), ((bad,), 3, ()), ((pairs,), 3, ("--seed", 1)), (("scenes/train/foreign",), 5, ()),
             ((three[1], "scenes/train/sft"), 4, ("--weights", 1, 1)))
    for number, (source, n, more) in enumerate(cases):
        out = tmp_path / f"sheets/{number}.png"
        said = f"wrote {n} records{', 1 of them dropped,' * (source == (bad,))} of {' + '.join(source)} to {out}\n"
        assert run("show", *source, "--n", n, "--out", out, *more) == said
        with Image.open(out) as sheet:
            sheet.load()
            assert sheet.format == "PNG" and min(sheet.size) > 300 and len(np.unique(np.asarray(sheet))) > 5
        assert len(sheets[-1]) == n and all("image" in row or "dropped" in row for row in sheets[-1])
    jsonl, dropped, shown, drawn, mixed = sheets
    assert all(row["question"][0] == "j" for row in jsonl) and len({row["question"] for row in shown}) == 3
    assert all({"chosen", "rejected"} <= row.keys() for row in shown + drawn) and all("answer" in row for row in jsonl + mixed)
    reasons = [row["dropped"] for row in dropped if "dropped" in row]
    assert reasons == [f"{bad} row 1: its picture is missing: {tmp_path}/none.png"]
    assert {row["question"][0] == "p" for row in mixed} == {True, False}
    assert "no such file" in refused(run, "show", str(tmp_path / "none.jsonl"))
