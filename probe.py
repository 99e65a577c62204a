"""
What does the vision encoder know? Detach it from each run, freeze it, and ask it directly.

    python probe.py runs/stage1 runs/sft runs/dpo --out runs/probe          the drawn world
    python probe.py runs/stage1 runs/dpo --out runs/p --classification cifar/train cifar/test
                                                                            folders with one folder a class
    python probe.py runs/stage1 runs/dpo --out runs/p --segmentation images masks
                                                                            pictures and label pictures of equal names

Probes 1 and 2 read `MLLM.features`, the patch tokens at the layer that the LLM reads, before the connector; 3 takes
gradients one step later, at the image tokens that the connector hands to the LLM.

1. classification: logistic regression on mean-pooled, standardised features.
2. segmentation: logistic regression on single patch tokens, each labelled by the majority of its pixels;
   mean IoU of patches.
3. gradient maps: where in the picture does a loss look? The gradient of log p(chosen), which is what SFT follows, and
   of log p(chosen) - log p(rejected), which is what DPO follows, with respect to the image tokens, L1 norm per token.
   The picture is encoded once for both answers, so the gradient is summed over every use of it. Reported: the share of
   gradient inside the box where the two answers differ, and how often the largest gradient lies in it (pointing game).

On the maps of the paper (PIVOT, section 4.2): its pipeline encodes the picture once for each answer and draws the
gradient at the *chosen* copy. By Eq. 1 that gradient is beta * sigmoid(-margin) * d log p(chosen), one number times the
SFT gradient, and the map is rescaled to [0, 1] before it is drawn. So at equal weights the two maps are the same
picture, and published differences come from weights that had moved apart. tests/test_probe.py checks this. The contrast
between the two losses only shows when the rejected answer's use of the picture is counted too, as it is here.

For 1 and 2 the strength of regularisation is chosen on a fifth of the training rows, all strengths in one pass over
frozen features, and the test rows are read once. Scores are means over --seeds such splits, with a 95 % bootstrap
interval over test pictures. A random encoder of the same shape is always the first row, and the first run is what the
others are compared with.
"""
import argparse
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from tqdm import tqdm

import common
import data
from model import MLLM, InputError
from scenes import Scenes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", help="run directories; the first is the one the others are compared with")
parser.add_argument("--out", required=True, help="folder to write; must not exist")
parser.add_argument("--classification", nargs="+", metavar="FOLDER",
                    help="TRAIN [TEST] folders with one folder a class (default: the drawn world)")
parser.add_argument("--segmentation", nargs="+", metavar="FOLDER",
                    help="IMAGES MASKS [TEST_IMAGES TEST_MASKS] folders (default: the drawn world)")
parser.add_argument("--void", type=int, default=255, help="mask value of pixels that belong to no class")
parser.add_argument("--maps",
                    help="pairs with boxes for the gradient maps: scenes/SPLIT/TASK or a .jsonl file "
                         "(default: scenes/test/maps, unless own folders are probed)")
parser.add_argument("--n", type=int, default=2000,
                    help="drawn pictures for classification; an eighth of it for segmentation, a fifth for maps")
parser.add_argument("--seeds", type=int, default=3, help="splits of the training rows to average over")
parser.add_argument("--batch_size", type=int, default=128, help="pictures a forward pass")
parser.add_argument("--seed", type=int, default=0, help="of the drawn world, the splits and the random encoder")
STRENGTHS = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]  # of the L2 penalty, relative to the mean cross-entropy


# ---- features --------------------------------------------------------------------------------------------------------


def random_encoder(model):
    """The model with an encoder of the same shape and fresh weights: what a probe reads when nothing was learnt"""
    vision = type(model.vision)(model.vision.config)
    return MLLM(vision, model.image_processor, model.llm, model.tokenizer, model.feature_layer, model.pool)


def squash(model, images):
    """PIL pictures -> (B,3,H,W), resized without cropping, so that masks and boxes stay where they are"""
    height, width = (side * model.vision.config.patch_size for side in model.grid)
    resized = [image.convert("RGB").resize((width, height), Image.BICUBIC) for image in images]
    no_crop = {"do_center_crop": False} if hasattr(model.image_processor, "do_center_crop") else {}
    return model.image_processor(resized, do_resize=False, return_tensors="pt", **no_crop)["pixel_values"]


