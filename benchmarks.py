"""
Benchmarks: the rows of other people's test sets -> questions about one picture, and what is right.

`eval_vqa.py` has the table of them. Here is what its columns are made of: for each benchmark a function that turns a
row into a record (the exact prompt of a profile, the options, the gold answer), functions that read a model's answer by
the rules of `metrics.py`, and `Questions`, which opens a set, leaves out what is not one picture (and counts it), and
draws a random part.

    record      {"question": the prompt, "gold": the right answer, "options": {letter: text} or None,
                 "picture": the column that holds it}
    reading     (row, prediction, profile) -> how right it is in [0, 1], and what was understood (None: not a thing)

A row here is a dict of the hub's own columns; of a picture it only says how many there are.
"""
import ast
import hashlib
import os
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import metrics
from model import InputError, first_line
from rows import NOT_IN_FORM, BadRow, open_picture

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


class Skip(Exception):
    """A row that is no question about one picture; the message is the reason, the same for all rows of its kind."""


class Benchmark(NamedTuple):
    """A line of the table in eval_vqa.py"""
    title: str
    ids: list                           # "ORG/NAME" or "ORG/NAME:CONFIG", tried in order; a dict if profiles differ
    split: str
    columns: str                        # that a row must have, the picture apart
    record: Callable                    # (row, profile) -> record; raises Skip
    read: Callable                      # (row, prediction, profile) -> right, understood
    metric: str                         # the number of the table, in words
    tokens: int = 32                    # longest answer
    scale: int = 100                    # what the number 1 is shown as
    unit: Callable | None = None        # row -> what it counts together with; None: each row by itself
    rule: Callable | None = None        # (how right, rows) of a unit -> (part, whole); None: sum and number of rows
    stratum: Callable | None = None     # (row, profile) -> category: the number is their mean; None leaves a row out
    score: Callable | None = None       # (rows with `prediction`, profile) -> dict: all numbers of the official scorer
    configs: list | None = None         # the configs that together are the benchmark
    pictures: tuple | None = None       # (config that holds the pictures, column of the row, its column)
    same_picture: str | None = None     # column that is equal where pictures are; None: their files are compared


# ---- from a row to a record ------------------------------------------------------------------------------------------


def lettered(texts):
    """Texts -> {"A": text, "B": text, ...}"""
    return dict(zip(string.ascii_uppercase, texts))


def listed(options):
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def mmbench(row, profile):
    options, hint = metrics.mmbench_options(row), row["hint"] if metrics.is_there(row["hint"]) else ""
    if profile == "paper":
        text = f"{hint}\n" * bool(hint) + f"{row['question']} Options:\n{listed(options)}\n{LETTER}"
    else:
        text = f"{hint} {row['question']} There are several options:\n{listed(options)}".strip() + f"\n\n{LETTER}"
    return {"question": text, "gold": row["answer"], "options": options}


def mme(row, profile):
    """The question asks for yes or no itself; lmms-eval takes that out again"""
    text = row["question"].strip()
    if profile == "lmms":
        text = text.replace(" Please answer yes or no.", "")
    return {"question": f"{text}\n{SHORT}", "gold": row["answer"].strip().rstrip("."),
            "options": {"Yes": "yes", "No": "no"}}


def seed(row, profile):
    """SEED-Bench also has questions about videos, as lists of frames"""
    if row["image"] != 1:
        raise Skip("about a video")
    options = lettered(row[f"choice_{letter}"] for letter in "abcd")
    return {"question": f"{row['question']}{' Options:' * (profile == 'paper')}\n{listed(options)}\n{LETTER}",
            "gold": row["answer"], "options": options}


def gqa(row, profile):
    return {"question": f"{row['question'].strip()}\n{SHORT}", "gold": row["answer"], "options": None}


def pope(row, profile):
    return {**gqa(row, profile), "gold": row["answer"].lower().strip(), "options": {"Yes": "yes", "No": "no"}}


