"""
What can the model answer? Greedy answers of one or several runs to the same questions, scored and compared.

    python eval_vqa.py runs/stage1 runs/sft runs/dpo --out runs/vqa                 the drawn world's test questions
    python eval_vqa.py runs/stage1 runs/dpo --data test.jsonl --out runs/my_vqa     your own {image, question, answer}
    python eval_vqa.py runs/stage1 --data train.jsonl --samples 4 --write_pairs pairs.jsonl
                                                                                    preference pairs from own samples

Each answer is scored twice. *Decoded*: the text the model writes must be the answer. *Restricted*: which of the
candidate answers (those that occur for this kind of question, where there are 2 to 40) has the highest
log-probability? A model that has taken up another style of speaking fails the first and may pass the second, so that a
change of style is not mistaken for a change of sight. *Blind* is the restricted score with a grey picture: what the
words of the question alone are worth.

The *swap test*, `--reader runs/stage1`, lets stage 1's connector and LLM read each run's encoder: what is lost then was
lost in the encoder, or at least moved to where its old reader does not find it.

Writes OUT/results.json and OUT/NAME.jsonl, every prediction of every run. Intervals are 95 % bootstraps over questions;
the first run is the one that the others are compared with, question by question.
"""
import argparse
import json
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
import data
from model import MLLM, InputError
from trees import pack

parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
parser.add_argument("runs", nargs="+", help="run directories; the first is the one the others are compared with")
parser.add_argument("--data", default="scenes/test/vqa",
                    help="questions: scenes/SPLIT/TASK, a .jsonl file, a parquet folder or a hub id")
parser.add_argument("--n", type=int, help="use only the first N rows (default: all; of the drawn world 1800)")
parser.add_argument("--out", help="folder to write; must not exist (not needed with --write_pairs)")
parser.add_argument("--batch_size", type=int, default=128, help="questions a forward pass, candidate answers included")
parser.add_argument("--max_new_tokens", type=int, default=48, help="longest answer in tokens")
parser.add_argument("--reader", help="swap test: this run's connector and LLM read the vision encoder of every run")
parser.add_argument("--samples", type=int, default=4, help="answers sampled for a question by --write_pairs")
parser.add_argument("--temperature", type=float, default=1.0, help="of the samples for --write_pairs")
parser.add_argument("--write_pairs",
                    help="write best-against-worst pairs of the first run's own samples to this .jsonl file, and stop")
parser.add_argument("--seed", type=int, default=0, help="of the drawn world, the samples and the bootstrap")


# ---- scoring: pure functions -----------------------------------------------------------------------------------------


def normalise(text):
    """Lower case, single spaces, no full stop at the end"""
    return " ".join(text.lower().split()).rstrip(".").strip()


def score(prediction, answer):
    """How right is a prediction, in [0, 1]: the same text; F1 of the parts for an answer of several, between commas.

    score("red", "Red.") = 1, score("red, blue", "red") = 0, score("red ring, blue box", "red ring, green box") = 1/2"""
    said, true = ([normalise(part) for part in text.split(",")] for text in (prediction, answer))
    if len(true) == 1:
        return float(said == true)
    return 2 * (Counter(said) & Counter(true)).total() / (len(said) + len(true))


def interval(values, seed):
    """Mean of `values` (R,) and its 95 % bootstrap interval over rows -> [mean, low, high]"""
    draws = common.bootstrap(lambda rows: values[rows].mean(), len(values), seed)
    return [float(values.mean()), *np.quantile(draws, [.025, .975]).tolist()]


# ---- answering -------------------------------------------------------------------------------------------------------


def candidates(records):
    """{kind: distinct answers, as first spelt}, for kinds with 2 to 40 of them; open questions offer no choice"""
    answers = {}
    for record in records:
        answers.setdefault(kind_of(record), {}).setdefault(normalise(record["answer"]), record["answer"])
    return {kind: [found[a] for a in sorted(found)] for kind, found in answers.items() if 2 <= len(found) <= 40}


def kind_of(record):
    return record.get("kind") or record.get("category") or "all"


