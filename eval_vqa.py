"""
What can the model answer? Greedy answers of one or several models to the same questions, scored and compared.

    python eval_vqa.py runs/stage1 runs/sft runs/dpo --out runs/vqa                 the drawn world's test questions
    python eval_vqa.py runs/stage1 runs/dpo --data test.jsonl --out runs/my_vqa     your own {image, question, answer}
    python eval_vqa.py runs/stage1 runs/dpo --data scenes/tune/foreign --out runs/p   is chosen likelier than rejected?
    python eval_vqa.py runs/sft runs/dpo --benchmarks all --out runs/bench          the paper's sixteen, and six more
    python eval_vqa.py runs/dpo --hf Qwen/Qwen2.5-VL-3B-Instruct --benchmarks vision --limit 500 --out runs/known
    torchrun --nproc_per_node=8 -- eval_vqa.py ...                                  the same, rows shared out
    python eval_vqa.py runs/stage1 --data train.jsonl --samples 4 --write_pairs pairs.jsonl
                                                                                    preference pairs from own samples

*Decoded*: the text that the model writes is scored, on a benchmark by its makers' metric (metrics.py). *Restricted*:
which of the given options has the highest log-probability? *Extracted*, of own data: of a text that says "answer is",
what follows. A model that has taken up another style of speaking fails the first and may pass the others, so that a
change of style is not mistaken for a change of sight. Own data have all three, benchmarks one: `--score logprob` takes
the second where there are options, usually easier. *Blind* is the same with a grey picture (of own data the options
alone): what the words of the question are worth. *Chance*, of benchmarks, is what guessing among the options is worth.

`--profile` says whose prompts and rules: "paper" those of Cambrian-1, with which PIVOT's tables were made, "lmms" those
of lmms-eval. Numbers of different profiles cannot be compared.

The *swap test*, `--reader runs/stage1`, lets stage 1's connector and LLM read each run's encoder: what is lost then was
lost in the encoder, or at least moved to where its old reader does not find it.

Writes into OUT: every answer as it was written (NAME.jsonl, of benchmarks in a folder each), results.json, results.md,
and report.html with the questions that another model than the first answers differently, and where each one looked.
Intervals are 95 % bootstraps over pictures (or what counts together); models are compared with the first one, on the
same resamples. A run that was stopped goes on with `--resume`, and with more models or benchmarks than before it
answers only what is new.
"""
import argparse
import difflib
import glob
import hashlib
import json
import os
import shutil
from collections import defaultdict

import numpy as np
from PIL import Image
from tqdm import tqdm

import benchmarks as b  # what the table below is made of
import common
import data
import gallery
import parallel
from answerers import HubModel, Run, identity
from comparison import (averages, benchmark_tables, compare_benchmarks, compare_own, flipped_cards, markdown,
                        own_tables, scorer_tables, turned)
from metrics import (MME_PERCEPTION, anls, cvbench_score, hallusionbench_score, mmbench_score, mme_score, mmvp_score,
                     naturalbench_score, normalise, option_letter, pope_score, relaxed_accuracy, score, vqa_accuracy)
from model import InputError
from own_pairs import write_pairs

__all__ = ["anls", "option_letter", "relaxed_accuracy", "vqa_accuracy"]  # for those who look for metrics here

# ---- the benchmarks --------------------------------------------------------------------------------------------------


def moved(name, config=""):
    """Hub ids of a data set of lmms-lab; most moved to lmms-lab-encoder in July 2026"""
    return [f"lmms-lab-encoder/{name}{config}", f"lmms-lab/{name}{config}"]


BLINK = """Art_Style Counting Forensic_Detection Functional_Correspondence IQ_Test Jigsaw Multi-view_Reasoning
    Object_Localization Relative_Depth Relative_Reflectance Semantic_Correspondence Spatial_Relation
    Visual_Correspondence Visual_Similarity""".split()
