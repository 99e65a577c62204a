"""
What does the vision encoder know? Detach it, freeze it, and ask it directly; several encoders side by side.

    python probe.py runs/stage1 runs/sft runs/dpo --out runs/probe                  the drawn world, every probe
    python probe.py google/siglip2-so400m-patch16-384 runs/sft runs/dpo/vision --out runs/p \\
        --classification timm/mini-imagenet                                         hub ids, runs, exported encoders
    python probe.py runs/stage1 runs/dpo --out runs/p --classification cifar/train cifar/test
                                                                                    folders with one folder a class
    python probe.py runs/stage1 runs/dpo --out runs/p --segmentation images masks --void 11
                                                                                    pictures and masks of equal names
    torchrun --nproc_per_node=8 -- probe.py ...                                     the same, pictures shared out

Probes 1 and 2 read `features`, the patch tokens at the layer that the LLM reads (or, with --through_connector, what the
connector makes of them); 4 and 5 read every layer up to it; 3 takes gradients at image tokens and pixels.

1. classification: (a) logistic regression on standardised pooled features; (b) the nearest class prototype, the mean of
   the normalised features of a class's *training* pictures (the paper's script takes test pictures for it).
2. segmentation: patch tokens, each labelled by the majority of its pixels, void left out, read by a linear and by a
   two-layer head (PIVOT: two layers, AdamW 1e-3, 5 epochs). Mean IoU, and the paper's recall, averaged over classes.
3. gradient maps: where in the picture does a loss look? See maps.py.
4. alignment with language: of the k = 10 pictures nearest to a picture, how many captions are among the 10 nearest to
   its caption, in the eyes of an LLM? (Mutual k-NN of the platonic representation hypothesis, arXiv 2405.07987: mean
   over tokens, clamped at the 95th percentile, best pair of layers.) Chance is k / (n - 1); choosing the best of many
   pairs adds a little, so captions are also shuffled and the best pair chosen again.
5. movement: how far did each layer's weights move from the first encoder's, |w - w0| / |w0|, and how alike is what they
   say, by linear CKA (Kornblith et al. 2019)?

Regularisation of the logistic readers (1a, linear head of 2) is chosen on a fifth of the training rows; test rows are
read once. Scores are means over --seeds such splits (for the two-layer head: initial weights and order), with a 95 %
bootstrap interval over test pictures. A random encoder of the same shape is always there, drawn anew for each seed, and
the first encoder is what the others are compared with.
"""
import argparse
import functools
import json
import os
import tempfile

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import alignment
import common
import data
import features
import figures
import maps
import parallel
import scenes
from features import Frozen, Pictures
from model import MLLM, InputError
from readers import linear_probe, prototype_probe, two_layer_probe
from rows import Rows

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("encoders", nargs="+",
                    help="run directories, exported vision/ folders, hub ids; the others are compared with the first")
parser.add_argument("--out", required=True, help="folder to write; must not exist")
parser.add_argument("--world", choices=scenes.WORLDS, default="scenes", help="which drawn world, without own data")
parser.add_argument("--classification", nargs="+", metavar="SOURCE",
                    help="TRAIN [TEST] folders with one folder a class, or one hub id or parquet folder "
                         "(default, if no other data is named: the shape of the red object, drawn world)")
parser.add_argument("--segmentation", nargs="+", metavar="SOURCE",
                    help="IMAGES MASKS [TEST_IMAGES TEST_MASKS] folders, or one hub id or parquet folder "
                         "(default, if no other data is named: the drawn world)")
parser.add_argument("--void", type=common.whole_number, default=255,
                    help="mask value of pixels that belong to no class (harmless where there is none)")
parser.add_argument("--maps",
                    help="pairs with boxes for the gradient maps: scenes/SPLIT/TASK or a .jsonl file "
                         "(default, if no other data is named: scenes/test/maps)")
parser.add_argument("--captions",
                    help="pictures with captions for the alignment: a .jsonl file, a parquet folder or a hub id such "
                         "as minhuh/prh (default, if no other data is named: scenes/test/maps)")
parser.add_argument("--llms", nargs="+",
                    help="LLMs to align with: hub ids, folders, or runs, whose own LLM is meant "
                         "(default: the first of the encoders that is a run)")
parser.add_argument("--pool", choices=("mean", "cls", "attention"), default="mean",
                    help="one vector a picture: mean of the patches, class token (CLIP, DINOv2, ViT), or SigLIP's head")
parser.add_argument("--through_connector", action="store_true",
                    help="read what the connector makes of the features, for 1 and 2 (run directories only)")
