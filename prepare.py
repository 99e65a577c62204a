"""
Data on the shelf: sets that come as archives are unpacked into rows.jsonl, and any set can be looked at.

    python data.py prepare mmpr-v1.2 --out data/mmpr           PIVOT's 20,000 pairs, by its rules and its seed
    python data.py prepare llava-pretrain --out data/llava     558k captions
    python data.py prepare vlaa-thinking --out data/vlaa       126k answers that think aloud
    python data.py prepare vlaa-thinking-grpo --out data/grpo  25k questions with rewards
    python data.py prepare llava-onevision/ureader_qa --out data/ureader_qa
    python data.py show rlaif-v --n 8 --out sheet.png          a contact sheet with text
    python data.py check rows.jsonl --init runs/stage1         reads every row as training would, counts the bad ones

`prepare` downloads once (or reads --from a folder that holds the files), writes one record a line, only the pictures
that the records need, and manifest.json: what was read, kept and dropped, by reason, and the hash of every file. A
second run chooses the rows again and keeps what is downloaded and unpacked. The rows are then --data DIR/rows.jsonl.

PIVOT's selection (its mpo-make_jsons.py): the rows of all files in the order of meta.json, each file only up to its
first row with several pictures; shuffled once with seed 777; .gif read as .jpg, only .jpg, .jpeg and .png; the picture
must be there; no <image> in an answer; at most 1500 tokens of Qwen2.5-1.5B in "<image>\\nquestion chosen" (rejected is
not counted); the first 20,000 of these.
"""
import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

import common
import scenes
from model import MLLM, InputError, first_line, opened
from rows import FIELDS, NOT_IN_FORM, Stream, load
from sources import NAMES, BadRow, Lines, form_of

SETS = {  # name -> hub id, the files that it needs, those of them that hold its rows
    "mmpr-v1.2": ("OpenGVLab/MMPR-v1.2", ("meta.json", "annotations*", "images*"), ("meta.json",)),
    "llava-pretrain": ("liuhaotian/LLaVA-Pretrain", ("blip_laion_cc_sbu_558k.json", "images*"),
                       ("blip_laion_cc_sbu_558k.json",)),
    "vlaa-thinking": ("UCSC-VLAA/VLAA-Thinking", ("VLAA-Thinking-SFT-126K.json", "images/*"),
                      ("VLAA-Thinking-SFT-126K.json",)),
    "vlaa-thinking-grpo": ("UCSC-VLAA/VLAA-Thinking", ("VLAA-Thinking-GRPO-25K.json", "images/*"),
                           ("VLAA-Thinking-GRPO-25K.json",)),
    "llava-onevision": ("lmms-lab/LLaVA-OneVision-Data", ("{config}/*",), ("*.json", "*.jsonl")),
}

VLAA_REWARDS = {  # part of a picture's folder -> the reward of its questions (VLAA-Thinker; rewards.py)
    "clevr": "digit", "geoqa": "letter", "arxivqa": "letter", "puma": "math", "synthesis": "math", "coco": "iou",
    "vg": "iou", "docvqa": "open", "vizwiz": "open", "allava": "open"}

parser = argparse.ArgumentParser(allow_abbrev=False, prog="data.py", description=__doc__,
                                 formatter_class=common.Help)
commands = parser.add_subparsers(dest="command", required=True)
flags = commands.add_parser("prepare", formatter_class=common.Help, help="unpack a set that comes as archives")
flags.add_argument("name", help=f"one of {', '.join(SETS)}/CONFIG")
flags.add_argument("--out", required=True, help="folder to write rows.jsonl, images/ and manifest.json into")
flags.add_argument("--from", dest="folder", help="folder that holds the set's files already (default: download them)")
flags.add_argument("--n", type=common.positive,
                   help="stop after this many records (default: 20000 of mmpr-v1.2, else all)")
flags.add_argument("--seed", type=int, default=777,
                   help="of the order in which mmpr-v1.2 is walked through (PIVOT: 777)")
flags.add_argument("--tokenizer", default="Qwen/Qwen2.5-1.5B-Instruct", help="counts the tokens of mmpr-v1.2's rows")
flags.add_argument("--max_tokens", type=int, default=1500, help="longest question and chosen answer of mmpr-v1.2")
flags = commands.add_parser("show", formatter_class=common.Help, help="a contact sheet with text")
flags.add_argument("data", nargs="+", help="anything that --data of the training scripts takes")
flags.add_argument("--n", type=common.positive, default=8,
                   help="how many pictures, drawn from the beginning of each source")
