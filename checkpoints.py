"""A run directory in the making: its log, its saves, what --resume needs, and when to stop."""
import contextlib
import fcntl
import functools
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import parallel
from common import digest, reason, reasons, report_dropped, versions
from model import MLLM, InputError, first_line, read_json

aten = torch.ops.aten
COUNTED = {  # what torch's counter leaves out: the LM head's weight gradient, and attention on a CPU
    aten.addmm_: lambda total, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}


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
        self.check_weights()
        self.saved, (numbers, tensors) = step, random_state()
        tensors |= self.optimizer.state()
        with parallel.full_weights_on_rank0(self.model):
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
            parameters[name].data.copy_(parallel.shard_like(parameter.data, parameters[name]))
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
        """Yields the number and the usable micro-batches of each of `data.batches`, from step `first` on. A process
        that has fewer than another gets `nothing` instead, as all must take part in every exchange; steps without any
        are skipped. Rows that cannot be used are named and counted. Saves when it is time to, or when asked to stop."""
        name = os.path.basename(sys.argv[0]).removeprefix("train_").removesuffix(".py")
        with stop_signals() as stop, tqdm(total=len(self.steps), initial=self.first, desc=name) as self.bar:
            for step, parts in enumerate(batches, self.first):
                dropped, usable = [why for _, each in parts for why in each], [batch for batch, _ in parts if batch]
                n = parallel.all_sum({"usable": len(usable), "dropped": len(dropped)})
                if n["dropped"]:
                    self.drop(parallel.gather(dropped))
                if n["usable"]:
                    yield step, usable + [nothing] * (parallel.all_max(len(usable)) - len(usable))
                self.bar.update()
                stopped = parallel.all_sum(len(stop))
                if stopped or (step + 1) % self.args.save_every == 0 and step + 1 < len(self.steps):
                    self.save(step + 1)
                if stopped:
                    n_steps = f"{step + 1} of {len(self.steps)} steps"
                    why = f"stopped by {(stop or ['a signal'])[0]} after {n_steps}; {self.again()}"
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
        adds. -> what was logged, or None"""
        self.n_trained += 1
        watched = {name: torch.as_tensor(value) for name, value in values.items() if name.startswith(("loss", "grad"))}
        self.unread.append((step, list(watched), torch.stack([value.float() for value in watched.values()])))
        if step % self.args.log_every and step != self.total_steps - 1:
            return None
        self.check()
        values = {**values, **more()}
        if not parallel.RANK:
            self.log(step, {**values, "dropped": self.dropped.total()})
        return values

    def count_flops(self, step, batches):
        """Passes on the micro-batches of a step, and counts the floating-point operations of the loop around it, once:
        counting costs time. It also sets compiled code aside, so it is not done in the first step, where DPO's rewards
        are 0 to the last bit, but in the second."""
        if self.step_flops is not None or (step == 0 and self.total_steps > 1):
            yield from batches
            return
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as flops:
            yield from batches
        self.step_flops = parallel.all_sum(flops.get_total_flops())

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

    def check_weights(self):
        """Stops the run if the last update, which no loss has met yet, left weights that are not numbers."""
        bad = [name for name, p in self.model.named_parameters() if not parallel.local(p.detach()).isfinite().all()]
        if parallel.all_max(len(bad)):
            raise SystemExit(f"the last step left weights that are not numbers ({', '.join(bad[:3])}). A lower --lr "
                             f"usually helps. {self.again()}")

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
        self.check_weights()
        with parallel.full_weights_on_rank0(self.model):
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
