"""What every stage needs and no stage is about: device, optimiser, schedule, the log, and the run directory."""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import parallel
from model import MLLM, InputError, can_compile, first_line, read_json

aten = torch.ops.aten
COUNTED = {  # what torch's counter leaves out: the LM head's weight gradient, and attention on a CPU
    aten.addmm_: lambda total, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows a file's docstring as it is, and the default of every flag whose help does not tell it itself"""

    def _get_help_string(self, action):
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        return action.help if silent else f"{action.help} (default: %(default)s)"


def true_or_false(text):
    """An argparse type for flags that take a word: `type=bool` would read "false" as true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def positive(text):
    """An argparse type: a whole number from 1"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def whole_number(text):
    """An argparse type: a whole number from 0"""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0")
    return int(text)


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
    add("--lr", type=float, default=lr,
        help="peak learning rate of all three parts; real weights want about 1e-5 (SFT) or 1e-6 (DPO, GRPO)")
    add("--lr_vision", type=float, help="peak learning rate of the vision encoder, 0 freezes it (default: --lr)")
    add("--lr_connector", type=float, help="the same for the connector")
    add("--lr_llm", type=float, help="the same for the LLM")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for matrices inside the layers, AdamW for the rest; for training from random weights")
    add("--weight_decay", type=float, default=0.0, help="decoupled weight decay (the paper: 0)")
    add("--warmup", type=float, default=0.03, help="share of all steps over which the learning rate rises")
    add("--clip", type=float, default=1.0, help="largest norm of the whole gradient")
    add("--max_length", type=positive, default=2048,
        help="longest row in tokens, image tokens included; longer rows are dropped and named")
    add("--strict", action="store_true", help="stop at the first row that cannot be used")
    add("--max_bad", type=float, default=0.05,
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


def setup(seed, matmul="high"):
    """Seeds, picks the device, quiets transformers.
    -> device, a function that gives the autocast context (bf16 on GPU, fp32 on CPU)"""
    parallel.join()
    torch.manual_seed(seed)
    if parallel.RANK:                                                           # the first process speaks for all
        sys.stdout, tqdm.__init__ = open(os.devnull, "w"), functools.partialmethod(tqdm.__init__, disable=True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # ours is the bar to look at
    torch.set_float32_matmul_precision(matmul)  # on a GPU of what autocast leaves in fp32, on a CPU of everything
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if device.type == "cuda" else contextlib.nullcontext
    return device, autocast


LESS_MEMORY = ("Less is taken by a smaller --micro_batch (same gradient; GRPO: also --batch_size or --group, which are "
               "sampled at once), --grad_checkpoint, --lr_llm 0 or --lr_vision 0 (what is frozen has no moments), "
               "--shard over several GPUs; in eval_vqa.py and probe.py by a smaller --batch_size")


def cli(main):
    """Runs a script. What its user can mend is said in one line; anything else is our fault and keeps its traceback."""
    try:
        main()
        parallel.leave()
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            at = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == os.path.abspath(sys.argv[0])]
            doing = f" at line {at[-1].lineno} of {at[-1].filename}: {at[-1].line}" if at else ""
            raise SystemExit(f"error: out of memory{doing} ({first_line(error)}). {LESS_MEMORY}") from None
        if parallel.WORLD > 1 and ("peer" in str(error) or isinstance(error, torch.distributed.DistError)):
            raise SystemExit(f"error: process {parallel.RANK} of {parallel.WORLD} lost another one, whose own message "
                             f"is above ({first_line(error)})") from None
        raise


def check_out(args):
    """Refuses a run directory that holds another run; has nothing to do where --resume finds a finished one"""
    unfinished = args.out.rstrip("/") + ".tmp"
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with a run and --overwrite begins anew: give one of them")
    if os.path.exists(args.out) and args.resume and not os.path.exists(unfinished):
        print(f"{args.out} is finished")
        raise SystemExit(0)
    if os.path.exists(args.out) and not (args.overwrite or args.resume):  # --resume: OUT.tmp was begun by --overwrite
        raise InputError(f"--out {args.out} exists already; choose another name, or --overwrite it")
    config = os.path.join(args.out, "config.json")
    if os.path.exists(args.out) and not (os.path.isfile(config) and "stage" in read_json(config)):
        raise InputError(f"--out {args.out} is no run directory, and nothing else is overwritten")
    if os.path.exists(unfinished) and not (args.resume or args.overwrite):
        raise InputError(f"{unfinished} is a run that was not finished: --resume goes on with it, --overwrite begins "
                         "anew")


def report_dropped(dropped, before):
    """Names the first five rows that could not be used. -> how many there have been so far"""
    for number, why in enumerate(dropped, before + 1):
        if number <= 5:
            tqdm.write(f"dropped     {why}" + (" (further ones are only counted)" if number == 5 else ""))
    return before + len(dropped)


class Optimizer:
    """AdamW over three parts with a rate each, and if asked Muon for the matrices of the layers;
    linear warm-up, cosine to 0.

    A part whose rate is 0 is frozen: its parameters require no gradient and appear in no group."""

    def __init__(self, model, args, total_steps):
        self.total, self.warmup, self.clip, self.model = \
            total_steps, max(1, round(args.warmup * total_steps)), args.clip, model
        if total_steps < 1:
            raise InputError("--steps and --epochs must be at least 1")
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
        parallel.add_up_gradients(self.model.parameters())
        norms = {f"grad_norm_{name}": global_norm(p.grad for p in part.parameters() if p.grad is not None)
                 for name, part in self.model.parts().items()}
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
        return {"lr": scale * max((g["peak"] for g in self.optimizers[0].param_groups), default=0),
                "grad_norm": parallel.whole(total), **norms}

    def state(self):
        """The moments of every parameter, {"0/llm.lm_head.weight/exp_avg": tensor}"""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {f"{i}/{names[parameter]}/{key}": parallel.for_the_first(value)
                for i, optimizer in enumerate(self.optimizers)
                for parameter, values in optimizer.state.items() for key, value in values.items()}

    def load_state(self, tensors):
        """Takes back what `state` gave"""
        parameters = dict(self.model.named_parameters())
        for place, tensor in tensors.items():
            i, name, key = place.split("/")
            if tensor.shape not in (parameters[name].shape, ()):                # what fused AdamW would not notice
                raise ValueError(f"{place} is {tuple(tensor.shape)}, must be {tuple(parameters[name].shape)}")
            self.optimizers[int(i)].state[parameters[name]][key] = parallel.split(tensor, parameters[name])


def digest(*parts):
    """A short name of what was given, text or tensors: other contents, another name"""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else
                     parallel.whole(part.detach()).cpu().contiguous().numpy())
        total.update(b"\n")
    return total.hexdigest()[:16]


def global_norm(tensors, sharded=False):
    """Euclidean norm of many tensors as one vector, () fp32; `sharded`: each process has its part of them, as it has of
    DTensors"""
    tensors = list(tensors)
    if not tensors:
        return torch.tensor(0.0)
    total = torch.stack([parallel.local(t.detach()).float().square().sum() for t in tensors]).sum()
    return (parallel.total(total) if sharded or isinstance(tensors[0], DTensor) else total).sqrt()


class Drift:
    """How far each part has moved from where it started: |w - w0| / |w0|, w0 kept on the CPU"""

    def __init__(self, model):
        self.model, self.start = model, {}
        if parallel.RANK and not any(isinstance(p, DTensor) for p in model.parameters()):
            return                                                              # the first process knows all of it
        for name, part in model.parts().items():
            start = [parallel.local(p.detach()).to("cpu", copy=True) for p in part.parameters()]
            self.start[name] = start, global_norm(part.parameters())

    def __call__(self):
        drift = {}
        for name, (start, norm) in self.start.items():
            parameters = list(self.model.parts()[name].parameters())
            moved = [parallel.local(p.detach()).cpu() - p0 for p, p0 in zip(parameters, start)]
            drift[f"drift_{name}"] = float(global_norm(moved, isinstance(parameters[0], DTensor)) / norm)
        return drift


def tracker(package, folder, name, settings):
    """Opens an experiment tracker, each an optional package -> log(step, values), close()"""
    if package == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(folder, "tensorboard"))
        return lambda step, values: [writer.add_scalar(*each, step) for each in values.items()], writer.close
    found = importlib.import_module(package)  # wandb and trackio answer to the same three calls
    os.environ.setdefault("WANDB_DIR", folder)
    found.init(project="nanopivot", name=name, config=settings)
    return lambda step, values: found.log(values, step=step), found.finish