@torch.no_grad()
def choose(model, pixels, records, options, batch_size=64):
    """The candidate with the highest summed log-probability, end of turn included; None where there are no candidates.

    pixels (B,3,H,W) -> list of B strings"""
    choices = [None] * len(records)
    asked = [b for b, record in enumerate(records) if options.get(kind_of(record))]
    if not asked:
        return choices
    image_tokens = model.image_tokens(pixels.to(model.device))
    for at in range(0, len(asked), batch_size):
        part, trees = asked[at:at + batch_size], []
        for b in part:  # all candidates are branches of one question
            responses = [model.chat.response_ids(option) for option in options[kind_of(records[b])]]
            trees.append([(model.chat.question_ids(records[b]["question"]), responses)])
        batch = pack([model.chat.trunk_ids(model.n_image, b) for b in part], trees, pixels, model.chat.pad_id)
        batch = batch.to(model.device)
        logps = iter(batch.per_response(model.response_logps(batch, image_tokens)).tolist())
        for b in part:
            choices[b] = max((next(logps), option) for option in options[kind_of(records[b])])[1]
    return choices


def read_records(rows):
    """All usable records of `rows`; the others are named and counted"""
    records, n_dropped = [], 0
    for i in range(len(rows)):
        try:
            records.append(rows[i])
        except data.BadRow as error:
            n_dropped = common.report_dropped([str(error)], n_dropped)
    if not records:
        raise SystemExit(f"{rows.source}: none of {len(rows)} rows can be used")
    return records


def answer_all(model, records, args, name):
    """-> one dict a record: prediction, choice, blind, and whether each is right"""
    options, results, chunks = candidates(records), [], range(0, len(records), args.batch_size)
    for at in tqdm(chunks, desc=name):
        chunk = records[at:at + args.batch_size]
        images = [record["image"] for record in chunk]
        grey = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
        predictions = model.generate(images, [record["question"] for record in chunk], args.max_new_tokens)
        choices = choose(model, model.pixels(images), chunk, options, args.batch_size)
        blind = choose(model, model.pixels(grey), chunk, options, args.batch_size)
        for record, prediction, choice, guess in zip(chunk, predictions, choices, blind):
            right = lambda text: None if text is None else score(text, record["answer"])
            results.append({**{k: record.get(k) for k in ("row", "question", "answer", "kind", "category")},
                            "prediction": prediction, "choice": choice, "blind": guess,
                            "decoded": right(prediction), "restricted": right(choice), "blind_score": right(guess)})
    return results


def load(run, reader=None):
    """A run; with `reader` (a run directory) its vision encoder behind the reader's connector and LLM"""
    model = MLLM.load(run)
    if reader:
        other = MLLM.load(reader)
        shape = lambda m: (m.grid, m.pool, m.vision.config.hidden_size)
        if shape(model) != shape(other):
            raise InputError(f"--reader {reader} reads features of another shape than {run} has")
        for part in ("connector", "llm", "tokenizer", "chat"):
            setattr(model, part, getattr(other, part))
    return model


def groups(results):
    """{name: row numbers}: everything, each category, each kind"""
    found = {"all": list(range(len(results)))}
    for i, result in enumerate(results):
        for name in dict.fromkeys((result["category"], result["kind"])):
            if name is None:
                continue
            found.setdefault(name, []).append(i)
    return found


def compare(results, seed):
    """{run: results} -> {run: {group: {measure: [mean, low, high], measure + "_vs_first": [...], "n": rows}}}"""
    first, table = next(iter(results.values())), {}
    for run, rows in results.items():
        table[run] = {}
        for group, members in groups(rows).items():
            cell = {"n": len(members)}
            for measure in ("decoded", "restricted", "blind_score"):
                usable = [i for i in members if rows[i][measure] is not None]
                if usable:
                    values = np.array([rows[i][measure] for i in usable])
                    cell[measure] = interval(values, seed)
                    cell[measure + "_vs_first"] = interval(values - [first[i][measure] for i in usable], seed)
            table[run][group] = cell
    return table


# ---- preference pairs from own samples -------------------------------------------------------------------------------