def vqav2(row, profile):
    """An answer is a dict here, with who gave it and how sure they were"""
    return {"question": f"{row['question'].strip()}\n{SHORT}", "options": None,
            "gold": [answer["answer"] for answer in row["answers"]]}


def scienceqa(row, profile):
    if not row["image"]:
        raise Skip("without a picture")
    options, hint = lettered(row["choices"]), row["hint"] if metrics.is_there(row["hint"]) else ""
    if profile == "paper":
        text = f"{hint} {row['question']}".strip() + f"\n{listed(options)}\n" \
               "Please answer directly with only the letter of the correct option and nothing else."
    else:
        text = f"Context: {hint}\n" * bool(hint) + f"{row['question']}\n{listed(options)}\n{LETTER}"
    return {"question": text, "gold": string.ascii_uppercase[row["answer"]], "options": options}


def mmmu(row, profile):
    """Options are a list as Python writes it. Cambrian finds them by a regular expression that apostrophes break."""
    options = lettered(ast.literal_eval(row["options"]))
    is_choice = row["question_type"] == "multiple-choice"
    gold = row["answer"]
    if not is_choice and gold.startswith("["):
        gold = ast.literal_eval(gold)
    if profile == "paper":  # whatever the number of pictures, it shows the first, and deletes all tags
        picture, text = "image_1", row["question"] + (f" Options:\n{listed(options)}\n{LETTER}" if is_choice else
                                                      f"\n{SHORT}")
        text = re.sub(r"<image \d+>", "", text)
    else:
        text = row["question"] + (f"\n{listed(options)}\n\n{LETTER}" if is_choice else f"\n\n{SHORT}")
        tags = sorted(set(re.findall(r"<image (\d+)>", text))) or ["1"]
        if len(tags) > 1:
            raise Skip("about several pictures")
        picture = f"image_{tags[0]}"
    return {"question": text, "gold": gold, "options": options if is_choice else None, "picture": picture}


def mathvista(row, profile):
    """Cambrian asks the set's own `query`, and for the reasoning first, but scores the whole output. lmms-eval makes a
    prompt of its own ("format-prompt")"""
    options = lettered(row["choices"]) if row["question_type"] == "multi_choice" else None
    if profile == "paper":
        text = row["query"] + ("\nFirst show your reasoning process and then give the final answer." if options else
                               f"\n{SHORT}")
    else:
        places = "one decimal place" if row["precision"] == 1 else "two decimal places"
        kind = {"integer": "single integer number", "float": f"single floating-point number with {places}",
                "list": "Python list"}.get(row["answer_type"])
        text = row["question"] + f" (Unit: {row['unit']})" * bool(row["unit"]) + \
            (f"\n{listed(options)}\n{LETTER}" if options else f"\nAnswer the question using a {kind}.")
    gold = next(letter for letter in options if options[letter] == row["answer"]) if options else row["answer"]
    return {"question": text, "gold": gold, "options": options, "picture": "decoded_image"}


def ai2d(row, profile):
    options = lettered(row["options"])
    return {"question": f"{row['question']}\n{listed(options)}\n{LETTER}", "options": options,
            "gold": string.ascii_uppercase[int(row["answer"])]}


def chartqa(row, profile):
    how = "Answer the question using a single number or phrase." if profile == "paper" else \
        "Answer the question with a single word."
    return {"question": f"{row['question']}\n{how}", "gold": row["answer"], "options": None}


def ocrbench(row, profile):
    text = row["question"].strip() + "\nGive the short answer directly." * (profile == "paper")
    return {"question": text, "gold": row["answer"], "options": None}


def textvqa(row, profile):
    """Cambrian shows the model what an OCR program has read, so that its numbers are higher than lmms-eval's"""
    text = row["question"].capitalize()
    if profile == "paper":
        text = f"{row['question']}\nReference OCR tokens: {', '.join(row['ocr_tokens'])}".rstrip()
    return {"question": f"{text}\n{SHORT}", "gold": row["answers"], "options": None}


def docvqa(row, profile):
    """The paper took lmms-eval for this one, as its test set wants a submission"""
    return {"question": f"{row['question']}\n{SHORT}", "gold": row["answers"], "options": None}


