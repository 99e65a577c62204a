"""What every script needs and no script is about: help, device, errors in one line, names, numbers, tables."""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import traceback

import numpy as np
import torch
import transformers
from tqdm import tqdm

import parallel
from model import InputError, first_line


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


def real(low=0.0, high=math.inf):
    """-> an argparse type: a number from `low` to `high`"""
    def read(text):
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from {low:g}" + f" to {high:g}" * (high < math.inf))
    return read


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


def report_dropped(dropped, before):
    """Names the first five rows that could not be used. -> how many there have been so far"""
    for number, why in enumerate(dropped, before + 1):
        if number <= 5:
            tqdm.write(f"dropped     {why}" + (" (further ones are only counted)" if number == 5 else ""))
    return before + len(dropped)


def digest(*parts):
    """A short name of what was given, text or tensors: other contents, another name"""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else
                     parallel.whole(part.detach()).cpu().contiguous().numpy())
        total.update(b"\n")
    return total.hexdigest()[:16]


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


def write_json(path, value):
    """Writes a file, whole or not at all"""
    with open(f"{path}.{os.getpid()}.tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(f.name, path)


def names(runs):
    """Short names for run directories and their vision/: the run's folder, or the whole path where that is ambiguous"""
    last = [os.path.basename(run.rstrip("/")) for run in runs]
    of_run = [os.path.basename(run.rstrip("/").removesuffix("/vision")) for run in runs]  # RUN/vision by RUN's name
    places = [os.path.realpath(run) for run in runs]
    if len(set(places)) < len(runs):
        raise InputError(f"{max(places, key=places.count)} is named twice")
    for short in (of_run, last):
        if len({*short, "random"}) == len(short) + 1:                           # probe.py's first row is "random"
            return short
    return [run.strip("/").replace("/", "_") + "_run" * (run == "random") for run in runs]


def bootstrap(statistic, n, seed, draws=1000):
    """`statistic(row numbers)` of `draws` resamples of n rows -> (draws,);
    the same seed gives the same resamples, so differences are paired"""
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])


def interval(value, draws):
    """-> [value, low, high], the middle 95 % of the draws"""
    return [float(value), *np.quantile(draws, [.025, .975]).tolist()]


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
