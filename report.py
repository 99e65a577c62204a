"""
The study in one table and one picture: what probe.py and eval_vqa.py found for every arm and seed.

    python report.py runs/seed0 runs/seed1 runs/seed2 --out runs        after speedrun.sh (which calls this)
    python report.py runs/transplant/seed0 --transplant --out runs/transplant       after transplant.sh (likewise)

Reads results.json in SEED/probe, SEED/vqa and SEED/swap and the logs of the arms; of a transplant,
results.json in SEED/vqa and SEED/probe and the FLOPs in config.json of its runs. Writes OUT/report.json and
OUT/report.png. Rows are means over seeds. Differences are paired within a seed, with a 95 % t interval over seeds; from
one seed no difference between arms is claimed, because training again with another seed moves every number.
"""
import argparse
import json
import os
import textwrap

import numpy as np

import common
from figures import color_of, plt

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("seeds", nargs="+", help="one folder a seed, as speedrun.sh or transplant.sh makes it")
parser.add_argument("--out", required=True, help="folder for report.json and report.png")
parser.add_argument("--transplant", action="store_true", help="the seed folders were made by transplant.sh")

ARMS = {"random": "random encoder", "stage1": "stage 1", "more": "stage 1 trained on", "sft": "SFT", "dpo": "DPO",
        "grpo": "GRPO", "sft_grpo": "half SFT, half GRPO"}
DIFFERENCES = (("dpo", "sft"), ("sft", "stage1"), ("dpo", "stage1"), ("more", "stage1"), ("grpo", "stage1"),
               ("grpo", "dpo"), ("grpo", "sft_grpo"))
MEASURES = {  # key -> (heading, file, path inside its table)
    "decoded": ("vision questions, as decoded", "vqa", ("vision-centric", "decoded")),
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
}
ENCODERS = {"random": "random", "start": "start", "more": "start trained on", "sft": "+ SFT", "dpo": "+ DPO",
            "large": "larger, no post-training"}  # rows of the transplant; its columns:
CONNECTORS = {"linear": "linear connector", "mlp": "MLP connector", "1+1": "MLP, first layer kept"}
ASKED = {"vision-centric": "vision questions", "shape": "shape questions"}
PROBED = {"logistic top-1": "probe: shape of the red object",
          "alignment start, read layer": "probe: alignment with start's LLM"}
COLUMNS = {(c, kind): f"{ASKED[kind]}, {CONNECTORS[c]}" for c in CONNECTORS for kind in ASKED} | \
    {("probe", measure): heading for measure, heading in PROBED.items()}
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def read(seed):
    """One seed's folder -> {measure: {arm: value}}"""
    found = {measure: {} for measure in MEASURES}
    tables = {}
    for file in ("probe", "vqa", "swap"):
        path = os.path.join(seed, file, "results.json")
        if not os.path.isfile(path):
            raise SystemExit(f"{path} is missing: speedrun.sh makes it")
        with open(path) as f:
            tables[file] = json.load(f)["table"]
    for measure, (_, file, (first, second)) in MEASURES.items():
        for arm in ARMS:
            cell = tables[file].get(arm, {}).get(first)
            if cell:
                found[measure][arm] = cell[second][0]
    return found


def paired(a, b):
    """Per-seed values of two arms -> {"mean": a - b, "low", "high", "per_seed"}; no interval from one seed"""
    d = np.array(a) - np.array(b)
    half = T95[min(len(d) - 2, len(T95) - 1)] * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else None
    return {"mean": float(d.mean()), "low": None if half is None else float(d.mean() - half),
            "high": None if half is None else float(d.mean() + half), "per_seed": d.tolist()}


def summarise(seeds):
    """-> {"rows": {measure: {arm: {"mean", "per_seed"}}}, "differences": {"dpo - sft": {measure: paired}, ...}}"""
    read_seeds = [read(seed) for seed in seeds]
    values = {m: {arm: [r[m][arm] for r in read_seeds] for arm in ARMS if arm in read_seeds[0][m]} for m in MEASURES}
    rows = {m: {arm: {"mean": float(np.mean(v)), "per_seed": v} for arm, v in arms.items()}
            for m, arms in values.items()}
    differences = {f"{a} - {b}": {m: paired(v[a], v[b]) for m, v in values.items()} for a, b in DIFFERENCES}
    return {"rows": rows, "differences": differences}