def mmvp(row, profile):
    options = metrics.mmvp_options(row)
    return {"question": f"{row['Question']}{' Options:' * (profile == 'paper')}\n{listed(options)}\n{LETTER}",
            "gold": row["Correct Answer"].strip("() ").upper(), "options": options}


def realworldqa(row, profile):
    """The question brings its options, and says how to answer"""
    options = dict(re.findall(r"^([A-Z])\. (.*)$", row["question"], re.MULTILINE))
    return {"question": row["question"].strip(), "gold": row["answer"],
            "options": options if row["answer"] in options else None}


def cvbench(row, profile):
    note = f"Note: You only need to respond with {', '.join(lettered(row['choices'][:5]))} without providing any " \
        "additional information.\n\n"
    return {"question": f"{row['prompt']}\n{LETTER}" if profile == "paper" else note + row["prompt"],
            "gold": row["answer"].strip("()"), "options": lettered(row["choices"])}


def hallusionbench(row, profile):
    return {"question": row["question"], "gold": "yes" if row["gt_answer"] == "1" else "no",
            "options": {"Yes": "yes", "No": "no"}}


def naturalbench(row, profile):
    is_yes_no, gold = row["Question_Type"] == "yes_no", metrics.naturalbench_gold(row)
    how = "Please answer Yes or No." if is_yes_no else \
        "Please output the letter corresponding to the correct option."
    names = ("No", "Yes") if is_yes_no else ("B", "A")
    return {"question": f"{row['Question']} {how}", "gold": names[gold], "picture": "Image",
            "options": {name: name.lower() for name in sorted(names, reverse=is_yes_no)}}


def blink(row, profile):
    """Cambrian shows only the first of several pictures, of which most questions cannot be answered"""
    if any(row[f"image_{n}"] for n in (2, 3, 4)):
        raise Skip("about several pictures")
    record = {**cvbench(row, profile), "picture": "image_1"}
    if profile == "paper":
        return {**record, "question": row["prompt"] + "\nPlease answer directly with only the letter of the correct "
                                                      "option and nothing else."}
    return {**record, "question": record["question"].replace("\n\n", "\n", 1)}  # its note ends with one line's end


def okvqa(row, profile):
    return {"question": f"{row['question'].strip()}\nWhen the provided information is insufficient, respond with "
                        f"'Unanswerable'.\n{SHORT}", "gold": row["answers"], "options": None}


# ---- reading answers -------------------------------------------------------------------------------------------------


def letter_by(rule):
    """The letter by Cambrian's rule, or by lmms-eval's for this task: (prediction, options) -> letter"""
    def read(row, prediction, profile):
        letter = (metrics.option_letter if profile == "paper" else rule)(prediction, row["options"])
        return float(letter == row["gold"]), letter
    return read


letters_of = lambda task: letter_by(lambda prediction, options: metrics.pattern_letter(prediction, options, task))
letters, read_mmbench = letter_by(metrics.mmmu_choice), letter_by(metrics.mmbench_letter)


def read_mme(row, prediction, profile):
    said = metrics.mme_yes_no(prediction, profile)
    return float(said == row["gold"].lower()), said


def read_pope(row, prediction, profile):
    said = metrics.pope_yes_no(prediction, profile)
    return float(said == row["gold"]), said


def read_scienceqa(row, prediction, profile):
    """Cambrian also takes the option's text"""
    if profile == "lmms":
        return letters_of("scienceqa")(row, prediction, profile)
    text = metrics.after_answer_is(prediction).rstrip(".")
    letter = text.split(".")[0].upper()
    same = [each for each, option in row["options"].items()
            if metrics.bare(text).strip() == metrics.bare(option).strip()]
    said = letter if letter in row["options"] else same[0] if same else None
    return float(row["gold"] in (letter, *same)), said


