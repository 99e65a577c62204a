"""
Strangers' files: pictures, rows and run directories that are broken, odd or mean. Each is read as what it says, or refused in one line that
can be printed and that names the file; nothing that a file brings along is run, nothing hangs.
"""
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import zlib

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(os.environ["HF_HOME"], "hypothesis"))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

import data
import rows as rows_file
import train_dpo
from model import InputError, MLLM

FUZZ = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
ROOM = 3 * 2**29  # bytes that a call may take, more than the process has already


class Late(BaseException):
    """It hangs; no Exception, so that no `except Exception` takes it for an answer"""


def outcome(call, seconds=10):
    """-> (what `call` returns, None) or (None, the message of its InputError or OSError), which is one line, to be printed anywhere.
    Another exception, an hour or gigabytes are an error of this test."""
    def late(*_):
        raise Late(f"not done after {seconds} s")
    before, limits = signal.signal(signal.SIGALRM, late), None
    if sys.platform == "linux":
        import resource
        with open("/proc/self/statm") as f:
            taken = int(f.read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call(), None
    except (InputError, OSError) as error:
        message = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    assert message.splitlines() == [message] and message.encode()
    assert not re.search("allocate memory|MemoryError", message), f"asked for gigabytes: {message}"
    return None, message


# ---- pictures ------------------------------------------------------------------------------------------------------------

DRAWN = np.zeros((32, 48, 3), np.uint8)  # four flat quarters: any way of saving keeps them, and no turn leaves them in their places
DRAWN[:16, :24], DRAWN[:16, 24:], DRAWN[16:, :24], DRAWN[16:, 24:] = (200, 40, 40), (40, 180, 60), (30, 60, 210), (220, 210, 50)
DRAWING = Image.fromarray(DRAWN)
GREY = np.array(DRAWING.convert("L"))
DEEP = (np.arange(32 * 48).reshape(32, 48) * 42).astype(np.uint16)  # 16 bits
PALETTE, ALPHA, CMYK = DRAWING.quantize(4), Image.fromarray(np.dstack([DRAWN, GREY])), DRAWING.convert("CMYK")


def file_of(picture, format="PNG", turned=None, **how):
    """The bytes of a file; `turned`: what its EXIF says"""
    exif = Image.Exif()
    exif.update({274: turned} if turned else {})
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file := io.BytesIO(), format, **{**({"exif": exif} if turned else {}), **({"quality": 95} if format == "JPEG" else {}), **how})
    return file.getvalue()


def png(width, height, depth, color, raw, *more):
    """A PNG by hand, with whatever size in its header"""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), *more, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks)


ANIMATED = dict(save_all=True, append_images=[Image.fromarray(255 - DRAWN)], duration=100)
WIDE = png(48, 32, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in DRAWN.reshape(32,
    -1).astype(int) * 256 + 77))  # 16 bits each of RGB
