"""Rows on the way in: the drawn world against an oracle that reads its pictures, every bad row by name, every format to the same record."""
import json
import pickle
import random
import re
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
import scenes
from scenes import COLORS, NUMBERS, PLACES, SHAPES, Scenes

# ---- the drawn world ---------------------------------------------------------------------------------------------------------


def read_picture(row):
    """The scene {cell: (shape, colour)}: the mask's class in each cell, and the likeliest colour of its pixels (channels are off by 8 %)"""
    picture, scene = np.array(row["image"], float), {}
    for cell in range(9):
        y, x = cell // 3 * 12, cell % 3 * 12
        classes = row["mask"][y:y + 12, x:x + 12]
        if classes.any():
            mean = picture[y:y + 12, x:x + 12][classes > 0].mean(0)
            scene[cell] = SHAPES[classes.max() - 1], min(COLORS, key=lambda c: np.linalg.norm(mean / COLORS[c] - 1))
    return scene


FACTS = {"circle": "zero", "ring": "zero", "triangle": "three", "square": "four", "diamond": "four", "cross": "twelve",
         "red yellow": "orange", "blue yellow": "green", "blue red": "purple", "green red": "yellow", "blue green": "cyan"}


def oracle(scene, question):
    """The answer to a question of the drawn world, from its words alone"""
    words = re.findall(r"[a-z]+", question)
    cell_of = {shape: cell for cell, (shape, _) in scene.items()}
    colors, shapes = [w for w in words if w in COLORS], [w for w in words if w in SHAPES]
    if question == "how many shapes are there?":
        return NUMBERS[len(scene)]
    if "color" in words:
        return scene[cell_of[shapes[0]]][1]
    if question.startswith("what shape"):
        return next(shape for shape, color in scene.values() if color == colors[0])
    if "where" in words:
        return PLACES[cell_of[shapes[0]]]
    if "there" in words:
        return "yes" if (shapes[0], colors[0]) in scene.values() else "no"
    if "above" in words or "left" in words:
        rows_and_columns = [(lambda c: c // 3 if "above" in words else c % 3)(cell_of[shape]) for shape in shapes]
        return "yes" if rows_and_columns[0] < rows_and_columns[1] else "no"
    if "plus" in words:
        return NUMBERS[sum(NUMBERS.index(w) for w in words if w in NUMBERS)]
    if "corners" in words:
        return FACTS[shapes[0]]
    assert "make" in words, question
    return FACTS[" ".join(sorted(colors))]


@pytest.fixture(scope="module")
def world():
    """{(split, task): rows} of the drawn world, drawn once"""
    return {(split, task): list(Scenes(split, n, task)) for split, task, n in (
        ("train", "sft", 1500), ("tune", "sft", 800), ("test", "sft", 800), ("test", "vqa", 2500), ("train", "foreign", 300), ("test", "plain", 300),
        ("test", "maps", 300), ("train", "red", 200))}


def test_answers_are_what_the_picture_shows(world):
    # every question that the world asks, answered anew from pixels and mask
    for row in world["test", "vqa"]:
        scene = read_picture(row)
        assert row["answer"] == oracle(scene, row["question"]), row["question"]
        assert row["category"] == ("knowledge" if row["kind"] in ("sum", "corners", "mix") else "vision-centric")
    kinds = Counter(row["kind"] for row in world["test", "vqa"])
    assert set(kinds) == {"color", "shape", "place", "relation", "count", "existence", "sum", "corners", "mix"} and min(kinds.values()) > 100


def test_captions_and_descriptions_are_what_the_picture_shows(world):
    # the sentences of stage 1 hold every object, in reading order, and nothing else
    for row in world["train", "sft"]:
        scene = read_picture(row)
        objects = [f"{color} {shape} at {PLACES[cell]}" for cell, (shape, color) in sorted(scene.items())]
        if row["kind"] == "caption":
            assert row["answer"].split(", ") == [" ".join(scene[c]) if c in scene else "empty" for c in range(9)]
        elif row["kind"] == "describe":
            assert row["answer"].split(", ") == objects
        elif row["kind"] == "find":
            attribute = row["question"].removeprefix("find the ").removesuffix(".")
            assert [row["answer"]] == [o for o in objects if attribute in o.split()]
        else:
            assert row["answer"] == oracle(scene, row["question"])


def test_yes_and_no_are_equally_likely(world):
    # a model that never looks gets half of them
    for kind in ("existence", "relation"):
        answers = [row["answer"] for row in world["test", "vqa"] if row["kind"] == kind]
        assert len(answers) > 150 and .4 < answers.count("yes") / len(answers) < .6, kind


def test_splits_share_no_layout(world):
    # captions name every cell, so they are the layout: no test caption is ever drawn in training; the same from the generator itself
    captions = {split: {row["answer"] for row in world[split, "sft"] if row["kind"] == "caption"} for split in ("train", "tune", "test")}
    rng = np.random.default_rng(0)
    drawn = {split: {scenes.caption(scenes.draw_scene(rng, split)) for _ in range(1500)} for split in captions}
    for split in captions:
        others = set().union(*(captions[s] | drawn[s] for s in captions if s != split))
        assert len(captions[split]) > 100 and not (captions[split] | drawn[split]) & others
    one_shape = Counter(caption.count("empty") == 8 for caption in drawn["test"])
    assert 10 < one_shape[True] < 9 * 6 * 6 / 5  # about a tenth of the 324 layouts of one shape, met many times: never in training


def test_a_row_depends_on_seed_split_task_and_index_alone(world):
    # drawn again, in another order, from a longer world: the same row; another seed, split or task: another row
    same = lambda a, b: np.array_equal(np.array(a["image"]), np.array(b["image"])) and all(a[k] == b[k] for k in a if k not in ("image", "mask"))
    rows = world["test", "vqa"]
    assert all(same(Scenes("test", 10_000, "vqa")[i], rows[i]) for i in (7, 3, 499))
    assert not any(same(other[7], rows[7]) for other in (Scenes("test", 9, "vqa", seed=1), Scenes("tune", 9, "vqa"), Scenes("test", 9, "sft")))
    assert len({row["image"].tobytes() for row in rows}) == len(rows)
    for i in (-1, 10):
        with pytest.raises(IndexError):
            Scenes("test", 10)[i]


def same_row(a, b):
    pixels = all(np.array_equal(np.array(a[k]), np.array(b[k])) for k in ("image", "mask"))
    return pixels and a.keys() == b.keys() and all(a[k] == b[k] for k in a if k not in ("image", "mask"))


def test_one_question_a_picture_is_the_world_as_it_was(world):
    # the draws in their order, written out: scene, picture, then the question; and three rows as they were before there were more questions
    for (split, task), rows in world.items():
        for i in range(0, len(rows), 25):
            rng = np.random.default_rng([0, zlib.crc32(f"{split} {task}".encode()), i])
            scene = scenes.draw_scene(rng, split)
            while task == "red" and not any(color == "red" for _, color in scene.values()):
                scene = scenes.draw_scene(rng, split)
            image, mask, boxes = scenes.draw_picture(rng, scene)
            assert same_row(rows[i], {"image": image, "mask": mask, **Scenes(split, 1, task).ask(rng, scene, boxes)})
    told = [[world[key][7].get(k) for k in ("question", "answer", "chosen", "rejected", "kind", "box")]
            for key in (("train", "sft"), ("test", "vqa"), ("test", "plain"))]
    cells = "empty, empty, empty, diamond green, cross cyan, ring yellow, square blue, empty, empty"
    assert told == [["name every cell.", cells, None, None, "caption", None],
                    ["what do blue and green make?", "cyan", None, None, "mix", None],
                    ["describe the picture.", None, "green ring at top right", "green ring at top left", "describe", (24, 0, 34, 10)]]


@pytest.mark.parametrize("task", ["sft", "vqa", "foreign", "plain", "maps"])
def test_questions_about_one_picture(task):
    # four rows in a row share a picture and no two are the same; the first of them is the row of the world with one question a picture
    rows, single = list(Scenes("test", 402, task, questions=4)), list(Scenes("test", 101, task))
    assert len(rows) == 402 and len({row["image"].tobytes() for row in rows}) == 101    # the last picture has two questions
    for i in range(101):
        about = rows[4 * i:4 * i + 4]
        assert all(np.array_equal(row["image"], about[0]["image"]) and np.array_equal(row["mask"], about[0]["mask"]) for row in about)
        fields = ("question",) if task in ("sft", "vqa") else ("question", "chosen", "rejected")  # one question may have several pairs
        assert len({tuple(row[k] for k in fields) for row in about}) == len(about)
        assert same_row(about[0], single[i])
        for row in about if task == "vqa" else ():
            assert row["answer"] == oracle(read_picture(row), row["question"])
    if task == "vqa":  # later questions are drawn like the first: of all nine kinds
        kinds = Counter(row["kind"] for i, row in enumerate(rows) if i % 4)
        assert len(kinds) == 9 and min(kinds.values()) > 15


def test_a_question_depends_on_no_other_that_was_asked_for():
    # shuffled, so that pictures fall out of the cache and come back; from a longer world; from a copy, as a worker has it; through load: the same
    expected, loaded = list(Scenes("train", 60, "sft", questions=4)), data.load("scenes/train/sft/4", "sft", 60)
    world, longer = Scenes("train", 60, "sft", questions=4), Scenes("train", 9000, "sft", questions=4)
    copy, numbers = pickle.loads(pickle.dumps(world)), list(range(60)) * 2
    random.Random(0).shuffle(numbers)
    for i in numbers:
        assert all(same_row(each[i], expected[i]) for each in (world, longer, copy)) and len(loaded) == 60
        assert all(np.array_equal(np.array(loaded[i][k]), np.array(expected[i][k])) for k in ("image", "question", "answer", "mask"))
    other_seed, three = Scenes("train", 60, "sft", 1, 4), Scenes("train", 60, "sft", 0, 3)
    assert not any(same_row(other_seed[i], expected[i]) for i in range(60)) and same_row(three[5], expected[6])


def test_the_mask_fills_its_boxes():
    # each box is the tight frame of its cell's mask; outside all boxes is ground; every shape lies inside its cell
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = scenes.draw_scene(rng, "train")
        image, mask, boxes = scenes.draw_picture(rng, scene)
        assert image.size == (36, 36) and mask.shape == (36, 36) and boxes.keys() == scene.keys()
        rest = mask.copy()
        for cell, (x0, y0, x1, y1) in boxes.items():
            inside = mask[y0:y1, x0:x1]
            shape = scenes.shape_mask(scene[cell][0], *np.mgrid[:12, :12] - 5.5, 5)
            shape = shape[shape.any(1)][:, shape.any(0)]
            assert np.array_equal(inside, shape * (1 + SHAPES.index(scene[cell][0])))  # tight and whole: nothing is cut or wraps round
            assert cell % 3 * 12 <= x0 < x1 <= cell % 3 * 12 + 12 and cell // 3 * 12 <= y0 < y1 <= cell // 3 * 12 + 12
            rest[y0:y1, x0:x1] = 0
        assert not rest.any()


def test_the_box_is_of_the_asked_object(world):
    # gradient maps are scored against it: the box lies in the cell of the object that the question or the answer names
    for row in world["test", "vqa"]:
        if row["kind"] in ("color", "shape", "place", "relation") or (row["kind"] == "existence" and row["answer"] == "yes"):
            named = next(w for w in re.findall("[a-z]+", row["question"] + " " + row["answer"]) if w in SHAPES)
            cell = next(c for c, (shape, _) in read_picture(row).items() if shape == named)
            assert (row["box"][0] // 12, row["box"][1] // 12) == (cell % 3, cell // 3), row["question"]
        elif row["kind"] != "existence":
            assert row["box"] is None


def test_a_wrong_object_is_wrong_in_one_attribute():
    # shape, colour or place, all three in turn; the text alone never betrays it: no shape, colour or place occurs twice
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(600):
        scene = scenes.draw_scene(rng, "train")
        cell = int(rng.choice(list(scene)))
        wrong, moved = scenes.wrong_object(rng, scene, cell)
        others = {c: o for c, o in scene.items() if c != cell}
        assert {c: o for c, o in wrong.items() if c != moved} == others and list(wrong) == sorted(wrong)
        differs = [moved != cell, wrong[moved][0] != scene[cell][0], wrong[moved][1] != scene[cell][1]]
        assert sum(differs) == 1 and moved not in others
        seen[differs.index(True)] += 1
        for attribute in (0, 1):
            assert len({o[attribute] for o in wrong.values()}) == len(scene)
    assert min(seen.values()) > 150


def test_maps_pairs_differ_in_one_word_of_the_boxed_object(world):
    # one wrong shape word, and the box is of the object that it is wrong about; the chosen text is true
    for row in world["test", "maps"]:
        scene, chosen, rejected = read_picture(row), row["chosen"].split(" "), row["rejected"].split(" ")
        differ = [i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b]
        assert len(differ) == 1 and rejected[differ[0]] not in {shape for shape, _ in scene.values()}
        shape = chosen[differ[0]]
        cell = next(c for c, (s, _) in scene.items() if s == shape)
        assert (row["box"][0] // 12, row["box"][1] // 12) == (cell % 3, cell // 3)
        assert row["chosen"].split(", ") == [f"{c} {s} at {PLACES[cell]}" for cell, (s, c) in scene.items()]


def test_plain_pairs_are_truth_against_error(world):
    # chosen is what the picture shows, rejected is not
    for row in world["test", "plain"]:
        scene = read_picture(row)
        true = scenes.describe(scene) if row["kind"] == "describe" else oracle(scene, row["question"])
        assert row["chosen"] == true != row["rejected"]


def test_red_is_labelled_by_the_shape_of_the_red_object(world):
    # what the linear probe has to read: bound colour and shape
    for row in world["train", "red"]:
        assert SHAPES[row["label"]] == next(shape for shape, color in read_picture(row).values() if color == "red")


def seen_in(text):
    """The objects that a text in the foreign style speaks of: {shape and colour and place, as a triple}"""
    return set(re.findall(rf"at ({'|'.join(sorted(PLACES, key=len, reverse=True))}) i see a (\w+) that is (\w+)", text))


def test_foreign_errors_come_at_the_stated_rates():
    # each object misread with .15 (chosen) and .45 (rejected), given that the two answers differ: equal ones are drawn again
    rng = np.random.default_rng(0)
    for n, kind in ((1, "color"), (1, "place"), (4, "describe")):
        wrong, total = np.zeros(2), 0
        while total < 1200:
            scene = scenes.draw_scene(rng, "train")
            if kind == "describe" and len(scene) != n:
                continue
            cell = int(rng.choice(list(scene)))
            truth = {(PLACES[c], *scene[c]) for c in (scene if kind == "describe" else [cell])}
            chosen, rejected = scenes.imperfect_pair(rng, scene, kind, cell)
            assert chosen != rejected and len(seen_in(chosen)) == len(seen_in(rejected)) == len({s[0] for s in seen_in(chosen)}) == n
            if kind != "describe":
                assert chosen.endswith(f"so the answer is {next(iter(seen_in(chosen)))[{'color': 2, 'place': 0}[kind]]}.")
            wrong += [len(seen_in(text) - truth) for text in (chosen, rejected)]
            total += n
        same = .15 * .45 + .85 * .55  # both right, or both wrong in the same way
        expected = [(p - .15 * .45 * same**(n - 1)) / (1 - same**n) for p in (.15, .45)]
        assert wrong / total == pytest.approx(expected, abs=.04), (kind, expected)


def test_how_wrong_and_how_foreign_the_pairs_are():
    # chosen answers are exact where the task says so, err more often where it says that, and speak as they should
    def wrong(task, field):
        rows = [Scenes("train", 400, task)[i] for i in range(400)]
        rows = [(row, read_picture(row)) for row in rows if row["kind"] == "describe"]
        say = scenes.foreign_style if task.startswith("foreign") else scenes.taught_style
        return np.mean([row[field] != say(scene, "describe", None) for row, scene in rows])
    assert wrong("foreign_exact", "chosen") == 0 and wrong("foreign_exact", "rejected") == 1
    assert .05 < wrong("foreign", "chosen") < wrong("foreign_poor", "chosen") - .1 and wrong("taught_poor", "chosen") > .05
    assert wrong("taught_poor", "rejected") > wrong("taught_poor", "chosen") + .2


def test_pairs_of_other_pictures_have_the_chosen_answers_of_foreign_ones(world):
    for i, row in enumerate(world["train", "foreign"]):
        other = Scenes("train", 300, "other")[i]
        assert all(other[key] == row[key] for key in ("question", "chosen", "box")) and np.array_equal(other["mask"], row["mask"])
        assert other["rejected"] != row["chosen"] and ("<think>" in other["rejected"]) == ("<think>" in row["chosen"])
    # its rejected answers are about other pictures: they name objects that are not there about as often as chance has it
    truth = lambda row: {(PLACES[cell], *found) for cell, found in read_picture(row).items()}
    rows = [Scenes("train", 200, "other")[i] for i in range(200)]
    assert np.mean([bool(seen_in(row["rejected"]) & truth(row)) for row in rows]) < .1
    # and the words alone do not betray them: as many objects, and each speaks of what was asked
    for row in rows:
        if row["kind"] == "describe":
            assert len(seen_in(row["chosen"])) == len(seen_in(row["rejected"]))
    asked = [(row, next(w for w in re.findall(r"\w+", row["question"]) if w in SHAPES or w in COLORS)) for row in rows if row["kind"] != "describe"]
    named = {field: np.mean([word in row[field] for row, word in asked]) for field in ("chosen", "rejected")}
    assert min(named.values()) > .9


def test_the_large_world_is_what_its_text_says():
    # boxes frame what is visible, which is at least half of each object; colours are told apart; objects cross borders and stand before others
    row, rng, hidden, crossed = Scenes("test", 1, "sft", world="large")[0], np.random.default_rng(1), [], 0
    assert row["image"].size == (96, 96) and row["mask"].shape == (96, 96)
    for _ in range(120):
        scene, drawn, whole = scenes.draw_scene(rng, "train", 5), scenes.shape_mask, {}
        try:
            scenes.shape_mask = lambda shape, *where: whole.setdefault(shape, []).append(drawn(shape, *where)) or whole[shape][-1]
            image, mask, boxes = scenes.draw_large(rng, scene)
        finally:
            scenes.shape_mask = drawn
        pixels = np.array(image, float)
        for cell, (shape, color) in scene.items():
            own = mask == 1 + SHAPES.index(shape)
            mean = pixels[own].mean(0)
            assert scenes.box_of(own) == boxes[cell] and not (own & ~whole[shape][-1]).any()
            assert min(COLORS, key=lambda c: np.linalg.norm(mean / np.linalg.norm(mean) - np.array(COLORS[c]) / np.linalg.norm(COLORS[c]))) == color
            x0, y0, x1, y1 = boxes[cell]
            crossed += x0 // 32 != (x1 - 1) // 32 or y0 // 32 != (y1 - 1) // 32
            hidden.append(1 - own.sum() / whole[shape][-1].sum())                        # the last try is the one that was kept
    assert crossed > 60 and max(hidden) <= .5 and np.mean(np.array(hidden) > .1) > .1 and max(hidden) > .4
    assert {len(scenes.draw_scene(rng, "train", 5)) for _ in range(300)} == {1, 2, 3, 4, 5}


# ---- sources of rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, pictures):
    """A folder with pictures a.png, b.png, and what can be wrong with one"""
    pictures[0].save(tmp_path / "a.png")
    pictures[1].save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:900])
    return tmp_path


def write(folder, *rows, name="rows.jsonl"):
    """A JSONL file of rows -> its path"""
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(folder / name)


GOOD = {"image": "a.png", "question": "what?", "answer": "a ring"}
PAIR = {"image": "a.png", "question": "what?", "chosen": "a ring", "rejected": "a cross"}


@pytest.mark.parametrize("row, kind, reason", [
    ({**GOOD, "image": "none.png"}, "sft", r"its picture is missing: \S+none\.png"),
    ({**GOOD, "image": "text.png"}, "sft", r"its picture cannot be read: \S+text\.png \(.+\)"),
    ({**GOOD, "image": "cut.png"}, "sft", r"its picture cannot be read: \S+cut\.png \(.+\)"),
    ({**GOOD, "image": None}, "sft", "it has no picture"),
    ({**GOOD, "answer": " "}, "sft", "'answer' is empty"),
    ({**GOOD, "answer": 3}, "sft", "'answer' is .*"),
    ({k: GOOD[k] for k in ("image", "answer")}, "vqa", "'question' is missing"),
    ({**PAIR, "rejected": " a ring\n"}, "pairs", "chosen and rejected are the same text"),
    ({**PAIR, "rejected": "<image> a cross"}, "pairs", "a response contains the <image> tag"),
    ({"images": ["a.png", "b.png"], "prompt": [{"role": "user", "content": "?"}], "chosen": [], "rejected": []}, "pairs",
     "has 2 pictures, must have exactly one"),
])
def test_a_bad_row_is_named(row, kind, reason, folder):
    # one line: the file, the row's number, what is wrong with it; its neighbours are fine
    good = PAIR if kind == "pairs" else GOOD
    rows = data.load(write(folder, good, row, good), kind)
    with pytest.raises(data.BadRow) as error:
        rows[1]
    assert re.fullmatch(re.escape(str(folder / "rows.jsonl")) + " row 1: " + reason, str(error.value))
    assert rows[0]["question"] == rows[2]["question"] == "what?" and rows[2]["row"] == 2


@pytest.mark.parametrize("source, kind, error, message", [
    ("{f}/none.jsonl", "sft", FileNotFoundError, r"--data \S+none\.jsonl: no such file"),
    ("{f}/empty.jsonl", "sft", ValueError, r"\S+empty\.jsonl has no rows"),
    ("{f}/broken.jsonl", "sft", ValueError, r"\S+broken\.jsonl line 2 is not JSON: .+"),
    ("{f}/list.jsonl", "sft", ValueError, r"\S+list\.jsonl line 1 is not a record, but a list"),
    ("{f}/good.jsonl", "pairs", ValueError, r"\S+good\.jsonl has no column 'chosen', 'rejected'; it has: answer, image, question"),
    ("nobody/nothing", "sft", ValueError, r"--data nobody/nothing cannot be loaded: .+"),
    ("{f}/parquet", "sft", FileNotFoundError, r"--data \S+parquet: neither scenes.+ nor a hub id"),
    ("scenes/train", "sft", ValueError, r"scenes/train: the drawn world is named scenes/SPLIT/TASK.+"),
    *((f"scenes/train/sft{more}", "sft", data.InputError, rf"scenes/train/sft{more}: the drawn world is named scenes/SPLIT/TASK or "
       "scenes/SPLIT/TASK/QUESTIONS, as in scenes/train/sft or scenes/train/sft/4") for more in ("/0", "/-1", "/two", "/2.5", "/", "/4/4")),
    ("scenes/validation/sft", "sft", ValueError, r".*unknown split 'validation' of the drawn world; splits: train, tune, test"),
    ("scenes/train/dpo", "sft", ValueError, r".*unknown task 'dpo' of the drawn world.*"),
    ("scenes/train/sft", "pairs", ValueError, r"scenes/train/sft has no column 'chosen', 'rejected'; it has: .+"),
])
def test_a_bad_source_is_named(source, kind, error, message, folder):
    # one line that names the file and, where there is one, the line or the columns
    for name, text in {"empty": "", "broken": json.dumps(GOOD) + "\n{'image': 3}\n", "list": "[1, 2]\n", "good": json.dumps(GOOD)}.items():
        (folder / f"{name}.jsonl").write_text(text)
    with pytest.raises(error) as caught:
        data.load(source.format(f=folder), kind)
    assert re.fullmatch(message, str(caught.value))


def same_record(a, b):
    assert np.array_equal(np.array(a["image"]), np.array(b["image"])) and a["image"].mode == b["image"].mode == "RGB"
    return all(a[k] == b[k] for k in ("question", "chosen", "rejected", "row"))


def test_every_format_gives_the_same_record(folder, pictures):
    # JSONL, a parquet folder with the columns of openbmb/RLAIF-V-Dataset, TRL's conversational rows of two kinds, relative to any folder
    datasets = pytest.importorskip("datasets")
    pairs = [PAIR, {**PAIR, "image": "b.png", "question": "where?", "chosen": "at left"}]
    jsonl = data.load(write(folder, *pairs), "pairs")

    hub = {"ds_name": ["RLAIF-V"] * 2, "image": pictures[:2], **{k: [row[k] for row in pairs] for k in ("question", "chosen", "rejected")},
           "origin_dataset": ["x"] * 2, "origin_split": ["{}"] * 2, "idx": [0, 1], "image_path": ["a.jpg"] * 2}
    (folder / "parquet").mkdir()
    datasets.Dataset.from_dict(hub).cast_column("image", datasets.Image()).to_parquet(folder / "parquet/RLAIF-V_000.parquet")
    parquet = data.load(str(folder / "parquet"), "pairs")

    def conversation(row, content):
        turn = lambda role, text: [{"role": role, "content": content(text)}]
        return {"images": [row["image"]], "prompt": turn("user", row["question"]), "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"])}

    def parts(text):
        return [{"type": "image", "text": None}, {"type": "text", "text": text}]

    conversations = [data.load(write(folder, *(conversation(row, content) for row in pairs), name=f"{content.__name__}.jsonl"), "pairs")
                     for content in (str, parts)]

    for rows in (parquet, *conversations):
        assert len(rows) == 2 and all(same_record(rows[i], jsonl[i]) for i in range(2))
    assert data.load(str(folder / "parquet"), "sft", n=1)[0]["answer"] == "a ring"  # chosen is the answer
    assert len(data.load(str(folder / "parquet"), "sft", n=1)) == 1