by_source = lambda row, profile: row["source"] if profile == "paper" else ""  # lmms-eval counts all rows alike

BENCHMARKS = {  # title, hub ids, split, columns, row -> record, answer -> how right, what the number is, longest answer
    "mmbench": b.Benchmark(
        "MMBench-en", {"paper": ["lmms-lab/MMBench_EN", *moved("MMBench", ":en")], "lmms": moved("MMBench", ":en")},
        "dev", "index, question, hint, A, B, C, D, answer, category", b.mmbench, b.read_mmbench, "circular accuracy",
        tokens=512, unit=lambda row: int(row["index"]) % 1_000_000, rule=b.all_right, score=mmbench_score),
    "mme": b.Benchmark(
        "MME", moved("MME"), "test", "question_id, question, answer, category", b.mme, b.read_mme, "perception, points",
        scale=2000, unit=lambda row: (row["category"], row["question_id"]), rule=b.mme_rule, score=mme_score,
        stratum=lambda row, _: row["category"] if row["category"] in MME_PERCEPTION else None),
    "seed": b.Benchmark(
        "SEED-I", moved("SEED-Bench"), "test", "question, choice_a, choice_b, choice_c, choice_d, answer", b.seed,
        b.letters_of("seed"), "accuracy", tokens=512),
    "gqa": b.Benchmark(
        "GQA", moved("GQA", ":testdev_balanced_instructions"), "testdev", "imageId, question, answer", b.gqa,
        b.read_gqa, "accuracy", tokens=128, pictures=("testdev_balanced_images", "imageId", "id"),
        same_picture="imageId"),
    "scienceqa": b.Benchmark(
        "ScienceQA-I", [*moved("ScienceQA", ":ScienceQA-IMG"), "derek-thomas/ScienceQA"], "test",
        "question, choices, answer, hint", b.scienceqa, b.read_scienceqa, "accuracy", tokens=512),
    "mmmu": b.Benchmark(
        "MMMU", moved("MMMU"), "validation", "id, question, options, answer, question_type", b.mmmu, b.read_mmmu,
        "accuracy", tokens=512),
    "mathvista": b.Benchmark(
        "MathVista", ["AI4Math/MathVista"], "testmini",
        "question, query, unit, choices, answer, question_type, answer_type, precision",
        b.mathvista, b.read_mathvista, "accuracy", tokens=512),
    "ai2d": b.Benchmark(
        "AI2D", moved("ai2d"), "test", "question, options, answer", b.ai2d, b.letters_of("ai2d"), "accuracy",
        tokens=512),
    "chartqa": b.Benchmark(
        "ChartQA", moved("ChartQA"), "test", "question, answer, type", b.chartqa, b.read_chartqa, "relaxed accuracy"),
    "ocrbench": b.Benchmark(
        "OCRBench", ["echo840/OCRBench"], "test", "question, answer, question_type", b.ocrbench, b.read_ocrbench,
        "contains the answer", tokens=128),
    "textvqa": b.Benchmark(
        "TextVQA", moved("textvqa"), "validation", "question, answers, ocr_tokens", b.textvqa, b.read_vqa,
        "VQA accuracy"),
    "docvqa": b.Benchmark(
        "DocVQA", moved("DocVQA", ":DocVQA"), "validation", "question, answers", b.docvqa, b.read_docvqa, "ANLS"),
    "mmvp": b.Benchmark(
        "MMVP", ["lmms-lab-eval/MMVP"], "train", "Index, Question, Options, Correct Answer", b.mmvp, b.read_mmvp,
        "accuracy of pairs", tokens=512, unit=lambda row: (int(row["Index"]) - 1) // 2, rule=b.all_right,
        score=mmvp_score),
    "realworldqa": b.Benchmark(
        "RealWorldQA", [*moved("RealWorldQA"), "visheratin/realworldqa"], "test", "question, answer", b.realworldqa,
        b.read_realworldqa, "accuracy", tokens=512),
    "cvbench2d": b.Benchmark(
        "CV-Bench 2D", ["nyu-visionx/CV-Bench:2D"], "test", "prompt, choices, answer, source, task", b.cvbench,
        b.letters_of("cvbench"), "accuracy (paper: mean of sources)", tokens=512, stratum=by_source,
        score=cvbench_score),
    "cvbench3d": b.Benchmark(
        "CV-Bench 3D", ["nyu-visionx/CV-Bench:3D"], "test", "prompt, choices, answer, source, task", b.cvbench,
        b.letters_of("cvbench"), "accuracy", tokens=512, stratum=by_source, score=cvbench_score),
    "pope": b.Benchmark(
        "POPE", moved("POPE"), "test", "question, answer, category", b.pope, b.read_pope, "F1", rule=b.f1_rule,
        score=pope_score),
    "hallusionbench": b.Benchmark(
        "HallusionBench", moved("HallusionBench"), "image",
        "category, subcategory, set_id, figure_id, question_id, question, gt_answer", b.hallusionbench,
        b.read_hallusionbench, "accuracy (aAcc)", score=lambda rows, _: hallusionbench_score(rows)),
    "naturalbench": b.Benchmark(
        "NaturalBench", ["BaiqiL/NaturalBench-lmms-eval"], "test", "Index, Question, Question_Type", b.naturalbench,
        b.read_naturalbench, "accuracy of fours (G_Acc)", unit=lambda row: int(row["Index"]) // 4, rule=b.all_right,
        score=lambda rows, _: naturalbench_score(rows)),
    "blink": b.Benchmark(
        "BLINK", ["BLINK-Benchmark/BLINK"], "val", "prompt, choices, answer, sub_task", b.blink,
        b.letters_of("blink"), "accuracy, mean of tasks", tokens=512, stratum=lambda row, _: row["sub_task"],
        configs=BLINK),
    "vqav2": b.Benchmark(
        "VQAv2", moved("VQAv2"), "validation", "image_id, question, answers", b.vqav2, b.read_vqa, "VQA accuracy",
        same_picture="image_id"),
    "okvqa": b.Benchmark(
        "OK-VQA", moved("OK-VQA"), "val2014", "question, answers", b.okvqa, b.read_vqa, "VQA accuracy"),
}
PAPER = {  # its groups; its overall number is the mean of their means
    "general": ["mmbench", "mme", "seed", "gqa"], "knowledge": ["scienceqa", "mmmu", "mathvista", "ai2d"],
    "ocr": ["chartqa", "ocrbench", "textvqa", "docvqa"], "vision": ["mmvp", "realworldqa", "cvbench2d", "cvbench3d"]}