parser.add_argument("--feature_layer", type=int,
                    help="layer of encoders that do not say which, as an index of hidden_states (default: -2)")
parser.add_argument("--n", type=common.positive, default=2000,
                    help="drawn pictures for classification; an eighth for segmentation, a fifth for captions, a tenth "
                         "for maps. Of own captions: the first N")
parser.add_argument("--seeds", type=common.positive, default=3, help="probe seeds to average over")
parser.add_argument("--max_patches", type=common.positive, default=200_000,
                    help="patches, drawn at random, that the linear segmentation head learns from at most")
parser.add_argument("--beta", type=float, default=0.1,
                    help="of the DPO loss in the gradient maps, whose reference is the run's parent if that is named "
                         "before it, else the run itself")
parser.add_argument("--batch_size", type=common.positive, default=128, help="pictures a forward pass")
parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 0,
                    help="processes that decode pictures ahead (default: 8 on a GPU, else 0)")
parser.add_argument("--cache",
                    help="folder where features are kept for the next probe (default: features, beside --out)")
parser.add_argument("--seed", type=int, default=0, help="of the drawn world, the random encoder and the bootstrap")


# ---- segmentation ----------------------------------------------------------------------------------------------------


def patch_labels(mask, grid, patch, void):
    """Label of each patch = the commonest class of its pixels: mask (H,W) integers -> (N,),
    -1 where every pixel is void"""
    nearest = [((np.arange(n * patch) + .5) * side / (n * patch)).astype(int) for n, side in zip(grid, mask.shape)]
    blocks = rearrange(mask[np.ix_(*nearest)].astype(int), "(h p) (w q) -> (h w) (p q)", h=grid[0], w=grid[1])
    N, C = len(blocks), max(int(blocks.max()), void) + 1
    counts = np.bincount((np.arange(N)[:, None] * C + blocks).ravel(), minlength=N * C).reshape(N, C)
    counts[:, void] = 0
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


@functools.lru_cache(maxsize=4)  # usually all encoders have the same grid: masks are read once
def labels_of(masks, grid, patch, void):
    """Pictures of labels -> (n,N)"""
    return np.stack([patch_labels(masks.mask(i), grid, patch, void)
                     for i in tqdm(range(len(masks)), desc="masks", leave=False)])


def tally(true, predicted, n_classes):
    """Labels (n,N), -1 = void, and predictions (n,N) -> (n,3,C): patches of each class that were hit, are of it, were
    called it"""
    counts = np.zeros((len(true), 3, n_classes), np.int64)
    for i in range(len(true)):
        t, p = true[i][true[i] >= 0], predicted[i][true[i] >= 0]
        counts[i] = [np.bincount(x, minlength=n_classes) for x in (t[t == p], t, p)]
    return counts


def mean_iou(counts):
    """tally (3,C) -> mean of intersection over union over the classes that occur in truth or prediction"""
    hit, true, called = counts
    union = true + called - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def macro_recall(counts):
    """tally (3,C) -> mean over the classes that occur of the share of their patches that was found (the paper's)"""
    hit, true, _ = counts
    return float((hit[true > 0] / true[true > 0]).mean())


# ---- asking ----------------------------------------------------------------------------------------------------------

mean = lambda values: float(np.mean(values))  # a statistic: values (seeds, pictures, ...) -> the number to report


def classify_pictures(frozen, sets, args, n_seeds):
    """-> {measure: (values (seeds,n), statistic)}"""
    train, train_y, test, test_y, classes = sets
    train_x, test_x = (frozen(pictures, args.pool) for pictures in (train, test))
    device, values = frozen.encoder.device, {}
    found = {"logistic": linear_probe(train_x, train_y, test_x, len(classes), n_seeds, device, k=5),
             "prototype": prototype_probe(train_x, train_y, test_x, len(classes), device, k=5)[None]}
    for name, best in found.items():                                                    # (seeds,n,5)
        right = best == test_y[:, None]
        values[f"{name} top-1"] = right[..., 0], mean
        if len(classes) >= 10:
            values[f"{name} top-5"] = right.any(-1), mean
    return values