def read_mmmu(row, prediction, profile):
    if row["options"]:
        return letters(row, prediction, profile)
    if profile == "lmms":
        return float(metrics.mmmu_open(prediction, row["gold"])), prediction or None
    said, golds = metrics.after_answer_is(prediction).rstrip("."), row["gold"]
    golds = [golds] if isinstance(golds, str) else golds
    return float(any(said == gold.lower() or metrics.near(gold, said) for gold in golds)), said or None


def read_mathvista(row, prediction, profile):
    if profile == "lmms":
        said = metrics.mathvista_answer(prediction, row)
        return float(said == row["answer"]), said
    said, gold = prediction.lower().strip(), row["gold"].lower()
    if row["options"]:  # Cambrian meant this, but asks for another question_type than the data has, so that it never is
        said = said.split(".")[0]
    right = float(said == gold or metrics.near(gold, said))
    return right, said or None if not row["options"] or said.upper() in row["options"] else None


def read_mmvp(row, prediction, profile):
    right = metrics.mmvp_right({**row, "prediction": prediction}, profile)
    wrong = "B" if row["gold"] == "A" else "A"
    says_wrong = metrics.mmvp_right({**row, "prediction": prediction, "Correct Answer": f"({wrong})"}, profile)
    return float(right), row["gold"] if right else wrong if says_wrong else None


def read_realworldqa(row, prediction, profile):
    """The first word (Cambrian, which stops at an empty answer; wrong here); a letter or the whole (lmms-eval)"""
    if profile == "lmms" and row["gold"] in list("ABCD"):
        letter = metrics.pattern_letter(prediction, "ABCD", "realworldqa")
        return float(letter == row["gold"]), letter
    said = prediction.lower().strip().rstrip(".")
    if profile == "paper":
        said = (metrics.after_answer_is(prediction).rstrip(".").split() or [""])[0]
    right = float(said == row["gold"].lower())
    return right, said or None if not row["options"] or said.upper() in row["options"] else None


def read_naturalbench(row, prediction, profile):
    choice = metrics.naturalbench_choice(prediction, row["Question_Type"])
    return float(choice == metrics.naturalbench_gold(row)), None if choice < 0 else choice


def read_hallusionbench(row, prediction, profile):
    said = "yes" if "yes" in prediction.lower() else "no" if re.search(r"\bno\b", prediction.lower()) else None
    return float((said or "no") == row["gold"]), said  # what is neither counts as a no, and as not understood


def as_text(measure):
    """The reader of an answer that is compared as a text; measure: (prediction, gold, row, profile) -> how right"""
    return lambda row, prediction, profile: (float(measure(prediction, row["gold"], row, profile)), prediction or None)


read_gqa = as_text(lambda said, gold, row, profile: metrics.gqa_correct(said, gold) if profile == "lmms" else
                said.lower().rstrip(".") == gold.lower())
read_chartqa = as_text(lambda said, gold, row, profile: metrics.relaxed_accuracy(said, gold, profile))
read_ocrbench = as_text(lambda said, gold, row, profile: metrics.ocrbench_correct(said, gold, row["question_type"]))
read_docvqa = as_text(lambda said, gold, row, profile: metrics.anls(said, gold))
read_vqa = as_text(lambda said, gold, row, profile: metrics.vqa_accuracy(said, gold))


# ---- rows that count together ----------------------------------------------------------------------------------------
# A rule gives (part, whole) of a unit; the number is the sum of parts by the sum of wholes, and its mean over strata.
# With probabilities instead of 0 and 1 for `right` it gives what guessing is worth.


def all_right(right, rows):
    return float(np.prod(right)), 1


def mme_rule(right, rows):
    """Half of accuracy and accuracy+ together, of a picture: 2000 points are 1"""
    return (float(np.mean(right)) + float(np.prod(right))) / 2, 1