GROUPS = {**PAPER, "more": ["pope", "hallusionbench", "naturalbench", "blink", "vqav2", "okvqa"]}


def benchmark_names(words):
    """Names of benchmarks and groups, "paper" for the sixteen and "all" -> names of benchmarks"""
    known = {**{name: [name] for name in BENCHMARKS}, **GROUPS,
             "paper": sum(PAPER.values(), []), "all": list(BENCHMARKS)}
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 1, 0.4)
            raise InputError(f"--benchmarks {word} is not known" + "".join(f"; did you mean {name}?" for name in near) +
                             f" There are {', '.join(known)}")
    return list(dict.fromkeys(name for word in words for name in known[word]))


# ---- own questions ---------------------------------------------------------------------------------------------------


def kind_of(record):
    return record.get("kind") or record.get("category") or "all"


def candidates(records):
    """{kind: distinct answers, as first spelt}, for kinds with 2 to 40 of them; open questions offer no choice"""
    answers = {}
    for record in records:
        answers.setdefault(kind_of(record), {}).setdefault(normalise(record["answer"]), record["answer"])
    return {kind: [found[a] for a in sorted(found)] for kind, found in answers.items() if 2 <= len(found) <= 40}


class OwnQuestions:
    """The drawn world's questions, or those of --data, in the form of benchmarks.Questions. An option is a text that
    answers another question of the same kind; of a preference pair the options are chosen and rejected."""

    def __init__(self, source, n, seed, limit=None):
        self.benchmark = b.Benchmark(source, [], "", "", None, lambda row, said, _: (score(said, row["answer"]), said),
                                     "accuracy", tokens=48)
        self.source, self.rows, self.records, self.dropped = source, data.load(source, "score", n, seed), [], []
        for i in tqdm(range(len(self.rows)), desc=source, delay=5):
            try:
                record = self.rows[i]
            except data.BadRow as error:
                self.dropped.append(str(error))
                continue
            kept = {key: record[key] for key in ("row", "question", "answer")}
            pair = [record.get("chosen"), record.get("rejected")]
            kept |= {key: None if record.get(key) is None else str(record[key]) for key in ("kind", "category")}
            self.records.append({**kept, "gold": record["answer"], "unit": str(i), "stratum": "",
                                 "shared": hashlib.blake2b(record["image"].tobytes(), digest_size=8).hexdigest(),
                                 "pair": pair if record["answer"] == pair[0] and isinstance(pair[1], str) else ()})
        if not self.records:
            raise InputError(f"{source}: none of {len(self.rows)} rows can be used")
        options = candidates(self.records)
        for record in self.records:
            texts = record.pop("pair") or options.get(kind_of(record), ())
            record["options"] = {text: text for text in texts} or None
        if limit and limit < len(self.records):
            self.records = b.draw(self.records, limit, seed)

    def picture(self, record):
        return self.rows[record["row"]]["image"]


