"""
Data: records -> chat text -> tensors.

A record is one question about one picture:

    {"image", "question", "answer"}                 to imitate (SFT) or to score (VQA)
    {"image", "question", "chosen", "rejected"}     a preference pair (the field names of MMPR and RLAIF-V)

with "category", "kind", "box", "mask" where known. `image` is a path relative to the JSONL file,
or a PIL picture. `--data` takes one of

    scenes/train/sft        the drawn world: scenes/SPLIT/TASK, see scenes.py
    scenes/train/sft/4      the same with four questions about each picture
    noisy/train/sft         the same world under heavy pixel noise
    my_rows.jsonl           one record a line, pictures beside it
    a folder of parquet files, or a hub id such as openbmb/RLAIF-V-Dataset, whose columns are those of a record

A row that cannot be used is never repaired: it is dropped and counted, and the first few are named.
"""
import hashlib
import json
import os

import torch
from PIL import Image
from torch.utils.data import DataLoader

from model import InputError, to_pixels
from scenes import WORLDS, Scenes
from trees import pack

FIELDS = {"sft": ("image", "question", "answer"), "vqa": ("image", "question", "answer"),
          "pairs": ("image", "question", "chosen", "rejected"), "captions": ("image", "caption")}
STAND_INS = {"sft": ("chosen",), "captions": ("text", "answer", "chosen")}  # what will do for a kind's last field


class BadRow(InputError):
    """A row that cannot be used; the message names it and says why."""


