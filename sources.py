"""
Where rows come from: named data sets, hub ids, files; and how rows in other people's forms become records.

Two tables. NAMES gives the sets that the papers train on short names. FORMS knows a row's form by its columns, so that
a local copy or a fork of a set is read like the set itself:

    python train_dpo.py --data rlaif-v ...                                       a name
    python train_sft.py --data HuggingFaceM4/the_cauldron/ai2d ...               a hub id, here with a config
    python train_sft.py --data /data/the_cauldron/ai2d ...                       its parquet files on disk
    python train_sft.py --data llava-next[:20%] 'llava-onevision/ai2d(gpt4v)'    a part of one, and all of another

A conversation of several turns about one picture is read as several questions about it, each by itself.
"""
import copy
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from model import InputError, first_line

ONEVISION = """ai2d(gpt4v) ai2d(internvl) ai2d(cauldron,llava_format) allava_instruct_vflan4v allava_instruct_laion4v
    aokvqa(cauldron,llava_format) cambrian(filtered) chart2text(cauldron) chartqa(cauldron,llava_format) chrome_writting
    clevr(cauldron,llava_format)[:1%] CLEVR-Math(MathV360K) diagram_image_to_text(cauldron)
    dvqa(cauldron,llava_format)[:1%] FigureQA(MathV360K)[:5%] figureqa(cauldron,llava_format)[:1%] geo170k(align)
    geo170k(qa) geo3k Geometry3K(MathV360K) geomverse(cauldron) GeoQA+(MathV360K) GEOS(MathV360K)
    hateful_memes(cauldron,llava_format) hitab(cauldron,llava_format) hme100k[:10%] iam(cauldron)
    IconQA(MathV360K)[:5%] iconqa(cauldron,llava_format)[:5%] iiit5k image_textualization(filtered) infographic(gpt4v)
    infographic_vqa infographic_vqa_llava_format intergps(cauldron,llava_format) k12_printing[:1%] llavar_gpt4_20k
    lrv_chart lrv_normal(filtered) MapQA(MathV360K) mapqa(cauldron,llava_format) mathqa mavis_math_metagen
    mavis_math_rule_geo multihiertt(cauldron) orand_car_a PMC-VQA(MathV360K)[:5%] raven(cauldron)[:5%]
    rendered_text(cauldron) robut_sqa(cauldron) robut_wikisql(cauldron) robut_wtq(cauldron,llava_format)
    scienceqa(cauldron,llava_format) scienceqa(nona_context)[:5%] screen2words(cauldron) sharegpt4o sharegpt4v(coco)
    sharegpt4v(knowledge) sharegpt4v(llava) sharegpt4v(sam) sroie[:10%] st_vqa(cauldron,llava_format)
    Super-CLEVR(MathV360K) TabMWP(MathV360K) tabmwp(cauldron) tallyqa(cauldron,llava_format)[:10%] textcaps
    textocr(gpt4v) tqa(cauldron,llava_format)[:5%] UniGeo(MathV360K) vision_flan(filtered) vistext(cauldron)
    visual7w(cauldron,llava_format) visualmrc(cauldron) VisualWebInstruct(filtered)[:20%] VizWiz(MathV360K)
    vqarad(cauldron,llava_format) vsr(cauldron,llava_format) websight(cauldron)""".split()
# PIVOT's single_image.yaml, its percentages included. Not here: magpie_pro, which has no pictures, and ureader_*, which
# are archives (python data.py prepare llava-onevision/ureader_qa --out DIR)

