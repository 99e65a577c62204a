"""
Rewards: how good is an answer? Pure functions (prediction, record) -> float in [0, 1], one for each kind of question.

The kinds are those of VLAA-Thinker's mixed reward (arXiv 2504.11468): rules for what has one right answer
(digit, letter, math), overlap for boxes (iou), a reward model for what is said freely (open); and two for the drawn
world: `exact`, and `place`, an overlap too, as a place is a box there. A record names its kind in its field "reward".
"""
import math
import re

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from metrics import normalise
from model import InputError, opened
from scenes import PLACES, SIDE

NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+"  # 1,000 and 1e-3 and -.5; 2,3 are two
THINK = ("You are a helpful assistant. Think about the question first, then answer it: write your reasoning between "
         "<think> and </think>, and after it the answer alone between <answer> and </answer>.")


def final_answer(prediction):
    """What stands between the last <answer> and its </answer>; None if there is no such pair"""
    found = re.findall(r"<answer>(.*?)</answer>", prediction, re.DOTALL)
    return found[-1].strip() if found else None


def exact(prediction, record):
    """The same text, but for case, spaces and a full stop"""
    return float(normalise(prediction) == normalise(record["answer"]))


def digit(prediction, record):
    """The last number of both is the same (CLEVR-Math)"""
    said, true = ([float(number.replace(",", "")) for number in re.findall(NUMBER, text)]
                  for text in (prediction, record["answer"]))
    return float(bool(said and true) and said[-1] == true[-1])


def letter(prediction, record):
    """The option's letter: alone, in brackets or before its text (GeoQA170K, ArxivQA)"""
    said, true = (re.match(r"\W*([A-Z])\b(?!['’])", text) for text in (prediction, record["answer"].upper()))
    return float(bool(said and true) and said[1] == true[1])


def mathematical(prediction, record):
    """Equal as mathematics, by the package math-verify (Math PUMA)"""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError("the reward 'math' needs a package: pip install math-verify") from None
    wrapped = lambda text: text if "$" in text or "\\boxed" in text else f"${text}$"
    return float(verify(parse(wrapped(record["answer"])), parse(wrapped(prediction))))


def overlap(a, b):
    """Intersection over union of two boxes (x0,y0,x1,y1)"""
    area = lambda box: max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
    common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - common
    return common / union if union > 0 else 0.0


def four_numbers(text):
    """The first four numbers of a text, as a box; None if there are fewer"""
    found = re.findall(r"-?\d+(?:\.\d+)?|-?\.\d+", text)  # not NUMBER: 10,200 are two sides here
    return [float(number) for number in found[:4]] if len(found) >= 4 else None


def iou(prediction, record):
    """Overlap of the box that is written with the right one: `box`, or the four numbers of the answer (COCO, VG)"""
    said, true = four_numbers(prediction), record.get("box") or four_numbers(record["answer"])
    return overlap(said, true) if said and true else 0.0


def place(prediction, record):
    """Drawn world: overlap of the cell that a place names with the object's box"""
    name = normalise(prediction)
    if name not in PLACES:
        return 0.0
    (y, x), cell = divmod(PLACES.index(name), SIDE), record["image"].width / SIDE
    return overlap((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell), record["box"])


class RewardModel:
    """S(question, answer): the score of a sequence classifier with one output, hub id or folder"""

    def __init__(self, name, device):
        model, found = opened(AutoModelForSequenceClassification, name, output_loading_info=True)
        if found["missing_keys"] or model.config.num_labels != 1:
            raise InputError(f"--reward_model {name} is no reward model: it gives {model.config.num_labels} numbers, "
                             f"must give one; its missing weights: {sorted(found['missing_keys'])}")
        self.model = model.to(device).eval()
        self.tokenizer = opened(AutoTokenizer, name)

    @torch.no_grad()
    def __call__(self, question, answer):
        inputs = self.tokenizer(question, answer, return_tensors="pt", truncation=True).to(self.model.device)
        return float(self.model(**inputs).logits[0, 0])


def open_ended(prediction, record, score, beta):
    """1 - exp(-beta * (S(prediction) - S(answer))) if the model of rewards likes the prediction better, else 0
    (VLAA-Thinker). score: (question, answer) -> float"""
    better = score(record["question"], prediction) - score(record["question"], record["answer"])
    return 1 - math.exp(-beta * better) if better > 0 else 0.0


KINDS = {"exact": exact, "digit": digit, "letter": letter, "math": mathematical, "iou": iou, "place": place,
         "open": open_ended}