def f1_rule(right, rows):
    """2 TP / (2 TP + FP + FN). An answer that was not understood is neither FP nor FN, as in lmms-eval"""
    part = whole = 0.0
    for r, row in zip(right, rows):
        is_yes, answered = row["gold"] == "yes", row.get("understood", "") is not None
        part += 2 * r * is_yes
        whole += 2 * r * is_yes + (1 - r) * answered
    return part, whole


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_split(hub_id, config, split, copies=None):
    """Rows of one split of a data set: from the hub, or from COPIES/ORG/NAME if that is there.

    Only the files of this split are downloaded. Raises InputError with what to do."""
    from datasets import exceptions, load_dataset, load_dataset_builder
    path = os.path.join(copies, hub_id) if copies and os.path.isdir(os.path.join(copies, hub_id)) else hub_id
    try:
        builder = load_dataset_builder(path, config)
        files = builder.config.data_files
        if not files:  # a cached copy knows its splits only
            return load_dataset(path, config, split=split)
        if split not in files:
            raise ValueError(f"it has no split {split}, but {', '.join(map(str, files))}")
        return load_dataset(builder.name, data_files={split: list(files[split])}, split=split,
                            features=builder.info.features)
    except Exception as error:  # each failure of the hub has its own type
        why = error.__cause__ if isinstance(error, exceptions.DatasetGenerationError) else error
        reason = f"{path}: {first_line(why)}" + f" (and not in {copies})" * bool(copies and path == hub_id)
        if "scripts are no longer supported" in reason:
            reason += " (it still comes as a program, which datasets no longer runs: put parquet files of it into " \
                      f"DIR/{hub_id} and name DIR by --copies, or another copy into the table)"
        elif re.search(r"gated|\b40[13]\b", reason, re.IGNORECASE):
            reason += " (accept its terms on its page, then: hf auth login)"
        raise InputError(reason) from error


UNUSED = ("answers", "ocr_tokens", "hint", "query", "prompt")  # needed for a record, not for its score


