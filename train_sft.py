"""
Supervised fine-tuning: the model imitates the answers. It serves three times:

    stage 1   from random weights or from hub weights to a model that answers (the shared start of all arms)
    stage 2   from a run, on the chosen answers of preference pairs (the arm that DPO is compared with)
    stage 3   the transplant: what is a post-trained encoder, frozen, worth to the next model? (transplant.sh)

    python train_sft.py --optimizer muon --batch_size 96 --n 57600 --out runs/stage1   drawn world, tiny model, minutes
    python train_sft.py --init runs/stage1 --data pairs.jsonl --lr 1e-3 --epochs 3 --out runs/sft   stage 2: `chosen`
    python train_sft.py --vision google/siglip2-so400m-patch16-384 --llm Qwen/Qwen2.5-1.5B-Instruct \\
        --lr_vision 0 --lr_llm 0 --lr 1e-3 --data captions.jsonl --out runs/connector   connector first, as LLaVA does
    python train_sft.py --vision runs/dpo/vision --lr_vision 0 --pool 2 --optimizer muon --out runs/transplant
                                                        a fresh connector and LLM on a frozen encoder (PIVOT's stage 3)

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
from collections import defaultdict

import torch

import checkpoints
import common
import data
import parallel
import scenes
import training
from model import MLLM, InputError, read_tensors

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("--data", nargs="+", default=["scenes/train/sft"],
                    help="rows to learn: scenes/SPLIT/TASK, a .jsonl file, parquet files, a name of sources.py or a "
                         "hub id; SOURCE[:500] and SOURCE[:10%%] take the first rows of a file or set")
parser.add_argument("--init",
                    help="run directory to start from; without it --vision and --llm are joined by a fresh connector")
parser.add_argument("--vision",
                    help="vision encoder: hub id, folder, or tiny (random, 36 px, patch 6; the default), "
                         "tiny-64-8 (64 px, patch 8), tiny-36-12-32-4 (also width and layers), ...")
parser.add_argument("--llm",
                    help="LLM with a chat template: hub id, folder, or tiny (random, words of --data; the default), "
                         "tiny-256-6 (also width and layers)")
parser.add_argument("--feature_layer", type=int,
                    help="encoder layer the LLM reads, as an index of hidden_states (default: what an exported encoder "
                         "says of itself, else the paper's -2)")
parser.add_argument("--image_size", type=common.positive, metavar="PIXELS",
                    help="side of the pictures that the encoder reads; other than its own, its positions are "
                         "interpolated (default: its own)")
parser.add_argument("--pool", type=common.positive,
                    help="fold POOL x POOL patches into one image token (default: 2 for tiny, else 1)")
parser.add_argument("--connector", choices=("mlp", "linear"),
                    help="a fresh connector's shape: Linear-GELU-Linear (default) or one Linear, which cannot see for "
                         "the encoder")
parser.add_argument("--connector_from", metavar="RUN",
                    help="take the first layers of this run's connector instead of random ones, and keep them frozen")
parser.add_argument("--keep_layers", type=int, choices=(1, 2),
                    help="how many layers of --connector_from to take (default 1: PIVOT's \"1+1\", one kept, one new)")
parser.add_argument("--max_drift", type=float,
                    help="stop once the vision encoder has moved so far, |w - w0| / |w0| (looked at every --log_every "
                         "steps): a control that moves as far as another arm did")
training.add_training_flags(parser, lr=4e-3, epochs=1, batch_size=64)


def start(args):
    """The model to train: a run, or a fresh connector between two parts"""
    if args.init:
        given = [flag for flag in ("vision", "llm", "feature_layer", "image_size", "pool", "connector",
                                   "connector_from", "keep_layers")
                 if getattr(args, flag) is not None]
        if given:
            raise InputError(f"--init {args.init} brings its own {', '.join(given)}: leave --{given[0]} out")
        return MLLM.load(args.init)
    kept = kept_layers(args)
    with tempfile.TemporaryDirectory() as folder:
        vision, llm = args.vision or "tiny", args.llm or "tiny"
        tiny = re.fullmatch(r"tiny(?:-(\d+)-(\d+)(?:-(\d+)-(\d+))?)?", vision)
        if tiny:
            vision = os.path.join(folder, "vision")
            # a random encoder that stays frozen is a control: its LLM has to start as that of the other arms does
            with torch.random.fork_rng(enabled=args.lr_vision == 0):
                scenes.tiny_vision(vision, *(int(size) for size in tiny.groups() if size))
        if tiny_llm := re.fullmatch(r"tiny(?:-(\d+)-(\d+))?", llm):
            if args.stream:
                raise InputError("--llm tiny learns its words from --data, which --stream does not load: name an --llm")
            llm = os.path.join(folder, "llm")
            scenes.tiny_llm(llm, data.texts(args.data), *(int(size) for size in tiny_llm.groups() if size))
        hidden = 0 if args.connector == "linear" else len(kept["up.weight"]) if kept else None  # None: the LLM's width
        model = MLLM.from_pretrained(vision, llm, args.feature_layer, args.pool or (2 if tiny else 1), hidden,
                                     args.image_size)
    own = model.connector.state_dict()
    for name, tensor in kept.items():
        if tensor.shape != own[name].shape:
            raise InputError(f"--connector_from {args.connector_from}: its {name} is {tuple(tensor.shape)}, this model "
                             f"needs {tuple(own[name].shape)}; --vision, --pool and, for two layers, --llm must fit it")
    model.connector.load_state_dict({**own, **kept})
    for name in kept:
        model.connector.get_parameter(name).requires_grad_(False)
    return model


def kept_layers(args):
    """The tensors to take from another run's connector: {} without --connector_from"""
    if not args.connector_from:
        if args.keep_layers:
            raise InputError("--keep_layers needs --connector_from RUN")
        return {}
    if args.connector == "linear":
        raise InputError("--connector linear has a single layer and --connector_from keeps one of two: use only one")
    state = read_tensors(os.path.join(args.connector_from, "connector.safetensors"))
    if "down.weight" not in state:
        raise InputError(f"--connector_from {args.connector_from}: its connector is a single linear layer")
    layers = ("up", "down")[:args.keep_layers or 1]
    return {name: tensor for name, tensor in state.items() if name.startswith(layers)}


