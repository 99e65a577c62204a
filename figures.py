"""Figures of probe.py: bars, gradient maps, segmentations, movement. `color_of` gives an arm one colour everywhere."""
import math
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after use(): no window system is needed


def color_of(name, names):
    """One colour an arm in all pictures; others in turn"""
    known = {"random": "0.6", "stage1": "black", "start": "black", "more": "tab:gray", "sft": "tab:orange",
             "sft_slow": "gold", "sft_equal": "chocolate", "sft_long": "tab:brown", "sft_drift": "tab:red",
             "dpo": "tab:blue", "dpo_fast": "navy",
             "dpo_sft": "tab:cyan", "mpo": "tab:purple", "other": "slategray", "warm": "darkkhaki",
             "warm_sft": "salmon", "warm_dpo": "skyblue", "grpo": "tab:green", "grpo_half": "limegreen",
             "sft_grpo": "tab:olive"}
    others = [n for n in names if n not in known]
    return known.get(name) or known.get(name.split("_")[0]) or f"C{2 + others.index(name) % 8}"


def canvas(lines, columns, width, height):
    """A figure with a grid of panels, each `width` x `height` inches -> figure, axes (lines, columns)"""
    return plt.subplots(lines, columns, figsize=(width * columns, height * lines + .4), squeeze=False,
                        layout="constrained")


def save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)


def blank(axis):
    axis.set_xticks([])
    axis.set_yticks([])


def draw_bars(path, result, chance):
    """A panel a measure: a bar an encoder with its 95 % interval over test pictures, a dot a probe seed, dashed what
    chance would reach: {"top-1", "top-5", "alignment": share}, or a row of `result` that is a baseline"""
    measures = list(dict.fromkeys(m for cells in result.values() for m in cells))
    baselines = {"energy": "area", "point": "point_centre"}
    baselines |= {m.removesuffix(", captions shuffled"): m for m in measures if m.endswith("shuffled")}
    measures = [m for m in measures if not m.endswith(("_pixels", "_input"))
                and m not in (*baselines.values(), "centre")]
    columns = min(4, len(measures))
    figure, axes = canvas(math.ceil(len(measures) / columns), columns, 3.4, 2.5)
    for axis in axes.flat[len(measures):]:
        axis.axis("off")
    for axis, measure in zip(axes.flat, measures):
        rows = [row for row, cells in result.items() if measure in cells]
        for x, row in enumerate(rows):
            cell = result[row][measure]
            value, low, high = (100 * v for v in cell["value"])
            axis.bar(x, value, color=color_of(row, list(result)), alpha=.75)
            axis.plot([x, x], [low, high], color="black", linewidth=1)
            axis.scatter([x] * len(cell["per_seed"]), 100 * np.array(cell["per_seed"]), s=9, color="red", zorder=3)
        baseline = baselines.get(measure) or baselines.get(measure.split("_")[0])
        level = result[rows[-1]][baseline]["value"][0] if baseline else \
            next((share for name, share in chance.items() if name in measure), None)
        if level is not None:
            axis.axhline(100 * level, color="black", linestyle="--", linewidth=.8)
        axis.set_xticks(range(len(rows)), [row if len(row) < 15 else "…" + row[-13:] for row in rows], fontsize=7,
                        **({"rotation": 30, "ha": "right"} if len(rows) > 4 else {}))
        axis.set_title(textwrap.fill(measure.replace("_", " "), 34), fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylabel("%", fontsize=7)
    figure.suptitle("bar: mean over probe seeds (dots); line: 95 % interval over test pictures; dashed: commonest "
                    "class, captions shuffled, area of the box, pointing at the centre", fontsize=9)
    save(figure, path)


def draw_maps(path, records, maps, name, places):
    """Contact sheet of one run: each picture with its box, then gradients of both objectives laid over it"""
    suffix = {"tokens": "", "pixels": ", at pixels", "input": ", x input"}
    shown = [(objective, place, title + suffix[place]) for place in places for objective, title in
             (("chosen", "log p(chosen)\n= SFT's map"), ("difference", "chosen - rejected\n= DPO's map"))]
    n = len(maps[shown[0][:2]])
    figure, axes = canvas(1 + len(shown), n, 1.4, 1.4)
    for i in range(n):
        record = records[i]
        image, (x0, y0, x1, y1) = record["image"], record["box"]
        for axis, what in zip(axes[:, i], [None, *shown]):
            extent = (0, image.width, image.height, 0)
            axis.imshow(image.convert("L").convert("RGB") if what else image, extent=extent)
            if what:
                axis.imshow(maps[what[:2]][i], extent=extent, cmap="jet", alpha=.55, interpolation="nearest")
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1.2))
            blank(axis)
    for axis, label in zip(axes[:, 0], ["picture", *(title for _, _, title in shown)]):
        axis.set_ylabel(label, fontsize=7)
    figure.suptitle(f"gradient maps at the weights of {name}; box: where the answers differ", fontsize=10)
    save(figure, path)