def difference_text(d):
    if d["low"] is None:
        return f"{100 * d['mean']:+.1f} (n = 1)"
    return f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def sentences(result, n_seeds):
    """What the numbers carry: the answers, the encoders and the gradients; then what they do not settle"""
    rows, diff = result["rows"], result["differences"]["dpo - sft"]
    at = lambda measure, arm: f"{100 * rows[measure][arm]['mean']:.0f} %"
    spread = "one seed" if n_seeds == 1 else f"means of {n_seeds} seeds"
    text = [f"Vision questions answered as taught: {at('decoded', 'stage1')} after stage 1, "
            f"{at('decoded', 'sft')} after SFT and {at('decoded', 'dpo')} after DPO "
            "on the same pairs; choosing among candidate answers, so that style does not count: "
            f"{at('restricted', 'stage1')}, {at('restricted', 'sft')} and {at('restricted', 'dpo')} ({spread}).",
            f"After GRPO on its own answers to as many pictures: {at('decoded', 'grpo')} as taught, and "
            f"{at('decoded', 'sft_grpo')} if half of those pictures went into SFT before it.",
            f"Read by stage 1's connector and LLM, its own encoder is worth {at('swap', 'stage1')} of them, "
            f"the encoder of SFT {at('swap', 'sft')}, of DPO {at('swap', 'dpo')}, of GRPO {at('swap', 'grpo')}.",
            f"At equal (stage-1) weights, {at('energy_difference', 'stage1')} of the gradient of chosen - rejected, "
            "which DPO follows, lies in the box of the object that the answers differ in, and "
            f"{at('energy_chosen', 'stage1')} of the gradient of log p(chosen), which SFT follows; the box is "
            f"{at('area', 'stage1')} of the picture (in part by construction: only the box tells the answers apart)."]
    if rows["restricted"]["stage1"]["mean"] < .9:
        text.append("Stage 1 stopped before it had learnt all it could; "
                    "STAGE1_STEPS=1500 OUT=runs/long bash speedrun.sh trains it for longer.")
    open_questions = [MEASURES[m][0] for m in ("restricted", "swap", "knowledge", "classification", "mIoU",
                                               "mIoU_two_layer", "alignment")
                      if diff[m]["low"] is None or diff[m]["low"] <= 0 <= diff[m]["high"]]
    if n_seeds == 1:
        text.append("DPO minus SFT on every other row: n = 1: not resolved. "
                    'SEEDS="0 1 2" bash speedrun.sh repeats the study, paired.')
    elif open_questions:
        text.append(f"DPO minus SFT is not resolved by {n_seeds} seeds (interval holds 0) for: "
                    f"{'; '.join(open_questions)}.")
    return text


def read_log(path):
    with open(path) as f:
        lines = [json.loads(line) for line in f]
    return {key: np.array([line[key] for line in lines]) for key in lines[0]}


def draw(path, result, seeds, text):
    """The picture: dots of every arm and seed, paired differences, training curves, gradient maps at equal weights"""
    figure = plt.figure(figsize=(16, 14))
    grid = figure.add_gridspec(4, 5, height_ratios=[1, .9, 2, .25], hspace=.38, wspace=.42)
    colors = {arm: color_of(arm, list(ARMS)) for arm in ARMS}

    for column, measure in enumerate(("decoded", "restricted", "swap", "mIoU")):
        axis = figure.add_subplot(grid[0, column])
        for x, arm in enumerate(ARMS):
            if arm in result["rows"][measure]:
                row = result["rows"][measure][arm]
                axis.plot([x - .3, x + .3], [100 * row["mean"]] * 2, color=colors[arm], linewidth=2)
                axis.scatter([x] * len(seeds), 100 * np.array(row["per_seed"]), color=colors[arm], s=18, zorder=3)
        axis.set_xticks(range(len(ARMS)), [name.replace(" ", "\n") for name in ARMS.values()], fontsize=5.5)
        axis.set_title(textwrap.fill(MEASURES[measure][0], 26), fontsize=9)
        axis.set_ylabel("%", fontsize=8)
        axis.set_xlim(-.6, len(ARMS) - .4)
        axis.set_ylim(0, 103)

    axis = figure.add_subplot(grid[1, :3])
    shown = ("restricted", "swap", "classification", "mIoU")
    for offset, (pair, color) in enumerate((("sft - stage1", "tab:orange"), ("dpo - stage1", "tab:blue"),
                                            ("grpo - stage1", colors["grpo"]), ("dpo - sft", "black"))):
        for y, measure in enumerate(shown):
            d, at = result["differences"][pair][measure], -y - .2 * (offset - 1.5)
            if d["low"] is not None:
                axis.plot([100 * d["low"], 100 * d["high"]], [at, at], color=color, linewidth=1)
            axis.scatter(100 * np.array(d["per_seed"]), [at] * len(seeds), s=10, color=color,
                         label=pair.replace(" - ", " minus ") if y == 0 else None)
    axis.axvline(0, color="0.5", linewidth=.8)
    axis.set_yticks([-y for y in range(len(shown))], [textwrap.fill(MEASURES[m][0], 24) for m in shown], fontsize=7)
    axis.set_title("paired differences in %-points: a dot a seed" +
                   (", line: 95 % interval" if len(seeds) > 1 else "; n = 1: not resolved"), fontsize=9)
    axis.legend(fontsize=7, loc="best")

    logs = {arm: read_log(os.path.join(seeds[0], arm, "log.jsonl"))
            for arm in ("sft", "dpo", "grpo", "sft_half", "sft_grpo")}
    sft, dpo = logs["sft"], logs["dpo"]
    axis = figure.add_subplot(grid[1, 3])
    axis.plot(sft["step"], sft["loss"], color="tab:orange", label="SFT loss (nats a token)")
    axis.plot(dpo["step"], dpo["loss"], color="tab:blue", label="DPO loss")
    axis.plot(dpo["step"], dpo["accuracy"], color="tab:blue", linestyle=":", label="DPO pair accuracy")
    axis.set_title(f"training, {os.path.basename(seeds[0].rstrip('/'))}", fontsize=9)
    axis.legend(fontsize=7)
    axis.set_xlabel("step", fontsize=8)
    axis = figure.add_subplot(grid[1, 4])
    for arm, before in (("grpo", 0), ("sft_grpo", logs["sft_half"]["seconds"][-1])):    # the SFT takes its time too
        axis.plot(before + logs[arm]["seconds"], logs[arm]["reward"], color=colors[arm], label=ARMS[arm])
    axis.set_title("mean reward of the samples", fontsize=9)
    axis.legend(fontsize=7)
    axis.set_xlabel("seconds", fontsize=8)
    axis = figure.add_subplot(grid[0, 4])
    for arm in ("sft", "dpo", "grpo"):
        for part, style in (("vision", "-"), ("llm", ":")):
            axis.plot(logs[arm]["step"], 100 * logs[arm][f"drift_{part}"], style,
                      color=colors[arm], label=f"{ARMS[arm]} {part}")
    axis.set_title("weight drift |w - w0| / |w0|, %", fontsize=9)
    axis.legend(fontsize=6, framealpha=.5, loc="center right")
    axis.set_xlabel("step", fontsize=8)

    axis = figure.add_subplot(grid[2, :])
    axis.imshow(plt.imread(os.path.join(seeds[0], "probe", "maps_stage1.png")))
    axis.axis("off")
    axis = figure.add_subplot(grid[3, :])
    axis.axis("off")
    axis.text(0, 1, "\n".join(textwrap.fill(line, 185) for line in text), va="top", fontsize=9, family="serif")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