def write_pairs(model, rows, args):
    """Samples --samples answers a question and pairs the best with the worst,
    judged by `score` against the known answer.

    A question whose samples are all equally good teaches no preference: it is left out and counted."""
    if os.path.exists(args.write_pairs):
        raise InputError(f"--write_pairs {args.write_pairs} exists already; remove it or choose another name")
    folder, written, n_flat = os.path.dirname(os.path.abspath(args.write_pairs)), 0, 0
    os.makedirs(folder, exist_ok=True)
    records = read_records(rows)
    with open(args.write_pairs + ".tmp", "w") as f:
        for at in tqdm(range(0, len(records), args.batch_size), desc="pairs"):
            chunk = records[at:at + args.batch_size]
            images, questions = [r["image"] for r in chunk], [r["question"] for r in chunk]
            samples = [model.generate(images, questions, args.max_new_tokens, args.temperature)
                       for _ in range(args.samples)]
            for record, *said in zip(chunk, *samples):
                said = [text for text in said if text]                      # an empty answer is no answer to learn from
                scores = [score(text, record["answer"]) for text in said]
                if not scores or max(scores) == min(scores):
                    n_flat += 1
                    continue
                path = rows.raw(rows.locate(record["row"])[0]).get("image")
                if isinstance(path, str) and rows.folder is not None:
                    path = os.path.relpath(os.path.join(rows.folder, path), folder)
                else:                                                       # a drawn or a hub picture has no file yet
                    path = f"{os.path.splitext(os.path.basename(args.write_pairs))[0]}_images/{record['row']}.png"
                    os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
                    record["image"].save(os.path.join(folder, path))
                f.write(json.dumps({"image": path, "question": record["question"],
                                    "chosen": said[int(np.argmax(scores))], "rejected": said[int(np.argmin(scores))],
                                    "chosen_score": max(scores), "rejected_score": min(scores)}) + "\n")
                written += 1
    os.replace(args.write_pairs + ".tmp", args.write_pairs)
    print(f"wrote {written} pairs to {args.write_pairs}; "
          f"{n_flat} of {len(records)} questions had samples that were all equally good")


def main():
    args = parser.parse_args()
    if not args.write_pairs:
        if not args.out:
            raise SystemExit("--out is needed: a folder for the results")
        common.check_out(args.out)
    device, autocast = common.setup(args.seed)
    n = args.n or (1800 if data.is_drawn(args.data) else None)
    rows = data.load(args.data, "vqa", n, args.seed)
    if args.write_pairs:
        with autocast():
            return write_pairs(MLLM.load(args.runs[0]).to(device).eval(), rows, args)

    records, results = read_records(rows), {}
    for run, name in zip(args.runs, common.names(args.runs)):
        with autocast():
            results[name] = answer_all(load(run, args.reader).to(device).eval(), records, args, name)
    table = compare(results, args.seed)
    with common.whole_folder(args.out) as folder:
        for name, answers in results.items():
            with open(os.path.join(folder, f"{name}.jsonl"), "w") as f:
                f.writelines(json.dumps(answer) + "\n" for answer in answers)
        with open(os.path.join(folder, "results.json"), "w") as f:
            json.dump({"args": vars(args), "versions": common.versions(), "table": table}, f, indent=1)

    first = next(iter(table))
    for measure in ("decoded", "restricted", "blind_score"):
        names = [g for g in table[first] if measure in table[first][g]]
        lines = [[run, *(common.percent(table[run][g][measure]) for g in names)] for run in table]
        common.print_table(f"{measure}, % right [95 % interval over {len(records)} questions of {args.data}]",
                           ["run", *names], lines)
    lines = [[run, *(f"{common.percent(table[run][g][m + '_vs_first'], sign=True)}" for m in ("decoded", "restricted")
                     for g in ("all", "vision-centric", "knowledge") if m in table[run].get(g, {}))]
             for run in list(table)[1:]]
    if lines:
        heads = [f"{m} {g}" for m in ("decoded", "restricted") for g in ("all", "vision-centric", "knowledge")
                 if m in table[first].get(g, {})]
        common.print_table(f"difference to {first}, question by question [95 % interval]", ["run", *heads], lines)
    print(f"wrote {args.out}/results.json and every prediction beside it")


if __name__ == "__main__":
    common.cli(main)