READ = {  # name -> (file, what it must be: (H,W) or (H,W,3))
    "PNG": (file_of(DRAWN), DRAWN), "BMP": (file_of(DRAWN, "BMP"), DRAWN), "WebP": (file_of(DRAWN, "WEBP", lossless=True), DRAWN),
    "JPEG": (file_of(DRAWN, "JPEG"), DRAWN), "progressive JPEG": (file_of(DRAWN, "JPEG", progressive=True), DRAWN),
    "CMYK JPEG": (file_of(CMYK, "JPEG"), DRAWN), "grey JPEG": (file_of(GREY, "JPEG"), GREY), "CMYK TIFF": (file_of(CMYK, "TIFF"), DRAWN),
    "palette": (file_of(PALETTE), DRAWN), "palette, one colour transparent": (file_of(PALETTE, transparency=0), DRAWN),
    "palette, an alpha each": (file_of(PALETTE, transparency=b"\0\x40\x80\xff"), DRAWN), "GIF": (file_of(PALETTE, "GIF"), DRAWN),
    "RGBA": (file_of(ALPHA), DRAWN), "LA": (file_of(ALPHA.convert("LA")), GREY), "1 bit": (file_of(Image.fromarray(GREY > 100)), (GREY > 100) * 255),
    "16 bit grey": (file_of(DEEP), DEEP // 256), "16 bit grey TIFF": (file_of(DEEP, "TIFF"), DEEP // 256), "16 bit RGB": (WIDE, DRAWN),
    "animated GIF": (file_of(PALETTE, "GIF", **ANIMATED), DRAWN), "animated WebP": (file_of(DRAWN, "WEBP", lossless=True, **ANIMATED), DRAWN),
    "APNG": (file_of(DRAWN, **ANIMATED), DRAWN), "JPEG, EXIF without a meaning": (file_of(DRAWN, "JPEG", 99), DRAWN),
    "JPEG, broken EXIF": (file_of(DRAWN, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish"), DRAWN),
    "JPEG, upside down": (file_of(DRAWN[::-1, ::-1], "JPEG", 3), DRAWN), "JPEG, mirrored": (file_of(DRAWN[:, ::-1], "JPEG", 2), DRAWN),
    "JPEG, on its left side": (file_of(np.rot90(DRAWN), "JPEG", 6), DRAWN), "PNG, on its right side": (file_of(np.rot90(DRAWN, -1), "PNG", 8), DRAWN),
}
NOT_ONE, EPS = r"\(it is not one\)", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\n0 0 moveto\nshowpage\n%%EOF\n"
REFUSED = {  # name -> (file, why)
    "declares 20000x20000": (png(20000, 20000, 8, 2, b""), "bomb"), "100 million pixels": (png(10000, 10000, 1, 0, b""), "bomb"),
    "ICO that holds 100 million": (b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 99, 22) + png(10000, 10000, 1, 0, b""), ""),
    "a comment of 200 MB": (png(4, 4, 8, 0, b"\0aaaa" * 4, (b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))), "too large"),
    "no pixels": (png(0, 0, 8, 2, b""), NOT_ONE), "no columns": (png(0, 5, 8, 2, b"\0" * 5), NOT_ONE),
    "GIF of no pixels": (b"GIF89a" + bytes(7) + b";", ""),
    **{f"{format} cut by {n}": (file_of(DRAWN, format)[:-n], "") for format,
        n in (("PNG", 40), ("PNG", 100), ("JPEG", 60), ("JPEG", 700), ("GIF", 30),
                                                                                   ("WEBP", 9), ("BMP", 9), ("TIFF", 9))},
    "32 bit TIFF": (file_of(np.ones((4, 4), np.int32), "TIFF"), "mode I: nobody"),
    "float TIFF": (file_of(np.ones((4, 4), np.float32), "TIFF"), "mode F: nobody"),
    "text": (b"this is no picture", NOT_ONE), "empty": (b"", NOT_ONE), "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NOT_ONE),
    "PDF": (b"%PDF-1.4\n1 0 obj<<>>endobj\n", NOT_ONE), "EPS": (EPS, ""),
}
GOOD = {"image": "a.png", "question": "what?", "answer": "a ring"}
PAIR = {"image": "a.png", "question": "what?", "chosen": "a ring", "rejected": "a cross"}


@pytest.fixture
def folder(tmp_path):
    DRAWING.save(tmp_path / "a.png")
    return tmp_path


def write(folder, *rows):
    """A JSONL file of rows, each an object or its very bytes -> its path"""
    (folder / "rows.jsonl").write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(folder / "rows.jsonl")


def refused(rows, i, why):
    """Record i is a BadRow that says its file, its row and why"""
    message = outcome(lambda: pytest.raises(data.BadRow, rows.__getitem__, i) and rows[i])[1]
    assert re.match(re.escape(rows.source) + rf" row {rows.locate(i)[0]}( question \d+)?: .*({why})", message), message


@pytest.mark.parametrize("name", READ)
def test_a_picture_is_what_was_drawn(name, folder):
    # whatever the format: upright, in RGB, of an animation the first frame, of 16 bits the upper 8; from a file and from its bytes
    file, drawn = READ[name]
    (folder / "x").write_bytes(file)
    for picture in (data.load(write(folder, {**GOOD, "image": "x"}), "sft")[0]["image"], rows_file.open_picture(file)):
        assert picture.mode == "RGB" and picture.size == (48, 32)
        off = np.abs(np.array(picture, int) - (drawn if drawn.ndim == 3 else drawn[..., None]))
        assert np.median(off) <= 3 and off.mean() < 6 if "JPEG" in name else not off.any()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_named(name, folder):
    # its row, its file, why, and the rows around it are read
    file, why = REFUSED[name]
    (folder / "x.png").write_bytes(file)
    rows = data.load(write(folder, GOOD, {**GOOD, "image": "x.png"}, GOOD), "sft")
    refused(rows, 1, rf"its picture cannot be read: {folder}/x\.png .*{why}")
    assert rows[0]["question"] == rows[2]["question"] == "what?"
    assert "its picture cannot be read: bytes" in outcome(lambda: rows_file.open_picture(file))[1]


@pytest.mark.parametrize("path", ["folder.png", "loop.png", "pipe.png", "", ".", "a\0b.png", "x" * 5000, "a.png/b.png", "a\nb.png", "a\u2028b.png",
                                  "\ud800.png", "gone.png", "http://localhost/a.png", "file:a.png"])
def test_a_path_to_no_picture_is_named(path, folder):
    # nothing waits for a pipe, and the message stays one line that can be printed
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    rows = data.load(write(folder, {**GOOD, "image": path}, GOOD), "sft")
    assert outcome(lambda: rows[0], seconds=2)[1] and rows.trees(4)[:] == [[0], [1]]
    refused(rows, 0, "its picture (is missing|cannot be read): ")


def test_a_path_may_lead_out_of_the_folder(folder):
    # "../x.png", an absolute path and a link are opened: a JSONL file may name any picture that its reader may read
    (folder / "rows").mkdir()
    (folder / "rows/link.png").symlink_to("../a.png")
    rows = data.load(write(folder / "rows", *({**GOOD, "image": path} for path in ("../a.png", str(folder / "a.png"), "link.png"))), "sft")
    assert all(np.array_equal(rows[i]["image"], DRAWN) for i in range(3))


def test_no_program_is_started_for_a_picture(folder, monkeypatch):
    # PIL hands EPS to Ghostscript, a whole language interpreter: here a `gs` that leaves a trace
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    (folder / "gs").chmod(0o755)
    (folder / "x.png").write_bytes(EPS)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found earlier
    for image in (EPS, str(folder / "x.png")):
        assert "cannot be read" in outcome(lambda: rows_file.open_picture(image))[1] and not (folder / "started").exists()


# ---- rows ----------------------------------------------------------------------------------------------------------------

VALUES = {"int": 3, "float": 2.5, "list": ["a.png", 1], "dict": {"a": 1}, "bool": True, "null": None, "empty": "", "blank": " \n\t", "no list": [],
    "no dict": {}}
INNER = {**VALUES, "list of lists": [[]], "list of nulls": [None], "dict of ints": {"from": 1, "value": 2}}
TALK, TEXTS, RATED = {"image": "a.png"}, {"images": ["a.png"]}, {"image": "a.png", "prompt": "q"}
FORM = "in the form of its columns|turns 1|pictures|is missing|answers is better"
BAD_ROWS = {  # name -> (row, kind, why)
    **{f"{kind}: {field} is {name}": ({**row, field: value}, kind, "picture" if field == "image" else f"'{field}' is (of type|missing|empty)")
       for row, kind, fields in ((GOOD, "sft", ("image", "question", "answer")), (PAIR, "pairs", ("chosen", "rejected")),
           (PAIR, "sft", ("rejected",)))
       for field in fields for name, value in VALUES.items()},
    **{f"{field} is {name}": ({**row, field: value}, kind, FORM) for row, kind, field in (
        (TALK, "sft", "conversations"), (TEXTS, "sft", "texts"), (RATED, "pairs", "completions")) for name, value in INNER.items()},
    "a turn of a number": ({**TALK, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": 3}]}, "sft",
        "'answer' is of type int"),
    "an answer to nothing": ({**TALK, "conversations": [{"from": "gpt", "value": "x"}]}, "sft", "must be of human and gpt"),
    "no question": ({"image": "a.png", "answer": "x"}, "sft", "'question' is missing"),
    "no picture": ({"question": "q", "answer": "x"}, "sft", "no picture"),
    "two pictures": ({"images": ["a.png"] * 2, "texts": [{"user": "q", "assistant": "x"}]}, "sft", "has 2 pictures, must have exactly one"),
    "none of a list": ({"images": [], "texts": [{"user": "q", "assistant": "x"}]}, "sft", "has 0 pictures"),
    "pictures in a dict": ({"images": {"a": 1}, "prompt": "q", "chosen": "x", "rejected": "y"}, "pairs", FORM),
    "a picture of a strange dict": ({**GOOD, "image": {"bytes": 3, "path": None}}, "sft", "must be a path"),
    "NaN": ({**GOOD, "answer": math.nan}, "sft", "float"),
    "equal": ({**PAIR, "rejected": "a ring\n"}, "pairs", "the same text"),
    "equal, for SFT": ({**PAIR, "rejected": "a ring\n"}, "sft", "the same text"),
    "the tag in an answer": ({**GOOD, "answer": "a <image>"}, "sft", "contains the <image> tag"),
    "nested 900 deep": (json.dumps({**GOOD, "image": 0}).replace("0", "[" * 900 + "]" * 900).encode(), "sft", "a list, must be a path"),
    "huge ratings": ({**RATED, "completions": [{"annotations": {k: {"Rating": "9" * 5000} for k in "abc"}, "response": "x"}] * 2}, "pairs", FORM),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_of_the_wrong_kind_is_named(name, folder, shared_model):
    # beside a row of its own form and one of another: trees and texts are made, and training drops it
    row, kind, why = BAD_ROWS[name]
    good = GOOD if kind == "sft" else PAIR
    for neighbour in (good, {**(row if isinstance(row, dict) else {}), **good}):
        path = write(folder, row, neighbour)
        rows, message = outcome(lambda: data.load(path, kind))
        assert rows, message
        refused(rows, 0, why)
        assert outcome(lambda: rows.trees(4)[:])[0] and outcome(lambda: [rows.text(i) for i in range(len(rows))])[0]
        assert f"{path} row 0" in data.Collator(rows, shared_model,
            ("answer",) if kind == "sft" else ("chosen", "rejected"))([[i] for i in range(len(rows))])[1][0]


LINE, DEEPLY = json.dumps(GOOD).encode(), b"[" * 100_000 + b"]" * 100_000
FILES = {  # name -> (file, how many rows it has, or what is said of it)
    "BOM": (b"\xef\xbb\xbf" + LINE + b"\n" + LINE + b"\n", 2), "CRLF": (LINE + b"\r\n" + LINE + b"\r\n", 2),
    "no final newline": (LINE + b"\n" + LINE, 2),
    "blank lines": (b"\n \n" + LINE + b"\n\t\n\n", 1), "a key twice": (b'{"question": "no", ' + LINE[1:], 1),
    "NaN elsewhere": (LINE[:-1] + b', "x": NaN}', 1),
    "line separators in a text": (json.dumps({**GOOD, "answer": "a\u2028b\x85c"}, ensure_ascii=False).encode(), 1),
    "empty": (b"", "has no rows"), "blank": (b"\n \n", "has no rows"), "a list": (LINE + b"\n[1]\n", "line 2 is not a record, but a list"),
    **{f"a line {each}": (LINE + b"\n" + each.encode() + b"\n", "line 2 is not a record") for each in ("3", "null", "NaN", '"x"', "true")},
    **{f"line {i}: {each[:9]}": (LINE + b"\n" + each, "line 2 is not JSON") for i, each in enumerate((
        b"{'image': 3}", LINE + b" " + LINE, LINE[:-9], b'{"question": "\xe9"}', b"\xff\xfe\n", bytes(99), b"\x1f\x8b\x08\0abc", LINE + b"\r" + LINE,
        LINE[:-1] + b', "digits": ' + b"9" * 5000 + b"}", DEEPLY, LINE[:-1] + b', "x": ' + DEEPLY + b"}"))},
    "no such column": (b'{"image": "a.png", "text": "x"}', "has no column 'question', 'answer'; it has: image, text"),
    "a column of two lines": (b'{"a\\nb": 1}', "has no column"), "a column that no one can print": (b'{"\\ud800": 1}', "has no column"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_lines_is_read_or_named(name, folder):
    # records, or one line that names the file, the number of its line, and what is wrong there
    (folder / "rows.jsonl").write_bytes(FILES[name][0])
    rows, message = outcome(lambda: data.load(str(folder / "rows.jsonl"), "sft"))
    if rows:
        assert len(rows) == FILES[name][1] and all(rows[i]["question"] == "what?" and rows[i]["answer"].startswith("a") for i in range(len(rows)))
    else:
        assert message.startswith(f"{folder}/rows.jsonl ") and FILES[name][1] in message


BYTES = {"bytes": file_of(DRAWN), "path": None}
TABLES = {  # name -> (parquet columns of one row, or a file, or how much is cut off one; what is said, None: it is read)
    **{f"{field} is {name}": ({**GOOD, "image": BYTES, field: value}, f"'{field}' is |picture") for field in ("image", "question", "answer")
       for name, value in (("int", 3), ("float", 1.5), ("list", ["a"]), ("dict", {"a": 1}), ("bool", True), ("null", None), ("empty", ""),
           ("bytes", b"\xff"))},
    **{f"conversations is {name}": ({"image": BYTES, "conversations": value}, "conversations|form of its columns|turns") for name, value in (
        ("int", 3), ("text", "a"), ("bool", True), ("null", None), ("ints", [3]), ("dict", {"a": 3}), ("dict of lists", {"a": [3]}))},
    "good": ({**GOOD, "image": BYTES}, None), "broken picture": ({**GOOD, "image": {**BYTES, "bytes": BYTES["bytes"][:99]}}, "cannot be read: bytes"),
    "missing column": ({"image": BYTES, "answer": "x"}, "no column 'question'"), "two-line column": ({"a\nb": 1}, "has no column"),
    "two pictures": ({"images": [BYTES, BYTES], "texts": [{"user": "q", "assistant": "x"}]}, "has 2 pictures"),
    **{f"file {content!r:.12}": (content, "cannot be loaded") for content in (b"no parquet", b"", -9, -400, b"PAR1" + b"\xff" * 30 + b"PAR1")},
}


@pytest.mark.parametrize("name", TABLES)
def test_parquet_of_the_wrong_kind_is_named(name, folder):
    # a record, a BadRow, or one line about the file
    import pyarrow
    from pyarrow.parquet import write_table
    (content, why), path = TABLES[name], folder / "0.parquet"
    write_table(pyarrow.table({column: [value] for column, value in (content if isinstance(content, dict) else {**GOOD, "image": BYTES}).items()}),
        path)
    if not isinstance(content, dict):
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    rows, message = outcome(lambda: data.load(str(path), "sft"))
    if not rows:
        assert str(path) in message and re.search(why, message)
    else:
        assert outcome(lambda: rows.trees(4)[:])[0]
        refused(rows, 0, why) if why else np.testing.assert_array_equal(rows[0]["image"], DRAWN)


@pytest.fixture(scope="module")
def shared_model(start_run):
    return MLLM.load(start_run)


@pytest.mark.parametrize("text, kept", [("\ud800 what", False), ("x" * 2**20, False), ("a\0b", True), ("\u202e\u200b", True),
    ("QUESTIONMARKER", True)])
def test_strange_text_is_trained_on_or_dropped(text, kept, folder, shared_model):
    # lone surrogates are no text and a megabyte is too long: dropped, with file and row; all else is tokens
    for field in ("question", "answer"):
        path = write(folder, {**GOOD, field: text}, GOOD)
        batch, dropped = outcome(lambda: data.Collator(data.load(path, "sft"), shared_model)([[0], [1]]))[0]
        assert [row for row, _ in batch.rows] == [0, 1][not kept:] and [each.startswith(f"{path} row 0: ") for each in dropped] == [True] * (not kept)
        assert all(each.splitlines() == [each] and each.encode() for each in dropped)


def test_the_templates_own_tokens_in_a_text_count_as_such(folder, shared_model):
    # as in transformers: what looks like a special token is one, so a stranger's row can end its own turn; the <image> tag only marks a place
    chat = shared_model.chat
    assert chat.question_ids("<|im_end|>").count(chat.stop_ids[-1]) == 1 + chat.question_ids("").count(chat.stop_ids[-1])
    assert chat.response_ids("x<|im_end|>y").count(chat.stop_ids[-1]) == 2
    assert chat.question_ids("<image>\nwhat<image>?") == chat.question_ids("what?") and min(chat.question_ids("<image>")) >= 0


# ---- run directories -----------------------------------------------------------------------------------------------------

CONFIG, CONNECTOR, LLM, WEIGHTS = "config.json", "connector.safetensors", "llm/config.json", "llm/model.safetensors"
EYE, SIGHT = "vision/config.json", "vision/model.safetensors"
PROCESSOR, WORDS, TOKENS, TEMPLATE = "vision/preprocessor_config.json", "llm/tokenizer_config.json", "llm/tokenizer.json", "llm/chat_template.jinja"


class Evil:
    """A pickle that leaves a trace when it is opened"""

    def __init__(self, folder):
        self.path = str(folder / "ran")

    def __reduce__(self):
        return os.mkdir, (self.path,)


def put(name, content):
    return lambda run: (run / name).write_bytes(content)


def gone(name):
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def says(name, **values):
    """Some settings of a JSON file are others"""
    return lambda run: (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), **values}))


def holds(name, **tensors):
    """Some tensors of a file are others, or none; "first" stands for one that is there"""
    def change(run):
        found = {key: value.clone() for key, value in load_file(run / name).items()}
        found.update({sorted(found)[3] if key == "first" else key: value for key, value in tensors.items()})
        save_file({key: value for key, value in found.items() if value is not None}, run / name, {"format": "pt"})
    return change


def index(to, write=save_file, name="model.safetensors.index.json"):
    """The LLM's weights are elsewhere, and an index says where"""
    def change(run):
        tensors, place = load_file(run / WEIGHTS), to.format(run=run)
        (run / WEIGHTS).unlink()
        write(tensors, run / "llm" / place)
        (run / "llm" / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, place)}))
    return change