def main():
    args = parser.parse_args()
    checkpoints.check_out(args)
    if args.max_drift is not None and args.max_drift <= 0:
        raise InputError(f"--max_drift {args.max_drift} must be above 0; --lr_vision 0 keeps the encoder where it is")
    device, autocast = common.setup(args.seed, args.matmul)

    # ---- model and data
    model = start(args)
    rows, steps = data.plan(args, "sft")
    micro_batch = args.micro_batch or args.batch_size
    collator = data.Collator(rows, model, ("answer",), args.max_length)
    model.to(device).train()
    if args.compile:
        model.compile_hot_path()
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    optimizer = training.Optimizer(model, args, len(steps))  # also freezes the parts whose rate is 0
    run = checkpoints.Run(args, model, optimizer, steps, parent=args.init, data=args.data, rows=rows.identity())
    drift = training.Drift(model)
    print(f"example     {data.show(model, collator)}\n")

    # ---- train
    run.restore()
    for step, step_batches in run.loop(data.batches(collator, steps, micro_batch, args.workers, run.first),
                                       data.empty_batch(model)):
        n_tokens = parallel.all_sum(sum(len(batch.targets) for batch in step_batches))
        sums = defaultdict(float)
        for batch in run.count_flops(step, step_batches):
            with autocast():
                logps = model.token_logps(batch.to(device))                     # (M,) of all response tokens
            loss = -logps.sum() / n_tokens                                      # its share in the step's token mean
            loss.backward()
            sums["loss"] += loss.detach()                                       # stays on the device until it is logged
        sums = parallel.all_sum(sums)
        if logged := run.step(step, {**sums, **optimizer.step(step)}, lambda: {
                **drift(), "tokens": n_tokens, "peak_mb": common.peak_memory_mb(device)}):
            run.bar.set_postfix(loss=f"{float(sums['loss']):.3f}")
            if args.max_drift and parallel.all_max(logged.get("drift_vision", 0.0)) >= args.max_drift:
                print(f"stopped     after step {step}: the vision encoder has moved as far as --max_drift")
                break
    run.finish()


if __name__ == "__main__":
    common.cli(main)
