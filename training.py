"""What the three train_*.py share: their flags, the optimiser with its schedule, and how far a model has moved."""
import argparse
import importlib.util
import math

import torch
from torch.distributed.tensor import DTensor

import parallel
from common import positive, real, true_or_false, whole_number
from model import InputError, can_compile

TRACKERS = ("tensorboard", "wandb", "trackio")


def installed_tracker(package):
    """An argparse type: one of TRACKERS that can be imported"""
    if package not in TRACKERS:
        raise argparse.ArgumentTypeError(f"'{package}' is none of {', '.join(TRACKERS)}")
    if not importlib.util.find_spec(package):
        raise argparse.ArgumentTypeError(f"needs that package: pip install {package}")
    return package


def add_training_flags(parser, lr, epochs, batch_size):
    """The flags that every train_*.py has, with the stage's own defaults."""
    add = parser.add_argument
    add("--out", required=True, help="run directory to write; until it is whole it is OUT.tmp")
    add("--resume", action="store_true",
        help="go on from the last save in OUT.tmp, with the same flags; without one, begin")
    add("--overwrite", action="store_true", help="replace what OUT and OUT.tmp hold")
    add("--save_every", type=positive, default=500, help="steps between saves in OUT.tmp (and at Ctrl-C)")
    add("--keep", type=positive, default=1,
        help="how many saves to keep, the newest; with more than 1 they stay in OUT/step-N at the end, else none does")
    add("--n", type=positive,
        help="use only the first N rows of each --data (of the drawn world: draw N rows, default 20000)")
    add("--weights", type=float, nargs="+",
        help="one number for each of several --data: its share of the pictures (default: as many as it has)")
    add("--stream", type=positive, metavar="BUFFER",
        help="read hub and parquet data as a stream, shuffled in a buffer of this many rows, instead of downloading it "
             "first; needs --steps")
    add("--epochs", type=positive, default=epochs, help="passes over the rows")
    add("--steps", type=positive,
        help="optimiser steps, in as many passes as they take, instead of --epochs (default: --epochs passes)")
    add("--batch_size", type=positive, default=batch_size, help="rows an optimiser step")
    add("--micro_batch", type=positive,
        help="rows a forward pass; smaller takes less memory, same gradient (default: --batch_size)")
    add("--questions_per_tree", type=positive, default=4,
        help="rows about one picture that are read in one sequence, the picture once (see trees.py); they then fall "
             "into the same step. 1: every row by itself, pictures in any order")
    add("--lr", type=real(), default=lr,
        help="peak learning rate of all three parts; real weights want about 1e-5 (SFT) or 1e-6 (DPO, GRPO)")
    add("--lr_vision", type=real(), help="peak learning rate of the vision encoder, 0 freezes it (default: --lr)")
    add("--lr_connector", type=real(), help="the same for the connector")
    add("--lr_llm", type=real(), help="the same for the LLM")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for matrices inside the layers, AdamW for the rest; for training from random weights")
    add("--weight_decay", type=real(), default=0.0, help="decoupled weight decay (the paper: 0)")
    add("--warmup", type=real(0, 1), default=0.03, help="share of all steps over which the learning rate rises")
    add("--clip", type=real(), default=1.0, help="largest norm of the whole gradient")
    add("--max_length", type=positive, default=2048,
        help="longest row in tokens, image tokens included; longer rows are dropped and named")
    add("--strict", action="store_true", help="stop at the first row that cannot be used")
    add("--max_bad", type=real(0, 1), default=0.05,
        help="stop when more than this share of all rows to be read cannot be used; 1 never stops")
    add("--grad_checkpoint", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--shard", action="store_true",
        help="of several processes (torchrun): each keeps only its part of weights, gradients and moments")
    add("--compile", type=true_or_false, default=can_compile(),
        help="torch.compile the loss hot path: true or false (default: true where there is a C++ compiler)")
    add("--matmul", choices=("highest", "high", "medium"), default="high",
        help="precision of fp32 matrix products, torch's words. On a GPU high and medium are TF32; on a CPU medium "
             "takes oneDNN: faster for models wider than the tiny ones, but real bf16 where the chip has it")
    add("--workers", type=whole_number, default=8 if torch.cuda.is_available() else 0,
        help="processes that decode pictures ahead of the step; 0 = in the training process, best for tiny pictures on "
             "a CPU (default: 8 on a GPU, else 0)")
    add("--seed", type=int, default=0, help="of the weights that are made, the data order and everything else")
    add("--log_every", type=positive, default=10, help="steps between lines of log.jsonl")
    add("--report_to", type=installed_tracker, metavar=f"{{{','.join(TRACKERS)}}}",
        help="pass those lines on to this package as well, if it is installed (files of its own end up in OUT; trackio "
             "keeps its data base in the hub's cache)")