def draw_segmentation(path, pictures, predictions):
    """Test pictures, the truth as patches see it, and what the two-layer head makes of each encoder"""
    shades = plt.get_cmap("tab20").colors
    n, colors = min(6, len(pictures)), matplotlib.colors.ListedColormap(shades[::2] + shades[1::2])  # pale ones last
    chosen = np.linspace(0, len(pictures) - 1, n).astype(int)
    figure, axes = canvas(2 + len(predictions), n, 1.6, 1.5)
    (_, truth, truth_grid), *_ = predictions.values()
    rows = [("truth, by patch", truth, truth_grid), *((name, p, grid) for name, (p, _, grid) in predictions.items())]
    for column, i in enumerate(chosen):
        image = pictures[i]
        extent = (0, image.width, image.height, 0)
        for axis in axes[:, column]:
            blank(axis)
            axis.imshow(image.convert("L").convert("RGB"), extent=extent)  # grey: the colours are the classes
        axes[0, column].imshow(image, extent=extent)
        for axis, (_, labels, grid) in zip(axes[1:, column], rows):
            labels = labels[i].reshape(grid)
            axis.imshow(np.ma.masked_less(labels, 0) % 20, extent=extent, cmap=colors, vmin=0, vmax=19, alpha=.6,
                        interpolation="nearest")
    for axis, (name, _, _) in zip(axes[:, 0], [("picture", None, None), *rows]):
        axis.set_ylabel(name, fontsize=8)
    classes = np.unique(np.concatenate([truth[truth >= 0], *(labels.ravel() for labels, _, _ in predictions.values())]))
    figure.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=colors(c % 20), alpha=.6, label=c) for c in classes],
                  loc="outside lower center", ncols=len(classes), fontsize=7)
    figure.suptitle("segmentation by the two-layer head; a colour a class, void left clear in the truth", fontsize=10)
    save(figure, path)


def draw_movement(path, movement, first):
    """Linear CKA of every layer of the first encoder with every layer of the others, and the drift of each layer"""
    others = [name for name, m in movement.items() if m["cka"] and name != first]  # a random one at least
    columns = min(4, len(others) + 2)
    figure, axes = canvas(math.ceil((len(others) + 2) / columns), columns, 3, 2.9)
    *maps, same, drift = axes.flat[:len(others) + 2]
    for axis in axes.flat[len(others) + 2:]:
        axis.axis("off")
    for axis, name in zip(maps, others):
        cka = np.array(movement[name]["cka"])
        image = axis.imshow(cka, vmin=0, vmax=1, origin="lower", cmap="magma")
        if cka.size <= 64:
            for (i, j), value in np.ndenumerate(cka):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="black" if value > .6 else "white")
        axis.set_xticks(range(cka.shape[1]), range(1, cka.shape[1] + 1), fontsize=7)
        axis.set_yticks(range(cka.shape[0]), range(1, cka.shape[0] + 1), fontsize=7)
        axis.set_xlabel(f"layer of {name}", fontsize=8)
        axis.set_ylabel(f"layer of {first}", fontsize=8)
        axis.set_title(f"linear CKA, {first} and {name}", fontsize=8)
    figure.colorbar(image, ax=maps, shrink=.8)
    for name, m in movement.items():
        style = {"color": color_of(name, list(movement)), "marker": "o", "markersize": 3, "label": name}
        if m["cka"] and name != first and len(m["cka"]) == len(m["cka"][0]):
            same.plot(range(1, len(m["cka"]) + 1), np.diag(m["cka"]), **style)
        if m["drift"] and name != first:
            drift.plot(range(len(m["drift"])), [max(d, 1e-8) for d in m["drift"]], **style)
    same.set_title("CKA of equal layers (encoders of equal depth)", fontsize=8)
    drift.set_title(f"drift of weights from {first}", fontsize=8)
    drift.set_ylabel("|w - w0| / |w0|", fontsize=8)
    for axis, label in ((same, "layer"), (drift, "layer (0: embeddings)")):
        axis.set_xlabel(label, fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    drift.set_yscale("log")
    save(figure, path)