def pickled(name, **config):
    """Weights as a pickle that does something"""
    return lambda run: (gone(os.path.dirname(name) + "/model.safetensors")(run), torch.save({"x": Evil(run)}, run / name), says(LLM, **config)(run))


def code(name, *classes, **values):
    """auto_map: code that comes along"""
    def change(run):
        (run / os.path.dirname(name) / "evil.py").write_text(f"import os\nos.mkdir({str(run / 'ran')!r})\nclass X: pass\n")
        says(name, auto_map={each: ["evil.X", "evil.X"] if each == "AutoTokenizer" else "evil.X" for each in classes}, **values)(run)
    return change


def square(n):
    return {"height": n, "width": n}


WRONG = {  # what each JSON file may not say
    PROCESSOR: dict(size=(None, "big", square(0), square(-1), square("x"), {"a": 1}, square(1000)),
        image_mean=("x", [1], None),
                    image_std=(None, [1]), resample=(99,), rescale_factor=("x", None), image_processor_type=("Nope", 3, "CLIPImageProcessor")),
    EYE: dict(model_type=("bert", "nope", 3, [], None), hidden_size=(0, -16, "a", 17), num_attention_heads=(7, 0), num_hidden_layers=(9, 2, -1, "3"),
        dtype=("nope",),
              patch_size=(0, -8, "8", 16, [8, 8]), image_size=(0, "24", 32, [24]), num_channels=(1,), hidden_act=("nope", []), layer_norm_eps=("x",)),
    LLM: dict(model_type=("bert", "siglip", "gpt2", "nope", 3, None), vocab_size=(5, 0, -1, "x"), num_key_value_heads=(0, 3),
        num_hidden_layers=(0, 1, 3), dtype=("no",),
              layer_types=(["nope"] * 2, 3, ["sliding_attention"] * 2), rms_norm_eps=("x", math.nan), tie_word_embeddings=(False,),
              pad_token_id=(10**6,),
              rope_parameters=("x", {"rope_type": "nope"}, {"rope_type": "default", "rope_theta": 0}), final_logit_softcapping=(3.0,),
              quantization_config=("x",)),
    WORDS: dict(tokenizer_class=(3,), eos_token=(3, {"a": 1})),
    CONFIG: dict(format=(0, 2, "1", None, [1], "1\n2", math.nan), pool=(None, 0, -1, "2", 1.0, True, 2, 3, 10**4000),
                 feature_layer=(None, "-2", 1.5, True, 0, 99, -9, 10**4000)),
}
RUNS = {  # name -> (what is changed, what the message says)
    **{f"{name} is {kind}": (put(name, content), name if name == CONFIG else os.path.dirname(name))
        for name in (CONFIG, LLM, EYE, PROCESSOR, WORDS, TOKENS)
       for kind, content in {"empty": b"", "cut": b'{"format": 1,', "a list": b"[]", "null": b"null", "binary": b"\xff\xfe\0",
           "100,000 deep": DEEPLY}.items()},
    **{f"{name} is {content!r:.12}": (put(name, content), name) for name in (CONNECTOR, WEIGHTS, SIGHT) for content in (
        b"", b"this is no tensor", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"nope")},
    **{f"{name} {kind}": (change, name + said) for name in (CONNECTOR, WEIGHTS, SIGHT) for kind, change, said in (
        ("is cut", lambda run, name=name: os.truncate(run / name, os.path.getsize(run / name) - 20), ""),
        ("has a tensor more", holds(name, x=torch.ones(2)), ".* x"),
        ("is cut in its header", lambda run, name=name: os.truncate(run / name, 60), ""),
        ("has a name of two lines", holds(name, **{"a\nb": torch.ones(2)}), ".* a"),
        ("is a folder", lambda run, name=name: (gone(name)(run), (run / name).mkdir()), ""),
        ("lacks one", holds(name, first=None), r".* \w+\.\S*(bias|weight)"),
        ("has one in another shape", holds(name, first=torch.ones(2)), r".* \w+\.\S*(bias|weight) .*\(2,\)"))},
    **{f"{name} is missing": (gone(name), said) for name, said in (
        (CONFIG, "no config.json"), (CONNECTOR, CONNECTOR), (WEIGHTS, "llm .*model.safe"), (LLM, "llm"), (EYE, "vision"), (PROCESSOR, "vision"),
        (SIGHT, "vision"),
        (TOKENS, "no tokenizer.json"), (TEMPLATE, "chat template"), ("llm", "llm"), ("vision", "vision"))},
    **{f"{name} says {key} {value!r:.40}": (says(name, **{key: value}), "") for name in WRONG for key, values in WRONG[name].items()
        for value in values},
    **{f"the chat template is {text!r:.30}": (put(TEMPLATE, text), "")
        for text in (b"", b"{% if", b"\xff", b"{{ a.b.c }}", b"{{ raise_exception('a\\nb') }}",
                                                                                    b"{{ ''.__class__.__mro__ }}", b"{{ messages[1].content * 2 }}")},
    "the connector's inner width is 10^10": (holds(CONNECTOR, **{"down.weight": torch.zeros(0, 10**10)}), CONNECTOR + ".*down"),
    "index leads up": (index("../x.safetensors"), "llm/model.safetensors.index.json .*../x"),
    "index leads elsewhere": (index("{run}/x.safetensors"), "index.json .*x.safe"),
    "index leads to a pickle": (index("x.bin", torch.save), "llm"), "index leads up to a pickle": (index("../x.bin", torch.save), "llm"),
    "index leads up, no suffix": (index("../x", torch.save), "llm"), "index of nothing": (index("x.safetensors", lambda *_: None), "llm"),
    "index that is no JSON": (put("llm/model.safetensors.index.json", b"{"), "llm/model.safetensors.index.json"),
    "config leads elsewhere": (lambda run: (shutil.move(run / WEIGHTS, run / "x.safetensors"),
        says(LLM, transformers_weights="../x.safetensors")(run)), "llm"),
    "more words than memory": (says(LLM, vocab_size=10**8), "llm/config.json: vocab_size is 100000000"),
    "wider than memory": (says(LLM, intermediate_size=10**9), "llm/config.json: intermediate_size is"),
    "a tower of layers": (says(EYE, num_hidden_layers=10**6), "vision/config.json: num_hidden_layers is 1000000"),
    "an enormous picture": (says(EYE, image_size=10**6), "vision/config.json: image_size is 1000000"),
    "enormous pictures": (says(PROCESSOR, size={"height": 40000, "width": 40000}), "vision: its image processor makes pictures of 40000 pixels"),
    "a pickle for the LLM": (pickled("llm/pytorch_model.bin"), "llm .*model.safetensors"),
    "a pickle for the encoder": (pickled("vision/pytorch_model.bin"), "vision .*safe"),
    "a pickle by another name": (pickled(WEIGHTS), WEIGHTS), "a pickle that the config names": (pickled("llm/x.bin", transformers_weights="x.bin"),
        "llm"),
    "an index of pickles": (index("x.bin", lambda _, path: torch.save(Evil(path.parents[1]), path), "pytorch_model.bin.index.json"), "llm"),
    **{f"code for {name}": (code(name, *classes, **values), os.path.dirname(name)) for name, classes, values in (
        (LLM, ("AutoConfig", "AutoModelForCausalLM"), {"model_type": "evil"}), (EYE, ("AutoConfig", "AutoModel"), {"model_type": "evil"}),
        (PROCESSOR, ("AutoImageProcessor",), {"image_processor_type": "X"}))},
}
LOADS = {  # what may stand in a run directory and changes nothing
    "nothing": lambda run: None, "an index of files beside it": index("x-00001-of-00001.safetensors"),
    "code for the LLM": code(LLM, "AutoConfig", "AutoModelForCausalLM"),
    "code for the tokenizer": code(WORDS, "AutoTokenizer", tokenizer_class="X"), "code for the encoder": code(EYE, "AutoConfig", "AutoModel"),
    "code for the processor": code(PROCESSOR, "AutoImageProcessor"),
    "a pickle beside the weights": lambda run: torch.save(Evil(run), run / "llm/pytorch_model.bin"),
}


