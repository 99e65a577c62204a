"""
Rows as records: any source as a sequence of them, several as a mixture, or a stream that never ends.

A row is what a source holds, a record what training reads (see data.py); most rows are one record, a conversation of
several turns is several. A picture is opened when its record is asked for, and not before.
"""
import contextlib
import hashlib
import io
import itertools
import os
import random
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from model import InputError, first_line
from scenes import WORLDS, Scenes
from sources import BadRow, Lines, expand, form_of, length, open_rows, sliced
from trees import cut

FIELDS = {"sft": ("image", "question", "answer"), "vqa": ("image", "question", "answer"),
          "score": ("image", "question", "answer"),  # as "vqa", and pairs are welcome
          "pairs": ("image", "question", "chosen", "rejected"), "captions": ("image", "caption")}
NOT_IN_FORM = (KeyError, IndexError, TypeError, AttributeError)  # raised by a row that is not what its columns say
STAND_INS = {"sft": ("chosen",), "score": ("chosen",),  # what will do for a kind's last field
             "captions": ("text", "answer", "chosen")}


class Nested(Sequence):
    """Lists of numbers, or lists of such lists, as one array and where each list starts: millions of rows cost bytes,
    not objects, and worker processes share them."""

    def __init__(self, values, starts):
        self.values, self.starts = values, starts  # an array or Nested; array of one more than there are lists
        self.n_pictures = len(self)                # of trees: how many pictures they are about

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[each] for each in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        found = self.values[self.starts[i]:self.starts[i + 1]]
        return found if isinstance(found, list) else found.tolist()