flags.add_argument("--weights", type=float, nargs="+", help="each source's share of the pictures")
flags.add_argument("--seed", type=int, default=0, help="another seed draws other records")
flags.add_argument("--out", default="runs/data.png", help="picture to write")
flags = commands.add_parser("check", formatter_class=common.Help, help="read every row, count the bad ones")
flags.add_argument("data", nargs="+", help="anything that --data of the training scripts takes")
flags.add_argument("--init", help="run whose tokenizer counts and shows the tokens (default: one made of the data)")
flags.add_argument("--n", type=common.positive, help="use only the first N rows of each")
flags.add_argument("--max_length", type=common.positive, default=2048, help="longest row in tokens, as in training")
flags.add_argument("--workers", type=common.whole_number, default=0, help="processes that decode pictures")


# ---- files, in folders and in archives -------------------------------------------------------------------------------


class Joined(io.RawIOBase):
    """Several files read as one: images.zip_aa, images.zip_ab, ... without a copy of 54 GB"""

    def __init__(self, paths):
        self.files = [open(path, "rb") for path in paths]
        self.starts = np.cumsum([0] + [os.path.getsize(path) for path in paths]).tolist()
        self.at = 0

    def readable(self):
        return True

    seekable = readable

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.starts[-1])[whence]
        return self.at

    def readinto(self, buffer):
        if self.at >= self.starts[-1]:
            return 0
        part = int(np.searchsorted(self.starts, self.at, "right")) - 1
        self.files[part].seek(self.at - self.starts[part])
        read = self.files[part].readinto(memoryview(buffer)[:self.starts[part + 1] - self.at])
        self.at += read
        return read


def whole_name(path):
    """images.zip_aa -> images.zip"""
    return re.sub(r"\.zip_\w+$", ".zip", path)


@contextlib.contextmanager
def unpacking(archive):
    """What a broken archive raises, as one line with its name"""
    try:
        yield
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{archive} cannot be unpacked: {first_line(error)}") from error