@pytest.fixture
def run(start_run, tmp_path):
    return shutil.copytree(start_run, tmp_path / "run")


@pytest.mark.parametrize("name", RUNS)
def test_a_broken_run_directory_is_named(name, run):
    # one line that names the file or its folder, and what a stranger put there is not run
    change, said = RUNS[name]
    change(run)
    loaded, message = outcome(lambda: MLLM.load(str(run)))
    assert not (run / "ran").exists()
    assert loaded is None and str(run) in message and re.search(said, message.replace(f"{run}/", "")), message


@pytest.mark.parametrize("name", LOADS)
def test_what_comes_along_is_not_run(name, run, shared_model):
    # the same weights, whatever lies beside them
    LOADS[name](run)
    loaded = MLLM.load(str(run))
    assert not (run / "ran").exists() and all(map(torch.equal, loaded.state_dict().values(), shared_model.state_dict().values()))


# ---- whatever else -------------------------------------------------------------------------------------------------------

SMALL = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["a.png", "b.png", "human", "gpt", "<image>",
    "\ud800", "9" * 40])
KEYS = st.sampled_from([*GOOD, *PAIR, "images", "prompt", "conversations", "texts", "completions", "ds_answer", "caption", "role", "content", "from",
    "value", "user",
                        "assistant", "bytes", "path", "annotations", "response", "Rating"]) | st.text(max_size=3)
