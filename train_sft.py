"""
Supervised fine-tuning: the model imitates the answers. It serves twice:

    stage 1   from random weights or from hub weights to a model that answers (the shared start of all arms)
    stage 2   from a run, on the chosen answers of preference pairs (the arm that DPO is compared with)

    python train_sft.py --optimizer muon --batch_size 96 --n 57600 --out runs/stage1   drawn world, tiny model, minutes
    python train_sft.py --init runs/stage1 --data pairs.jsonl --lr 1e-3 --epochs 3 --out runs/sft   stage 2: `chosen`
    python train_sft.py --vision google/siglip2-so400m-patch16-384 --llm Qwen/Qwen2.5-1.5B-Instruct \\
        --lr_vision 0 --lr_llm 0 --lr 1e-3 --data captions.jsonl --out runs/connector   connector first, as LLaVA does

The loss is the mean of -log p over all response tokens of the *step*: micro-batches are divided by the step's
token count, so that accumulation gives the gradient of the full batch whatever the lengths are.

Left out of the paper's method (PIVOT, arXiv 2510.16333, appendix E.1): its "plain" template for the connector stage,
fp16 and ZeRO over eight GPUs, sampling by length, and the stray prompt tokens that its released label mask leaves
in the loss.
"""
import argparse
import os
import re
import tempfile

from tqdm import tqdm

import common
import data
import scenes
from model import MLLM, InputError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="scenes/train/sft",
                    help="rows to learn: scenes/SPLIT/TASK, a .jsonl file, a parquet folder or a hub id")
parser.add_argument("--init",
                    help="run directory to start from; without it --vision and --llm are joined by a fresh connector")
parser.add_argument("--vision",
                    help="vision encoder: hub id, folder, or tiny (random, 36 px, patch 6; the default), "
                         "tiny-64-8 (64 px, patch 8), ...")
parser.add_argument("--llm",
                    help="LLM with a chat template: hub id, folder, or tiny (random, words of --data; the default)")
parser.add_argument("--feature_layer", type=int,
                    help="encoder layer the LLM reads, as an index of hidden_states (default and paper: -2)")
parser.add_argument("--pool", type=int,
                    help="fold POOL x POOL patches into one image token (default: 2 for tiny, else 1)")
common.add_training_flags(parser, lr=4e-3, epochs=1, batch_size=64)


def start(args):
    """The model to train: a run, or a fresh connector between two parts"""
    if args.init:
        if args.vision or args.llm or args.feature_layer is not None or args.pool:
            raise InputError(f"--init {args.init} brings --vision, --llm, --feature_layer and --pool: leave them out")
        return MLLM.load(args.init)
    with tempfile.TemporaryDirectory() as folder:
        vision, llm = args.vision or "tiny", args.llm or "tiny"
        tiny = re.fullmatch(r"tiny(?:-(\d+)-(\d+))?", vision)
        if tiny:
            vision = os.path.join(folder, "vision")
            scenes.tiny_vision(vision, *(int(size) for size in tiny.groups() if size))
        if llm == "tiny":
            llm = os.path.join(folder, "llm")
            scenes.tiny_llm(llm, data.texts(args.data))
        feature_layer = -2 if args.feature_layer is None else args.feature_layer
        return MLLM.from_pretrained(vision, llm, feature_layer, args.pool or (2 if tiny else 1))


def main():
    args = parser.parse_args()
    common.check_out(args.out)
    device, autocast = common.setup(args.seed, args.matmul)

    # ---- model and data
    model = start(args)
    rows, micro_batch = data.load(args.data, "sft", args.n, args.seed), args.micro_batch or args.batch_size
    collator = data.Collator(rows, model, ("answer",), args.max_length)
    trees = rows.trees(min(args.questions_per_tree, args.batch_size))
    steps = data.order(trees, args.batch_size, args.epochs, args.seed, args.steps)
    model.to(device).train()
    optimizer = common.Optimizer(model, args, len(steps))  # also freezes the parts whose rate is 0
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    if args.compile:
        model.compile_hot_path()
    run = common.Run(args, model, len(steps), parent=args.init, data=args.data, rows=len(rows), trees=len(trees))
    drift = common.Drift(model)
    print(f"example     {data.show(model, collator)}\n")

    # ---- train
    n_dropped, bar = 0, tqdm(data.batches(collator, steps, micro_batch, args.workers), total=len(steps), desc="sft")
    for step, micro_batches in enumerate(bar):
        for _, dropped in micro_batches:
            n_dropped = common.report_dropped(dropped, n_dropped)
        step_batches = [batch for batch, _ in micro_batches if batch is not None]
        if not step_batches:
            continue  # every row of the step was dropped, and said so
        n_tokens = sum(len(batch.targets) for batch in step_batches)
        loss = 0.0
        for batch in step_batches:
            with autocast():
                logps = model.response_logps(batch.to(device))                  # (M,)
            micro_loss = -logps.sum() / n_tokens                                # its share in the step's token mean
            micro_loss.backward()
            loss += micro_loss.detach()
        stats = {"loss": loss, **optimizer.step(step)}
        if run.step(step, stats, lambda: {**drift(), "tokens": n_tokens, "dropped": n_dropped,
                                          "peak_mb": common.peak_memory_mb(device)}):
            bar.set_postfix(loss=f"{float(loss):.3f}")
    if n_dropped == sum(len(tree) for step in steps for tree in step):
        raise SystemExit(f"--data {args.data}: not one row could be used")
    run.finish()


if __name__ == "__main__":
    common.cli(main)
