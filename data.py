"""
Data: records -> chat text -> tensors.

A record is one question about one picture:

    {"image", "question", "answer"}                 to imitate (SFT) or to score (VQA)
    {"image", "question", "chosen", "rejected"}     a preference pair (the field names of MMPR and RLAIF-V)

with "category", "kind", "box", "mask" where known. `image` is a path relative to the JSONL file,
or a PIL picture. `--data` takes one or more of

    scenes/train/sft        the drawn world: scenes/SPLIT/TASK, see scenes.py
    scenes/train/sft/4      the same with four questions about each picture
    noisy/train/sft         the same world under heavy pixel noise
    my_rows.jsonl           one record a line, pictures beside it
    rlaif-v, llava-next     names, hub ids and parquet files, of which sources.py knows the forms

    python data.py prepare mmpr-v1.2 --out data/mmpr     sets that come as archives -> rows.jsonl and pictures
    python data.py show data/mmpr/rows.jsonl --n 8       a contact sheet with text
    python data.py check data/mmpr/rows.jsonl            which rows cannot be used, and the tokens that bear loss

A row that cannot be used is never repaired: it is dropped and counted, and the first few are named.
"""
import hashlib
import itertools
import math
import signal
from array import array

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import parallel
from model import SYSTEM, InputError, to_pixels
from rows import BadRow, Nested, Stream, check_weights, is_drawn, load
from trees import cut, pack


def plan(args, kind):
    """The flags about data -> the rows, and for every step its trees: lists of row numbers that share a picture"""
    limit = min(args.questions_per_tree, args.batch_size)
    if args.stream:
        if not args.steps:
            raise InputError("--stream needs --steps: a stream does not say when it ends")
        stream = Stream(args.data, kind, args.batch_size, args.steps, limit, args.stream, args.seed, args.n,
                        args.weights)
        return stream, stream
    check_weights(args.weights, len(args.data))
    rows = load(args.data, kind, args.n, args.seed)
    return rows, order(rows.trees(limit), args.batch_size, args.epochs, args.seed, args.steps, args.weights)


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
                        raise BadRow(f"{record['name']}: {longest} tokens, --max_length is {self.max_length}")
                except BadRow as error:
                    dropped.append(str(error))
                    continue
                questions.append((question, answers))
                numbers.append((record["row"], len(images)))
                image = record["image"]
            if questions:
                packed.append(questions)
                images.append(image)
        if not images:
            return None, dropped
        pixels = to_pixels(self.image_processor, images)
        trunks = [self.chat.trunk_ids(self.n_image, i) for i in range(len(images))]
        batch = pack(trunks, packed, pixels, self.chat.pad_id)
        # a fingerprint of all that is read of a row: DPO's remembered reference refuses a row that has changed
        seen = [hashlib.blake2b(repr(trunks[0]).encode() + p.numpy().tobytes(), digest_size=8) for p in pixels]
        for (number, i), question in zip(numbers, (q for questions in packed for q in questions)):
            fingerprint = seen[i].copy()
            fingerprint.update(repr(question).encode())
            batch.rows += (number, int.from_bytes(fingerprint.digest(), "big", signed=True)),
        return batch, dropped


