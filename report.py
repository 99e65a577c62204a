"""
The study in two tables and one picture: what probe.py and eval_vqa.py found for every arm and seed.

    python report.py runs/seed0 runs/seed1 runs/seed2 --out runs        after speedrun.sh (which calls this)
    python report.py runs/transplant/seed0 --transplant --out runs/transplant       after transplant.sh (likewise)

Reads results.json in SEED/probe, SEED/vqa and SEED/swap and the logs and FLOPs of the arms; of a transplant,
results.json in SEED/vqa and SEED/probe and the FLOPs in config.json of its runs. Writes OUT/report.json, OUT/report.md
and OUT/report.png, and of a study OUT/all.png. Rows are means over seeds. Differences are paired within a seed, with a
95 % t interval over seeds, each of which brings test rows of its own. (A bootstrap over so few seeds would be too sure
of itself: of 95 % intervals over 5 seeds and their rows some 88 % hold the truth; tests/test_report.py counts.) Of so
many differences some leave 0 out by chance: DPO minus SFT, extracted and in the swap test, is what the study is about;
the others are there to explain it. From one seed no difference between arms is claimed: training again with another
seed moves every number.
"""
import argparse
import json
import os
import textwrap

import numpy as np
from safetensors.torch import load_file

import common
from comparison import markdown
from figures import color_of, plt, save
from model import read_json

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("seeds", nargs="+", help="one folder a seed, as speedrun.sh or transplant.sh makes it")
parser.add_argument("--out", required=True, help="folder for report.json, report.md and report.png")
parser.add_argument("--transplant", action="store_true", help="the seed folders were made by transplant.sh")

ARMS = {"random": "random encoder", "stage1": "stage 1", "more": "stage 1 trained on", "sft": "SFT",
        "sft_slow": "SFT at DPO's rate", "sft_equal": "SFT at DPO's compute", "sft_long": "SFT, twice as long",
        "sft_drift": "SFT, stopped at DPO's drift",
        "dpo": "DPO", "dpo_fast": "DPO at SFT's rate", "other": "DPO, rejected: of other pictures",
        "dpo_sft": "DPO + 0.1 SFT", "mpo": "MPO", "warm": "warm-up (vision frozen)", "warm_sft": "warm-up, then SFT",
        "warm_dpo": "warm-up, then DPO", "grpo": "GRPO", "grpo_half": "GRPO, half as long",
        "sft_grpo": "half SFT, then half GRPO"}
CONTRASTS = {  # a - b: what it asks
    ("dpo", "sft"): "DPO or SFT on the same pairs?", ("sft", "stage1"): "does SFT gain or harm?",
    ("dpo", "stage1"): "does DPO gain or harm?", ("grpo", "stage1"): "does GRPO gain or harm?",
    ("more", "stage1"): "would training on do it?", ("dpo", "sft_slow"): "is it the rate? both at the lower",
    ("dpo_fast", "sft"): "is it the rate? both at the higher", ("dpo", "sft_equal"): "is it DPO's compute?",
    ("dpo", "sft_long"): "is it DPO's longer text?",
    ("dpo", "sft_drift"): "is it that DPO moves less? SFT stopped early",
    ("dpo_fast", "sft_slow"): "is it that DPO moves less? rates swapped",
    ("dpo", "other"): "would any contrast do?", ("warm_sft", "sft"): "is SFT's harm the shock of a new style?",
    ("warm_sft", "sft_long"): "or is it the second half of the steps?",
    ("warm_sft", "warm"): "does SFT harm after the shock?", ("warm_dpo", "warm_sft"): "DPO or SFT after the shock?",
    ("dpo_sft", "dpo"): "what does an SFT term add?", ("mpo", "dpo_fast"): "what does MPO add? SFT's rate for both",
    ("grpo_half", "sft_grpo"): "does SFT before GRPO hurt?"}