JSON = st.recursive(SMALL, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
ROW = st.dictionaries(KEYS, JSON, max_size=6) | st.builds(lambda row, more: {**row, **more}, st.sampled_from([GOOD, PAIR]),
    st.dictionaries(KEYS, JSON, max_size=2)) | st.builds(
    lambda row, value: {**row, next(iter(row)): value}, st.sampled_from([{"conversations": 0, "image": "a.png"}, {"texts": 0, "images": ["a.png"]}, {
        "completions": 0, "prompt": "q", "image": "a.png"}, {"prompt": 0, "images": ["a.png"], "chosen": "x", "rejected": "y"}]), JSON)
LINES = st.lists(ROW.map(lambda row: json.dumps(row).encode()) | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30),
    max_size=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    DRAWING.save(folder / "a.png")
    return folder


@settings(max_examples=120, **FUZZ)
@given(st.lists(ROW, min_size=1, max_size=3).map(lambda rows: [json.dumps(row).encode() for row in rows]) | LINES,
    st.sampled_from([*rows_file.FIELDS]))
def test_any_lines_are_records_or_refused(place, shared_model, lines, kind):
    # loading, trees, texts, every record, and the batch that training makes of them
    path = write(place, *lines)
    rows, message = outcome(lambda: data.load(path, kind))
    if not rows:
        assert message.startswith(f"{path} ")
        return
    outcome(lambda: (rows.trees(4)[:], rows.identity()))[0] or pytest.fail("no trees")
    fields = {"pairs": ("chosen", "rejected"), "captions": ("caption",)}.get(kind, ("answer",))
    for i in range(len(rows)):
        record, message = outcome(lambda: rows[i])
        assert message.startswith(f"{path} row ") if record is None else record["image"].mode == "RGB" and all(isinstance(record[field], str)
            for field in fields)
        assert isinstance(outcome(lambda: rows.text(i))[0], dict)
        if kind != "captions":  # which have no question
            batch, dropped = outcome(lambda: data.Collator(rows, shared_model, fields)([[i]]))[0]
            assert (batch is None) == bool(dropped) and all(each.startswith(f"{path} row ") for each in dropped)


FILES_OF_RUN = [CONFIG, CONNECTOR, EYE, LLM, PROCESSOR, WORDS, "llm/tokenizer.json", TEMPLATE, WEIGHTS, "vision/model.safetensors"]
DAMAGE = st.one_of(st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)), st.tuples(st.just("cut"), st.integers(0, 2**20), st.none()),
                   st.tuples(st.just("insert"), st.integers(0, 2**20), st.binary(min_size=1, max_size=3)
                       | st.sampled_from([b"9", b"-", b'"', b"null", b"[", b"{", b"\n"])),
                   st.tuples(st.just("set"), st.integers(0, 99), st.none() | st.integers(-9, 99) | st.floats(-2, 99)
                       | st.sampled_from(["", "x", [], {}, True, [1], "\n", "nan"])))