NAMES = {  # name -> what it stands for
    "rlaif-v": ["openbmb/RLAIF-V-Dataset"],                              # 83k pairs
    "rlaif-v-h4": ["HuggingFaceH4/rlaif-v_formatted"],                   # the same, as conversations
    "rlaif-v-trl": ["trl-lib/rlaif-v"],
    "vlfeedback": ["davanstrien/VLFeedback"],                            # 80k rows of rated answers
    "vlfeedback-pairs": ["Zhihui/VLFeedback"],                           # pairs that LLaMA-Factory made of them
    "llava-recap": ["lmms-lab/LLaVA-ReCap-558K"],                        # LLaVA-Pretrain's pictures, longer captions
    "llava-next": ["lmms-lab/LLaVA-NeXT-Data"],                          # 779k conversations
    "llava-onevision": ["lmms-lab/LLaVA-OneVision-Data"],
    "cauldron": ["HuggingFaceM4/the_cauldron"],
    "finevision": ["HuggingFaceM4/FineVision"],
    "pivot-stage1": ["llava-next", *(f"llava-onevision/{config}" for config in ONEVISION)],  # PIVOT, appendix E.1
    "pivot-stage3": ["llava-next", *(f"llava-onevision/{config}" for config in              # its "Cambrian-737K"
                                     ("textocr(gpt4v)", "infographic_vqa", "infographic(gpt4v)"))],
}
ARCHIVES = {  # name -> hub id of what load_dataset reads wrongly or not at all; see prepare.py
    "mmpr-v1.2": "OpenGVLab/MMPR-v1.2", "llava-pretrain": "liuhaotian/LLaVA-Pretrain",
    "vlaa-thinking": "UCSC-VLAA/VLAA-Thinking", "llava-onevision/ureader_": "lmms-lab/LLaVA-OneVision-Data/ureader_"}
BY_CONFIG = ("llava-onevision", "cauldron", "finevision")  # NAME/CONFIG is one config, the name alone means all of them
NOT_READ = ("ureader_", "magpie_pro")                      # llava-onevision's archives and its rows without pictures


class BadRow(InputError):
    """A row that cannot be used; the message names it and says why."""


# ---- forms: other people's rows -> records ---------------------------------------------------------------------------


def dicts(value):
    """A list of dicts, which some data sets keep as a dict of lists -> a list of dicts"""
    return [dict(zip(value, each)) for each in zip(*value.values())] if isinstance(value, dict) else value


def only(pictures):
    """The picture of a list of exactly one; raises BadRow"""
    if len(pictures or ()) != 1:
        raise BadRow(f"has {len(pictures or ())} pictures, must have exactly one")
    return pictures[0]


def turn_text(turns):
    """The text of one turn in TRL's form: a string, or a list of turns whose content is a string or a list of parts"""
    if isinstance(turns, str):
        return turns
    turns = [turn for turn in turns if turn["role"] != "system"]
    if len(turns) != 1:
        raise BadRow(f"a conversation of {len(turns)} turns, must be one question and one answer")
    content = turns[0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def from_trl(row, _):
    """trl-lib/rlaif-v, HuggingFaceH4/rlaif-v_formatted: lists of turns"""
    return {"image": only(row["images"]), "question": turn_text(row["prompt"]), "chosen": turn_text(row["chosen"]),
            "rejected": turn_text(row["rejected"])}


def from_llama_factory(row, _):
    """Zhihui/VLFeedback, llamafactory/RLHF-V: one question and two last turns"""
    turns = dicts(row["conversations"])
    if len(turns) != 1:
        raise BadRow(f"a conversation of {len(turns)} turns, must be one question")
    return {"image": only(row["images"]), "question": turns[0]["value"], "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"]}


def from_ratings(row, _):
    """VLFeedback: several answers, each rated for helpfulness, faithfulness and ethics -> the best against the worst.
    An answer without three numbers for ratings is left out; of equal sums the first counts."""
    sums = []
    for completion in dicts(row["completions"]):
        ratings = [str((aspect or {}).get("Rating")) for aspect in (completion["annotations"] or {}).values()]
        if len(ratings) == 3 and all(re.fullmatch(r"\d+(\.\d+)?", rating) for rating in ratings):
            sums.append((sum(map(float, ratings)), completion["response"]))
    if len({total for total, _ in sums}) < 2:
        raise BadRow(f"none of its {len(sums)} rated answers is better than another")
    best, worst = (choose(sums, key=lambda pair: pair[0])[1] for choose in (max, min))
    return {"image": row["image"], "question": row["prompt"], "chosen": best, "rejected": worst}


def from_llava(row, k):
    """LLaVA-Pretrain, LLaVA-NeXT, LLaVA-OneVision: turns of "human" and "gpt" """
    turns = dicts(row["conversations"])[2 * k:2 * k + 2]
    if [turn["from"] for turn in turns] != ["human", "gpt"]:
        raise BadRow(f"turns {2 * k + 1} and {2 * k + 2} are of {[turn['from'] for turn in turns]}, "
                     "must be of human and gpt")
    return {"image": row["image"], "question": turns[0]["value"], "answer": turns[1]["value"]}