MEASURES = {  # key -> (heading, file, path inside its table)
    "decoded": ("vision questions, as decoded", "vqa", ("vision-centric", "decoded")),
    "extracted": ("vision questions, what follows \"answer is\"", "vqa", ("vision-centric", "extracted")),
    "restricted": ("vision questions, restricted to candidates", "vqa", ("vision-centric", "restricted")),
    "swap": ("swap test: stage 1's LLM reads the encoder", "swap", ("vision-centric", "restricted")),
    "knowledge_decoded": ("knowledge questions, as decoded", "vqa", ("knowledge", "decoded")),
    "knowledge": ("knowledge questions, restricted", "vqa", ("knowledge", "restricted")),
    "blind": ("vision questions, restricted, grey picture", "vqa", ("vision-centric", "blind_score")),
    "classification": ("probe: shape of the red object", "probe", ("logistic top-1", "value")),
    "mIoU": ("probe: patches, linear head, mean IoU", "probe", ("linear mIoU", "value")),
    "mIoU_two_layer": ("probe: patches, two-layer head, mean IoU", "probe", ("two-layer mIoU", "value")),
    "alignment": ("alignment with stage 1's LLM, read layer", "probe", ("alignment stage1, read layer", "value")),
    "area": ("gradient in box, were it spread evenly", "probe", ("area", "value")),
    "energy_chosen": ("gradient in box, log p(chosen)", "probe", ("energy_chosen_tokens", "value")),
    "energy_difference": ("gradient in box, chosen - rejected", "probe", ("energy_difference_tokens", "value")),
    "point_chosen": ("pointing game, log p(chosen)", "probe", ("point_chosen_tokens", "value")),
    "point_difference": ("pointing game, chosen - rejected", "probe", ("point_difference_tokens", "value")),
    "drift": ("drift of the encoder's weights", None, None),
}
SHOWN = ("decoded", "extracted", "restricted", "swap", "mIoU", "mIoU_two_layer")   # with intervals
SHORT = ("stage1", "more", "sft", "dpo", "warm_sft", "warm_dpo", "grpo", "sft_grpo")  # arms of the short picture
ENCODERS = {"random": "random", "start": "start", "more": "start trained on", "sft": "+ SFT", "dpo": "+ DPO",
            "large": "larger, no post-training"}  # rows of the transplant; its columns:
CONNECTORS = {"linear": "linear connector", "mlp": "MLP connector", "1+1": "MLP, first layer kept"}
ASKED = {"vision-centric": "vision questions", "shape": "shape questions"}
PROBED = {"logistic top-1": "probe: shape of the red object",
          "alignment start, read layer": "probe: alignment with start's LLM"}
COLUMNS = {(c, kind): f"{ASKED[kind]}, {CONNECTORS[c]}" for c in CONNECTORS for kind in ASKED} | \
    {("probe", measure): heading for measure, heading in PROBED.items()}
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond ten seeds the last, which is a bit too wide
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def results(*folder):
    """The table that probe.py or eval_vqa.py left in a folder: {row: {column: ...}}"""
    return read_json(os.path.join(*folder, "results.json"))["table"]