@contextlib.contextmanager
def stop_signals():
    """-> a list that gets the name of the signal when Ctrl-C or SIGTERM comes; a second one ends the process at once"""
    caught, before = [], {}

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)
        print("\nfinishing this step, then saving; once more to stop without", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def random_state():
    """The state of every random number generator -> what JSON can hold, tensors"""
    kind, keys, *rest = np.random.get_state()
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}, tensors


def set_random_state(numbers, tensors):
    """Takes back what `random_state` gave"""
    version, keys, gauss = numbers["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(numbers["numpy"])
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])


class Run:
    """A run directory in the making: OUT.tmp with growing logs and the last saves, renamed to OUT when all is written.

    So OUT is either whole or absent. A save, OUT.tmp/step-N, is a run directory like any other, with what --resume
    needs beside it in train_state/; it is written as OUT.tmp/saving and then renamed, so it is whole or absent too."""

    LOGS = ("log.jsonl", "samples.jsonl")
    # flags that may be others when it is resumed
    FREE = ("resume", "overwrite", "save_every", "keep", "workers", "report_to", "strict", "max_bad")

    def __init__(self, args, model, optimizer, steps, updates=1, **more):
        self.args, self.model, self.optimizer, self.steps, self.updates = args, model, optimizer, steps, updates
        self.out, self.folder, self.replaces = args.out, args.out.rstrip("/") + ".tmp", args.overwrite
        self.total_steps, self.step_flops, self.unread, self.n_trained = len(steps) * updates, None, [], 0
        self.first, self.saved, self.dropped, self.carried = 0, 0, Counter(), SimpleNamespace()
        self.settings = {"stage": os.path.basename(sys.argv[0]), "args": vars(args), "versions": versions(),
                         "total_steps": self.total_steps, **more}
        self.began, self.report, self.end_report = time.time(), (lambda step, values: None), (lambda: None)
        if not parallel.RANK:                                                   # the first process writes for all
            self.open_folder()
        parallel.wait()
        if self.saves():
            self.check_save(self.saves()[-1])
        if args.report_to and not parallel.RANK:
            self.report, self.end_report = tracker(args.report_to, self.folder, self.out, self.settings)
        print(f"settings    {json.dumps(vars(args))}")
        for name, part in model.parts().items():
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            print(f"{name:<11} {sum(p.numel() for p in part.parameters()):>13,} parameters, {trained:>13,} trained")

    def open_folder(self):
        """Makes OUT.tmp this process's own, empty unless there is a save to go on from."""
        os.makedirs(self.folder, exist_ok=True)
        self.file = open(os.path.join(self.folder, "log.jsonl"), "a")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder} is being written by another process") from None
        except OSError:                                                         # a file system without locks
            pass
        if not (self.args.resume and self.saves()):
            self.file.truncate(0)
            for name in set(os.listdir(self.folder)) - {"log.jsonl"}:
                path = os.path.join(self.folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    # ---- saves -------------------------------------------------------------------------------------------------------

    def saves(self, folder=None):
        """The saves in OUT.tmp or in `folder`, oldest first"""
        folder = folder or self.folder
        found = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name)]
        return [os.path.join(folder, name) for name in sorted(found, key=lambda name: int(name[5:]))]

    def again(self):
        """In words: the last save, and the command that goes on from it"""
        flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
        start = ["torchrun", f"--nproc_per_node={parallel.WORLD}", "--"] if parallel.WORLD > 1 else ["python"]
        command = shlex.join([*start, sys.argv[0], *flags, "--resume"])
        return f"the last save is {self.saves()[-1]}; go on with: {command}" if self.saves() else "there is no save yet"

    def save(self, step):
        """Writes OUT.tmp/step-N after N steps, then removes those older than the last --keep."""
        self.check()
        if step == self.saved:
            return
        self.saved, (numbers, tensors) = step, random_state()
        tensors |= self.optimizer.state()
        with parallel.together(self.model):
            if not parallel.RANK:
                self.write_save(step, numbers, tensors)
        parallel.wait()

    def write_save(self, step, numbers, tensors):
        """save, in the first process"""
        folder = os.path.join(self.folder, "saving")
        state = {"step": step, "carried": vars(self.carried), "dropped": self.dropped, "n_trained": self.n_trained,
                 "step_flops": self.step_flops, "seconds": time.time() - self.began, "random": numbers,
                 "logs": {name: os.path.getsize(os.path.join(self.folder, name)) for name in self.LOGS
                          if os.path.exists(os.path.join(self.folder, name))}}
        try:
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(os.path.join(folder, "train_state"))
            self.model.write(folder, {**self.settings, "step": step})
            save_file(tensors, os.path.join(folder, "train_state", "tensors.safetensors"))
            with open(os.path.join(folder, "train_state", "state.json"), "w") as f:
                json.dump(state, f, default=float)                              # () tensors become numbers
            os.rename(folder, os.path.join(self.folder, f"step-{step}"))
        except Exception as error:  # tokenizers has no name of its own for a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(f"step {step} could not be saved: {first_line(error)}; {self.again()}") from error
        for old in self.saves()[:-self.args.keep]:
            shutil.rmtree(old)

    def check_save(self, save):
        """Refuses to go on from a save of another stage, with other flags or on other rows"""
        before, now = read_json(os.path.join(save, "config.json")), json.loads(json.dumps(self.settings))
        if before.get("stage") != now["stage"]:
            raise InputError(f"{save} was trained by {before.get('stage')}, not by {now['stage']}")
        flags = before.get("args", {})
        for key in sorted(now["args"].keys() - {*self.FREE, "out"}):
            if flags.get(key) != now["args"][key]:
                raise InputError(f"{save} was trained with --{key} {flags.get(key)}, not {now['args'][key]}: --resume "
                                 "wants the same flags")
        self.replaces = flags.get("overwrite", False)                           # as the run was begun
        if before.get("rows") != now["rows"]:
            raise InputError(f"--data {' '.join(self.args.data)} has changed since {save} was written: --resume wants "
                             "the same rows")

    def restore(self, **carried):
        """Takes model, optimiser, random numbers and log back to the last save, if --resume finds one.
        `carried`: what the loop hands from step to step, as JSON can hold it -> the same, as it was at that save"""
        self.carried = SimpleNamespace(**carried)
        saves, parameters = self.saves(), dict(self.model.named_parameters())
        if parallel.RANK:                                                       # GRPO: each its own samples
            step = os.path.basename(saves[-1]) if saves else ""
            torch.manual_seed(int(digest(f"{self.args.seed} {parallel.RANK} {step}"), 16) % 2**63)
        if not saves:
            return self.carried
        for name, parameter in MLLM.load(saves[-1]).named_parameters():
            parameters[name].data.copy_(parallel.split(parameter.data, parameters[name]))
        try:
            state = read_json(os.path.join(saves[-1], "train_state", "state.json"))
            tensors = load_file(os.path.join(saves[-1], "train_state", "tensors.safetensors"))
            drawn = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith("rng/")}
            self.optimizer.load_state(tensors)
            if not parallel.RANK:
                set_random_state(state["random"], drawn)
            self.n_trained, self.step_flops = state["n_trained"], state["step_flops"]
            self.first = self.saved = state["step"]
            self.dropped, self.began = Counter(state["dropped"]), time.time() - state["seconds"]
            for name in self.LOGS:                                              # what was logged after the save
                if os.path.exists(os.path.join(self.folder, name)) and not parallel.RANK:
                    os.truncate(os.path.join(self.folder, name), state["logs"].get(name, 0))
            vars(self.carried).update(state["carried"])
        except (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{saves[-1]}/train_state cannot be used ({first_line(error)})" +
                             f": remove {saves[-1]} to go on from an earlier save" * (len(saves) > 1)) from error
        print(f"resumed     {saves[-1]}")
        return self.carried

    # ---- steps -------------------------------------------------------------------------------------------------------

    def loop(self, batches, nothing):
        """`data.batches` from step `first` on -> for every step its number and its batches, and as often `nothing` as
        another process has more of them; steps without any are skipped. Rows that cannot be used are named and counted.
        Saves when it is time to, or when asked to stop."""
        name = os.path.basename(sys.argv[0]).removeprefix("train_").removesuffix(".py")
        with stop_signals() as stop, tqdm(total=len(self.steps), initial=self.first, desc=name,
                                          disable=parallel.RANK > 0) as self.bar:
            for step, parts in enumerate(batches, self.first):
                dropped, usable = [why for _, each in parts for why in each], [batch for batch, _ in parts if batch]
                n = parallel.total({"usable": len(usable), "dropped": len(dropped)})
                if n["dropped"]:
                    self.drop(parallel.gather(dropped))
                if n["usable"]:
                    yield step, usable + [nothing] * (parallel.most(len(usable)) - len(usable))
                self.bar.update()
                stopped = parallel.total(len(stop))
                if stopped or (step + 1) % self.args.save_every == 0 and step + 1 < len(self.steps):
                    self.save(step + 1)
                if stopped:
                    why = f"stopped by {(stop or ['a signal'])[0]} after step {step}; {self.again()}"
                    raise SystemExit(1 if parallel.RANK else why)

    @functools.cached_property
    def n_rows(self):
        """Rows to be read in all epochs together"""
        return len(self.steps) * self.args.batch_size if self.args.stream else \
            sum(len(tree) for step in self.steps for tree in step)

    def drop(self, dropped):
        """Counts rows that cannot be used by reason, names the first few, and stops the run if they are too many."""
        if self.args.strict:
            raise InputError(f"--strict: {dropped[0]}")
        report_dropped(dropped, self.dropped.total())
        self.dropped.update(map(reason, dropped))
        share = self.dropped.total() / self.n_rows
        if share > self.args.max_bad:
            raise InputError(f"{self.dropped.total()} rows cannot be used, more than --max_bad {self.args.max_bad:g} of"
                             f" all: {reasons(self.dropped)}; python data.py check lists them")

    def step(self, step, values, more=dict):
        """Takes the values of a step: () tensors, which stay on their device, as reading one makes the CPU wait for it.

        They are read every --log_every steps and at the last, and then the step's line is logged with what `more()`
        adds. -> was it logged?"""
        self.n_trained += 1
        watched = {name: torch.as_tensor(value) for name, value in values.items() if name.startswith(("loss", "grad"))}
        self.unread.append((step, list(watched), torch.stack([value.float() for value in watched.values()])))
        if step % self.args.log_every and step != self.total_steps - 1:
            return False
        self.check()
        values = {**values, **more()}
        if not parallel.RANK:
            self.log(step, {**values, "dropped": self.dropped.total()})
        return True

    def count_flops(self, step, batches):
        """Passes on the micro-batches of a step, and counts the floating-point operations of the loop around it, once:
        counting costs time. It also sets compiled code aside, so it is not done in the first step, where DPO's rewards
        are 0 to the last bit, but in the second."""
        if self.step_flops is not None or step == 0 < self.total_steps - 1:
            yield from batches
            return
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as flops:
            yield from batches
        self.step_flops = parallel.total(flops.get_total_flops())

    def check(self):
        """Stops the run at the first loss or gradient that is not a number: nothing after it could be right."""
        for step, names, values in self.unread:
            bad = [f"{name} is {value}" for name, value in zip(names, values.tolist()) if not math.isfinite(value)]
            if bad:
                rows = "of a stream" if self.args.stream else \
                    ", ".join(str(row) for tree in self.steps[step // self.updates] for row in tree)
                raise SystemExit(f"step {step}: {', '.join(bad)} (rows {rows}). A lower --lr usually helps. The log so "
                                 f"far is {self.folder}/log.jsonl; {self.again()}")
        self.unread = []

    def log(self, step, values):
        """One line of log.jsonl"""
        values = {k: float(v) for k, v in values.items()}
        values = {k: round(v, 6) if abs(v) > 1e-3 else v for k, v in values.items()}
        self.file.write(json.dumps({"step": step, "seconds": round(time.time() - self.began, 2), **values}) + "\n")
        self.file.flush()
        self.report(step, values)

    def finish(self):
        """Writes the trained model, and OUT.tmp becomes OUT."""
        self.check()
        if not self.n_trained:
            raise SystemExit(f"--data {' '.join(self.settings['args']['data'])}: not one row could be used")
        with parallel.together(self.model):
            if not parallel.RANK:
                self.write()
        parallel.wait()

    def write(self):
        """finish, in the first process"""
        self.settings["seconds"] = round(time.time() - self.began, 1)
        self.settings["flops"] = self.step_flops and self.step_flops * self.n_trained  # as if all were as that step
        self.settings["dropped"] = self.dropped
        try:
            shutil.rmtree(os.path.join(self.folder, "saving"), ignore_errors=True)  # by a run that was killed
            self.model.write(self.folder, self.settings)
        except Exception as error:
            raise InputError(f"{self.folder} could not be written: {first_line(error)}; {self.again()}") from error
        self.end_report()
        old = self.folder + ".old"
        shutil.rmtree(old, ignore_errors=True)
        if os.path.exists(self.out) and not self.replaces:
            raise InputError(f"{self.out} appeared meanwhile; the trained run is {self.folder}")
        if os.path.exists(self.out):                                            # --overwrite: until now it was whole
            os.rename(self.out, old)
        os.rename(self.folder, self.out)
        self.file.close()                                                       # until here nobody else may write
        shutil.rmtree(old, ignore_errors=True)
        if self.args.keep == 1:                                                 # it was there for --resume alone
            for save in self.saves(self.out):
                shutil.rmtree(save, ignore_errors=True)
        print(f"saved       {self.out}  ({self.settings['seconds']:.0f} s)"
              + (f"; dropped: {reasons(self.dropped)}" if self.dropped else ""))


def reason(why):
    """What was wrong with a row, "NAME: REASON[: DETAILS]", without names and numbers: to count by"""
    return re.sub(r"\d+", "N", why.partition(": ")[2].partition(": ")[0])


def reasons(counts):
    """A Counter of reasons -> text, most frequent first"""
    return ", ".join(f"{count} x {why}" for why, count in counts.most_common())


@contextlib.contextmanager
def whole_folder(out):
    """A temporary neighbour to write into, renamed to `out` when the block ends well: `out` is whole or absent."""
    folder = f"{out.rstrip('/')}.{os.getpid()}.tmp"                             # OUT.tmp may be a run in the making
    os.makedirs(folder)
    try:
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def names(runs):
    """Short names for run directories: the last part of the path, or the whole path where that would be ambiguous"""
    last = [os.path.basename(run.rstrip("/")) for run in runs]
    clear = len({*last, "random"}) == len(last) + 1  # "random" is the name of probe.py's first row
    places = [os.path.realpath(run) for run in runs]
    if len(set(places)) < len(runs):
        raise InputError(f"{max(places, key=places.count)} is named twice")
    return last if clear else [run.strip("/").replace("/", "_") + "_run" * (run == "random") for run in runs]


def bootstrap(statistic, n, seed, draws=1000):
    """`statistic(row numbers)` of `draws` resamples of n rows -> (draws,);
    the same seed gives the same resamples, so differences are paired"""
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])


def percent(interval, sign=False):
    """[mean, low, high] -> "61.2 [58.0, 64.1]" """
    form = "{:+.1f}" if sign else "{:.1f}"
    mean, low, high = (form.format(100 * x) for x in interval)
    return f"{mean} [{low}, {high}]"


def print_table(title, heads, lines):
    """A table that stays narrow: a column for each of `lines` (their first cell is its name),
    a row for each of `heads`"""
    columns = [heads, *lines]
    widths = [max(len(str(cell)) for cell in column) for column in columns]
    print(f"\n{title}")
    for row in zip(*columns, strict=True):
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def versions():
    """What one needs to know to repeat a run"""
    here, commit = os.path.dirname(os.path.abspath(__file__)), ""
    if shutil.which("git"):
        command = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": commit.strip() or None,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def peak_memory_mb(device):
    """Peak memory of this process so far, in MB: GPU memory on a GPU, resident memory on a CPU"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux kilobytes