def segment_pictures(frozen, sets, args, n_seeds):
    """-> {measure: (values (seeds,n,3,C), statistic)}; then, to be drawn, what the two-layer head of the first seed
    predicts (n,N), the truth (n,N), and the grid of the N patches"""
    train, train_masks, test, test_masks = sets
    patch = frozen.encoder.vision.config.patch_size * frozen.encoder.grid[0] // frozen.grid[0]
    train_y, test_y = (labels_of(masks, frozen.grid, patch, args.void) for masks in (train_masks, test_masks))
    train_x, test_x = (frozen(pictures, "patches") for pictures in (train, test))       # (n,N,D)
    n_classes, device = int(max(train_y.max(), test_y.max())) + 1, frozen.encoder.device
    flat = lambda x: x.reshape(-1, x.shape[2])                                          # (n,N,D) -> (n N,D)
    picture = np.arange(len(train_y)).repeat(train_y.shape[1])
    linear = linear_probe(flat(train_x), train_y.reshape(-1), flat(test_x), n_classes, n_seeds,
                          device, picture, args.max_patches)[..., 0].reshape(n_seeds, *test_y.shape)
    two_layer = two_layer_probe(train_x, train_y, test_x, n_classes, n_seeds, device, frozen.name)
    values = {}
    for name, predicted in (("linear", linear), ("two-layer", two_layer)):
        counts = np.stack([tally(test_y, p, n_classes) for p in predicted])             # (seeds,n,3,C)
        values[f"{name} mIoU"] = counts, lambda v: mean([mean_iou(seed.sum(0)) for seed in v])
        values[f"{name} recall"] = counts, lambda v: mean([macro_recall(seed.sum(0)) for seed in v])
    return values, two_layer[0], test_y, frozen.grid


def map_values(scores):
    """What map_scores found -> {measure: (values (1,n) or (1,n,2), statistic)}

    The energy share of an objective is averaged over pictures. That of a loss is the sum of all gradients inside the
    boxes over the sum of all gradients, because a batch adds gradients up; for one pair it equals its objective's."""
    together, values = (lambda v: float(v[..., 0].sum() / v[..., 1].sum())), {}
    for name, v in scores.items():
        if not name.startswith("energy"):
            values[name] = v[None], mean
        elif "loss" in name:
            values[name] = v[None], together
        else:
            values[name] = (v[:, 0] / v[:, 1].clip(1e-30))[None], mean
    return values


def summarise(table, first, seed):
    """{row: {measure: (values (seeds, pictures, ...), statistic)}}
    -> {row: {measure: {"value": [mean, low, high], "vs_first": [...] or None, "per_seed": [...]}}}"""
    boot = {(row, measure): common.bootstrap(lambda draw: statistic(v[:, draw]), v.shape[1], seed)
            for row, measures in table.items() for measure, (v, statistic) in measures.items()}
    result = {row: {} for row in table}
    for (row, measure), draws in boot.items():
        v, statistic = table[row][measure]
        cell = result[row][measure] = {"value": common.interval(statistic(v), draws), "vs_first": None,
                                       "per_seed": [statistic(one[None]) for one in v]}
        if measure in table[first] and row != first:                                    # the same draws: paired
            difference = statistic(v) - statistic(table[first][measure][0])
            cell["vs_first"] = common.interval(difference, draws - boot[first, measure])
    return result


def print_result(result, first):
    """Two tables for the probes and two for the maps: values, and differences to the first encoder"""
    measures = list(dict.fromkeys(measure for cells in result.values() for measure in cells))
    of_maps = [m for m in measures if m.split("_")[0] in ("energy", "point", "area", "centre")]
    for title, shown in (("probes", [m for m in measures if m not in of_maps]), ("gradient maps", of_maps)):
        for key, heading in (("value", f"{title}, % [95 % interval over test pictures]"),
                             ("vs_first", f"{title}, difference to {first}, picture by picture [95 % interval]")):
            text = lambda cell: common.percent(cell[key], sign=key != "value") if cell and cell[key] else ""
            if key == "vs_first":
                shown = [m for m in shown if not m.endswith(("_pixels", "_input", "area", "centre", "shuffled"))]
            lines = [[row, *(text(cells.get(m)) for m in shown)] for row, cells in result.items()]
            lines = [line for line in lines if any(line[1:])]
            if lines:
                common.print_table(heading, ["", *shown], lines)
    if of_maps:
        print("\nenergy: share of the gradient in the box; point: largest gradient in the box; _chosen, _difference, "
              "_SFT_loss, _DPO_loss: of what;\n_tokens, _pixels, _input: at image tokens, at pixels, pixels x input; "
              "area, centre, point_centre: what a map without eyes would reach")


def parent_of(run):
    """The run that a run was trained from, as a path, or None"""
    with open(os.path.join(run, "config.json")) as f:
        parent = json.load(f).get("parent")
    return parent and os.path.realpath(parent)