@settings(max_examples=120, **FUZZ)
@given(st.sampled_from(FILES_OF_RUN), st.lists(DAMAGE, min_size=1, max_size=2))
def test_a_damaged_run_directory_loads_or_is_refused(start_run, place, name, damage):
    # flipped, cut and inserted bytes, other values: of weights only the header, as any number is a weight
    run = place / "run"
    shutil.copytree(start_run, run, dirs_exist_ok=True)
    content = bytearray((run / name).read_bytes())
    for how, at, what in damage:
        head = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
        at = at % max(1, min(head, len(content))) if how != "set" else at
        if how == "flip" and content:
            content[at] ^= 1 << what
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = what
        elif how == "set" and name.endswith("config.json"):
            try:
                found = json.loads(content)
                found[sorted(found)[at % len(found)]] = what
                content = bytearray(json.dumps(found).encode())
            except (ValueError, TypeError, ZeroDivisionError):
                pass  # an earlier damage left no JSON
    (run / name).write_bytes(content)
    loaded, message = outcome(lambda: MLLM.load(str(run)))
    assert loaded or str(run) in message
    shutil.copy(os.path.join(start_run, name), run / name)


@pytest.mark.parametrize("flags", [("--lr", "-1"), ("--lr", "nan"), ("--lr_vision", "inf"), ("--max_bad", "5"), ("--warmup", "2"), ("--beta", "-1"),
                                   ("--label_smoothing", "1.5"), ("--sft_weight", "x")])
def test_numbers_have_a_range(flags, capsys):
    with pytest.raises(SystemExit):
        train_dpo.parser.parse_args(["--init", "run", "--out", "out", *flags])
    assert f"argument {flags[0]}: '{flags[1]}' is not a number from 0" in capsys.readouterr().err