def read_log(run):
    """log.jsonl of a run -> {name: array, a number a logged step}"""
    with open(os.path.join(run, "log.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return {key: np.array([line.get(key, np.nan) for line in lines]) for key in lines[0]}


def drift(start, run):
    """How far the vision encoder of a run is from that of its start: |w - w0| / |w0|"""
    before, after = (load_file(os.path.join(each, "vision", "model.safetensors")) for each in (start, run))
    square = lambda tensors: sum(float(tensor.double().square().sum()) for tensor in tensors)
    return (square(after[name] - before[name] for name in before) / square(before.values()))**.5


def flops_of(seed, arm):
    """FLOPs of the optimiser steps that made an arm out of stage 1, those of a run between them included; None if they
    were not counted"""
    config = read_json(os.path.join(seed, arm, "config.json"))
    parent = os.path.basename(config["parent"] or "")
    before = 0 if parent in ("", "stage1") else flops_of(seed, parent)
    return None if None in (before, config["flops"]) else before + config["flops"]


def read(seed):
    """One seed's folder -> {measure: {arm: value}}, {arm: FLOPs of its steps}"""
    tables = {file: results(seed, file) for file in ("probe", "vqa", "swap")}
    found = {measure: {} for measure in MEASURES}
    for measure, (_, file, path) in MEASURES.items():
        for arm in ARMS:
            cell = tables[file].get(arm, {}).get(path[0]) if file else None
            if cell:
                found[measure][arm] = cell[path[1]][0]
    arms = [arm for arm in ARMS if arm in tables["vqa"]]
    found["drift"] = {arm: drift(os.path.join(seed, "stage1"), os.path.join(seed, arm)) for arm in arms}
    return found, {arm: flops_of(seed, arm) for arm in arms}


def paired(a, b):
    """Per-seed values of two arms -> {"mean": a - b, "low", "high", "per_seed"}; no interval from one seed"""
    d = np.array(a) - np.array(b)
    half = T95[min(len(d) - 2, len(T95) - 1)] * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else None
    return {"mean": float(d.mean()), "low": None if half is None else float(d.mean() - half),
            "high": None if half is None else float(d.mean() + half), "per_seed": d.tolist()}


def summarise(seeds):
    """-> {"rows": {measure: {arm: {"mean", "per_seed"}}}, "differences": {"dpo - sft": {measure: paired}, ...},
    "flops": {arm: mean over seeds}}"""
    read_seeds, flops = zip(*map(read, seeds))
    values = {m: {arm: [r[m][arm] for r in read_seeds] for arm in ARMS if all(arm in r[m] for r in read_seeds)}
              for m in MEASURES}
    rows = {m: {arm: {"mean": float(np.mean(v)), "per_seed": v} for arm, v in arms.items()}
            for m, arms in values.items()}
    differences = {f"{a} - {b}": {m: paired(v[a], v[b]) for m, v in values.items() if a in v and b in v}
                   for a, b in CONTRASTS if a in values["decoded"] and b in values["decoded"]}
    counted = [arm for arm in flops[0] if all(each.get(arm) for each in flops)
               and arm != "sft_grpo"]  # whose answers grow shorter: no step of it stands for all
    return {"rows": rows, "differences": differences,
            "flops": {arm: float(np.mean([each[arm] for each in flops])) for arm in counted}}


def difference_text(d):
    mean, low, high = (None if d[k] is None else f"{round(100 * d[k], 1) + 0.:+.1f}" for k in ("mean", "low", "high"))
    return f"{mean} (n = 1)" if low is None else f"{mean} [{low}, {high}]"


def study_tables(result, n_seeds):
    """-> [(title, heads, lines)], as common.print_table and comparison.markdown take them: the arms, the contrasts"""
    rows, flops = result["rows"], result["flops"]
    arms = [arm for arm in ARMS if any(arm in cells for cells in rows.values())]
    number = lambda cell: f"{100 * cell['mean']:.1f}" if cell else ""
    lines = [[ARMS[arm], *(number(cells.get(arm)) for cells in rows.values()),
              f"{flops[arm] / 1e12:.2f}" if arm in flops else ""] for arm in arms]
    contrasts = [[f"{ARMS[a]} minus {ARMS[b]}", question,
                  *(difference_text(d[m]) if m in d else "" for m in SHOWN)]
                 for (a, b), question in CONTRASTS.items() for d in [result["differences"].get(f"{a} - {b}")] if d]
    return [(f"%, mean of {n_seeds} seed(s)", ["", *(heading for heading, _, _ in MEASURES.values()),
                                                "10^12 FLOPs of training: the second step's, times all"],
             lines),
            (f"paired differences in %-points [95 % interval over {n_seeds} seeds]" if n_seeds > 1 else
             "paired differences in %-points; n = 1: not resolved",
             ["", "the question", *(MEASURES[m][0] for m in SHOWN)], contrasts)]


def sentences(result, n_seeds):
    """What the numbers carry: the answers, the encoders and the gradients; then what they do not settle"""
    rows, diff, text = result["rows"], result["differences"], []
    at = lambda measure, arm: f"{100 * rows[measure][arm]['mean']:.0f} %"
    has = lambda *arms: all(arm in rows["decoded"] for arm in arms)
    if has("sft", "dpo"):
        spread = "one seed" if n_seeds == 1 else f"means of {n_seeds} seeds"
        text.append(f"Vision questions answered as taught: {at('decoded', 'stage1')} after stage 1, "
                    f"{at('decoded', 'sft')} after SFT and {at('decoded', 'dpo')} after DPO on the same pairs; "
                    f"reading what follows \"answer is\": {at('extracted', 'stage1')}, "
                    f"{at('extracted', 'sft')} and {at('extracted', 'dpo')} ({spread}). Read by stage 1's connector "
                    f"and LLM, stage 1's own encoder gets {at('swap', 'stage1')} of them right, SFT's "
                    f"{at('swap', 'sft')} and DPO's {at('swap', 'dpo')}.")
    if has("sft", "warm_sft", "warm_dpo"):
        text.append("After a warm-up of connector and LLM on other pairs, with the encoder frozen, SFT's encoder "
                    f"gets {at('swap', 'warm_sft')} and DPO's {at('swap', 'warm_dpo')}.")
    if has("grpo"):
        text.append(f"After GRPO on its own answers to as many pictures: {at('decoded', 'grpo')} as taught" +
                    (f", and {at('decoded', 'sft_grpo')} if half of those pictures went into SFT before it."
                     if has("sft_grpo") else "."))
    text.append(f"At equal (stage-1) weights, {at('energy_difference', 'stage1')} of the gradient of chosen - "
                "rejected, which DPO follows, lies in the box of the object that the answers differ in, and "
                f"{at('energy_chosen', 'stage1')} of the gradient of log p(chosen), which SFT follows; the box is "
                f"{at('area', 'stage1')} of the picture (in part by construction: only the box tells the answers "
                "apart).")
    if rows["restricted"]["stage1"]["mean"] < .9:
        text.append(f"Stage 1 gets {at('restricted', 'stage1')} right: a larger STAGE1_STEPS may take it further.")
    if "dpo - sft" in diff and n_seeds == 1:
        text.append('DPO minus SFT: n = 1: not resolved. SEEDS="0 1 2" bash speedrun.sh repeats the study, paired.')
    elif "dpo - sft" in diff:
        unresolved = [MEASURES[m][0] for m, d in diff["dpo - sft"].items() if m in (*SHOWN, "knowledge", "alignment")
                      and d["low"] <= 0 <= d["high"]]
        if unresolved:
            text.append(f"DPO minus SFT is not resolved by {n_seeds} seeds (interval holds 0) for: "
                        f"{'; '.join(unresolved)}.")
    return text


def dots(axis, y, values, color, low=None, high=None):
    """A line of a panel: a dot a seed, a tick at their mean, the interval if there is one; all in %"""
    values = 100 * np.array(values)
    if low is not None:
        axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1)
    axis.scatter(values, [y] * len(values), color=color, s=12, alpha=.6, linewidths=0, zorder=3)
    axis.plot([values.mean()] * 2, [y - .35, y + .35], color=color, linewidth=2)


def frame(axis, names, title, first):
    """The frame of a panel of `dots`: names at the left of the first panel of a row"""
    axis.set_yticks(range(0, -len(names), -1), names if first else [""] * len(names), fontsize=8)
    axis.set_ylim(-len(names) + .4, .6)
    axis.set_title(textwrap.fill(title, 24), fontsize=9)
    axis.grid(axis="x", alpha=.3)
    axis.tick_params(axis="x", labelsize=7)


def draw_arms(axis, result, arms, measure, named):
    """A panel with a line for each arm"""
    frame(axis, [ARMS[arm] for arm in arms], MEASURES[measure][0] + ", %", named)
    for y, arm in enumerate(arms):
        if arm in result["rows"][measure]:
            dots(axis, -y, result["rows"][measure][arm]["per_seed"], color_of(arm, arms))


def draw_contrasts(axis, result, pairs, measure, named):
    """A panel with a line for each paired difference"""
    frame(axis, [f"{ARMS[a]} minus {ARMS[b]}" for a, b in pairs], "paired differences, %-points", named)
    axis.axvline(0, color="0.5", linewidth=.8)
    for y, (a, b) in enumerate(pairs):
        d = result["differences"][f"{a} - {b}"].get(measure)
        if d:
            dots(axis, -y, d["per_seed"], color_of(a, []), d["low"], d["high"])


def draw_short(path, result, n_seeds):
    """The answers and the swap test of the arms that the study is about"""
    arms = [arm for arm in SHORT if arm in result["rows"]["extracted"]]
    pairs = [pair for pair in CONTRASTS if " - ".join(pair) in result["differences"] and {*pair} <= {*SHORT}]
    figure, axes = plt.subplots(2, 2, figsize=(9, .3 * (len(arms) + len(pairs)) + 1.8), layout="constrained",
                                height_ratios=(len(arms) + 1, len(pairs) + 1))
    for column, measure in enumerate(("extracted", "swap")):
        draw_arms(axes[0, column], result, arms, measure, column == 0)
        axes[0, column].set_xlim(0, 102)
        draw_contrasts(axes[1, column], result, pairs, measure, column == 0)
    figure.suptitle("dot: seed, tick: mean, line: 95 % interval" if n_seeds > 1 else
                    "n = 1: no difference is resolved", fontsize=8)
    save(figure, path)


def draw(path, result, seeds, text):
    """All of it: arms and contrasts with a dot for each seed, training curves of the first seed, gradient maps at equal
    weights"""
    arms = [arm for arm in ARMS if any(arm in cells for cells in result["rows"].values())]
    pairs = [pair for pair in CONTRASTS if " - ".join(pair) in result["differences"]]
    height = [.3 * len(arms) + .5, .3 * len(pairs) + .5, 2.4, 6, 1.4]
    figure = plt.figure(figsize=(18, sum(height) + 4))
    grid = figure.add_gridspec(5, 60, height_ratios=height, hspace=.3)
    colors = {arm: color_of(arm, arms) for arm in arms}
    for column, measure in enumerate(SHOWN):
        place = slice(10 * column + (2 if column else 0), 10 * column + 10)
        draw_arms(figure.add_subplot(grid[0, place]), result, arms, measure, column == 0)
        draw_contrasts(figure.add_subplot(grid[1, place]), result, pairs, measure, column == 0)

    curves = {arm: read_log(os.path.join(seeds[0], arm)) for arm in arms if arm not in ("random", "stage1")}
    panels = {"loss": "loss of the SFT arms, nats a token", "accuracy": "pair accuracy in training",
              "reward": "mean reward of the samples", "drift_vision": "drift of the encoder from the run's start"}
    for i, (key, title) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[2, 15 * i:15 * i + 12])
        for arm, log in curves.items():
            if key in log and not (key == "loss" and ("accuracy" in log or "reward" in log)):
                axis.plot(log["step"], log[key], color=colors[arm], linewidth=1,
                          linestyle="--" if arm.startswith("warm") else "-")
        axis.set_title(f"{title}\n({os.path.basename(seeds[0].rstrip('/'))}; colours as above, dashed: after warm-up)",
                       fontsize=8)
        axis.set_xlabel("step", fontsize=8)
    axis = figure.add_subplot(grid[3, :])
    axis.imshow(plt.imread(os.path.join(seeds[0], "probe", "maps_stage1.png")))
    axis.axis("off")
    axis = figure.add_subplot(grid[4, :])
    axis.axis("off")
    axis.text(0, 1, "\n".join(textwrap.fill(line, 200) for line in text), va="top", fontsize=9, family="serif")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