# ---- answering -------------------------------------------------------------------------------------------------------


def in_batches(records, size):
    """Batches of records whose questions are about equally long, questions about one picture side by side; the longest
    come first, so that running out of memory shows at once"""
    groups = defaultdict(list)
    for record in records:
        groups[record["shared"]].append(record)
    groups = sorted(groups.values(), key=lambda group: -max(len(record["question"]) for record in group))
    ordered = [record for group in groups for record in group]
    return [ordered[at:at + size] for at in range(0, len(ordered), size)]


def ask(answerer, records, images, args, tokens, blind=False):
    """-> for each record the text that is written, or None, and the likeliest option, or None. Own data have both, but
    of blind answers only the option; benchmarks have one or the other, by --score"""
    chooses = lambda record: record["options"] and args.score != "decoded"
    writes = lambda record: not blind if args.score == "both" else not chooses(record)
    texts, choices = {}, {}
    if to_write := [i for i, record in enumerate(records) if writes(record)]:
        texts = dict(zip(to_write, answerer.generate([images[i] for i in to_write],
                                                     [records[i]["question"] for i in to_write], tokens)))
    if to_choose := [i for i, record in enumerate(records) if chooses(record)]:
        options = [list(records[i]["options"]) for i in to_choose]
        logps = answerer.option_logps([images[i] for i in to_choose], [records[i]["question"] for i in to_choose],
                                      options)
        if not np.isfinite(sum(logps, [])).all():
            raise InputError("a log-probability is not a number: this model is broken")
        choices = {i: names[int(np.argmax(each))] for i, names, each in zip(to_choose, options, logps)}
    return [(texts.get(i), choices.get(i)) for i in range(len(records))]