class Questions:
    """The questions of a benchmark, pictures apart.

    `records` is a list of dicts: a row's columns, its record, "row" (its name), "unit", "shared" (the same for rows
    about the same picture). `skipped` counts reasons, `dropped` names rows that cannot be used. With `limit`, seeded
    random units of about so many rows."""

    def __init__(self, benchmark, profile, copies=None, limit=None, seed=0):
        self.benchmark, self.skipped, self.dropped = benchmark, Counter(), []
        self.open(benchmark.ids[profile] if isinstance(benchmark.ids, dict) else benchmark.ids, copies)
        self.read(profile)
        if limit and limit < len(self.records):
            self.records = draw(self.records, limit, seed)
        if not self.records:
            raise InputError(f"{self.source}: none of its rows can be used; {[*self.dropped, *self.skipped][0]}")
        picture = self.records[0]["picture"]
        if picture not in self.shown[0].column_names:
            raise InputError(f"{self.source} has no column {picture}; it has: {', '.join(self.shown[0].column_names)}")
        for record in tqdm(self.records, desc=f"{benchmark.title} pictures", delay=5):
            stored = str(record[benchmark.same_picture]) if benchmark.same_picture else \
                self.stored(record) or record["row"]
            record["shared"] = hashlib.blake2b(stored if isinstance(stored, bytes) else stored.encode(),
                                               digest_size=8).hexdigest()

    def open(self, ids, copies):
        """`parts`: the rows of each config; `shown`: where their pictures are"""
        benchmark, self.parts, reasons = self.benchmark, None, []
        for hub_id in ids:
            self.source, _, config = hub_id.partition(":")
            try:
                parts = [open_split(self.source, each, benchmark.split, copies)
                         for each in benchmark.configs or [config or None]]
                self.shown = parts if not benchmark.pictures else \
                    [open_split(self.source, benchmark.pictures[0], benchmark.split, copies)]
                self.parts = parts
                break
            except InputError as error:
                reasons.append(str(error))
        if not self.parts:
            raise InputError(f"{benchmark.title} cannot be opened: " + "; ".join(reasons) + ". If you have it on disk, "
                             "--copies DIR reads DIR/ORG/NAME, as hf download --local-dir leaves it")
        self.undecoded = [rows.with_format("arrow") for rows in self.shown]
        missing = [column for column in benchmark.columns.split(", ") if column not in self.parts[0].column_names]
        if missing:
            raise InputError(f"{self.source} has no column {', '.join(missing)}; "
                             f"it has: {', '.join(self.parts[0].column_names)}")

    def read(self, profile):
        """`records`, of all rows that are questions about one picture"""
        benchmark, self.records, broken = self.benchmark, [], {}
        where = benchmark.pictures and {key: i for i, key in enumerate(self.shown[0][benchmark.pictures[2]])}
        kept = [column for column in benchmark.columns.split(", ") if column not in UNUSED]
        for part, rows in enumerate(self.parts):
            for i, row in enumerate(self.texts(rows)):
                name, unit = f"{benchmark.configs[part]} {i}" if benchmark.configs else str(i), None
                try:
                    unit = str(benchmark.unit(row)) if benchmark.unit else name
                    record = {"picture": "image", **benchmark.record(row, profile)}
                    names = [letter.lower() for letter in record["options"] or ()]
                    if record["gold"] in (None, "", []) or names and str(record["gold"]).lower() not in names:
                        raise ValueError(f"its right answer {record['gold']!r} is none of its options")
                    if where and row[benchmark.pictures[1]] not in where:
                        raise ValueError(f"there is no picture {row[benchmark.pictures[1]]}")
                except Skip as reason:
                    self.skipped[str(reason)] += 1
                except (*NOT_IN_FORM, ValueError, SyntaxError, StopIteration) as error:
                    broken[unit] = f"{benchmark.title} row {name}"
                    self.dropped.append(f"{broken[unit]} cannot be used ({type(error).__name__}: {error})")
                else:
                    self.records.append({**{column: row[column] for column in kept}, **record, "row": name,
                                         "unit": unit, "place": (0, where[row[benchmark.pictures[1]]]) if where
                                         else (part, i),
                                         "stratum": benchmark.stratum(row, profile) if benchmark.stratum else ""})
        self.dropped += [f"{benchmark.title} row {record['row']} counts together with {broken[record['unit']]}"
                         for record in self.records if record["unit"] in broken]  # half a pair would count as a pair
        self.records = [record for record in self.records if record["unit"] not in broken]

    @staticmethod
    def texts(rows):
        """Rows as dicts, with a picture's column saying how many pictures there are; none is read or decoded"""
        import pyarrow.compute as compute
        from datasets import Image
        is_picture = lambda feature: isinstance(feature, Image) or \
            isinstance(feature, dict) and set(feature) == {"bytes", "path"}  # as it is stored
        pictures = [name for name, feature in rows.features.items() if is_picture(getattr(feature, "feature", feature))]
        for part in rows.with_format("arrow").iter(1000):
            columns = {name: part[name].to_pylist() for name in part.column_names if name not in pictures}
            for name in pictures:
                counts = compute.is_valid(part[name]) if is_picture(rows.features[name]) else \
                    compute.fill_null(compute.list_value_length(part[name]), 0)
                columns[name] = [int(n) for n in counts.to_pylist()]
            yield from (dict(zip(columns, values)) for values in zip(*columns.values()))

    def stored(self, record):
        """The file of a record's picture: its bytes, or where it is, or None"""
        part, i = record["place"]
        picture = self.undecoded[part][i][record["picture"]].to_pylist()[0]
        picture = picture[0] if isinstance(picture, list) and picture else picture
        return picture and (picture["bytes"] or picture["path"])

    def picture(self, record):
        """A record's picture, (W,H) RGB, upright; raises BadRow"""
        try:
            return open_picture(self.stored(record))
        except BadRow as error:
            raise BadRow(f"{self.benchmark.title} row {record['row']}: {error}") from None


def draw(records, limit, seed):
    """Whole units in a random order until they have `limit` rows, in the order of the records"""
    units = list(dict.fromkeys(record["unit"] for record in records))
    sizes, drawn, n = Counter(record["unit"] for record in records), set(), 0
    for i in np.random.default_rng(seed).permutation(len(units)):
        if n >= limit:
            break
        drawn.add(units[i])
        n += sizes[units[i]]
    return [record for record in records if record["unit"] in drawn]