def _as_record(row):
    """TRL's conversational preference row (images, prompt, chosen, rejected as lists of turns) -> a record;
    others unchanged"""
    if "images" not in row or not isinstance(row.get("prompt"), list):
        return row
    def text(turns):
        content = turns[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    if len(row["images"]) != 1:
        raise BadRow(f"has {len(row['images'])} pictures, must have exactly one")
    return {"image": row["images"][0], "question": text(row["prompt"]),
            "chosen": text(row["chosen"]), "rejected": text(row["rejected"])}


class Rows:
    """Any source of records as a sequence. `kind` says which fields a record must have: "sft", "vqa", "pairs" or
    "captions" (an answer will do for one; of a list of captions the first is taken).

    For "sft" a preference row is welcome: its chosen text is the answer,
    so that both arms can read the very same rows."""

    def __init__(self, source, rows, kind, folder=None):
        self.source, self.rows, self.kind, self.folder = source, rows, kind, folder

    def __len__(self):
        return len(self.rows)

    def trees(self, limit):
        """Row numbers grouped by picture, at most `limit` a group, in the order of the rows"""
        if limit < 1:
            raise InputError("--questions_per_tree and --batch_size must be at least 1")
        if limit == 1:
            return [[i] for i in range(len(self))]
        groups = {}
        for i, picture in enumerate(self._pictures()):
            groups.setdefault(picture, []).append(i)
        return [group[at:at + limit] for group in groups.values() for at in range(0, len(group), limit)]

    def _pictures(self):
        """A key for each row, equal where rows share a picture; no picture is decoded"""
        if isinstance(self.rows, Scenes):
            yield from (i // self.rows.questions for i in range(len(self)))
        elif isinstance(self.rows, list):
            for i, row in enumerate(self.rows):
                image = row.get("image") or row.get("images")
                yield repr(image) if image else i
        else:
            column = "image" if "image" in self.rows.column_names else "images"
            for part in self.rows.select_columns([column]).with_format("arrow").iter(1000):  # arrow: bytes, undecoded
                for image in part[column].to_pylist():
                    image = image[0] if isinstance(image, list) and image else image
                    value = (image["bytes"] or image["path"]) if isinstance(image, dict) else image
                    yield hashlib.blake2b(value if isinstance(value, bytes) else repr(value).encode()).digest()

    def identity(self):
        """A short name of what the rows are, for a key: another text in any row gives another name"""
        if isinstance(self.rows, Scenes):
            return f"{self.source} seed {self.rows.seed}"
        if isinstance(self.rows, list):
            return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]
        return self.rows._fingerprint

    def __getitem__(self, i):
        """-> the record with its picture opened; raises BadRow with the row's name and the reason"""
        name = f"{self.source} row {i}"
        try:
            try:
                row = self.rows[i]
            except (OSError, ValueError) as error:  # a hub row whose picture does not decode
                raise BadRow(f"cannot be read ({error})") from None
            record = dict(_as_record(row))
            fields = FIELDS[self.kind][1:]
            last = fields[-1]
            if last not in record:
                stand_in = next((name for name in STAND_INS.get(self.kind, ()) if name in record), last)
                record[last] = record.get(stand_in)
                if self.kind == "sft" and "rejected" in record:
                    fields += ("rejected",)  # unread, but what DPO drops SFT drops too
            if self.kind == "captions" and isinstance(record[last], list):
                record[last] = next(iter(record[last]), "")
            for field in fields:
                if not isinstance(record.get(field), str):
                    found = "missing" if record.get(field) is None else \
                        f"of type {type(record[field]).__name__}, must be text"
                    raise BadRow(f"'{field}' is {found}")
                if not record[field].strip():
                    raise BadRow(f"'{field}' is empty")
                if "<image>" in record[field] and field != "question":
                    raise BadRow("a response contains the <image> tag")
            if "rejected" in fields and record[fields[1]].strip() == record["rejected"].strip():
                raise BadRow("chosen and rejected are the same text")
            record["image"] = self._open(record.get("image"))
        except BadRow as error:
            raise BadRow(f"{name}: {error}") from None
        return {**record, "row": i}

    def _open(self, image):
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if not isinstance(image, str):
            raise BadRow(f"'image' is a {type(image).__name__}, must be a path or a picture")
        path = os.path.join(self.folder or "", image)
        try:
            with Image.open(path) as opened:
                return opened.convert("RGB")
        except FileNotFoundError:
            raise BadRow(f"there is no picture {path}") from None
        except Exception as error:  # whatever PIL says of a broken file, the reader wants the file's name
            raise BadRow(f"picture {path} cannot be read ({error})") from None


def is_drawn(source):
    """Is it a name of the drawn world, as scenes/train/sft?"""
    return source.split("/")[0] in WORLDS and "/" in source


def load(source, kind, n=None, seed=0):
    """Opens `source` (see the top of this file) as Rows of `kind`; `n` limits how many rows are used (the first ones).

    Raises ValueError or FileNotFoundError with one line that names the file and, where there is one,
    the line or column."""
    if is_drawn(source) and not os.path.exists(source):
        world, *parts = source.split("/")
        if not (len(parts) == 2 or len(parts) == 3 and parts[2].isdecimal() and int(parts[2]) > 0):
            raise InputError(f"{source}: the drawn world is named scenes/SPLIT/TASK or scenes/SPLIT/TASK/QUESTIONS, "
                             "as in scenes/train/sft or scenes/train/sft/4")
        try:
            rows, folder = Scenes(parts[0], n or 20_000, parts[1], seed, *map(int, parts[2:]), world=world), None
        except ValueError as error:
            raise InputError(f"--data {source}: {error}") from None
        columns = set(rows[0])
    elif source.endswith(".jsonl"):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"--data {source}: no such file")
        rows, folder = [], os.path.dirname(source)
        with open(source, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{source} line {number} is not JSON: {error}") from None
                if not isinstance(rows[-1], dict):
                    raise InputError(f"{source} line {number} is not a record, but a {type(rows[-1]).__name__}")
        columns = set().union(*rows)
    else:
        from datasets import load_dataset  # only here: the drawn world needs none of it
        local = os.path.isdir(source)
        if not local and (source.count("/") != 1 or source.startswith((".", "/"))):
            raise FileNotFoundError(f"--data {source}: neither scenes/..., a .jsonl file, "
                                    "a folder of parquet files nor a hub id")
        try:
            rows = load_dataset("parquet", data_dir=source, split="train") if local else \
                load_dataset(source, split="train")
        except Exception as error:  # each failure of the hub or of a file has its own type
            raise InputError(f"--data {source} cannot be loaded: {str(error).splitlines()[0]}") from error
        folder, columns = None, set(rows.column_names)
    if n is not None and not isinstance(rows, Scenes):
        rows = rows.select(range(min(n, len(rows)))) if hasattr(rows, "select") else rows[:n]
    if not len(rows):
        raise InputError(f"{source} has no rows")
    *others, last = FIELDS[kind]
    missing = [f for f in others if f not in columns] + [last] * (not columns & {last, *STAND_INS.get(kind, ())})
    if missing and not {"images", "prompt"} <= columns:
        raise InputError(f"{source} has no column {', '.join(map(repr, missing))}; "
                         f"it has: {', '.join(sorted(columns))}")
    return Rows(source, rows, kind, folder)


class Collator:
    """A list of trees (lists of row numbers that share a picture) -> (Batch, dropped),
    in which `dropped` lists the reasons of the rows that were left out.

    A record has one response for each of `responses` (field names), in that order.
    For pairs that is chosen, rejected: responses 2i and 2i+1 of the batch are pair i, which `batch.rows[i]` names."""

    def __init__(self, rows, model, responses=("answer",), max_length=2048):
        self.rows, self.responses, self.max_length = rows, responses, max_length
        # not the model: workers get a copy of this
        self.chat, self.n_image, self.image_processor = model.chat, model.n_image, model.image_processor

    def __call__(self, trees):
        images, packed, numbers, dropped = [], [], [], []
        n_trunk = len(self.chat.trunk_ids(self.n_image))
        for tree in trees:
            questions = []
            for number in tree:
                try:
                    record = self.rows[number]
                    question = self.chat.question_ids(record["question"])
                    answers = [self.chat.response_ids(record[field]) for field in self.responses]
                    # SFT drops what DPO has to drop
                    rejected = record.get("rejected") if "answer" in self.responses else None
                    unused = self.chat.response_ids(rejected) if isinstance(rejected, str) else []
                    longest = n_trunk + len(question) + max(map(len, [*answers, unused]))
                    if longest > self.max_length:  # cutting would take the end of the answer, or worse, image tokens
                        raise BadRow(f"{self.rows.source} row {number}: {longest} tokens, "
                                     f"--max_length is {self.max_length}")
                except BadRow as error:
                    dropped.append(str(error))
                    continue
                questions.append((question, answers))
                numbers.append((number, len(images)))
                image = record["image"]
            if questions:
                packed.append(questions)
                images.append(image)
        if not images:
            return None, dropped
        pixels = to_pixels(self.image_processor, images)
        trunks = [self.chat.trunk_ids(self.n_image, i) for i in range(len(images))]
        batch = pack(trunks, packed, pixels, self.chat.pad_id)
        seen = [hashlib.blake2b(repr(trunks[0]).encode() + p.numpy().tobytes(), digest_size=8) for p in pixels]
        for (number, i), question in zip(numbers, (q for questions in packed for q in questions)):
            fingerprint = seen[i].copy()
            fingerprint.update(repr(question).encode())
            batch.rows += (number, int.from_bytes(fingerprint.digest(), "big", signed=True)),
        return batch, dropped


def cut(trees, size):
    """Consecutive trees in lists of at most `size` rows; a larger tree is split"""
    parts, n = [], size
    for tree in (tree[at:at + size] for tree in trees for at in range(0, len(tree), size)):
        if n + len(tree) > size:
            parts.append([])
            n = 0
        parts[-1].append(tree)
        n += len(tree)
    return parts


def order(trees, batch_size, epochs, seed, steps=None):
    """The trees of every step: `epochs` seeded shuffles of `trees` cut into steps of at most `batch_size` rows, the
    remainder of an epoch included; or, if `steps` is given, as many shuffles as that many steps take.

    A function of its arguments alone, so two arms with the same seed read the same rows in the same order."""
    batches, epoch = [], 0
    while (epoch < epochs) if steps is None else (len(batches) < steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        batches += cut([trees[i] for i in torch.randperm(len(trees), generator=generator).tolist()], batch_size)
        epoch += 1
    return batches[:steps]


def batches(collator, steps, micro_batch, workers=0):
    """Yields for each step the list of its micro-batches [(Batch, dropped), ...] of at most `micro_batch` rows;
    pictures are decoded by `workers` processes, ahead of the step that needs them"""
    micro = [cut(step, micro_batch) for step in steps]
    ahead = -(-max(map(len, micro)) // workers) + 1 if workers else None       # micro-batches a worker: a step and more
    loader = iter(DataLoader([part for parts in micro for part in parts], batch_size=None, collate_fn=collator,
                             num_workers=workers, prefetch_factor=ahead, pin_memory=torch.cuda.is_available()))
    for parts in micro:
        yield [next(loader) for _ in parts]


def texts(source, n=2000):
    """Text for a tiny tokenizer: the first rows of `source`,
    and of the drawn world its foreign style too (a real LLM knows its words)"""
    sources = [source, "scenes/train/foreign", "scenes/train/plain"] if is_drawn(source) else [source]
    for each in sources:
        rows = load(each, "pairs" if each.endswith(("foreign", "plain")) else "sft", n).rows
        for i in range(min(n, len(rows))):
            row = rows[i]
            fields = ("question", "answer", "chosen", "rejected")
            yield from (row[field] for field in fields if isinstance(row.get(field), str))
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 2  # the chat template's own words


def show(model, collator, number=0):
    """One example as the loss sees it: the text, with the tokens that bear loss in [[ ]]
    and the picture as <image x N>"""
    batch, dropped = collator([[number]])
    if batch is None:
        return f"the first row cannot be used: {dropped[0]}"
    prompt, decode = batch.input_ids[0, :batch.sources[0] + 1].tolist(), model.tokenizer.decode
    first = next(i for i, token in enumerate(prompt) if token < 0)
    before, after = decode(prompt[:first]), decode(prompt[first + model.n_image:])
    responses = [decode(batch.targets[batch.response_of == r]) for r in range(batch.n_responses)]
    return "\n".join(f"{before}<image x {model.n_image}>{after}[[{response}]]" for response in responses)