# ---- the transplant --------------------------------------------------------------------------------------------------


def read_transplant(seed):
    """One seed's folder -> {(encoder, *column): share right among candidates, or a probe's score}, {run: FLOPs}"""
    asked, probed = results(seed, "vqa"), results(seed, "probe")
    values = {(*row.split("."), kind): cells[kind]["restricted"][0] for row, cells in asked.items() for kind in ASKED}
    values |= {(row, "probe", measure): cells[measure]["value"][0]
               for row, cells in probed.items() for measure in PROBED}
    return values, {run: read_json(os.path.join(seed, run, "config.json"))["flops"]
                    for run in ("start", "more", "sft", "dpo", "large", "start.linear")}


def report_transplant(seeds, out):
    """Table, report.json and picture of a transplant; differences to the start are paired within a seed"""
    found, flops = zip(*map(read_transplant, seeds))
    values = {key: [seed[key] for seed in found] for key in found[0]}
    cost = {run: float(np.mean([seed[run] for seed in flops])) for run in flops[0]}
    lines, result = {encoder: [name] for encoder, name in ENCODERS.items()}, {}
    for key in COLUMNS:
        for encoder, line in lines.items():
            v = values.get((encoder, *key))
            if v:
                d = paired(v, values["start", *key])
                result[", ".join((encoder, *key))] = {"mean": float(np.mean(v)), "per_seed": v, "minus_start": d}
            line += [f"{100 * np.mean(v):.1f}", difference_text(d) if encoder != "start" else ""] if v else ["", ""]
    table = (f"a fresh LLM reads each frozen encoder: % right among candidates, and difference to start [95 %]; "
             f"{len(seeds)} seed(s)",
             ["", *(cell for heading in COLUMNS.values() for cell in (heading, "    minus start"))],
             list(lines.values()))
    text = [f"{name}: {cost[run]:.3g} FLOPs, {100 * cost[run] / cost['start']:.0f} % of what trained the start"
            for run, name in (("start", "stage 1 of the start"), ("large", "stage 1 of the larger encoder"),
                              ("more", "training on"), ("sft", "SFT"), ("dpo", "DPO, its reference apart"),
                              ("start.linear", "a fresh LLM on a frozen encoder"))]
    write(out, {"seeds": seeds, "rows": result, "flops": cost}, [table], text,
          lambda path: draw_transplant(path, values))