class Rows:
    """Any source of rows as a sequence of records. `kind` says which fields a record must have: "sft", "vqa", "score"
    (as "vqa"; a pair's chosen answer will do), "pairs" or "captions" (an answer will do; of several the first counts).

    For "sft" a preference row is welcome: its chosen text is the answer, so that both arms can read the very same rows.
    A row that asks several questions about its picture counts as many times."""

    def __init__(self, source, rows, kind, columns=None, folder=None, n=None):
        self.source, self.rows, self.kind, self.folder = source, rows, kind, folder
        self.is_hub, columns = hasattr(rows, "column_names"), columns or set().union(*rows)
        self.form, (*others, last) = form_of(columns), FIELDS[kind]
        given = self.form.gives or columns
        missing = [field for field in others if field not in given]
        missing += [last] * (not given & {last, *STAND_INS.get(kind, ())})
        if missing:
            raise InputError(f"{source} has no column {', '.join(map(repr, missing))}; "
                             f"it has: {', '.join(sorted(columns))}")
        self.first, self.opened, self.streamed = None, (None, None), not hasattr(rows, "__len__")
        self.undecoded = rows.with_format("arrow") if self.is_hub and not self.streamed else rows
        if not self.streamed:  # a stream counts as it goes
            if self.form.questions:  # first (rows + 1,): the number of each row's first record
                self.first = np.concatenate([[0], np.cumsum(np.fromiter(self._counts(), np.int64, len(rows)))])
            n_records = len(rows) if self.first is None else int(self.first[-1])
            self.n = min(n or n_records, n_records)

    def __len__(self):
        return self.n

    def _counts(self):
        """How many records each row is, as Form.n_questions; of hub rows without reading more than lengths"""
        if not self.is_hub:
            for row in self.rows:
                try:
                    yield self.form.n_questions(row)
                except NOT_IN_FORM:  # one record, which will be a bad row
                    yield 1
            return
        import pyarrow.compute
        import pyarrow.types
        for part in self.rows.select_columns([self.form.questions]).with_format("arrow").iter(10_000):
            lists = part[self.form.questions]
            if pyarrow.types.is_struct(lists.type) and lists.type.num_fields:  # a dict of lists, not a list of dicts
                lists = pyarrow.compute.struct_field(lists, [0])
            if not (pyarrow.types.is_list(lists.type) or pyarrow.types.is_large_list(lists.type)):
                yield from itertools.repeat(1, len(lists))                      # bad rows, when they are read
                continue
            lengths = pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy()
            yield from np.maximum(1, -(-lengths // self.form.items))

    def trees(self, limit):
        """Row numbers grouped by picture, at most `limit` a group, in the order of the rows"""
        if limit < 1:
            raise InputError("--questions_per_tree and --batch_size must be at least 1")
        numbers = np.arange(len(self))
        if limit == 1:
            trees = Nested(numbers, np.arange(len(self) + 1))
            trees.n_pictures = self.locate(len(self) - 1)[0] + 1
            return trees
        pictures = np.fromiter(self._pictures(), np.int64, len(self))
        _, first, group = np.unique(pictures, return_index=True, return_inverse=True)
        first = first[group.ravel()]                                    # the first row about the same picture
        numbers = np.argsort(first, kind="stable")
        new = np.flatnonzero(np.diff(first[numbers], prepend=-1))       # where the next picture begins
        place = np.arange(len(numbers)) - np.repeat(new, np.diff(new, append=len(numbers)))  # within its picture
        trees = Nested(numbers, np.append(np.flatnonzero(place % limit == 0), len(numbers)))
        trees.n_pictures = len(new)
        return trees

    def _pictures(self):
        """A number for each row, equal where rows share a picture; no picture is decoded"""
        short = lambda value: int.from_bytes(hashlib.blake2b(
            value if isinstance(value, bytes) else repr(value).encode(), digest_size=8).digest(), "big", signed=True)
        if isinstance(self.rows, Scenes):
            yield from (i // self.rows.questions for i in range(len(self)))
            return
        if self.first is not None:
            yield from np.repeat(np.arange(len(self.rows)), np.diff(self.first))[:self.n]
            return
        if self.is_hub:
            column = "image" if "image" in self.rows.column_names else "images"
            parts = self.rows.select_columns([column]).with_format("arrow").iter(1000)  # arrow: bytes, undecoded
            pictures = (picture for part in parts for picture in part[column].to_pylist())
        else:
            pictures = (row.get("image") or row.get("images") for row in self.rows)
        for i, picture in enumerate(itertools.islice(pictures, len(self))):
            picture = picture[0] if isinstance(picture, list) and picture else picture
            picture = (picture.get("bytes") or picture.get("path")) if isinstance(picture, dict) else picture
            yield short(picture or ("row", i))

    def identity(self):
        """A short name of what the rows are, for a key: another text in any row gives another name"""
        if isinstance(self.rows, Scenes):
            return f"{self.source} seed {self.rows.seed}"
        return f"{self.rows._fingerprint if self.is_hub else self.rows.identity} {len(self)}"

    def locate(self, i):
        """Record i -> row, which of its questions"""
        if self.first is None:
            return i, 0
        row = int(np.searchsorted(self.first, i, "right")) - 1
        return row, i - int(self.first[row])

    def raw(self, row):
        """A row as it is stored, its pictures undecoded"""
        return self.undecoded[row].to_pylist()[0] if self.is_hub else self.rows[row]

    def text(self, i):
        """Record i without its picture, and unchecked; {} if it cannot be made"""
        row, k = self.locate(i)
        try:
            row = self.raw(row)
            return form_of(row).to_record(row, k)
        except (BadRow, *NOT_IN_FORM):
            return {}

    def __getitem__(self, i):
        """-> the record with its picture opened; raises BadRow with the row's name and the reason"""
        if not 0 <= i < self.n:
            raise IndexError(i)
        row, k = self.locate(i)
        name = f"{self.source} row {row}" + f" question {k + 1}" * (self.first is not None)
        return {**self.check(name, self.raw(row), k), "row": i}

    def check(self, name, row, k=0):
        """A row as it is stored -> the record of its question k, with its picture opened; or BadRow, with its name"""
        try:
            try:
                record = form_of(row).to_record(row, k)  # JSONL rows may differ in form
            except NOT_IN_FORM as error:
                raise BadRow(f"is not in the form of its columns ({type(error).__name__}: {error})") from None
            fields = FIELDS[self.kind][1:]
            last = fields[-1]
            if self.kind == "sft" and record.get("chosen") is not None and "rejected" in record:
                record["answer"] = record["chosen"]  # a preference row, whatever else it has: what DPO reads SFT reads
                fields += ("rejected",)  # unread, but what DPO drops SFT drops too
            elif last not in record:
                stand_in = next((name for name in STAND_INS.get(self.kind, ()) if name in record), last)
                record[last] = record.get(stand_in)
            if self.kind == "captions" and isinstance(record[last], list):
                record[last] = next(iter(record[last]), "")
            for field in fields:
                if not isinstance(record.get(field), str):
                    found = "missing" if record.get(field) is None else \
                        f"of type {type(record[field]).__name__}, must be text"
                    raise BadRow(f"'{field}' is {found}")
                if not record[field].strip():
                    raise BadRow(f"'{field}' is empty")
                try:
                    record[field].encode()
                except UnicodeEncodeError:
                    raise BadRow(f"'{field}' holds half a character (a lone surrogate)") from None
                if "<image>" in record[field] and field != "question":
                    raise BadRow("a response contains the <image> tag")
            if "rejected" in fields and record[fields[1]].strip() == record["rejected"].strip():
                raise BadRow("chosen and rejected are the same text")
            record["image"] = self._open(record.get("image"))
        except BadRow as error:
            raise BadRow(f"{name}: {error}") from None
        return {**record, "name": name}

    def _open(self, image):
        """`open_picture`; the questions of a tree follow each other, and open their picture once"""
        if isinstance(image, dict):  # the hub's form: the bytes of a file, or its path
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, (str, bytes)) or image != self.opened[0]:
            self.opened = image, open_picture(image, self.folder)
        return self.opened[1]


FORMATS = "BMP GIF ICO JPEG JPEG2000 PNG PPM TIFF WEBP".split()  # for others (EPS) PIL would start a program


def open_picture(image, folder=None):
    """A PIL picture, or the bytes or the path of a file -> (W,H) RGB, upright; raises BadRow with the reason.

    Of an animation the first frame, of 16 bits the upper 8. What is cut off, no picture, or so large that it may be
    meant to fill the memory (PIL's limit, 89 million pixels) is refused."""
    if image is None:
        raise BadRow("it has no picture")
    if not isinstance(image, (str, bytes, Image.Image)):
        raise BadRow(f"'image' is a {type(image).__name__}, must be a path or a picture")
    path = os.path.join(folder or "", image) if isinstance(image, str) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if path and os.path.exists(path) and not os.path.isfile(path):      # a pipe would never end
                raise ValueError("it is no file")
            picture = image if isinstance(image, Image.Image) else \
                Image.open(path or io.BytesIO(image), formats=FORMATS)
        with contextlib.nullcontext() if picture is image else picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F"):
                raise ValueError(f"mode {picture.mode}: nobody says which of its numbers is white")
            if picture.mode.startswith("I;16"):                                 # PIL would make all above 255 white
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return picture.convert("RGB")
    except FileNotFoundError:
        raise BadRow(f"its picture is missing: {path}") from None
    except Exception as error:  # whatever PIL says of a broken file, the reader wants the file's name
        why = "it is not one" if isinstance(error, UnidentifiedImageError) else first_line(error)  # PIL: where it lies
        raise BadRow(f"its picture cannot be read: {path or 'bytes'} ({why})") from None


class Mixture:
    """Several sources as one: the records of each in turn"""

    def __init__(self, parts):
        self.parts, self.source = parts, " + ".join(part.source for part in parts)
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self):
        return int(self.starts[-1])

    def part_of(self, i):
        """Record i -> the source that it is from, its number there"""
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.parts[part], i - int(self.starts[part])

    def text(self, i):
        part, number = self.part_of(i)
        return part.text(number)

    def __getitem__(self, i):
        part, number = self.part_of(i)
        return {**part[number], "row": i}

    def trees(self, limit):
        """As Rows.trees; a tree holds rows of one source. For --weights it has `sizes` and `pictures`: how many trees
        and how many pictures are of each source"""
        parts, numbers, starts = [part.trees(limit) for part in self.parts], [], [[0]]
        for trees, first in zip(parts, self.starts):
            numbers.append(trees.values + first)
            starts.append(trees.starts[1:] + first)
        mixed = Nested(np.concatenate(numbers), np.concatenate(starts))
        mixed.sizes, mixed.pictures = [len(trees) for trees in parts], [trees.n_pictures for trees in parts]
        mixed.n_pictures = sum(mixed.pictures)
        return mixed

    def identity(self):
        return " ".join(part.identity() for part in self.parts)


def is_drawn(source):
    """Is it a name of the drawn world, as scenes/train/sft?"""
    return source.split("/")[0] in WORLDS and "/" in source


def load(source, kind, n=None, seed=0):
    """Opens `source` (see the top of data.py; a list of several: a Mixture) as Rows of `kind`; `n` limits how many
    records of each are used (the first ones).

    Raises ValueError or FileNotFoundError with one line that names the file and, where there is one,
    the line or column."""
    several = expand(source) if isinstance(source, str) else source
    if len(several) > 1:
        return Mixture([load(each, kind, n, seed) for each in several])
    if not isinstance(source, str):
        return load(source[0], kind, n, seed)
    source, folder = several[0], None
    if is_drawn(source) and not os.path.exists(source):
        world, *parts = source.split("/")
        if not (len(parts) == 2 or len(parts) == 3 and parts[2].isdecimal() and int(parts[2]) > 0):
            raise InputError(f"{source}: the drawn world is named scenes/SPLIT/TASK or scenes/SPLIT/TASK/QUESTIONS, "
                             "as in scenes/train/sft or scenes/train/sft/4")
        try:
            rows = Scenes(parts[0], n or 20_000, parts[1], seed, *map(int, parts[2:]), world=world)
        except ValueError as error:
            raise InputError(f"--data {source}: {error}") from None
        columns = set(rows[0])
    else:
        rows = open_rows(source, n)
        columns = rows.columns if isinstance(rows, Lines) else set(rows.column_names)
        folder = os.path.dirname(source) if isinstance(rows, Lines) else None
    if not len(rows):
        raise InputError(f"{source} has no rows")
    return Rows(source, rows, kind, columns, folder, n)


def check_weights(weights, n_sources):
    """Raises InputError unless there are as many positive --weights as sources, and several of both, or no weights"""
    if weights and (len(weights) != n_sources or n_sources == 1 or min(weights) <= 0):
        raise InputError(f"--weights: give a positive number for each of several sources; there are {n_sources}")


def shuffled(rows, size, generator):
    """The rows in another order, never more than `size` of them in memory. (The buffer of datasets is one arrow table,
    which breaks at 2 GB of pictures.)"""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        at = generator.randrange(size)
        buffer[at], row = row, buffer[at]
        yield row
    generator.shuffle(buffer)
    yield from buffer


class Stream:
    """--stream: the rows of hub sets and parquet files as they come, never all at once. It is both the rows and the
    steps of a stage; drawn worlds and JSONL files may be among the sources, as they are never in memory anyway.

    Shuffled in buffers of `buffer` rows in all, files in a seeded order; a source that ends begins again in another
    order. One process reads, so the order is the same whatever the number of workers; they decode the pictures."""

    def __init__(self, sources, kind, batch_size, n_steps, limit, buffer, seed, n=None, weights=None):
        self.batch_size, self.n_steps, self.limit, self.buffer, self.seed = batch_size, n_steps, limit, buffer, seed
        sources = [sources] if isinstance(sources, str) else sources
        self.source, self.parts, self.weights = " + ".join(sources), [], []
        check_weights(weights, len(sources))
        for number, several in enumerate(map(expand, sources)):
            parts = [self.open(each, kind, n) for each in several]
            sizes = [1.0] if len(parts) == 1 and (weights or len(sources) == 1) else \
                [length(part.rows, part.source) if part.streamed else len(part.trees(limit)) for part in parts]
            self.weights += [size * (weights[number] / sum(sizes) if weights else 1) for size in sizes]
            self.parts += parts

    def open(self, source, kind, n):
        """-> Rows, whose rows are a stream if they are of the hub or of parquet files"""
        if is_drawn(source) or sliced(source)[0].endswith(".jsonl"):
            return load(source, kind, n, self.seed)
        rows = open_rows(source, n, stream=True).decode(False)
        return Rows(source, rows, kind, set(rows.features))

    def identity(self):
        return f"stream of {self.source}, seed {self.seed}, buffer {self.buffer}"

    def __len__(self):
        return self.n_steps

    def __iter__(self):
        return itertools.islice(cut(self.trees(), self.batch_size), self.n_steps)

    def trees(self):
        """Without end: the questions about a picture, each as (source, number of the row, row, number of the question)
        """
        generator, readers = random.Random(self.seed), [self.read(part) for part in range(len(self.parts))]
        while True:
            yield from next(generator.choices(readers, self.weights)[0])

    def read(self, part):
        """Without end: the trees of a row of source number `part`; of rows that are not streamed, one tree at a time"""
        rows, epoch, number = self.parts[part], 0, -1
        buffer = max(1, round(self.buffer * self.weights[part] / sum(self.weights)))
        while True:
            seed = self.seed * 1_000_003 + epoch
            if not rows.streamed:
                trees, generator = rows.trees(self.limit), torch.Generator().manual_seed(seed)
                for i in torch.randperm(len(trees), generator=generator).numpy():
                    yield [[(part, number, None, 0) for number in trees[i]]]
            else:
                try:
                    files = rows.rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)  # their order only
                    for number, row in enumerate(shuffled(files, buffer, random.Random(seed))):
                        n = rows.form.n_questions(row)
                        yield [[(part, number, row, k) for k in range(at, min(at + self.limit, n))]
                               for at in range(0, n, self.limit)]
                except (OSError, ValueError) as error:
                    raise InputError(f"--data {rows.source}: the stream broke off after row {number}: "
                                     f"{first_line(error)}") from error
                if number < 0:
                    raise InputError(f"{rows.source} has no rows")
            epoch += 1

    def first(self):
        """An item to look at, which fills no buffer"""
        return 0, 0, next(iter(self.parts[0].rows)) if self.parts[0].streamed else None, 0

    def __getitem__(self, item):
        part, number, row, k = item
        rows = self.parts[part]
        return rows[number] if row is None else \
            {**rows.check(f"{rows.source} row {number} of the shuffled stream", row, k), "row": number}