def check_box(record, name):
    """Raises InputError unless the record's box (x0, y0, x1, y1) lies in its picture"""
    (W, H), box = record["image"].size, record.get("box")
    if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
            and 0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H):
        raise InputError(f"{name}: 'box' is {box}; it must be x0, y0, x1, y1 in pixels of a picture of {W}x{H}")


def sets_to_ask_of(args, runs, llms):
    """The sets that were named, or all of the drawn world -> what `features.classification_data` and
    `features.segmentation_data` give, or None; pairs and captions (`rows.Rows`, or []); pictures for the movement"""
    if args.through_connector and len(runs) < len(args.encoders):
        raise InputError("--through_connector: only run directories have a connector; leave other encoders out")
    if args.maps and not runs:
        raise InputError("--maps: only run directories have an LLM, and none is named")
    if args.captions and not llms:
        raise InputError("--captions: name the LLMs to align with by --llms")
    drawn = not (args.classification or args.segmentation or args.maps or args.captions)
    own_world = f"{args.world}/test/maps"
    classification = segmentation = None
    pairs = captions = []
    if args.classification or drawn:
        classification = features.classification_data(args.classification, args.n, args.seed, args.world)
    if args.segmentation or drawn:
        segmentation = features.segmentation_data(args.segmentation, args.n, args.seed, args.world)
    if args.maps or drawn and runs:
        source = args.maps or own_world
        pairs = data.load(source, "pairs", max(1, args.n // 10) if data.is_drawn(source) else None, args.seed)
        for i in range(len(pairs)):
            check_box(pairs[i], f"--maps {source} row {i}")
    if args.captions or drawn and llms:
        source = args.captions or own_world
        n = max(4 * alignment.K, args.n // 5) if data.is_drawn(source) else args.n
        captions = data.load(source, "captions", n, args.seed)
        if not isinstance(captions, (Rows, scenes.Scenes)):
            raise InputError(f"--captions {source} stands for several sets: name one")
        if len(captions) <= alignment.K + 1:
            raise InputError(f"--captions {source}: {len(captions)} rows are too few for {alignment.K} neighbours")
    any_pictures = classification[2] if classification else segmentation[2] if segmentation else \
        Pictures(captions or pairs)
    return classification, segmentation, pairs, captions, any_pictures


def main():
    args = parser.parse_args()
    if os.path.exists(args.out):
        raise InputError(f"--out {args.out} exists already; remove it or choose another name")
    device, autocast = common.setup(args.seed, "highest")                               # TF32 would stall line searches
    parallel.wait()                                                                     # all have looked for --out
    names, runs = common.names(args.encoders), [source for source in args.encoders if features.is_run(source)]
    first, llms = names[0], args.llms or runs[:1]
    cache = args.cache or os.path.join(os.path.dirname(os.path.abspath(args.out)), "features")
    classification, segmentation, pairs, captions, any_pictures = sets_to_ask_of(args, runs, llms)
    texts = [captions[i]["caption"] for i in range(len(captions))]
    words = {name: alignment.neighbours(alignment.text_features(llm, texts, device, autocast))
             for name, llm in zip(common.names(llms), llms)} if texts else {}           # {LLM: (L,n,k)}

    # ---- encoder by encoder
    rows = [(name, source, None) for name, source in zip(names, args.encoders)]         # of a random one: which draw
    table, predictions, layer_pairs, movement, margins_of = {}, {}, {}, {}, {}
    shapes, start = [], None
    with common.whole_folder(args.out) if not parallel.RANK else tempfile.TemporaryDirectory() as folder:
        for name, source, draw in rows:                                                 # grows: random ones come last
            encoder = features.open_encoder(source, args.feature_layer)
            shape, n_seeds = features.shape_of(encoder), args.seeds
            if draw is not None:
                encoder, n_seeds = features.random_like(encoder, args.seed * args.seeds + draw), 1
            elif shape not in shapes:
                rows += [(f"random_{name}" if shapes else "random", source, i) for i in range(args.seeds)]
                shapes.append(shape)
            encoder.to(device).eval()
            frozen = Frozen(encoder, name, cache, args.batch_size, args.workers, autocast, args.through_connector)
            values = {}
            if classification:
                values.update(classify_pictures(frozen, classification, args, n_seeds))
            if segmentation:
                found, *drawn = segment_pictures(frozen, segmentation, args, n_seeds)
                predictions.setdefault(name, drawn)                                     # of a random one the first draw
                if start and frozen.grid != start["grid"]:                              # other labels, own rows
                    found = {f"{m}, {frozen.grid[0]}x{frozen.grid[1]} patches": v for m, v in found.items()}
                values.update(found)
            if words:
                by_picture = alignment.neighbours(torch.from_numpy(np.array(frozen(Pictures(captions), "layers"))))
            for llm, by_caption in words.items():
                found, layer_pairs[f"{name}, {llm}"] = alignment.alignment(by_picture, by_caption)
                values.update({f"alignment {llm}, {which}": (v, mean) for which, v in found.items()})
            if pairs and isinstance(encoder, MLLM) and draw is None:                    # no LLM reads a random encoder
                reference = margins_of.get(parent_of(source))                           # None: the run is its own
                scores, drawn_maps, margins_of[os.path.realpath(source)] = maps.map_scores(
                    encoder, pairs, max(1, args.batch_size // 8),                       # two answers, and backward too
                    autocast, f"{name} maps", reference, args.beta)
                values.update(map_values(scores))
                for file, places in (("maps", ["tokens"]), ("pixel_maps", ["pixels", "input"])):
                    figures.draw_maps(os.path.join(folder, f"{file}_{name}.png"), pairs, drawn_maps, name, places)
            earlier = table.get(name, {})                                               # draws of a random one
            table[name] = {m: (np.concatenate([earlier[m][0], v]) if m in earlier else v, statistic)
                           for m, (v, statistic) in values.items()}
            if draw:                                                                    # one draw is enough below
                continue
            state = {key: value.cpu() for key, value in encoder.vision.state_dict().items()}
            tokens = alignment.sample_layers(frozen, any_pictures, seed=args.seed)
            start = start or {"state": state, "tokens": tokens, "shape": shape, "grid": frozen.grid,
                              "patches": encoder.grid}
            movement[name] = {
                "drift": alignment.layer_drift(start["state"], state, len(tokens)) if shape == start["shape"] else None,
                "cka": alignment.linear_cka(start["tokens"], tokens, device)
                if encoder.grid == start["patches"] else None}

        # ---- one table, one JSON, the pictures
        rows.sort(key=lambda row: row[2] is None)                                       # random ones first
        table, movement = ({name: found[name] for name, _, _ in rows} for found in (table, movement))
        result, guess = summarise(table, first, args.seed), chance(classification, captions)
        with open(os.path.join(folder, "results.json"), "w") as f:
            json.dump({"args": vars(args), "versions": common.versions(), "table": result, "movement": movement,
                       "alignment_layers": layer_pairs, "chance": guess}, f, indent=1)
        figures.draw_bars(os.path.join(folder, "probe.png"), result, guess)
        figures.draw_movement(os.path.join(folder, "movement.png"), movement, first)
        if segmentation:
            figures.draw_segmentation(os.path.join(folder, "segmentation.png"), segmentation[2],
                                      {name: predictions[name] for name in table})
    print_result(result, first)
    print_movement(movement, first)
    if guess:
        print(f"\nchance, %: {', '.join(f'{measure} {100 * value:.1f}' for measure, value in guess.items())}")
    print(f"wrote {args.out}: results.json, probe.png, movement.png" + ", segmentation.png" * bool(segmentation)
          + ", maps_*.png, pixel_maps_*.png" * bool(pairs))


def chance(classification, captions):
    """What guessing would reach: the commonest class, the five commonest; k / (n - 1) for neighbours, of any one pair
    of layers"""
    found = {}
    if classification:
        shares = np.sort(np.bincount(classification[3]) / len(classification[3]))[::-1]
        found = {"top-1": float(shares[0])} | ({"top-5": float(shares[:5].sum())} if len(shares) >= 10 else {})
    return found | ({"alignment": alignment.K / (len(captions) - 1)} if len(captions) else {})


def print_movement(movement, first):
    """Relative drift of weights and CKA of equal layers, a column an encoder"""
    depth, lines = len(movement[first]["cka"]), []
    for name, m in movement.items():
        drift = [f"{x:.4f}" for x in m["drift"]] if m["drift"] else [""] * (depth + 1)  # another shape has none
        same = [f"{m['cka'][i][i]:.4f}" if m["cka"] and i < len(m["cka"][i]) else "" for i in range(depth)]
        lines.append([name, *drift, *same])
    layers = range(1, depth + 1)
    common.print_table(f"movement from {first}: relative drift of weights, linear CKA of patch tokens "
                       "(random: one draw)", [
        "", "drift, embeddings", *(f"drift, layer {i}" for i in layers), *(f"CKA, layer {i}" for i in layers)], lines)


if __name__ == "__main__":
    common.cli(main)