@torch.no_grad()
def extract(model, images, batch_size, pooled, desc):
    """PIL pictures -> frozen features on the CPU: (n,D) means over patches if `pooled`, else (n,N,D)"""
    features = []
    for at in tqdm(range(0, len(images), batch_size), desc=desc):
        x = model.features(squash(model, images[at:at + batch_size]).to(model.device)).float().cpu()
        features.append(x.mean(1) if pooled else x)
    return torch.cat(features)


# ---- linear probes ---------------------------------------------------------------------------------------------------


def fit_linear(x, y, n_classes, strengths=STRENGTHS):
    """Logistic regression at every strength at once: x (n,D), y (n,) -> weights (S,D+1,C), the last row is the bias.

    Minimises mean cross-entropy + strength * |W|^2 for each by L-BFGS; the heads share nothing,
    so their sum has the same optimum."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1)                                        # (n,D+1)
    penalty = torch.tensor(strengths)[:, None, None] * torch.ones(1, x.shape[1], 1)
    penalty[:, -1] = 0                                                                  # the bias is free
    weights = torch.zeros(len(strengths), x.shape[1], n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.einsum("nd,sdc->snc", x, weights)
        loss = F.cross_entropy(rearrange(logits, "s n c -> (s n) c"), y.repeat(len(strengths))) * len(strengths)
        loss = loss + (penalty * weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_probe(train_x, train_y, test_x, n_classes, n_seeds, groups=None):
    """-> predictions (n_seeds, n_test), each with the strength that was best on a held-out fifth of the training rows.

    `groups` (n,) names the picture of each training row, so that patches of one picture are not split apart."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6                                  # statistics of train only
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    groups = torch.arange(len(train_x)) if groups is None else groups
    predictions = []
    for seed in range(n_seeds):
        shuffled = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed))
        held_out = torch.isin(groups, shuffled[:max(1, len(shuffled) // 5)])
        weights = fit_linear(train_x[~held_out], train_y[~held_out], n_classes)         # (S,D+1,C)
        classify = lambda x, w: (x @ w[..., :-1, :] + w[..., -1:, :]).argmax(-1)
        accuracy = (classify(train_x[held_out], weights) == train_y[held_out]).float().mean(1)  # (S,)
        predictions.append(classify(test_x, weights[accuracy.argmax()]))
    return torch.stack(predictions)


def patch_labels(mask, grid, patch, void):
    """Label of each patch = the commonest class of its pixels: mask (H,W) integers -> (N,),
    -1 where every pixel is void"""
    nearest = [((np.arange(n * patch) + .5) * side / (n * patch)).astype(int) for n, side in zip(grid, mask.shape)]
    blocks = rearrange(mask[np.ix_(*nearest)], "(h p) (w q) -> (h w) (p q)", h=grid[0], w=grid[1])
    counts = np.stack([(blocks == c).sum(1) * (c != void) for c in range(int(blocks.max()) + 1)], 1)    # (N,C)
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


def mean_iou(confusion):
    """Confusion counts (C,C), rows true
    -> mean of intersection over union over the classes that occur in truth or prediction"""
    hit, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float((hit[union > 0] / union[union > 0]).mean())


# ---- data of the probes ----------------------------------------------------------------------------------------------


def pictures_in(folder):
    """Sorted picture files of a folder"""
    if not os.path.isdir(folder):
        raise SystemExit(f"{folder}: no such folder")
    return sorted(name for name in os.listdir(folder)
                  if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")))


def open_picture(path):
    try:
        with Image.open(path) as image:
            return image.copy()
    except Exception as error:
        raise SystemExit(f"picture {path} cannot be read ({error})") from None


def class_folders(folder, classes=None):
    """FOLDER/class/picture -> pictures, labels (n,), class names"""
    if not os.path.isdir(folder):
        raise SystemExit(f"--classification {folder}: no such folder")
    found = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    classes = classes or found
    if not found:
        raise SystemExit(f"--classification {folder}: it holds no class folders")
    if unknown := sorted(set(found) - set(classes)):
        raise SystemExit(f"--classification {folder}: classes {unknown} are not in the training folder")
    images, labels = [], []
    for name in found:
        for file in pictures_in(os.path.join(folder, name)):
            images.append(open_picture(os.path.join(folder, name, file)).convert("RGB"))
            labels.append(classes.index(name))
    return images, torch.tensor(labels), classes


def hold_out_third(*lists):
    """Every third item is for testing -> (train lists), (test lists)"""
    pick = lambda x, test: [v for i, v in enumerate(x) if (i % 3 == 2) == test]
    return [pick(x, False) for x in lists], [pick(x, True) for x in lists]


def classification_data(args):
    """-> train pictures, train labels, test pictures, test labels, number of classes"""
    if not args.classification:
        train, test = ([rows[i] for i in range(len(rows))] for rows in
                       (Scenes("train", args.n, "red", args.seed), Scenes("test", args.n // 2, "red", args.seed)))
        unpack = lambda rows: ([r["image"] for r in rows], torch.tensor([r["label"] for r in rows]))
        return *unpack(train), *unpack(test), 6
    images, labels, classes = class_folders(args.classification[0])
    if len(args.classification) > 1:
        test_images, test_labels, _ = class_folders(args.classification[1], classes)
    else:
        (images, labels), (test_images, test_labels) = hold_out_third(images, labels.tolist())
        labels, test_labels = torch.tensor(labels), torch.tensor(test_labels)
    return images, labels, test_images, test_labels, len(classes)


def mask_folders(images, masks):
    """Two folders with files of the same names (endings may differ) -> pictures, masks (H,W)"""
    stems = {os.path.splitext(name)[0]: name for name in pictures_in(masks)}
    pictures, arrays = [], []
    for name in pictures_in(images):
        if os.path.splitext(name)[0] not in stems:
            raise SystemExit(f"{os.path.join(images, name)} has no mask in {masks}")
        mask = np.array(open_picture(os.path.join(masks, stems[os.path.splitext(name)[0]])))
        if mask.ndim != 2:
            raise SystemExit(f"{os.path.join(masks, stems[os.path.splitext(name)[0]])} is not a label picture: "
                             f"it has {mask.shape[2]} channels")
        pictures.append(open_picture(os.path.join(images, name)).convert("RGB"))
        arrays.append(mask)
    return pictures, arrays


def segmentation_data(args):
    """-> (train pictures, train masks), (test pictures, test masks)"""
    if not args.segmentation:
        unpack = lambda rows: ([rows[i]["image"] for i in range(len(rows))],
                               [rows[i]["mask"] for i in range(len(rows))])
        return tuple(unpack(Scenes(split, max(2, args.n // 8), "vqa", args.seed)) for split in ("train", "test"))
    if len(args.segmentation) not in (2, 4):
        raise SystemExit("--segmentation takes IMAGES MASKS, or IMAGES MASKS TEST_IMAGES TEST_MASKS")
    if len(args.segmentation) == 4:
        return mask_folders(*args.segmentation[:2]), mask_folders(*args.segmentation[2:])
    return hold_out_third(*mask_folders(*args.segmentation))


# ---- gradient maps ---------------------------------------------------------------------------------------------------


def gradient_maps(model, batch):
    """For pairs (responses 2i chosen, 2i+1 rejected of picture i) -> {"chosen": (I,N), "difference": (I,N)},
    L1 norms per image token"""
    tokens = model.image_tokens(batch.pixels).detach().requires_grad_()                # (I,N,D): one copy a picture
    chosen, rejected = rearrange(batch.per_response(model.response_logps(batch, tokens)), "(i two) -> two i", two=2)
    maps = {}
    for name, objective in {"chosen": chosen, "difference": chosen - rejected}.items():
        gradient, = torch.autograd.grad(objective.sum(), tokens, retain_graph=True)    # pictures do not mix in the sum
        maps[name] = reduce(gradient.abs(), "i n d -> i n", "sum")
    return maps


def box_cover(box, size, grid):
    """How much of each token's cell lies in the box:
    box (x0,y0,x1,y1) and size (W,H) in pixels, grid (rows, columns) -> (N,) in [0,1]"""
    (x0, y0, x1, y1), (W, H), (rows, columns) = box, size, grid
    overlap = lambda low, high, n, extent: np.clip(
        np.minimum(high * n / extent, np.arange(n) + 1) - np.maximum(low * n / extent, np.arange(n)), 0, 1)
    return np.outer(overlap(y0, y1, rows, H), overlap(x0, x1, columns, W)).reshape(-1)


def points_at(gradient, box, size, grid):
    """Pointing game: does the middle of the token with the largest gradient lie in the box?"""
    row, column = divmod(int(np.argmax(gradient)), grid[1])
    x, y = (column + .5) * size[0] / grid[1], (row + .5) * size[1] / grid[0]
    return float(box[0] <= x < box[2] and box[1] <= y < box[3])


def map_scores(model, collator, records, batch_size, desc):
    """-> {"energy_chosen": (I,), "energy_difference", "point_chosen", "point_difference", "area": the box's share},
    maps of all pictures"""
    grid = tuple(side // model.pool for side in model.grid)
    maps, scores = {"chosen": [], "difference": []}, {}
    for at in tqdm(range(0, len(records), batch_size), desc=desc):
        chunk = range(at, min(at + batch_size, len(records)))
        batch, dropped = collator([[i] for i in chunk])
        if dropped:
            raise InputError(dropped[0])
        batch.pixels = squash(model, [records[i]["image"] for i in chunk])        # no crop: boxes stay in place
        for name, value in gradient_maps(model, batch.to(model.device)).items():
            maps[name] += list(value.float().cpu().numpy())
    for i, record in enumerate(records):
        box, size = record["box"], record["image"].size
        cover = box_cover(box, size, grid)
        scores.setdefault("area", []).append(cover.mean())
        scores.setdefault("point_centre", []).append(
            float(box[0] <= size[0] / 2 < box[2] and box[1] <= size[1] / 2 < box[3]))
        for name in maps:
            scores.setdefault(f"energy_{name}", []).append(float((maps[name][i] * cover).sum() / maps[name][i].sum()))
            scores.setdefault(f"point_{name}", []).append(points_at(maps[name][i], box, size, grid))
    return {name: np.array(values) for name, values in scores.items()}, maps


def draw_maps(path, records, maps, grid, title, n=8):
    """Contact sheet: each picture with its box, then both maps laid over it"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = min(n, len(records))
    figure, axes = plt.subplots(3, n, figsize=(1.5 * n, 4.9), squeeze=False)
    for i in range(n):
        image, (x0, y0, x1, y1) = records[i]["image"], records[i]["box"]
        for row, name in enumerate((None, "chosen", "difference")):
            axis = axes[row][i]
            axis.imshow(image, extent=(0, image.width, image.height, 0))
            if name:
                axis.imshow(maps[name][i].reshape(grid), extent=(0, image.width, image.height, 0),
                            cmap="jet", alpha=.55, interpolation="nearest")
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1.2))
            axis.set_xticks([]), axis.set_yticks([])
    for row, text in enumerate(("picture", "log p(chosen)\n(SFT's gradient)", "chosen - rejected\n(DPO's gradient)")):
        axes[row][0].set_ylabel(text, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    args = parser.parse_args()
    common.check_out(args.out)
    device, autocast = common.setup(args.seed)
    own = bool(args.classification or args.segmentation)
    todo = {"classification": not own or bool(args.classification), "segmentation": not own or bool(args.segmentation),
            "maps": bool(args.maps) or not own}
    classification = classification_data(args) if todo["classification"] else None
    segmentation = segmentation_data(args) if todo["segmentation"] else None
    n_maps = None if args.maps else max(1, args.n // 5)
    pairs = data.load(args.maps or "scenes/test/maps", "pairs", n_maps, args.seed) if todo["maps"] else None
    records = [pairs[i] for i in range(len(pairs))] if pairs else []
    if any(not record.get("box") for record in records):
        raise SystemExit(f"--maps {args.maps}: every row needs a 'box' (x0, y0, x1, y1 in pixels)")

    table = {}  # {row: {measure: values over test pictures}}
    with common.whole_folder(args.out) as folder:
        for name, run in {"random": None, **dict(zip(common.names(args.runs), args.runs))}.items():
            model = (MLLM.load(run) if run else random_encoder(MLLM.load(args.runs[0]))).to(device).eval()
            values = table[name] = {}
            with autocast():
                if classification:
                    train_images, train_y, test_images, test_y, n_classes = classification
                    train_x, test_x = (extract(model, x, args.batch_size, True, f"{name} classification")
                                       for x in (train_images, test_images))
                    values["classification"] = (linear_probe(train_x, train_y, test_x, n_classes, args.seeds)
                                                == test_y).float().numpy()              # (seeds, n)
                if segmentation:
                    values["mIoU"] = segment(model, segmentation, args, name)           # (seeds, n, C, C)
                if records and run:                                                     # no LLM reads a random encoder
                    collator = data.Collator(pairs, model, ("chosen", "rejected"))
                    scores, maps = map_scores(model, collator, records, args.batch_size, f"{name} maps")
                    values.update({k: v[None] for k, v in scores.items()})
                    grid = tuple(side // model.pool for side in model.grid)
                    draw_maps(os.path.join(folder, f"maps_{name}.png"), records, maps, grid,
                              f"gradient maps at the weights of {name}; box: where the answers differ")
        result = summarise(table, args.seed)
        with open(os.path.join(folder, "results.json"), "w") as f:
            json.dump({"args": vars(args), "versions": common.versions(), "table": result}, f, indent=1)
    measures = [m for m in result[common.names(args.runs)[0]]]
    lines = [[name, *(common.percent(cells[m]["value"]) if m in cells else "" for m in measures)]
             for name, cells in result.items()]
    common.print_table(f"probes, % [95 % interval over test pictures], means over {args.seeds} probe seeds",
                       ["", *measures], lines)
    first, *others = common.names(args.runs)
    lines = [[name, *(common.percent(result[name][m]["vs_first"], sign=True) for m in measures)] for name in others]
    if lines:
        common.print_table(f"difference to {first}, picture by picture [95 % interval]", ["", *measures], lines)
    print(f"wrote {args.out}/results.json" + (" and a contact sheet of gradient maps for each run" if records else ""))


def segment(model, segmentation, args, name):
    """-> confusion counts (seeds, n_test, C, C) of the patches of every test picture"""
    (train_images, train_masks), (test_images, test_masks) = segmentation
    label = lambda masks: torch.from_numpy(np.stack([
        patch_labels(m, model.grid, model.vision.config.patch_size, args.void) for m in masks]))
    train_y, test_y = label(train_masks), label(test_masks)                            # (n,N)
    train_x, test_x = (extract(model, x, args.batch_size, False, f"{name} segmentation")
                       for x in (train_images, test_images))
    picture = torch.arange(len(train_y))[:, None].expand_as(train_y)
    known, n_classes = train_y >= 0, int(max(train_y.max(), test_y.max())) + 1
    predictions = linear_probe(train_x[known], train_y[known], rearrange(test_x, "n p d -> (n p) d"),
                               n_classes, args.seeds, picture[known])
    confusions = np.zeros((args.seeds, len(test_y), n_classes, n_classes), np.int32)
    for seed in range(args.seeds):
        for i, (true, predicted) in enumerate(zip(test_y, predictions[seed].reshape(test_y.shape))):
            np.add.at(confusions[seed, i], (true[true >= 0], predicted[true >= 0]), 1)
    return confusions


def summarise(table, seed):
    """{row: {measure: values (seeds, pictures, ...)}}
    -> {row: {measure: {"value": [mean, low, high], "vs_first": [...], "seed_sd"}}}"""
    first, result = list(table)[1], {}
    for row, values in table.items():
        result[row] = {}
        for measure, v in values.items():
            statistic = (lambda x: np.mean([mean_iou(s.sum(0)) for s in x])) if measure == "mIoU" else np.mean
            reference = table[first][measure]
            boot, boot_first = (common.bootstrap(lambda d, x=x: statistic(x[:, d]), v.shape[1], seed)
                                for x in (v, reference))  # same draws
            interval = lambda mean, b: [float(mean), *np.quantile(b, [.025, .975]).tolist()]
            result[row][measure] = {"value": interval(statistic(v), boot),
                                    "vs_first": interval(statistic(v) - statistic(reference), boot - boot_first),
                                    "seed_sd": float(np.std([statistic(v[s:s + 1]) for s in range(len(v))]))}
    return result


if __name__ == "__main__":
    common.cli(main)