def test_a_broken_picture_in_parquet_is_a_bad_row(folder):
    # the same one line as for a file
    datasets = pytest.importorskip("datasets")
    image = [{"bytes": (folder / "a.png").read_bytes(), "path": None}, {"bytes": b"no picture", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    (folder / "parquet").mkdir()
    datasets.Dataset.from_dict({"image": image, "question": ["q"] * 2, "answer": ["a"] * 2}, features).to_parquet(folder / "parquet/0.parquet")
    rows = data.load(str(folder / "parquet"), "sft")
    assert rows[0]["answer"] == "a"
    with pytest.raises(data.BadRow, match=r"^\S+parquet row 1: its picture cannot be read: bytes \(.+\)$"):
        rows[1]


def test_the_drawn_world_survives_a_disk(tmp_path):
    # written as JSONL and PNG and read back by the same loader: pixel for pixel, word for word
    scenes.write_rows(list(Scenes("test", 5, "foreign")), str(tmp_path / "world"))
    drawn, read = data.load("scenes/test/foreign", "pairs", 5), data.load(str(tmp_path / "world/rows.jsonl"), "pairs")
    assert len(read) == 5 and all(same_record(drawn[i], read[i]) and tuple(drawn[i]["box"]) == tuple(read[i]["box"]) for i in range(5))


# ---- rows to batches ---------------------------------------------------------------------------------------------------------


PICTURES = {"a.png": [0, 2, 3, 6, 7, 8], "b.png": [1, 5], "c.png": [4]}  # nine rows: which are about which picture, in the order of the rows


def test_trees_group_the_rows_of_a_picture(folder, pictures):
    # JSONL by path, parquet by the picture's bytes, TRL's lists of pictures as JSONL and as parquet: the same groups, in the order of the rows
    datasets = pytest.importorskip("datasets")
    pictures[0].rotate(90).save(folder / "c.png")                                       # as large as a.png, and another picture
    names = [next(name for name, rows in PICTURES.items() if i in rows) for i in range(9)]
    texts = [{"question": f"q{i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(9)]
    turns = [{"prompt": [{"role": "user", "content": t["question"]}], **{k: [{"role": "assistant", "content": t[k]}] for k in ("chosen", "rejected")}}
             for t in texts]
    sources = [write(folder, *({"image": n, **t} for n, t in zip(names, texts)))]
    (folder / "trl.jsonl").write_text("".join(json.dumps({"images": [n], **t}) + "\n" for n, t in zip(names, turns)))
    sources.append(str(folder / "trl.jsonl"))
    images = [{"bytes": (folder / name).read_bytes(), "path": f"{i}.png"} for i, name in enumerate(names)]  # each row has its own path
    for column, feature, table in (("image", datasets.Image(), [{"image": image, **t} for image, t in zip(images, texts)]),
                                   ("images", [datasets.Image()], [{"images": [image], **t} for image, t in zip(images, turns)])):
        made = datasets.Dataset.from_list(table).cast_column(column, feature)
        (folder / column).mkdir()
        for part, numbers in enumerate((range(4), range(4, 9))):                        # two files, and two of the pictures are in both
            made.select(numbers).to_parquet(folder / column / f"{part}.parquet")
        sources.append(str(folder / column))
    for source in sources:
        rows = data.load(source, "pairs")
        assert rows[6]["question"] == "q6?" and np.array_equal(rows[4]["image"], Image.open(folder / "c.png"))
        for limit in (2, 3, 4, 100):
            assert list(rows.trees(limit)) == [group[i:i + limit] for group in PICTURES.values() for i in range(0, len(group), limit)]
        assert list(rows.trees(1)) == [[i] for i in range(9)]                                 # every row by itself, in order
        assert data.load(source, "pairs", n=5).trees(4)[:] == [[0, 2, 3], [1], [4]]
        assert data.load(source, "sft").trees(4)[:] == rows.trees(4)[:]                       # both arms, one order


def test_trees_decode_no_picture(folder):
    # a table of a million pictures is grouped by bytes: a row whose picture cannot be opened is grouped too, and named only when it is read
    datasets = pytest.importorskip("datasets")
    bad, good = {"bytes": b"no picture", "path": None}, {"bytes": (folder / "a.png").read_bytes(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    (folder / "parquet").mkdir()
    datasets.Dataset.from_dict({"image": [bad, good, bad, good, None], "question": ["q"] * 5, "answer": ["a"] * 5}, features).to_parquet(
        folder / "parquet/0.parquet")
    rows = data.load(str(folder / "parquet"), "sft")
    assert list(rows.trees(4)) == [[0, 2], [1, 3], [4]]
    gone, without = {**GOOD, "image": "gone.png"}, {"question": "?"}
    missing = data.load(write(folder, gone, GOOD, gone, without, without), "sft")
    assert missing.trees(4)[:] == [[0, 2], [1], [3], [4]]                                  # rows without a picture share none


def test_trees_of_the_drawn_world():
    # scenes/SPLIT/TASK/QUESTIONS: consecutive rows share a picture; without QUESTIONS each row has its own
    assert data.load("scenes/train/sft/4", "sft", 10).trees(4)[:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert data.load("scenes/train/sft/4", "sft", 10).trees(3)[:] == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]
    assert data.load("scenes/train/foreign/2", "pairs", 5).trees(4)[:] == [[0, 1], [2, 3], [4]]
    assert data.load("scenes/train/sft", "sft", 3).trees(4)[:] == data.load("scenes/train/sft/4", "sft", 3).trees(1)[:] == [[0], [1], [2]]


def test_order_covers_every_row_each_epoch():
    # a function of its arguments; every epoch is another shuffle of all rows, the remainder included
    rows = [[i] for i in range(11)]
    steps = data.order(rows, 4, 3, seed=5)[:]
    assert [len(step) for step in steps] == [4, 4, 3] * 3 and steps == data.order(rows, 4, 3, seed=5)[:]
    epochs = [sum(sum(steps[i:i + 3], []), []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert data.order(rows, 4, 1, seed=6)[0] != steps[0] and data.order(rows, 4, 1, seed=5)[:] == steps[:3]
    as_before = torch.randperm(11, generator=torch.Generator().manual_seed(5 * 1_000_003)).tolist()     # the rows of single pictures as ever
    assert epochs[0] == as_before


def test_cut_splits_what_is_larger_than_a_part():
    # a micro-batch smaller than a tree changes how a step is read, not which rows are in it; nothing can be asked for in parts of no row
    assert list(data.cut([[0, 1, 2, 3, 4], [5], [6, 7]], 2)) == [[[0, 1]], [[2, 3]], [[4], [5]], [[6, 7]]]
    for limit in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            data.load("scenes/train/sft/4", "sft", 8).trees(limit)


def test_order_and_cut_keep_trees_whole():
    # trees of one to four rows: each whole in one step and in one micro-batch, every row once an epoch, never more rows than were asked for,
    # and a step ends only where the next tree does not fit
    generator, numbers, trees = random.Random(0), iter(range(100_000)), []
    for _ in range(60):
        trees.append([next(numbers) for _ in range(generator.randint(1, 4))])
    for batch_size in (4, 7, 64):
        steps = data.order(trees, batch_size, 2, seed=1)[:]
        half = next(i for i in range(len(steps)) if sum(map(len, steps[:i + 1])) == len(trees)) + 1
        assert all(sorted(sum(epoch, [])) == trees for epoch in (steps[:half], steps[half:])) and steps[:half] != steps[half:]
        micro_batches = [(list(data.cut(step, micro)), micro) for step in steps for micro in (4, 6)]
        for parts, limit in [(steps[:half], batch_size), (steps[half:], batch_size), *micro_batches]:
            sizes = [sum(map(len, part)) for part in parts]
            assert 0 < min(sizes) and max(sizes) <= limit
            assert all(n + len(following[0]) > limit for n, following in zip(sizes, parts[1:]))
        assert all(sum(list(data.cut(step, 4)), []) == step for step in steps)                # in order, nothing lost
        assert steps == data.order([list(tree) for tree in trees], batch_size, 2, seed=1)[:] != data.order(trees, batch_size, 2, seed=2)[:]


def branches(batch):
    """[(prompt, response) of each response], read off the batch through its mask: what the last token of a response sees, and itself"""
    found, T = [], batch.input_ids.shape[1]
    for r in range(batch.n_responses):
        sources, response = batch.logit_at[batch.response_of == r].tolist(), batch.targets[batch.response_of == r].tolist()
        s, t = divmod(sources[-1] + 1 if len(response) > 1 else sources[-1], T)
        seen = batch.input_ids[s, batch.visible()[s, 0, t]].tolist()
        assert len(response) > 1 and seen[-len(response):] == response
        found.append((seen[:-len(response)], response))
    return found


def test_collator_pairs_share_a_picture(make):
    # responses 2i and 2i+1 are chosen and rejected of pair i, which batch.rows names: one picture, one prompt, their own words
    model = make()
    for source, trees in (("scenes/train/foreign", [[2], [0]]), ("scenes/train/foreign/3", [[3, 4, 5], [1], [0, 2]])):
        rows = data.load(source, "pairs", 6)
        batch, dropped = data.Collator(rows, model, ("chosen", "rejected"))(trees)
        assert dropped == [] and batch.n_responses == 2 * len(sum(trees, [])) and [row for row, _ in batch.rows] == sum(trees, [])
        assert batch.pixels.shape == (len(trees), 3, 24, 24) and torch.equal(batch.pixels, model.pixels([rows[tree[0]]["image"] for tree in trees]))
        expected = [(model.chat.prompt_ids(rows[i]["question"], 9, image), model.chat.response_ids(rows[i][field]))
                    for image, tree in enumerate(trees) for i in tree for field in ("chosen", "rejected")]
        assert branches(batch) == expected
        assert (batch.input_ids < 0).sum() == 9 * len(trees)                            # the picture is not repeated


def test_collator_drops_and_names(make, folder):
    # rows that cannot be used are left out with their reason, a too long one with both numbers; a batch of none is None
    model = make()
    rows = data.load(write(folder, PAIR, {**PAIR, "rejected": "long " * 50}, {**PAIR, "image": "none.png"}, {**PAIR, "image": "b.png"}), "pairs")
    longest = len(model.chat.prompt_ids("what?", 9)) + len(model.chat.response_ids("long " * 50))
    for limit, kept in ((longest, [0, 1, 3]), (longest - 1, [0, 3])):
        for trees in ([[0], [1], [2], [3]], [[0, 1], [2], [3]], [[1, 0], [2], [3]]):    # a row alone in its tree, the last of it, the first
            batch, dropped = data.Collator(rows, model, ("chosen", "rejected"), limit)(trees)
            names = [[row for row in tree if row in kept] for tree in trees]
            assert len(dropped) == 4 - len(kept) and batch.n_responses == 2 * len(kept) and [row for row, _ in batch.rows] == sum(names, [])
            assert torch.equal(batch.pixels, model.pixels([rows[tree[0]]["image"] for tree in names if tree]))
            assert -int(batch.input_ids.min()) == 9 * len(batch.pixels) and "row 2: its picture is missing" in dropped[-1]
            expected = [(model.chat.prompt_ids("what?", 9, image), model.chat.response_ids(rows[i][field]))
                        for image, tree in enumerate(tree for tree in names if tree) for i in tree for field in ("chosen", "rejected")]
            assert branches(batch) == expected
    assert dropped[0] == f"{rows.source} row 1: {longest} tokens, --max_length is {longest - 1}"
    assert data.Collator(rows, model, ("chosen", "rejected"), 5)([[0], [1]])[0] is None


def test_max_length_is_of_a_row_not_of_its_tree(make):
    # what is dropped does not depend on what a row is read together with
    model, rows = make(), data.load("scenes/train/foreign/4", "pairs", 4)
    longest = max(len(model.chat.prompt_ids(rows[i]["question"], 9)) + len(model.chat.response_ids(rows[i][field]))
                  for i in range(4) for field in ("chosen", "rejected"))
    batch, dropped = data.Collator(rows, model, ("chosen", "rejected"), longest)([[0, 1, 2, 3]])
    assert dropped == [] and batch.n_responses == 8 and batch.input_ids.shape[1] > longest
    alone = [data.Collator(rows, model, ("chosen", "rejected"), longest - 1)([[i]])[1] for i in range(4)]
    assert data.Collator(rows, model, ("chosen", "rejected"), longest - 1)([[0, 1, 2, 3]])[1] == sum(alone, []) != []


def test_workers_change_nothing(make):
    # micro-batches arrive step by step, in order, whoever decodes the pictures
    model = make()
    collator = data.Collator(data.load("scenes/train/sft", "sft", 9), model)
    steps = data.order([[i] for i in range(9)], 5, 1, 0)[:]
    alone, helped = (list(data.batches(collator, steps, 2, workers)) for workers in (0, 2))
    assert [len(step) for step in alone] == [3, 2]
    assert [b.n_responses for step in alone for b, _ in step] == [2, 2, 1, 2, 2]
    for step, other in zip(alone, helped, strict=True):
        for (a, _), (b, _) in zip(step, other, strict=True):
            assert a.rows == b.rows and a.n_responses == b.n_responses
            assert all(torch.equal(getattr(a, name), value) for name, value in vars(b).items() if torch.is_tensor(value))
    numbers = sum(sum(steps, []), [])
    assert [row for step in alone for b, _ in step for row, _ in b.rows] == numbers
    in_order = [branches(collator([[number]])[0])[0] for number in numbers]
    flat = [(prompt, response) for step in alone for b, _ in step for prompt, response in branches(b)]
    words = lambda found: [([i for i in prompt if i >= 0], response) for prompt, response in found]  # a picture's number is of its batch
    assert words(flat) == words(in_order)


def test_show_marks_what_bears_loss(make, folder):
    # one example as the loss sees it; a first row that cannot be used is said, not hidden
    model = make()
    rows = data.load(write(folder, PAIR, {**PAIR, "image": "none.png"}), "pairs")
    shown = data.show(model, data.Collator(rows, model, ("chosen", "rejected")))
    assert "<image x 9>\nwhat?<|im_end|>" in shown and "[[a ring<|im_end|>]]" in shown and "[[a cross<|im_end|>]]" in shown
    assert "cannot be used" in data.show(model, data.Collator(rows, model, ("chosen", "rejected")), 1)


def test_sft_drops_what_dpo_drops(make, tmp_path):
    # both arms read the very same rows: equal, empty or too long rejected answers are dropped by either
    Image.new("RGB", (24, 24)).save(tmp_path / "p.png")
    rows = [{"image": "p.png", "question": "q?", "chosen": "yes", "rejected": r} for r in ("no", "yes", "", "no " * 300, "nay", None)]
    rows[0]["answer_note"] = None  # a null in a field that nobody reads is nobody's business
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n\n")  # blank lines are no rows
    model = make()
    kept = []
    for kind, fields in (("sft", ("answer",)), ("pairs", ("chosen", "rejected"))):
        collator = data.Collator(data.load(str(tmp_path / "rows.jsonl"), kind), model, fields, max_length=100)
        for trees in ([[i] for i in range(6)], [list(range(6))]):                       # each row alone, and all in one tree
            batch, dropped = collator(trees)
            assert len(dropped) == 4 and [row for row, _ in batch.rows] == [0, 4] and len(batch.pixels) == min(2, len(trees))
        kept.append([i for i in range(6) if not collator([[i]])[1]])
    assert kept == [[0, 4], [0, 4]]


def test_sft_imitates_what_dpo_prefers(folder):
    # a pair that also has an answer: both arms read the chosen text, and drop the row for the same reasons
    both = {**PAIR, "answer": "the truth"}
    path = write(folder, both, {**both, "rejected": ""}, {**both, "chosen": None})
    for kind, field in (("sft", "answer"), ("pairs", "chosen")):
        rows = data.load(path, kind)
        assert rows[0][field] == "a ring" and len(rows) == 3
        with pytest.raises(data.BadRow, match="'rejected' is empty"):
            rows[1]
    assert rows.kind == "pairs" and data.load(path, "vqa")[0]["answer"] == "the truth"


def test_iterating_over_rows_stops_at_their_number(folder):
    talk = {"image": "a.png", "conversations": [{"from": who, "value": "x"} for who in ("human", "gpt") * 4]}
    rows = data.load(write(folder, talk, talk), "sft", n=5)
    assert len(rows) == len(list(rows)) == 5


def test_steps_ask_for_as_many_passes_as_they_need():
    rows = [[i] for i in range(10)]
    steps = data.order(rows, 4, epochs=1, seed=0, steps=8)[:]  # three steps a pass: the third pass stops after two
    assert len(steps) == 8 and steps[:3] == data.order(rows, 4, 1, 0)[:] and sorted(sum(sum(steps[3:6], []), [])) == list(range(10))
    trees = [[i, i + 1, i + 2] for i in range(0, 30, 3)]    # two trees of three in a step of eight: five steps a pass, not four
    steps = data.order(trees, 8, epochs=1, seed=0, steps=8)[:]
    assert len(steps) == 8 and steps[:5] == data.order(trees, 8, 1, 0)[:] and steps == data.order(trees, 8, 2, 0)[:8]