class Optimizer:
    """AdamW over three parts with a rate each, and if asked Muon for the matrices of the layers;
    linear warm-up, cosine to 0.

    A part whose rate is 0 is frozen: its parameters require no gradient and appear in no group."""

    def __init__(self, model, args, total_steps):
        self.total, self.warmup, self.clip, self.model = \
            total_steps, max(1, round(args.warmup * total_steps)), args.clip, model
        if args.shard and args.optimizer == "muon":
            raise InputError("--shard: Muon needs whole matrices; use --optimizer adamw")
        rates = {name: args.lr if getattr(args, f"lr_{name}") is None else getattr(args, f"lr_{name}")
                 for name in model.parts()}
        for name, part in model.parts().items():
            if rates[name] == 0:
                part.requires_grad_(False)
        if args.shard and parallel.WORLD > 1:
            parallel.shard(model)
        adamw, muon = [], []
        for name, part in model.parts().items():
            if rates[name] == 0:
                continue
            embeddings = {id(m.weight) for m in part.modules() if isinstance(m, torch.nn.Embedding)} | \
                {id(model.llm.get_output_embeddings().weight)}
            matrices, others = [], []
            for parameter in part.parameters():
                is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
                if parameter.requires_grad:
                    (matrices if is_matrix and args.optimizer == "muon" else others).append(parameter)
            adamw.append({"params": others, "peak": rates[name]})
            muon.append({"params": matrices, "peak": rates[name]})
        if not any(group["params"] for group in adamw + muon):
            raise InputError("every learning rate is 0: there is nothing to train")
        self.optimizers = [torch.optim.AdamW(adamw, lr=0.0, betas=(.9, .95) if args.optimizer == "muon" else (.9, .999),
                                             weight_decay=args.weight_decay, fused=True)]
        if args.optimizer == "muon":
            self.optimizers.append(torch.optim.Muon(
                [g for g in muon if g["params"]], lr=0.0, weight_decay=args.weight_decay,
                adjust_lr_fn="match_rms_adamw"))  # updates as large as AdamW's: one rate fits both

    def step(self, step):
        """Clips, sets the rates of `step` (from 0), updates, clears. -> {"lr", "grad_norm", "grad_norm_PART"}"""
        parallel.all_reduce_gradients(self.model.parameters())
        norms = {f"grad_norm_{name}": parallel.global_norm(p.grad for p in part.parameters() if p.grad is not None)
                 .to(self.model.device) for name, part in self.model.parts().items()}  # of a frozen part a 0 on the CPU
        trained = [p for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.clip_grad_norm_(trained, self.clip)
        if step < self.warmup:
            scale = (step + 1) / self.warmup
        else:
            scale = .5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"lr": scale * max(group["peak"] for group in self.optimizers[0].param_groups),
                "grad_norm": parallel.whole(total), **norms}

    def state(self):
        """The moments of every parameter, {"0/llm.lm_head.weight/exp_avg": tensor}"""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {f"{i}/{names[parameter]}/{key}": parallel.full_on_rank0(value)
                for i, optimizer in enumerate(self.optimizers)
                for parameter, values in optimizer.state.items() for key, value in values.items()}

    def load_state(self, tensors):
        """Takes back what `state` gave"""
        parameters = dict(self.model.named_parameters())
        for place, tensor in tensors.items():
            i, name, key = place.split("/")
            if tensor.shape not in (parameters[name].shape, ()):                # what fused AdamW would not notice
                raise ValueError(f"{place} is {tuple(tensor.shape)}, must be {tuple(parameters[name].shape)}")
            self.optimizers[int(i)].state[parameters[name]][key] = parallel.shard_like(tensor, parameters[name])


class Drift:
    """How far each part has moved from where it started: |w - w0| / |w0|, w0 kept on the CPU"""

    def __init__(self, model):
        self.model, self.start = model, {}
        if parallel.RANK and not any(isinstance(p, DTensor) for p in model.parameters()):
            return                                                              # the first process knows all of it
        for name, part in model.parts().items():
            start = [parallel.local(p.detach()).to("cpu", copy=True) for p in part.parameters()]
            self.start[name] = start, parallel.global_norm(part.parameters())

    def __call__(self):
        drift = {}
        for name, (start, norm) in self.start.items():
            parameters = list(self.model.parts()[name].parameters())
            moved = (parallel.local(p.detach()).cpu() - p0 for p, p0 in zip(parameters, start))
            drift[f"drift_{name}"] = float(parallel.global_norm(moved, isinstance(parameters[0], DTensor)) / norm)
        return drift