def answer(answerer, questions, records, args):
    """Asks about records with their pictures, and without -> a dict for each, to be saved; one whose picture cannot be
    read says so"""
    pictures, lines = {}, []
    for record in records:
        if record["shared"] not in pictures:
            try:
                pictures[record["shared"]] = questions.picture(record)
            except data.BadRow as error:
                lines.append({"row": record["row"], "dropped": str(error)})
    records = [record for record in records if record["shared"] in pictures]
    if not records:
        return lines
    images = [pictures[record["shared"]] for record in records]
    grey = {image.size: Image.new("RGB", image.size, (128, 128, 128)) for image in images}
    tokens, blind = args.max_new_tokens or questions.benchmark.tokens, [(None, None)] * len(records)
    seen = ask(answerer, records, images, args, tokens)
    if args.blind:
        blind = ask(answerer, records, [grey[image.size] for image in images], args, tokens, blind=True)
    return lines + [{"row": record["row"], "prediction": text, "choice": choice, "blind_prediction": blind_text,
                     "blind_choice": blind_choice}
                    for record, (text, choice), (blind_text, blind_choice) in zip(records, seen, blind)]


def judge(record, line, read, profile):
    """A record and what was answered -> both, and how right that is: "decoded" the text, "restricted" the option,
    "score" the one that counts, "blind_score" the same of the grey picture; None where there is none. "understood" is
    what was read out of the answer"""
    def one(text, choice):
        decoded, understood = (None, choice) if text is None else read(record, text, profile)
        restricted = None if choice is None else float(normalise(choice) == normalise(str(record["gold"])))
        return decoded, restricted, understood

    decoded, restricted, understood = one(line["prediction"], line["choice"])
    blind_decoded, blind_restricted, blind_understood = one(line["blind_prediction"], line["blind_choice"])
    return {**{key: value for key, value in record.items() if key not in ("picture", "place")}, **line,
            "decoded": decoded, "restricted": restricted, "score": restricted if decoded is None else decoded,
            "understood": understood, "blind_understood": blind_understood,
            "blind_score": blind_restricted if blind_decoded is None else blind_decoded}


def saved_lines(path):
    """{row: line} of the answers at `path` and of those that other processes left beside it"""
    lines = {}
    for each in [path, *glob.glob(glob.escape(path) + ".rank*")]:
        if os.path.exists(each):
            with open(each) as f:
                for text in f:
                    if text.endswith("\n"):  # the last line of a stopped run may be cut off
                        line = json.loads(text)
                        lines[line["row"]] = line
    return lines


def gather(questions, path, profile):
    """All processes' answers into one file, in the order of the records, and judged: what was judged before may have
    been so by other rules. -> usable lines by row, {row: reason} of the others"""
    saved, dropped, lines = saved_lines(path), {}, {}
    for record in questions.records:
        line = saved.get(record["row"])
        if line and "dropped" in line:
            dropped[record["row"]] = line["dropped"]
        elif line:
            raw = {key: line[key] for key in ("prediction", "choice", "blind_prediction", "blind_choice")}
            lines[record["row"]] = judge(record, raw, questions.benchmark.read, profile)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines.values())
        f.writelines(json.dumps({"row": row, "dropped": reason}) + "\n" for row, reason in dropped.items())
    os.replace(path + ".new", path)
    for each in glob.glob(glob.escape(path) + ".rank*"):
        os.remove(each)
    return lines, dropped


def usable_lines(questions, gathered):
    """{run: what `gather` gives} -> {run: lines} about the rows that every run has answered, without those that count
    together with others; and why which rows are not among them"""
    dropped = {row: reason for _, reasons in gathered.values() for row, reason in reasons.items()}
    broken = {record["unit"] for record in questions.records if record["row"] in dropped}
    dropped |= {record["row"]: f"row {record['row']} counts together with another that cannot be used"
                for record in questions.records if record["unit"] in broken and record["row"] not in dropped}
    lines = {run: [line for row, line in lines.items() if row not in dropped] for run, (lines, _) in gathered.items()}
    if not all(lines.values()):
        raise InputError(f"{questions.source}: not one picture can be read: {next(iter(dropped.values()))}")
    return lines, list(dropped.values())


