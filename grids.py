"""
Tables and pictures beside the study: which learning rate for which arm, what decides the sign of DPO minus SFT, and
when an encoder is lost.

    python grids.py sweep runs/sweep                                after sweep.sh (which calls this)
    python grids.py map runs/map/seed0 runs/map/seed1 --out runs/map     after map.sh (likewise)
    python grids.py path runs/path/seed0 --out runs/path            after path.sh (likewise)

All write report.json, report.md and report.png into OUT (of a sweep: into its folder).
"""
import argparse
import os
import re

import numpy as np

import common
from figures import canvas, color_of, save
from model import InputError
from report import difference_text, paired, read_log, results, write

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("kind", choices=("sweep", "map", "path"), help="which script made the folders")
parser.add_argument("folders", nargs="+", help="the folder of a sweep, or one folder a seed of a map or path")
parser.add_argument("--out", help="folder for report.json, report.md and report.png "
                                  "(default: the sweep's, or the folder above the first seed's)")

SWEPT = {"sft": "SFT", "dpo": "DPO", "dpo_sft": "DPO + 0.1 SFT", "mpo": "MPO", "grpo": "GRPO"}
COLUMNS = {  # key -> (heading, file, group, measure)
    "pairs": ("chosen likelier than rejected, new pairs", "pairs", "all", "restricted"),
    "decoded": ("vision questions, as decoded", "vqa", "vision-centric", "decoded"),
    "restricted": ("vision questions, restricted to candidates", "vqa", "vision-centric", "restricted"),
    "swap": ("swap test: stage 1's LLM reads the encoder", "swap", "vision-centric", "restricted"),
    "drift": ("drift of the encoder's weights", None, None, None),
    "reward": ("mean reward, second half", None, None, None)}


def arm_of(run):
    """ARM-RATE -> ARM"""
    return run.partition("-")[0]


def rate_of(run):
    """ARM-RATE -> RATE"""
    return run.partition("-")[2]