def draw_transplant(path, values):
    """A panel a connector and kind of question, or a probe; a column an encoder, a dot a seed"""
    figure, axes = plt.subplots(2, len(COLUMNS) // 2, figsize=(2 * len(COLUMNS), 6), layout="constrained")
    for axis, (key, heading) in zip(axes.T.flat, COLUMNS.items()):
        for x, encoder in enumerate(ENCODERS):
            v, color = 100 * np.array(values.get((encoder, *key), [])), color_of(encoder, list(ENCODERS))
            if len(v):
                axis.plot([x - .3, x + .3], [v.mean()] * 2, color=color, linewidth=2)
                axis.scatter([x] * len(v), v, color=color, s=18, zorder=3)
        axis.set_xticks(range(len(ENCODERS)), [name.replace(" ", "\n") for name in ENCODERS.values()], fontsize=6.5)
        axis.set_title(heading, fontsize=9)
        axis.set_xlim(-.6, len(ENCODERS) - .4)
        axis.set_ylim(0, 103)
        axis.set_ylabel("%" if key[0] == "probe" else "% right among candidates", fontsize=8)
    figure.suptitle("the transplant: a fresh LLM learns to read each frozen encoder (dots: seeds)", fontsize=10)
    save(figure, path)


def write(out, contents, tables, text, draw_into, printed=None):
    """Prints tables (or `printed` instead) and text, and writes OUT/report.json, OUT/report.md and OUT/report.png"""
    for table in printed or tables:
        common.print_table(*table)
    print("\n" + "\n".join(text))
    os.makedirs(out, exist_ok=True)
    common.write_json(os.path.join(out, "report.json"), {"versions": common.versions(), **contents, "text": text})
    with open(os.path.join(out, "report.md"), "w") as f:
        f.write(markdown(tables) + "\n" + "\n\n".join(text) + "\n")
    draw_into(os.path.join(out, "report.png"))
    print(f"wrote {out}/report.json, report.md and report.png")


def main():
    args = parser.parse_args()
    if args.transplant:
        return report_transplant(args.seeds, args.out)
    result = summarise(args.seeds)
    text = sentences(result, len(args.seeds))
    arms, (title, _, lines) = tables = study_tables(result, len(args.seeds))
    columns = [[m, *(line[i + 2] for line in lines)] for i, m in enumerate(SHOWN)]
    narrow = title, ["", *(line[0] for line in lines)], columns                 # for a terminal
    write(args.out, {"seeds": args.seeds, **result}, tables, text,
          lambda path: draw_short(path, result, len(args.seeds)), [arms, narrow])
    draw(os.path.join(args.out, "all.png"), result, args.seeds, text)
    print(f"wrote {args.out}/all.png: every arm and measure, training curves, gradient maps")


if __name__ == "__main__":
    common.cli(main)