def answer_all(open_answerer, questions, path, args, autocast, rank, world):
    """Answers what `path` does not hold yet; each process its share, into a file of its own"""
    with open(path) as f:  # this file alone: others may be writing theirs already
        done = {line["row"] for line in map(json.loads, f) if "dropped" not in line}
    batches = in_batches([record for record in questions.records if record["row"] not in done], args.batch_size)
    with open(path if world == 1 else f"{path}.rank{rank}", "a") as f:
        for records in tqdm(batches[rank::world], desc=os.path.relpath(path, args.folder)[:-6],
                            disable=rank > 0 or not batches):
            with autocast():  # a new context for each batch: it holds its bf16 copies of weights until it ends
                lines = answer(open_answerer(), questions, records, args)
            f.writelines(json.dumps(line) + "\n" for line in lines)
            f.flush()


# ---- the program -----------------------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("runs", nargs="*", help="run directories; the first is the one the others are compared with")
parser.add_argument("--hf", nargs="+", default=[], metavar="ID",
                    help="hub ids or folders of image-text-to-text models of transformers, to be asked the same")
parser.add_argument("--data", default="scenes/test/vqa",
                    help="own questions: scenes/SPLIT/TASK, a .jsonl file, a parquet folder or a hub id")
parser.add_argument("--n", type=common.positive,
                    help="use only the first N rows of --data (default: all; of the drawn world 1800)")
parser.add_argument("--benchmarks", nargs="+", metavar="NAME",
                    help=f"instead of --data: all, paper (the sixteen), {', '.join(GROUPS)}, or any of "
                         f"{', '.join(BENCHMARKS)}")
parser.add_argument("--profile", choices=("paper", "lmms"), default="paper",
                    help="whose prompts and rules for benchmarks: Cambrian-1's, as in the paper, or lmms-eval's")
parser.add_argument("--copies", metavar="DIR",
                    help="look for a benchmark's data set in DIR/ORG/NAME before the hub (hf download ORG/NAME "
                         "--repo-type dataset --local-dir DIR/ORG/NAME)")
parser.add_argument("--limit", type=common.positive,
                    help="ask about some N random rows of each set; rows that count together stay together")
parser.add_argument("--score", choices=("decoded", "logprob"),
                    help="of benchmarks: score the text that is written, or where there are options the likeliest one "
                         "(default: decoded; own data are scored both ways)")
parser.add_argument("--blind", type=common.true_or_false, default=True,
                    help="ask everything a second time with a grey picture: true or false")
parser.add_argument("--out", help="folder to write; must not exist (not needed with --write_pairs)")
parser.add_argument("--resume", action="store_true",
                    help="go on with a run that was stopped, or add models and benchmarks to a finished one; the "
                         "tables show those that are named")
parser.add_argument("--gallery", type=common.whole_number, default=12, metavar="N",
                    help="at most so many questions of each set in report.html")
parser.add_argument("--batch_size", type=common.positive, default=128, help="questions a forward pass")
parser.add_argument("--max_new_tokens", type=common.positive,
                    help="longest answer in tokens (default: 48 for own data, a benchmark's own, 32 to 512)")
parser.add_argument("--reader", help="swap test: this run's connector and LLM read the vision encoder of every run")
parser.add_argument("--samples", type=common.positive, default=4, help="answers to a question, for --write_pairs")
parser.add_argument("--temperature", type=float, default=1.0, help="of the samples for --write_pairs")
parser.add_argument("--write_pairs",
                    help="write best-against-worst pairs of the first run's own samples to this .jsonl file, and stop")
parser.add_argument("--seed", type=int, default=0, help="of the drawn world, --limit, the samples and the bootstrap")

SAME = ("benchmarks", "data", "n", "profile", "limit", "score", "blind", "max_new_tokens", "reader", "seed")