def from_cauldron(row, k):
    """The Cauldron, FineVision"""
    turn = dicts(row["texts"])[k]
    return {"image": only(row["images"]), "question": turn["user"], "answer": turn["assistant"]}


def from_vlaa(row, _):
    """VLAA-Thinking: the answer thinks aloud"""
    return {"image": row["image"], "question": row["question"], "answer": row["ds_answer"]}


def as_it_is(row, _):
    """A record already, with any further columns"""
    return dict(row)


class Form(NamedTuple):
    """How the rows of somebody's data set become records"""
    columns: set                        # that tell the form
    to_record: Callable                 # (row, number of the question) -> record; raises BadRow
    gives: set | None = None            # the record's fields; None: those of the row
    questions: str | None = None        # the column that lists several questions, where a row asks several
    items: int = 1                      # how many items of that list are one question and its answer

    def n_questions(self, row):
        """How many records a row is: at least one, and one for a rest that has no answer, so that it is counted"""
        return max(1, -(-len(dicts(row.get(self.questions)) or ()) // self.items))


PAIR, ANSWER = {"image", "question", "chosen", "rejected"}, {"image", "question", "answer"}
FORMS = [
    Form({"images", "conversations", "chosen", "rejected"}, from_llama_factory, PAIR),
    Form({"images", "prompt", "chosen", "rejected"}, from_trl, PAIR),
    Form({"image", "prompt", "completions"}, from_ratings, PAIR),
    Form({"image", "conversations"}, from_llava, ANSWER, "conversations", 2),
    Form({"images", "texts"}, from_cauldron, ANSWER, "texts", 1),
    Form({"image", "question", "ds_answer"}, from_vlaa, ANSWER),
    Form(set(), as_it_is),
]


def form_of(columns):
    """The first Form that has these columns"""
    return next(form for form in FORMS if form.columns <= set(columns))


# ---- opening ---------------------------------------------------------------------------------------------------------


class Lines:
    """The objects of a JSON Lines file, each parsed when it is asked for: a million rows are a million offsets."""

    def __init__(self, path, n=None):
        self.path, self.columns, offsets, contents = path, set(), [], hashlib.sha256()
        with open(path, "rb") as f:
            for number, line in enumerate(iter(f.readline, b""), 1):
                if n is not None and len(offsets) >= n:
                    break
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path} line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path} line {number} is not a record, but a {type(row).__name__}")
                self.columns.update(row)
                offsets.append(f.tell() - len(line))
                contents.update(line)
        self.offsets, self.identity = np.array(offsets, dtype=np.int64), contents.hexdigest()[:16]

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.path, "rb") as f:  # anew each time: processes must not share a position in the file
            return self._read(f, self.offsets[i])

    def __iter__(self):
        with open(self.path, "rb") as f:
            for offset in self.offsets:
                yield self._read(f, offset)

    def _read(self, f, offset):
        f.seek(offset)
        try:
            return json.loads(f.readline())
        except (ValueError, RecursionError):
            raise InputError(f"{self.path} was changed while it was in use; start again") from None

    def take(self, n):
        """The first `n` of them"""
        shorter = copy.copy(self)
        shorter.offsets, shorter.identity = self.offsets[:n], f"{self.identity} {n}"
        return shorter


def sliced(source):
    """NAME[:500] or NAME[:10%] -> NAME and the slice, which may be empty, or a slice of a slice: pivot-stage1[:1%]"""
    return re.fullmatch(r"(.*?)((?:\[:\d+%?\])*)", source).groups()