def epoch_order(trees, generator, weights):
    """The numbers of an epoch's trees: all in any order, or with `weights` so many trees of each source of a Mixture
    that it has its share of the pictures; a source that is too small comes round again, in another order"""
    if weights is None:
        return torch.randperm(len(trees), generator=generator)
    drawn, start = [], 0
    for size, pictures, weight in zip(trees.sizes, trees.pictures, weights, strict=True):
        count = round(weight / sum(weights) * trees.n_pictures * size / pictures)
        if not count:
            raise InputError(f"--weights {weight:g}: so small a share is not one of {trees.n_pictures} pictures")
        rounds = [start + torch.randperm(size, generator=generator) for _ in range(math.ceil(count / size))]
        drawn.append(torch.cat(rounds)[:count])
        start += size
    drawn = torch.cat(drawn)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def order(trees, batch_size, epochs, seed, steps=None, weights=None):
    """The trees of every step: `epochs` seeded shuffles of `trees` cut into steps of at most `batch_size` rows, the
    remainder of an epoch included; or, if `steps` is given, as many shuffles as that many steps take.

    A function of its arguments alone, so two arms with the same seed read the same rows in the same order."""
    rows, tree_starts, step_starts, epoch = array("q"), array("q", [0]), array("q", [0]), 0
    while (epoch < epochs) if steps is None else (len(step_starts) <= steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for step in cut((trees[i] for i in epoch_order(trees, generator, weights).numpy()), batch_size):
            for tree in step:
                rows.extend(tree)
                tree_starts.append(len(rows))
            step_starts.append(len(tree_starts) - 1)
            if steps is not None and len(step_starts) > steps:
                break
        epoch += 1
    return Nested(Nested(np.array(rows), np.array(tree_starts)), np.array(step_starts))


def ignore_signals(_):
    """Ctrl-C and SIGTERM reach workers too, but it is the training process that has to end the step"""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Identity(torch.utils.data.Dataset):
    """What a DataLoader asks for, it gets: the sampler brings the trees, the collator reads them"""

    def __getitem__(self, trees):
        return trees


def batches(collator, steps, micro_batch, workers=0, first=0, rank=parallel.RANK, world=parallel.WORLD):
    """Yields for each step, from step number `first` on, the list of its micro-batches [(Batch, dropped), ...] of at
    most `micro_batch` rows; of `world` processes, the one with this `rank` gets its share of the step's trees. Pictures
    are decoded by `workers` processes, ahead of the step that needs them. What comes before `first` is passed over,
    undecoded."""
    if not len(steps):
        return
    planned, read = itertools.tee(list(cut(step[rank::world], micro_batch))
                                  for step in itertools.islice(steps, first, None))
    n_parts = math.ceil(steps.batch_size / micro_batch) if isinstance(steps, Stream) else \
        len(list(cut(steps[0], micro_batch)))
    ahead = math.ceil(n_parts / workers) + 1 if workers else None               # a worker's share of a step, and one
    loader = iter(DataLoader(Identity(), batch_size=None, sampler=(part for parts in planned for part in parts),
                             collate_fn=collator, num_workers=workers, prefetch_factor=ahead,
                             worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
                             generator=torch.Generator()))  # or it would take a number from everybody's
    for parts in read:
        yield list(itertools.islice(loader, len(parts)))


def empty_batch(model):
    """A Batch without responses, for a process that has no rows in a step: its loss and all its gradients are 0"""
    return pack([model.chat.trunk_ids(model.n_image)], [[]], model.pixels([Image.new("RGB", (32, 32))]),
                model.chat.pad_id)


def texts(sources, n=2000):
    """Text for a tiny tokenizer: the first rows of `sources`,
    and of the drawn world its foreign style too (a real LLM knows its words)"""
    for source in [sources] if isinstance(sources, str) else sources:
        for each in [source, "scenes/train/foreign", "scenes/train/plain"] if is_drawn(source) else [source]:
            rows = load(each, "pairs" if is_drawn(each) and each.endswith(("foreign", "plain")) else "sft", n)
            for i in range(min(n, len(rows))):
                row = rows.text(i)
                fields = ("question", "answer", "chosen", "rejected")
                yield from (row[field] for field in fields if isinstance(row.get(field), str))
    yield from ["system\n" + SYSTEM, "user\n", "assistant\n"] * 2  # the template's words; BPE wants to see each twice


def show(model, collator, number=0):
    """One example as the loss sees it: the text, with the tokens that bear loss in [[ ]]
    and the picture as <image x N>"""
    if isinstance(collator.rows, Stream):
        number = collator.rows.first()
    batch, dropped = collator([[number]])
    if batch is None:
        return f"the first row cannot be used: {dropped[0]}"
    prompt, decode = batch.input_ids[0, :batch.logit_at[0] + 1].tolist(), model.tokenizer.decode
    first = next(i for i, token in enumerate(prompt) if token < 0)
    before, after = decode(prompt[:first]), decode(prompt[first + model.n_image:])
    responses = [decode(batch.targets[batch.response_of == r]) for r in range(batch.n_responses)]
    return "\n".join(f"{before}<image x {model.n_image}>{after}[[{response}]]" for response in responses)


if __name__ == "__main__":
    import prepare  # only here: training needs none of it
    prepare.main()