def prepare_folder(args, models, sets):
    """OUT.tmp, emptied or with what a stopped run left there; raises InputError if that was another run"""
    settings = {flag: getattr(args, flag) for flag in SAME}
    settings["benchmarks"] = bool(args.benchmarks)  # others may be added
    settings["reader"] = args.reader and identity(args.reader, False)
    known = {"models": models, "sets": {name: common.digest(*(json.dumps(
        [record["row"], record["question"], record["options"], record["shared"]]) for record in questions.records))
        for name, questions in sets.items()}}
    saved = [each for each in (args.folder, args.out) if os.path.exists(os.path.join(each, "settings.json"))]
    if args.resume and os.path.exists(args.out) and saved != [args.out]:
        raise InputError(f"--resume: {args.out} holds no answers to go on from" if not saved else
                         f"--resume: both {args.out} and {args.folder} are there; remove one")
    if args.resume and saved:
        with open(os.path.join(saved[0], "settings.json")) as f:
            before = json.load(f)
        for flag in SAME:
            if before["settings"][flag] != settings[flag]:
                was, now = ("not given" if each is None else each
                            for each in (before["settings"][flag], settings[flag]))
                raise InputError(f"--resume: {saved[0]} was answered with another --{flag} ({was}; now {now}); use "
                                 "that, or another --out")
        for what in known:
            for name, contents in known[what].items():
                if before[what].get(name, contents) != contents:
                    raise InputError(f"--resume: {name or args.data} is not what it was when {saved[0]} was written; "
                                     "use another --out")
            known[what] = {**before[what], **known[what]}
        if saved == [args.out]:
            os.rename(args.out, args.folder)
    else:
        shutil.rmtree(args.folder, ignore_errors=True)
        os.makedirs(args.folder)
    common.write_json(os.path.join(args.folder, "settings.json"), {"settings": settings, **known})


def checked_arguments():
    """The flags, or InputError where they do not go together; `folder` is where answers are kept until all are there"""
    args = parser.parse_args()
    if not args.runs + args.hf:
        raise InputError("name a run directory (before --benchmarks, which takes all words behind it), or a model "
                         "behind --hf")
    if args.hf and args.reader:
        raise InputError("--reader swaps parts of runs: leave --hf out")
    if args.write_pairs and (not args.runs or args.temperature <= 0):
        raise InputError("--write_pairs samples from a run directory, at a --temperature above 0")
    if args.write_pairs and (parallel.WORLD > 1 or args.reader):
        raise InputError("--write_pairs samples from a run as it is, in one process: leave --reader and torchrun out")
    if args.write_pairs and os.path.exists(args.write_pairs):
        raise InputError(f"--write_pairs {args.write_pairs} exists already; remove it or choose another name")
    if not args.write_pairs and not args.out:
        raise InputError("--out is needed: a folder for the results")
    if args.benchmarks and (args.n or args.data != parser.get_default("data") or args.write_pairs):
        raise InputError("--benchmarks brings its own questions: leave --data, --n and --write_pairs out (--limit asks "
                         "fewer)")
    if args.copies and not os.path.isdir(args.copies):
        raise InputError(f"--copies {args.copies}: no such folder")
    if args.out:
        args.folder = args.out.rstrip("/") + ".tmp"
        if os.path.exists(args.out) and not args.resume:
            raise InputError(f"--out {args.out} exists already; remove it, choose another name, or --resume")
        answers = glob.glob(os.path.join(glob.escape(args.folder), "**", "*.jsonl*"), recursive=True)
        if any(map(os.path.getsize, answers)) and not args.resume:
            raise InputError(f"{args.folder} holds the answers of a run that was stopped: --resume goes on, or remove "
                             "it")
    args.benchmarks = args.benchmarks and benchmark_names(args.benchmarks)
    if args.score and not args.benchmarks:
        raise InputError("--score is for --benchmarks: own data are scored both ways")
    args.score = (args.score or "decoded") if args.benchmarks else "both"
    return args