class Files:
    """All files of a download, whether they lie in its folders or in its archives, found by the end of their path:
    where an archive is to be unpacked, and what its paths are relative to, is told differently by everyone."""

    def __init__(self, folder, patterns):
        found = sorted(os.path.relpath(os.path.join(at, name), folder)
                       for at, _, names in os.walk(folder) for name in names)
        self.paths = [path for path in found if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not fnmatch.filter(self.paths, pattern):
                raise InputError(f"{folder} has no {pattern}")
        self.folder, self.archives, self.by_name = folder, {}, {}
        parts = {}
        for path in self.paths:
            parts.setdefault(whole_name(path), []).append(os.path.join(folder, path))
        for whole in tqdm(parts, desc="archives", unit="file"):
            with unpacking(whole):
                members = self.members(whole, parts[whole])
            stem = re.sub(r"\.(zip|tar|tar\.gz|tgz)$", "", whole) if members else ""
            for member in members or [whole]:
                full = os.path.normpath(member)
                full = full if full.startswith(os.path.basename(stem) + "/") else os.path.join(stem, full)
                self.by_name.setdefault(os.path.basename(full), []).append((full, whole, member))

    def members(self, path, parts):
        """The files in an archive, which stays open; None of any other file"""
        if path.endswith(".zip"):
            self.archives[path] = zipfile.ZipFile(io.BufferedReader(Joined(parts)))
            return [item.filename for item in self.archives[path].infolist() if not item.is_dir()]
        if re.search(r"\.(tar|tar\.gz|tgz)$", path):
            self.archives[path] = parts[0]
            with tarfile.open(parts[0]) as archive:
                members = [item.name for item in archive if item.isfile() or item.islnk()]
                while archive.fileobj.read(2**20):  # to the very end, where a checksum stands
                    pass
                return members
        return None

    def find(self, name):
        """-> (path, archive, member) of the file whose path ends like `name`: the longer the better, then the shorter
        its path. None if there is none, or several are as good."""
        wanted, found = [part for part in name.split("/") if part not in ("", ".", "..")], {}
        for entry in self.by_name.get(os.path.basename(name), ()):
            path = entry[0].split("/")
            same = min(len(wanted), len(path))
            if wanted[-same:] == path[-same:]:
                found.setdefault((same, -len(path)), {}).setdefault(entry[0], entry)
        best = list(found[max(found)].values()) if found else []
        return best[0] if len(best) == 1 else None

    def unpack(self, entries, out):
        """Writes these files to OUT/PATH, each whole or not at all; those that are there already are left"""
        by_archive = {}
        for path, archive, member in entries:
            if member.startswith("/") or ".." in path.split("/"):
                raise InputError(f"{archive} names a file outside of its folder: {member}")
            by_archive.setdefault(archive, {})[member] = os.path.join(out, path)
        with tqdm(total=len(entries), desc="unpack", unit="file") as bar:
            for archive, targets in by_archive.items():
                with unpacking(archive):
                    for member, content in self.contents(archive, targets):
                        target = targets[member]
                        if not os.path.exists(target):
                            os.makedirs(os.path.dirname(target), exist_ok=True)
                            whole = f"{target}.{os.getpid()}.tmp"  # another process may be at it too
                            with open(whole, "wb") as f:
                                f.write(content())
                            os.replace(whole, target)
                        bar.update()

    def contents(self, archive, members):
        """(member, a function that reads it) of each of `members`"""
        found = self.archives.get(archive)
        if isinstance(found, zipfile.ZipFile):
            yield from ((member, lambda member=member: found.read(member)) for member in members)
        elif found:
            with tarfile.open(found) as tar:  # a compressed tar can only be read from its beginning
                yield from ((item.name, lambda item=item: tar.extractfile(item).read()) for item in tar
                            if item.name in members)
        else:
            with open(os.path.join(self.folder, archive), "rb") as f:
                yield archive, f.read


def items(path):
    """The rows of a JSON list or of JSON Lines, one by one: a list of a million is never parsed as a whole"""
    with open(path, encoding="utf-8-sig") as f:
        if not f.read(100).lstrip().startswith("["):
            yield from Lines(path)
            return
        f.seek(0)
        text = f.read()
    at = text.index("[") + 1
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    while not text.startswith("]", at := gap.match(text, at).end()):
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:  # also where a download was cut off
            raise InputError(f"{path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} lists a {type(row).__name__}, must list records")
        yield row


# ---- rows ------------------------------------------------------------------------------------------------------------


def mmpr_rows(files, args, dropped):
    """PIVOT's selection from MMPR-v1.2, in its order: yields (record, the entry of its picture)"""
    tokenizer = opened(AutoTokenizer, args.tokenizer)
    with open(os.path.join(files.folder, "meta.json")) as f:
        try:
            meta = json.load(f)
        except ValueError as error:
            raise InputError(f"{f.name} is not JSON: {error}") from None
    entries = {name: files.find(one["annotation"]) for name, one in meta.items()}
    for name, entry in entries.items():
        if entry is None:
            raise InputError(f"meta.json names {meta[name]['annotation']}, which is in no archive")
    shutil.rmtree(os.path.join(args.out, "annotations"), ignore_errors=True)  # of a run that was stopped
    files.unpack(list(entries.values()), os.path.join(args.out, "annotations"))
    parts = [(name, Lines(os.path.join(args.out, "annotations", entry[0]))) for name, entry in entries.items()]
    lengths = [next((i for i, row in enumerate(rows) if isinstance(row.get("image"), list)), len(rows))
               for _, rows in tqdm(parts, desc="read", unit="file")]
    dropped["after a row with several pictures"] = sum(len(rows) for _, rows in parts) - sum(lengths)
    order, starts = list(range(sum(lengths))), np.cumsum([0] + lengths)
    random.Random(args.seed).shuffle(order)  # the same shuffle as of the rows themselves, which need not be in memory
    for number in order:
        part = int(np.searchsorted(starts, number, "right")) - 1
        (name, rows), i = parts[part], number - int(starts[part])
        row = rows[i]
        if not row.get("image") or not all(isinstance(row.get(field), str) for field in FIELDS["pairs"]):
            dropped["no text" if row.get("image") else "no picture"] += 1
            continue
        image = os.path.join(meta[name]["root"], row["image"])
        image = image[:-4] + ".jpg" if image.endswith(".gif") else image
        question = row["question"] if "<image>" in row["question"] else "<image>\n" + row["question"]
        entry = files.find(image)
        reason = "neither .jpg, .jpeg nor .png" if not image.lower().endswith((".jpg", ".jpeg", ".png")) else \
            "picture not found" if entry is None else \
            "<image> in an answer" if "<image>" in row["chosen"] or "<image>" in row["rejected"] else \
            "too long" if len(tokenizer(f"{question} {row['chosen']}")["input_ids"]) > args.max_tokens else None
        if reason:
            dropped[reason] += 1
            continue
        yield {"question": question, "chosen": row["chosen"], "rejected": row["rejected"], "subset": name,
               "line": i}, entry


def other_rows(files, patterns, dropped):
    """Every row of a set whose form sources.py knows, each question a record: yields (record, entry of its picture)"""
    for path in files.paths:
        if not any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
            continue
        for row in items(os.path.join(files.folder, path)):
            form = form_of(row)
            for k in range(form.n_questions(row)):
                try:
                    record = form.to_record(row, k)
                    image = record.pop("image", None)
                    if not isinstance(image, str):
                        raise BadRow("no picture" if not image else "several pictures")
                    entry = files.find(image)
                    if entry is None:
                        raise BadRow("picture not found")
                except BadRow as error:
                    dropped[re.sub(r"\d+", "N", str(error))] += 1
                    continue
                except NOT_IN_FORM:
                    dropped["not in the form of its columns"] += 1
                    continue
                yield {**record, **{key: row[key] for key in ("id", "gt") if key in row}}, entry


def to_reward(record, path):
    """A row of VLAA-Thinking for train_grpo.py: its short right answer instead of the long one, and how to judge"""
    kind = next((kind for part, kind in VLAA_REWARDS.items() if part in path.lower()), None)
    if kind is None:
        raise InputError(f"{path} is of no source of VLAA-Thinking; known are {', '.join(VLAA_REWARDS)}")
    answer = record["gt"] if isinstance(record["gt"], str) else json.dumps(record["gt"])
    return {**{key: record[key] for key in ("id", "question") if key in record}, "answer": answer, "reward": kind}


def prepare(args):
    """Fills OUT: rows.jsonl, images/, manifest.json. Raises InputError, one line"""
    name, _, config = args.name.partition("/")
    if name not in SETS or bool(config) != (name == "llava-onevision"):
        raise InputError(f"{args.name} needs no preparing: give it to --data" if name in {*NAMES} - {*SETS} else
                         f"{args.name}: sets that come as archives are {', '.join(SETS)}/CONFIG")
    if os.path.exists(args.out) and not any(os.path.exists(os.path.join(args.out, file))
                                            for file in ("rows.jsonl.part", "asked.json")):
        raise InputError(f"--out {args.out} exists and was not prepared here; choose another name")
    hub_id, patterns, rows_in = SETS[name]
    patterns = [pattern.format(config=config) for pattern in patterns]
    done = os.path.join(args.out, "manifest.json")
    asked = {key: getattr(args, key) for key in ("name", "folder", "n", "seed", "tokenizer", "max_tokens")}
    begun = os.path.join(args.out, "asked.json")
    if os.path.exists(begun):
        with open(begun) as f:
            if json.load(f) != asked:
                raise InputError(f"{args.out} was begun with other settings, see its asked.json; name another one")
    if os.path.exists(done):
        print(f"{args.out} is ready")
        return
    folder = args.folder or download(hub_id, patterns)
    files, dropped, entries, n = Files(folder, patterns), Counter(), {}, 0
    os.makedirs(args.out, exist_ok=True)
    limit = args.n or (20_000 if name == "mmpr-v1.2" else None)
    rows = mmpr_rows(files, args, dropped) if name == "mmpr-v1.2" else other_rows(files, rows_in, dropped)
    part = os.path.join(args.out, "rows.jsonl.part")
    with open(part, "w", encoding="utf-8") as f:
        for record, entry in tqdm(rows, total=limit, desc="select", unit="record"):
            path = entry[0] if entry[0].startswith("images/") else f"images/{entry[0]}"
            if name == "vlaa-thinking-grpo":
                if record.get("gt") is None:
                    dropped["no right answer"] += 1
                    continue
                record = to_reward(record, path)
            entries[path, *entry[1:]] = None  # a set that keeps its order
            f.write(json.dumps({"image": path, **record}, ensure_ascii=False) + "\n")
            n += 1
            if n == limit:
                break
    if not n:
        raise InputError(f"{args.name}: not one row can be used: {dict(dropped)}")
    common.write_json(begun, asked)  # from here on another run must not go on with other settings
    files.unpack(list(entries), args.out)
    manifest = {"asked": asked, "hub": hub_id, "kept": n, "dropped": dict(dropped), "pictures": len(entries),
                "rows_sha256": sha256(part),
                "files": {path: {"bytes": os.path.getsize(os.path.join(folder, path)),
                                 "sha256": sha256(os.path.join(folder, path))}
                          for path in tqdm(files.paths, desc="hash", unit="file")}, "versions": common.versions()}
    os.replace(part, os.path.join(args.out, "rows.jsonl"))
    common.write_json(done, manifest)
    shutil.rmtree(os.path.join(args.out, "annotations"), ignore_errors=True)  # MMPR's, unpacked
    common.print_table(f"{args.name}: {n} records, {len(entries)} pictures in {args.out}",
                       ["", "kept", *dropped], [["rows", n, *dropped.values()]])


def download(hub_id, patterns):
    """The hub's files in its cache; what is there already is not loaded again"""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # each failure of the hub has its own type
        raise InputError(f"{hub_id} cannot be downloaded: {first_line(error)}; with its files at hand, "
                         "name their folder by --from") from error


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- looking ---------------------------------------------------------------------------------------------------------


def show(args):
    """Draws the contact sheet. Raises InputError, one line"""
    if not args.out.endswith(".png"):
        raise InputError(f"--out {args.out}: must end in .png")
    stream_of = lambda kind: Stream(args.data, kind, batch_size=4, n_steps=1, limit=4, buffer=10 * args.n,
                                    seed=args.seed, weights=args.weights)
    try:
        stream = stream_of("pairs")
    except InputError:
        stream = stream_of("sft")
    rows, seen = [], set()
    for tree in stream.trees():
        known = {(part, number, k) for part, number, _, k in tree}
        if len(rows) == args.n or known & seen:  # a stream begins again when all has been read
            break
        seen |= known
        shown = None
        for item in tree:  # one question a picture: the first that can be used
            try:
                shown = stream[item]
                break
            except BadRow as error:
                shown = shown or {"dropped": str(error)}
        rows.append(shown)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    scenes.contact_sheet(rows, args.out)
    n_dropped = sum("dropped" in row for row in rows)
    dropped = f", {n_dropped} of them dropped," * bool(n_dropped)
    print(f"wrote {len(rows)} records{dropped} of {stream.source} to {args.out}")


# ---- checking --------------------------------------------------------------------------------------------------------


def check(args):
    """Reads every row through the collator of training; prints how many cannot be used, by reason, and examples with
    the tokens that bear loss in [[ ]]. Raises InputError if no row can be used"""
    import data  # not above: data.py is what was started
    try:
        rows, kind = load(args.data, "pairs", args.n), "pairs"
    except InputError:
        rows, kind = load(args.data, "sft", args.n), "sft"
    with tempfile.TemporaryDirectory() as folder:
        if args.init:
            model = MLLM.load(args.init)
        else:
            scenes.tiny_vision(os.path.join(folder, "vision"))
            scenes.tiny_llm(os.path.join(folder, "llm"), data.texts(args.data))
            model = MLLM.from_pretrained(os.path.join(folder, "vision"), os.path.join(folder, "llm"))
    collator = data.Collator(rows, model, ("chosen", "rejected") if kind == "pairs" else ("answer",), args.max_length)
    steps = [[[number]] for number in range(len(rows))]                        # each by itself
    counts, n_dropped, usable = Counter(), 0, []
    read = data.batches(collator, steps, 1, args.workers)
    for number, ((_, dropped),) in enumerate(tqdm(read, total=len(rows), desc="check")):
        n_dropped = common.report_dropped(dropped, n_dropped)
        counts.update(map(common.reason, dropped))
        usable += [number] * (not dropped and len(usable) < 3)
    for number in usable:
        print(f"\nrow {number}\n{data.show(model, collator, number)}")
    print(f"\n{rows.source}: {len(rows)} rows read as {kind}, {n_dropped} of them ({n_dropped / len(rows):.1%}) cannot "
          "be used" + f": {common.reasons(counts)}" * bool(counts))
    if n_dropped == len(rows):
        raise InputError(f"{rows.source}: not one row can be used")


def main():
    args = parser.parse_args()
    common.cli(lambda: {"prepare": prepare, "show": show, "check": check}[args.command](args))