# ---- the transplant --------------------------------------------------------------------------------------------------


def read_transplant(seed):
    """One seed's folder -> {(encoder, *column): share right among candidates, or a probe's score}, {run: FLOPs}"""
    tables = {}
    for file in ("vqa", "probe"):
        with open(os.path.join(seed, file, "results.json")) as f:
            tables[file] = json.load(f)["table"]
    values = {(*row.split("."), kind): cells[kind]["restricted"][0]
              for row, cells in tables["vqa"].items() for kind in ASKED}
    values |= {(row, "probe", measure): cells[measure]["value"][0]
               for row, cells in tables["probe"].items() for measure in PROBED}
    flops = {}
    for run in ("start", "more", "sft", "dpo", "large", "start.linear"):
        with open(os.path.join(seed, run, "config.json")) as f:
            flops[run] = json.load(f)["flops"]
    return values, flops


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
    common.print_table("a fresh LLM reads each frozen encoder: % right among candidates, and difference to start "
                       f"[95 %]; {len(seeds)} seed(s)",
                       ["", *(cell for heading in COLUMNS.values() for cell in (heading, "    minus start"))],
                       lines.values())
    text = [f"{name}: {cost[run]:.3g} FLOPs, {100 * cost[run] / cost['start']:.0f} % of what trained the start"
            for run, name in (("start", "stage 1 of the start"), ("large", "stage 1 of the larger encoder"),
                              ("more", "training on"), ("sft", "SFT"), ("dpo", "DPO, its reference apart"),
                              ("start.linear", "a fresh LLM on a frozen encoder"))]
    print("\n" + "\n".join(text))
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "report.json.tmp"), "w") as f:
        json.dump({"seeds": seeds, "versions": common.versions(), "rows": result, "flops": cost, "text": text},
                  f, indent=1)
    os.replace(f.name, os.path.join(out, "report.json"))
    draw_transplant(os.path.join(out, "report.png"), values)
    print(f"wrote {out}/report.json and {out}/report.png")


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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    args = parser.parse_args()
    if args.transplant:
        return report_transplant(args.seeds, args.out)
    result = summarise(args.seeds)
    result["text"] = sentences(result, len(args.seeds))
    arms = [arm for arm in ARMS if any(arm in rows for rows in result["rows"].values())]
    lines = [[ARMS[arm], *(f"{100 * result['rows'][m][arm]['mean']:.1f}" if arm in result["rows"][m] else ""
                           for m in MEASURES)] for arm in arms]
    for name, pair in (("DPO minus SFT", "dpo - sft"), ("GRPO minus stage 1", "grpo - stage1")):
        lines.append([name, *(difference_text(result["differences"][pair][m]) for m in MEASURES)])
    common.print_table(f"%, mean of {len(args.seeds)} seed(s)",
                       ["", *(heading for heading, _, _ in MEASURES.values())], lines)
    print("\n" + "\n".join(result["text"]))
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "report.json.tmp"), "w") as f:
        json.dump({"seeds": args.seeds, "versions": common.versions(), **result}, f, indent=1)
    os.replace(f.name, os.path.join(args.out, "report.json"))
    draw(os.path.join(args.out, "report.png"), result, args.seeds, result["text"])
    print(f"wrote {args.out}/report.json and {args.out}/report.png")


if __name__ == "__main__":
    common.cli(main)