def main():
    args = checked_arguments()
    rank, world = parallel.RANK, parallel.WORLD  # they only wait for each other; no tensors travel
    device, autocast = common.setup(args.seed)
    if args.benchmarks:
        sets = {name: b.Questions(BENCHMARKS[name], args.profile, args.copies, args.limit, args.seed)
                for name in args.benchmarks}
    else:
        n = args.n or (1800 if data.is_drawn(args.data) else None)
        sets = {"": OwnQuestions(args.data, n, args.seed, args.limit)}
    if args.write_pairs:
        with autocast():
            return write_pairs(Run(args.runs[0], device).model, sets[""], args)

    models = dict(zip(common.names(args.runs + args.hf), args.runs + args.hf))
    answers_path = lambda name, run: os.path.join(args.folder, name, f"{run}.jsonl")
    if rank == 0:
        prepare_folder(args, {run: identity(model, model in args.hf) for run, model in models.items()}, sets)
        for name, questions in sets.items():
            common.report_dropped(questions.dropped, 0)
            for run in models:
                gather(questions, answers_path(name, run), args.profile)
    parallel.wait()
    opened = {}

    def open_answerer(run):
        """The model of this name: opened when it is first asked, and then the only one in memory"""
        if run not in opened:
            opened.clear()
            opened[run] = HubModel(models[run], device) if models[run] in args.hf else \
                Run(models[run], device, args.reader)
        return opened[run]

    def draw_map(run, image, question, text):
        """Where each run looked; of other models it is not known which image token is where"""
        with autocast():
            return None if models[run] in args.hf else open_answerer(run).map(image, question, text)

    try:
        for run in models:
            for name, questions in sets.items():
                answer_all(lambda: open_answerer(run), questions, answers_path(name, run), args, autocast, rank, world)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the answers so far are in {args.folder}, and --resume goes on") from None
    parallel.wait()  # from here on the first process is alone
    if rank == 0:
        report({name: {run: gather(questions, answers_path(name, run), args.profile) for run in models}
                for name, questions in sets.items()}, sets, args, draw_map)


def report(gathered, sets, args, draw_map):
    """Compares the models, writes results.json, results.md and report.html, gives the folder its name, and prints"""
    lines, dropped = {}, {}
    for name, questions in sets.items():
        lines[name], dropped[name] = usable_lines(questions, gathered[name])
        common.report_dropped(dropped[name], 0)
    results = {"args": {flag: value for flag, value in vars(args).items() if flag != "folder"},
               "versions": common.versions()}
    if args.benchmarks:
        results["table"] = compare_benchmarks(sets, lines, dropped, args)
        results["averages"] = {run: averages(cells, PAPER) for run, cells in results["table"].items()}
        tables = benchmark_tables(results["table"], sets, PAPER, args)
        details = scorer_tables(results["table"], sets)
        notes = [f"prompts and rules of {'Cambrian-1' if args.profile == 'paper' else 'lmms-eval'} "
                 f"(profile {args.profile})"]
    else:
        results["table"], results["dropped"] = compare_own(sets[""], lines[""], args.seed), \
            sets[""].dropped + dropped[""]
        tables, details, notes = own_tables(results["table"], args), [], [f"questions of {args.data}"]
    with open(os.path.join(args.folder, "results.json"), "w") as f:
        json.dump(results, f, indent=1)
    sheets = [turned(*each) for each in tables + details]
    with open(os.path.join(args.folder, "results.md"), "w") as f:
        f.write(markdown(sheets))
    cards, n_flipped = flipped_cards(sets, lines, args, draw_map)
    notes += [f"{len(cards)} of the {n_flipped} questions that another model gets right or wrong unlike the first, "
              "drawn at random"] * bool(n_flipped)
    gallery.write(os.path.join(args.folder, "report.html"), "What can the models answer?",
                  notes + ["blind: the same questions with a grey picture"] * args.blind,
                  sheets, cards)
    os.rename(args.folder, args.out)
    for each in tables:
        common.print_table(*each)
    print(f"wrote {args.out}/results.json, results.md, report.html and every answer beside them")


if __name__ == "__main__":
    common.cli(main)