def read_sweep(folder):
    """-> {run: {column: value}}; a run is stage1 or ARM-RATE"""
    tables = {file: results(folder, file) for file in ("pairs", "vqa", "swap")}
    values = {}
    for run in tables["vqa"]:
        log = {} if run == "stage1" else read_log(os.path.join(folder, run))
        values[run] = {key: tables[file][run][group][measure][0]
                       for key, (_, file, group, measure) in COLUMNS.items() if file}
        values[run]["drift"] = 0.0 if run == "stage1" else float(log["drift_vision"][-1])
        if "reward" in log:
            values[run]["reward"] = float(log["reward"][len(log["reward"]) // 2:].mean())
    return values


def picked(values):
    """{run: {column: value}} -> {arm: its run with the lowest rate among those that are not worse than its best}: by
    pairs, where 2 points are one and a half standard errors of 1000 rows; GRPO by its reward, where 0.3 points are as
    much of 80,000 samples of 10,000 questions"""
    found = {}
    for arm in SWEPT:
        score = {run: values[run]["reward" if arm == "grpo" else "pairs"] for run in values
                 if arm_of(run) == arm}
        found[arm] = min((run for run in score if score[run] >= max(score.values()) - (.003 if arm == "grpo" else .02)),
                         key=lambda run: float(rate_of(run)))
    return found


def report_sweep(folder, out):
    values = read_sweep(folder)
    best = picked(values)
    arms = {arm: sorted((run for run in values if arm_of(run) == arm), key=lambda run: float(rate_of(run)))
            for arm in SWEPT}
    row = lambda name, run: [name, *(f"{100 * values[run][key]:.1f}" if key in values[run] else "" for key in COLUMNS)]
    lines = [row("stage 1", "stage1")] + [
        row(f"{SWEPT[arm]} {rate_of(run)}" + " <" * (run == best[arm]), run)
        for arm, runs in arms.items() for run in runs]
    rates = [f"LR_{arm.upper()}={rate_of(run)}" for arm, run in best.items()]
    text = ["picked (<): " + ", ".join(rates)]
    with open(os.path.join(folder, "rates.sh"), "w") as f:
        f.write(f"export {' '.join(rates)}\n")

    def draw(path):
        figure, axes = canvas(2, 4, 3.4, 3.2)
        for axis, key in zip(axes[1], ("decoded", "restricted", "swap", "drift")):      # what is learnt, what it costs
            for arm, runs in arms.items():
                x, y = ([100 * values[run][which] for run in runs] for which in ("pairs", key))
                axis.plot(x, y, "-", color=color_of(arm, list(arms)), linewidth=.7)
                axis.scatter(x, y, [12 + 12 * i for i in range(len(runs))], color=color_of(arm, list(arms)), alpha=.7)
            axis.plot(100 * values["stage1"]["pairs"], 100 * values["stage1"][key], "*", color="black", markersize=10)
            axis.set_xlabel(COLUMNS["pairs"][0] + ", %", fontsize=8)
            axis.set_ylabel(COLUMNS[key][0] + ", %", fontsize=8)
        for axis, (key, (heading, *_)) in zip(axes[0], COLUMNS.items()):
            for arm, runs in arms.items():
                x, color = [float(rate_of(run)) for run in runs], color_of(arm, list(arms))
                axis.plot(x, [100 * values[run][key] for run in runs], "o-", color=color, markersize=3,
                          label=SWEPT[arm])
                axis.plot(float(rate_of(best[arm])), 100 * values[best[arm]][key], "o", color=color)
            axis.axhline(100 * values["stage1"][key], color="0.5", linewidth=.8, label="stage 1")
            axis.set_xscale("log")
            axis.set_title(heading + ", %", fontsize=8)
            axis.set_xlabel("peak learning rate", fontsize=8)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        figure.suptitle("learning rates on the tuning split; below: what is learnt against what it costs "
                        "(larger dots: higher rates, star: stage 1)", fontsize=10)
        save(figure, path)

    write(out, {"values": values, "picked": best},
          [("tuning split, %; < is the rate that is picked", ["", *(heading for heading, *_ in COLUMNS.values())],
            lines)], text, draw)


# ---- the map ---------------------------------------------------------------------------------------------------------

MAPPED = {"restricted": ("vqa", "vision questions, restricted to candidates"),
          "swap": ("swap", "swap test: the start's LLM reads the encoder"),
          "decoded": ("vqa", "vision questions, as decoded")}


def read_map(seed):
    """One seed's folder -> {START.CONDITION: {arm: {measure: value}}}, in which the arm "start" is where both came
    from. A condition without an SFT run of its own (another beta) has that of the foreign pairs."""
    found = {}
    for folder in sorted(os.listdir(seed)):
        if not folder.startswith("vqa-"):
            continue
        start = folder.removeprefix("vqa-")
        tables = {file: results(seed, f"{file}-{start}") for file in ("vqa", "swap")}
        values = {run: {m: tables[file][run]["vision-centric"]["decoded" if m == "decoded" else "restricted"][0]
                        for m, (file, _) in MAPPED.items()} for run in tables["vqa"]}
        for run in values:
            name, _, arm = run.rpartition(".")
            if arm == "dpo":
                found[name] = {"start": values[start], "dpo": values[run],
                               "sft": values.get(f"{name}.sft") or values[f"{start}.foreign.sft"]}
    return found


CONDITIONS = {  # what the pairs are, as scenes.py and map.sh call it -> in words, in the order of the table
    "plain": "own style, the truth against one error", "taught_poor": "own style, few errors",
    "foreign_exact": "foreign style, no errors", "foreign": "foreign style, few errors",
    "foreign_poor": "foreign style, many errors", "own": "its own samples, best against worst",
    "beta": "foreign style, few errors, beta", "n": "foreign style, few errors, pairs:"}


def parsed(name):
    """START.CONDITION -> is it the wider model, its steps, the condition's kind, its number or 0"""
    start, _, condition = name.partition(".")
    kind, number = re.fullmatch(r"(beta|n|.*?)([\d.]*)", condition).groups()
    return start.startswith("wide"), int(start.removeprefix("wide")), kind, float(number or 0)


def in_order(name):
    """Smaller starts first, wider models last; within a start as CONDITIONS says"""
    wide, steps, kind, number = parsed(name)
    return wide, steps, [*CONDITIONS, kind].index(kind), number, name


def in_words(name):
    wide, steps, kind, number = parsed(name)
    return f"{'wide, ' * wide}{steps} steps: {CONDITIONS.get(kind, kind)}" + f" {number:g}" * bool(number)


def report_map(seeds, out):
    """A line a condition: where it started, and how far both arms went from there; one picture"""
    found = [read_map(seed) for seed in seeds]
    names = sorted(set.intersection(*map(set, found)), key=in_order)
    if not names:
        raise InputError(f"{', '.join(seeds)}: no vqa-START folders that all of them have; map.sh makes them")
    contrasts = (("sft", "start"), ("dpo", "start"), ("dpo", "sft"))
    of = lambda name, arm, measure: [each[name][arm][measure] for each in found]
    left_out = sorted(set.union(*map(set, found)) - {*names})
    result = {name: {m: {f"{a} - {b}": paired(of(name, a, m), of(name, b, m)) for a, b in contrasts} for m in MAPPED}
              for name in names}
    starts = {name: [each[name]["start"] for each in found] for name in names}
    lines = [[in_words(name), f"{100 * np.mean(of(name, 'start', 'restricted')):.1f}",
              *("" if a == "sft" and parsed(name)[2] == "beta" else difference_text(result[name][m][f"{a} - {b}"])
                for m in MAPPED for a, b in contrasts)]
             for name in names]
    heads = ["steps of stage 1: pairs", "start, restricted",
             *(f"{heading}: {a} - {b}" for _, heading in MAPPED.values() for a, b in contrasts)]

    def draw(path):
        figure, axes = canvas(1, len(MAPPED), 4.8, .24 * len(names) + .8)
        for column, (axis, (measure, (_, heading))) in enumerate(zip(axes[0], MAPPED.items())):
            for y, name in enumerate(names):
                for shift, arm in ((.18, "sft"), (-.18, "dpo")):
                    if arm == "sft" and parsed(name)[2] == "beta":                      # it has none
                        continue
                    d = [100 * x for x in result[name][measure][f"{arm} - start"]["per_seed"]]
                    axis.scatter(d, [shift - y] * len(d), s=14, color=color_of(arm, []), linewidths=0,
                                 label=f"{arm.upper()} minus its start" if y == 0 else None)
            axis.axvline(0, color="0.5", linewidth=.8)
            axis.set_yticks(range(0, -len(names), -1), list(map(in_words, names)) if column == 0 else [""] * len(names),
                            fontsize=7)
            axis.grid(alpha=.3)
            axis.set_title(heading + ", %-points", fontsize=9)
        axes[0, 0].legend(fontsize=7)
        figure.suptitle("steps of stage 1, and what the pairs are: a dot a seed", fontsize=10)
        save(figure, path)

    title = f"paired differences in %-points, {len(seeds)} seed(s)" + " [95 % interval]" * (len(seeds) > 1)
    text = [f"not in every seed, so left out: {', '.join(left_out)}"] if left_out else []
    write(out, {"seeds": seeds, "start": starts, "map": result}, [(title, heads, lines)], text, draw)


# ---- the path --------------------------------------------------------------------------------------------------------

PATHS = {"sft": "SFT", "sft_slow": "SFT at DPO's rate", "warm_sft": "warm-up, then SFT", "dpo": "DPO"}
ALONG = {"swap": "swap test: stage 1's LLM reads the encoder, %", "drift_vision": "drift of the encoder, %",
         "loss": "training loss (SFT: nats a token)"}


def read_path(seed):
    """One seed's folder -> {arm: (steps taken (S,), {what: (S,)})}; at 0 steps stands the start"""
    found = {}
    for arm in PATHS:
        log, table = read_log(os.path.join(seed, arm)), results(seed, f"{arm}.swap")
        steps = np.array(sorted(int(row[5:]) for row in table if row.startswith("step-")))
        at = lambda row: 100 * table[row]["vision-centric"]["restricted"][0]
        near = np.abs(log["step"][:, None] - (steps - 1)).argmin(0)                     # not every step is logged
        found[arm] = np.append(0, steps), {
            "swap": np.array([at("stage1"), *(at(f"step-{step}") for step in steps)]),
            "drift_vision": np.append(0, 100 * log["drift_vision"][near]), "loss": log["loss"][np.append(0, near)]}
    return found


def report_path(seeds, out):
    """A line an arm: how far it is after so many steps; one picture"""
    found = [read_path(seed) for seed in seeds]
    steps = found[0]["sft"][0]
    mean = {arm: {what: np.mean([each[arm][1][what] for each in found], 0) for what in ALONG} for arm in PATHS}
    shown = [i for i, step in enumerate(steps) if step in (0, 8, 16, 24, 40, 80) or step == steps[-1]]
    lines = [[f"{PATHS[arm]}: {heading}", *(f"{mean[arm][what][i]:.3g}" for i in shown)]
             for arm in PATHS for what, heading in ALONG.items()]

    def draw(path):
        figure, axes = canvas(1, len(ALONG), 4, 3)
        for axis, (what, heading) in zip(axes[0], ALONG.items()):
            for arm in PATHS:
                for each in found:
                    axis.plot(steps, each[arm][1][what], color=color_of(arm, []), linewidth=.5, alpha=.5)
                axis.plot(steps, mean[arm][what], color=color_of(arm, []), label=PATHS[arm])
            axis.set_title(heading, fontsize=9)
            axis.set_xlabel("steps", fontsize=8)
            axis.grid(alpha=.3)
        axes[0, -1].legend(fontsize=7)
        save(figure, path)

    write(out, {"seeds": seeds, "steps": steps.tolist(), "path": {
        arm: {what: [each[arm][1][what].tolist() for each in found] for what in ALONG} for arm in PATHS}},
        [(f"after so many steps, mean of {len(seeds)} seed(s)", ["", *(str(steps[i]) for i in shown)], lines)], [],
        draw)


def main():
    args = parser.parse_args()
    if args.kind == "sweep":
        return report_sweep(args.folders[0], args.out or args.folders[0])
    report = report_map if args.kind == "map" else report_path
    report(args.folders, args.out or os.path.dirname(os.path.abspath(args.folders[0])))


if __name__ == "__main__":
    common.cli(main)