def expand(source):
    """A name -> the hub ids that it stands for; anything else -> itself. A slice goes to each part."""
    name, part = sliced(source)
    base, _, config = name.partition("/")
    if os.path.exists(name) or name.endswith(".jsonl"):
        return [source]
    for short, hub_id in ARCHIVES.items():
        for beginning in (short, hub_id):
            if name.startswith(beginning):
                raise InputError(f"--data {name} comes as archives, to be unpacked once: python data.py prepare "
                                 f"'{short}{name.removeprefix(beginning)}' --out DIR, then --data DIR/rows.jsonl")
    if base not in NAMES:
        return [source]
    if config and base not in BY_CONFIG:
        raise InputError(f"--data {source}: {base} has no configs; leave /{config} out")
    if config or base not in BY_CONFIG:
        meant = [f"{each}/{config}" if config else each for each in NAMES[base]]
        return [found + part for each in meant for found in ([each] if config else expand(each))]
    import datasets  # only where it is needed: the drawn world needs none of it
    try:
        configs = datasets.get_dataset_config_names(NAMES[base][0])
    except Exception as error:  # each failure of the hub has its own type
        raise InputError(f"--data {source}: the configs of {NAMES[base][0]} cannot be listed: "
                         f"{first_line(error)}") from error
    if left_out := [each for each in configs if base == "llava-onevision" and each.startswith(NOT_READ)]:
        print(f"left out    of {base}: {', '.join(left_out)} (archives, or without pictures)")
    return [f"{NAMES[base][0]}/{each}{part}" for each in configs if each not in left_out]


def parquet_files(path):
    """The parquet files of a folder, or the one that is named"""
    pattern = os.path.join(glob.escape(path), "**/*.parquet")
    return [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)


def open_rows(source, n=None, stream=False):
    """A .jsonl or .parquet file, a folder of parquet files, a hub id or a hub id with a config -> its rows, the first
    `n` of them or the slice that `source` names: Lines, datasets.Dataset or, with `stream`, IterableDataset.

    Raises InputError or FileNotFoundError, one line that begins with the source."""
    name, part = sliced(source)
    if name.endswith(".jsonl"):
        if not os.path.isfile(name):
            raise FileNotFoundError(f"--data {name}: no such file")
        rows = Lines(name, None if part else n)
    else:
        hub = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:/([^/]+))?", name)
        if name.endswith(".parquet") and os.path.isfile(name):
            where = dict(path="parquet", data_files=name)
        elif os.path.isdir(name):
            if not parquet_files(name):
                hint = os.path.join(name, "rows.jsonl")
                raise InputError(f"--data {name} holds no parquet files" +
                                 f"; did you mean {hint}?" * os.path.isfile(hint))
            where = dict(path="parquet", data_dir=name)
        elif hub:
            where = dict(zip(("path", "name"), hub.groups()))
        else:
            raise FileNotFoundError(f"--data {name}: neither scenes/..., a .jsonl file, a folder of parquet files, "
                                    f"one of {', '.join(NAMES)} nor a hub id")
        from datasets import SplitDict, SplitInfo, exceptions, load_dataset
        from pyarrow.parquet import ParquetFile
        try:
            rows = load_dataset(**where, split="train", streaming=stream)
        except Exception as error:  # each failure of the hub or of a file has its own type
            why = error.__cause__ if isinstance(error, exceptions.DatasetGenerationError) else error
            raise InputError(f"--data {name} cannot be loaded: {first_line(why)}") from error
        if stream and os.path.exists(name):  # parquet files say how many rows they have, and `length` reads it here
            n_rows = sum(ParquetFile(path).metadata.num_rows for path in parquet_files(name))
            rows.info.splits = SplitDict({"train": SplitInfo("train", num_examples=n_rows)})
        if stream and rows.features is None:
            raise InputError(f"--data {name} does not say which columns it has: it cannot be read with --stream")
    if part:
        size = length(rows, source) if "%" in part else math.inf
        for each in re.findall(r"\d+%?", part):
            size = math.ceil(size * int(each[:-1]) / 100) if "%" in each else min(size, int(each))
        n = min(n or math.inf, size)
    if n is None:
        return rows
    if hasattr(rows, "__len__"):
        return rows.take(min(n, len(rows)))
    rows = rows.take(n)
    for split in (rows.info.splits or {}).values():  # what `length` reads
        split.num_examples = min(n, split.num_examples)
    return rows


def length(rows, source):
    """How many rows there are; of a stream if its maker said so, else raises InputError"""
    if hasattr(rows, "__len__"):
        return len(rows)
    split = (rows.info.splits or {}).get(rows.split)
    if not split or not split.num_examples:
        raise InputError(f"how many rows {source} has is not known before its stream is read: give --weights, and "
                         "numbers of rows instead of percentages")
    return split.num_examples
