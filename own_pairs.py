"""
Preference pairs from a model's own samples: `python eval_vqa.py RUN --data train.jsonl --write_pairs pairs.jsonl`.
"""
import json
import os

import numpy as np
from tqdm import tqdm

from metrics import score
from model import InputError


def write_pairs(model, questions, args):
    """Samples --samples answers to each of eval_vqa's OwnQuestions and pairs the best with the worst, judged by `score`
    against the known answer.

    A question whose samples are all equally good teaches no preference: it is left out and counted."""
    folder, written, n_flat = os.path.dirname(os.path.abspath(args.write_pairs)), 0, 0
    rows, records, tokens = questions.rows, questions.records, args.max_new_tokens or questions.benchmark.tokens
    if not hasattr(rows, "raw"):
        raise InputError(f"--data {args.data} stands for several sets: name one")
    os.makedirs(folder, exist_ok=True)
    with open(args.write_pairs + ".tmp", "w") as f:
        for at in tqdm(range(0, len(records), args.batch_size), desc="pairs"):
            chunk = records[at:at + args.batch_size]
            images, texts = [questions.picture(record) for record in chunk], [record["question"] for record in chunk]
            samples = [model.generate(images, texts, tokens, args.temperature) for _ in range(args.samples)]
            for record, image, *said in zip(chunk, images, *samples):
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
                    image.save(os.path.join(folder, path))
                f.write(json.dumps({"image": path, "question": record["question"],
                                    "chosen": said[int(np.argmax(scores))], "rejected": said[int(np.argmin(scores))],
                                    "chosen_score": max(scores), "rejected_score": min(scores)}) + "\n")
                written += 1
    os.replace(args.write_pairs + ".tmp", args.write_pairs)
    print(f"wrote {written} pairs to {args.write_pairs}; "
          f"{n_flat} of {len(records)} questions had samples that were all equally good")
