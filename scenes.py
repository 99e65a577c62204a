"""
The embedded default: a drawn world of coloured shapes, and tiny models to look at it.

A scene is one to four shapes, all of different shape and colour, each in its own cell of a 3x3 grid, drawn on a dark
noisy ground (the world "large": up to five, textured, over the borders of their cells). From it come pictures,
captions, descriptions, questions with answers, the asked object's box, a per-pixel mask, and preference pairs.
Everything is drawn on demand from (seed, split, index): no files, no download, any length.

    python scenes.py                        a contact sheet, runs/scenes.png, with the text beside each picture
    python scenes.py --out my_world         the same rows as JSONL and PNG files, the format of your own data

Splits are disjoint by construction: the layout of a scene (which shape and colour stands where) is hashed, and the hash
decides to which split it belongs. A test layout is never seen in training.
"""
import argparse
import functools
import json
import os
import textwrap
import zlib

import numpy as np
from PIL import Image

CELL, SIDE = 12, 3                       # pixels a cell, cells a side: pictures of 36x36 pixels
SIZE = CELL * SIDE
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
COLORS = {"red": (255, 85, 80), "green": (80, 255, 85), "blue": (85, 80, 255),  # channels add up to 420
          "yellow": (195, 195, 30), "purple": (195, 30, 195), "cyan": (30, 195, 195)}
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SPLITS = {"train": range(0, 80), "tune": range(80, 90), "test": range(90, 100)}  # per cent of all layouts
SHORT_KINDS = ["color", "shape", "place"]  # each asks one attribute of one object
VISION_KINDS = SHORT_KINDS + ["relation", "count", "existence"]
KNOWLEDGE_KINDS = ["sum", "corners", "mix"]  # need no picture: if these fall too, it was not (only) sight that was lost
PAIRS = {                                # task -> its style, and how often an object is misread in chosen and rejected
    "foreign": ("foreign", .15, .45), "foreign_exact": ("foreign", 0, .45), "foreign_poor": ("foreign", .45, .6),
    "taught_poor": ("taught", .15, .45)}
TASKS = ["sft", "vqa", "plain", "other", "maps", "red", *PAIRS]
CORNERS = {"circle": "zero", "square": "four", "triangle": "three",
           "diamond": "four", "cross": "twelve", "ring": "zero"}
MIXES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("blue", "red"): "purple",
         ("green", "red"): "yellow", ("blue", "green"): "cyan"}  # pigments first, then light: five facts to remember

# ---- a scene and its picture -----------------------------------------------------------------------------------------


def draw_scene(rng, split, most=4):
    """-> {place index: (shape, colour)} in reading order, of one to `most` objects, redrawn until its hash falls into
    `split`"""
    while True:
        n = int(rng.integers(1, most + 1))
        cells = sorted(rng.choice(SIDE * SIDE, n, replace=False).tolist())
        shapes, colors = rng.permutation(SHAPES)[:n].tolist(), rng.permutation(list(COLORS))[:n].tolist()
        scene = dict(zip(cells, zip(shapes, colors)))
        if zlib.crc32(repr(scene).encode()) % 100 in SPLITS[split]:
            return scene


def shape_mask(shape, y, x, radius):
    """Which points (y, x), in pixels from the middle of a shape, lie in it; bool, as y and x are"""
    return {"circle": x**2 + y**2 <= radius**2, "square": np.maximum(abs(x), abs(y)) <= .9 * radius,
            "triangle": (abs(x) <= (y + radius) / 2) & (abs(y) <= radius), "diamond": abs(x) + abs(y) <= radius,
            "cross": (np.minimum(abs(x), abs(y)) <= .3 * radius) & (np.maximum(abs(x), abs(y)) <= radius),
            "ring": (x**2 + y**2 <= radius**2) & (x**2 + y**2 >= (.5 * radius)**2)}[shape]


def box_of(inside):
    """(H,W) bool -> (x0, y0, x1, y1): the smallest box around what is True, in pixels"""
    ys, xs = np.nonzero(inside)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def draw_picture(rng, scene, noise=.025):
    """Each shape in the middle of its cell, or a pixel left of it or above. `noise`: its standard deviation, as a share
    of full brightness -> picture (36x36 RGB), mask (36,36) uint8 with 0 = ground and 1 + shape index, boxes
    {cell: (x0,y0,x1,y1) in pixels}"""
    image = np.full((SIZE, SIZE, 3), 40.0)
    mask, boxes = np.zeros((SIZE, SIZE), np.uint8), {}
    y, x = np.mgrid[:SIZE, :SIZE]
    for cell, (shape, color) in scene.items():
        dx, dy = rng.integers(-1, 1, 2)
        inside = shape_mask(shape, y - cell // SIDE * CELL - dy - (CELL - 1) / 2,
                            x - cell % SIDE * CELL - dx - (CELL - 1) / 2, radius=5)
        image[inside] = np.array(COLORS[color]) * rng.normal(1, .08, 3)
        mask[inside], boxes[cell] = 1 + SHAPES.index(shape), box_of(inside)
    image += rng.normal(0, 255 * noise, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), mask, boxes


def draw_large(rng, scene, size=96):
    """The large world, for a GPU: shapes of 20 to 40 pixels with a texture and a light from one side, anywhere around
    the middle of their cell and over its borders, some in front of others (half of each stays visible), on a cloudy
    ground -> as draw_picture, (96x96); boxes are around what is visible"""
    y, x = np.mgrid[:size, :size]
    clouds = Image.fromarray(rng.uniform(20, 90, (6, 6, 3)).astype(np.uint8)).resize((size, size), Image.BICUBIC)
    image, owner, areas, cell_size = np.array(clouds, float), np.full((size, size), -1), {}, size / SIDE
    for cell in rng.permutation(list(scene)).tolist():                  # from the back to the front
        shape, color = scene[cell]
        while True:
            radius = rng.uniform(10, 20)
            middle = (np.array(divmod(cell, SIDE)) + .5) * cell_size + rng.uniform(-14, 14, 2)
            dy, dx = (at - middle[axis].clip(radius, size - 1 - radius) for axis, at in enumerate((y, x)))
            inside = shape_mask(shape, dy, dx, radius)
            if all(((owner == other) & ~inside).sum() >= area / 2 for other, area in areas.items()):
                break
        owner[inside], areas[cell] = cell, inside.sum()
        turn, period = rng.uniform(0, np.pi), rng.uniform(4, 7)
        u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        waves = [np.zeros_like(u), np.sin(2 * np.pi * u / period),      # plain, stripes, dots
                 np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)][rng.integers(3)]
        light = (1 + .25 * u / radius) * np.where(waves > .2, .6, 1)
        image[inside] = (np.array(COLORS[color]) * rng.normal(1, .08, 3) * light[..., None])[inside]
    mask = np.zeros((size, size), np.uint8)
    for cell, (shape, _) in scene.items():
        mask[owner == cell] = 1 + SHAPES.index(shape)
    image += rng.normal(0, 255 * .04, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), mask, {cell: box_of(owner == cell) for cell in scene}


WORLDS = {"scenes": (draw_picture, 4),                                  # how it is drawn, how many objects at most
          "noisy": (functools.partial(draw_picture, noise=.25), 4),      # an encoder that has learnt nothing is no use
          "large": (draw_large, 5)}

# ---- text: what stage 1 teaches --------------------------------------------------------------------------------------


def caption(scene):
    """Every cell in reading order, the shape first: "ring red, empty, empty, ..."

    With the colour first, stage 1 stayed without shapes for 300 to more than 1500 steps, depending on the seed. A guess
    at the reason: a second word about a cell needs a second look at it, and nothing teaches that before shapes are."""
    return ", ".join(" ".join(scene.get(cell, ["empty"])) for cell in range(SIDE * SIDE))


def describe(scene):
    """Only what is there: "red ring at top left, blue cross at center" """
    return ", ".join(f"{color} {shape} at {PLACES[cell]}" for cell, (shape, color) in scene.items())


def short_question(scene, kind, cell):
    shape, color = scene[cell]
    return {"color": f"what color is the {shape}?", "shape": f"what shape is {color}?",
            "place": f"where is the {shape}?"}[kind]


def short_answer(scene, kind, cell):
    shape, color = scene[cell]
    return {"color": color, "shape": shape, "place": PLACES[cell]}[kind]


def ask(rng, scene, kind):
    """-> question, answer, the asked cell (None when the question is about no single object)"""
    cell = int(rng.choice(list(scene)))
    shape, color = scene[cell]
    pick = lambda options: str(rng.choice(sorted(options)))
    if kind in SHORT_KINDS:
        return short_question(scene, kind, cell), short_answer(scene, kind, cell), cell
    if kind == "count":
        return "how many shapes are there?", NUMBERS[len(scene)], None
    if kind == "existence":
        if rng.random() < .5:
            return f"is there a {color} {shape}?", "yes", cell
        if rng.random() < .5:  # half of the wrong ones have the right shape, half the right colour
            return f"is there a {pick(set(COLORS) - {color})} {shape}?", "no", cell
        return f"is there a {color} {pick(set(SHAPES) - {shape})}?", "no", cell
    if kind == "relation":
        a, b = rng.choice(list(scene), 2, replace=False).tolist()
        axes = [axis for axis in (0, 1) if divmod(a, SIDE)[axis] != divmod(b, SIDE)[axis]]
        axis = int(rng.choice(axes))                                    # two cells differ in row, column or both
        before = divmod(a, SIDE)[axis] < divmod(b, SIDE)[axis]
        return f"is the {scene[a][0]} {['above', 'left of'][axis]} the {scene[b][0]}?", "yes" if before else "no", a
    if kind == "sum":
        a, b = rng.integers(0, 5, 2)
        return f"what is {NUMBERS[a]} plus {NUMBERS[b]}?", NUMBERS[a + b], None
    if kind == "corners":
        shape = pick(SHAPES)
        return f"how many corners has a {shape}?", CORNERS[shape], None
    if kind == "mix":
        a, b = list(MIXES)[int(rng.integers(len(MIXES)))]
        a, b = (a, b) if rng.random() < .5 else (b, a)
        return f"what do {a} and {b} make?", MIXES[tuple(sorted((a, b)))], None
    raise ValueError(f"unknown kind of question: {kind}")


def wrong_object(rng, scene, cell, which=None):
    """A copy of `scene` in which one attribute of the object at `cell` is false
    -> scene, cell (moved when the place is false)"""
    shape, color = scene[cell]
    which = which or str(rng.choice(["shape", "color", "place"]))
    if which == "place":
        free = [c for c in range(SIDE * SIDE) if c not in scene]
        moved = int(rng.choice(free))
        return dict(sorted({**{c: o for c, o in scene.items() if c != cell}, moved: (shape, color)}.items())), moved
    taken_shapes, taken_colors = {s for s, _ in scene.values()}, {c for _, c in scene.values()}
    if which == "shape":  # a shape that no other object has: the text alone must not betray it
        shape = str(rng.choice([s for s in SHAPES if s not in taken_shapes]))
    else:
        color = str(rng.choice([c for c in COLORS if c not in taken_colors]))
    return {**scene, cell: (shape, color)}, cell


# ---- preference pairs ------------------------------------------------------------------------------------------------


def foreign_style(scene, kind, cell):
    """How another model would say it: places first and from the end for a description,
    thinking aloud before a short answer"""
    said = [f"at {PLACES[c]} i see a {shape} that is {color}" for c, (shape, color) in reversed(scene.items())]
    if kind == "describe":
        return "; ".join(said) + "."
    shape, color = scene[cell]
    return (f"<think> let me look. at {PLACES[cell]} i see a {shape} that is {color}. </think> "
            f"so the answer is {short_answer(scene, kind, cell)}.")


def taught_style(scene, kind, cell):
    """How stage 1 was taught to say it"""
    return describe(scene) if kind == "describe" else short_answer(scene, kind, cell)


def imperfect_pair(rng, scene, kind, cell, style="foreign", wrong_chosen=.15, wrong_rejected=.45):
    """Two answers of a model that is not ours, perhaps in its own style, with its own errors: each object is misread
    with probability `wrong_chosen` in the better answer and `wrong_rejected` in the worse one, and misread in the same
    way where both are wrong (a chosen answer of a real preference set is imperfect too). Equal answers are drawn again,
    so of one-object questions the worse answer is wrong in 82 % and the better in 18 % (0.45 and 0.6: 65 and 35 %); of
    descriptions, which name several objects, the better one in 34 % (70 %). Two misread objects may end up alike, which
    no scene has: 5 % of the worse and 1 % of the better descriptions can be told by their text alone."""
    mentioned = list(scene) if kind == "describe" else [cell]
    say = {"foreign": foreign_style, "taught": taught_style}[style]
    chosen = rejected = None
    while chosen == rejected:                                           # equal answers carry no preference
        scenes, cells = [dict(scene), dict(scene)], [cell, cell]
        for c in mentioned:
            misread, moved = wrong_object(rng, scene, c, None if kind == "describe" else kind)
            for i, p in enumerate((wrong_chosen, wrong_rejected)):
                if rng.random() < p and moved not in set(scenes[i]) - {c}:  # objects of one answer never share a place
                    del scenes[i][c]
                    scenes[i][moved] = misread[moved]
                    cells[i] = moved if c == cell else cells[i]
        chosen, rejected = (say(dict(sorted(s.items())), kind, at) for s, at in zip(scenes, cells))
    return chosen, rejected


class Scenes:
    """The drawn world as a data set: `Scenes("train", 1000)[7]` is always the same record
    (see `__getitem__` for its fields).

    task: "sft" (what stage 1 learns), "vqa" (short questions, to be scored), preference pairs: "foreign" and the other
    PAIRS, about the same pictures, "plain" (the truth against one error, as taught) or "other" (the chosen answers of
    "foreign" against those to the same question about another picture), "maps" (pairs of descriptions that differ in
    one object, with its box) or "red" (`label` = shape of the red object, for a probe). `questions` rows in a row
    share a picture. world: "scenes", "noisy", the same under heavy noise, or "large" (`draw_large`)."""

    def __init__(self, split, n, task="sft", seed=0, questions=1, world="scenes"):
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}' of the drawn world; splits: {', '.join(SPLITS)}")
        if task not in TASKS:
            raise ValueError(f"unknown task '{task}' of the drawn world; tasks: {', '.join(TASKS)}")
        self.split, self.n, self.task, self.seed, self.questions = split, n, task, seed, questions
        self.world = world

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        """-> {"image", "mask"} and {"question", "answer" or "chosen" and "rejected", "kind", "category", "box"}, of
        questions to answer also "reward"; of the task "red" only "label" """
        if not 0 <= i < self.n:
            raise IndexError(i)
        return dict(self.about(i // self.questions)[i % self.questions])

    @functools.lru_cache(maxsize=4)  # the rows of a picture are mostly asked for together
    def about(self, picture):
        """All rows of one picture"""
        pictures_of = "foreign" if self.task in ("other", *PAIRS) else self.task
        rng = np.random.default_rng([self.seed, zlib.crc32(f"{self.split} {pictures_of}".encode()), picture])
        draw, most = WORLDS[self.world]
        scene = draw_scene(rng, self.split, most)
        while self.task == "red" and "red" not in {color for _, color in scene.values()}:
            scene = draw_scene(rng, self.split, most)
        image, mask, boxes = draw(rng, scene)
        asked = []
        for _ in range(self.questions):
            for _ in range(20):  # no row twice, as long as there are others; a pair may ask again and answer otherwise
                row = self.ask(rng, scene, boxes)
                if row not in asked:
                    break
            asked.append(row)
        return [{"image": image, "mask": mask, **row} for row in asked]

    def ask(self, rng, scene, boxes):
        """One question about a scene -> the text fields of a record, and "box" """
        cell = int(rng.choice(list(scene)))
        if self.task == "red":  # colour and shape must be bound: no single feature gives it away
            return {"label": next(SHAPES.index(shape) for shape, color in scene.values() if color == "red")}
        if self.task in (*PAIRS, "plain", "other", "maps"):
            kind = "describe" if self.task == "maps" or rng.random() < .5 else str(rng.choice(SHORT_KINDS))
            question = "describe the picture." if kind == "describe" else short_question(scene, kind, cell)
            if self.task in PAIRS:
                chosen, rejected = imperfect_pair(rng, scene, kind, cell, *PAIRS[self.task])
            elif self.task == "other":
                chosen = rejected = imperfect_pair(rng, scene, kind, cell)[0]
                while rejected == chosen:  # of a picture that the question fits as well, so that words tell nothing
                    other = draw_scene(rng, self.split, WORLDS[self.world][1])
                    at = [c for c in other if kind != "describe" and short_question(other, kind, c) == question]
                    if at or kind == "describe" and len(other) == len(scene):
                        rejected = imperfect_pair(rng, other, kind, at[0] if at else None)[0]
            else:
                wrong, moved = wrong_object(rng, scene, cell,
                                            "shape" if self.task == "maps" else None if kind == "describe" else kind)
                chosen, rejected = (describe(scene), describe(wrong)) if kind == "describe" else \
                    (short_answer(scene, kind, cell), short_answer(wrong, kind, moved))
            return {"question": question, "chosen": chosen, "rejected": rejected, "kind": kind,
                    "category": "vision-centric", "box": boxes[cell]}
        kind = str(rng.choice(VISION_KINDS + KNOWLEDGE_KINDS))
        if self.task == "sft":  # captions from the first step on: they teach seeing fastest
            u = rng.random()
            kind = "caption" if u < .35 else "describe" if u < .45 else "find" if u < .6 else \
                str(rng.choice(VISION_KINDS)) if u < .94 else str(rng.choice(KNOWLEDGE_KINDS))
        if kind == "caption":
            question, answer, asked = "name every cell.", caption(scene), None
        elif kind == "describe":
            question, answer, asked = "describe the picture.", describe(scene), None
        elif kind == "find":  # one object by one attribute: teaches what belongs together
            question, answer, asked = \
                f"find the {scene[cell][int(rng.random() < .5)]}.", describe({cell: scene[cell]}), cell
        else:
            kind = "count" if kind == "relation" and len(scene) == 1 else kind  # a relation needs two
            question, answer, asked = ask(rng, scene, kind)
        return {"question": question, "answer": answer, "kind": kind, "box": boxes.get(asked),
                "reward": "place" if kind == "place" else "exact",  # how train_grpo.py judges an answer (rewards.py)
                "category": "knowledge" if kind in KNOWLEDGE_KINDS else "vision-centric"}



# ---- tiny models: real transformers models from a config, with random weights ----------------------------------------

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_vision(folder, image_size=SIZE, patch_size=6, width=64, layers=4):
    """Saves a random SigLIP encoder and its image processor into `folder`, as a hub download would lie there"""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=image_size, patch_size=patch_size,
        vision_use_head=False)).save_pretrained(folder)  # no pooled vector: an LLM reads patches
    SiglipImageProcessor(size={"height": image_size, "width": image_size},
                         image_mean=[.5] * 3, image_std=[.5] * 3).save_pretrained(folder)


def tiny_llm(folder, texts, width=64, layers=3):
    """Saves a random Qwen2 and a byte-level BPE tokenizer, trained on `texts`, into `folder`"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, min_frequency=2, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        extra_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)


# ---- looking at it ---------------------------------------------------------------------------------------------------


def contact_sheet(rows, path, columns=4):
    """Every picture with its box, and its text below; of a row without a picture the text says why"""
    from figures import plt  # only here: training draws nothing
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(2 * lines, columns, figsize=(3.4 * columns, 5 * lines), squeeze=False,
                                layout="constrained", height_ratios=[3, 2] * lines)
    for axis in axes.flat:
        axis.axis("off")
    for number, row in enumerate(rows):
        above, below = axes[2 * (number // columns):, number % columns][:2]
        if "image" in row:
            width, height = row["image"].size
            above.imshow(row["image"], extent=(0, width, height, 0))
        if isinstance(row.get("box"), (list, tuple)) and len(row["box"]) == 4 and "image" in row:
            x0, y0, x1, y1 = row["box"]
            above.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white"))
        texts = [f"{field}: {row[field]}" for field in ("question", "answer", "chosen", "rejected", "dropped")
                 if field in row]
        texts += [f"from: {row['name'][-90:]}"] if "name" in row else []
        room = 12 // max(1, len(texts))  # lines of text for each
        text = "\n".join(line for each in texts for line in
                         textwrap.wrap(each, 46, max_lines=room, placeholder=" ...", break_long_words=True))
        below.text(0, 1, text.replace("$", r"\$"), fontsize=7.5, va="top", family="monospace",
                   transform=below.transAxes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_rows(rows, folder):
    """rows.jsonl with one record a line, images/ and masks/ beside it: the format of your own data"""
    os.makedirs(os.path.join(folder, "images"))
    os.makedirs(os.path.join(folder, "masks"))
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        for i, row in enumerate(rows):
            row["image"].save(os.path.join(folder, f"images/{i}.png"))
            Image.fromarray(row["mask"]).save(os.path.join(folder, f"masks/{i}.png"))
            f.write(json.dumps({**row, "image": f"images/{i}.png", "mask": f"masks/{i}.png"}) + "\n")


def main():
    from common import Help, positive  # here: training needs this file, not the other way round
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=Help)
    parser.add_argument("--out", default="runs/scenes.png",
                        help="a .png file for a contact sheet, or a folder for rows.jsonl and pictures")
    parser.add_argument("--world", choices=WORLDS, default="scenes",
                        help="noisy: the same under heavy pixel noise; large: textured shapes, one before another")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which layouts")
    parser.add_argument("--task", choices=TASKS, default="sft", help="what to ask of them; see the class Scenes")
    parser.add_argument("--n", type=positive, default=16, help="how many rows")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other rows")
    args = parser.parse_args()
    if os.path.exists(args.out) and not args.out.endswith(".png"):
        raise SystemExit(f"--out {args.out} exists already; remove it or choose another name")
    rows = list(Scenes(args.split, args.n, args.task, args.seed, world=args.world))
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    contact_sheet(rows, args.out) if args.out.endswith(".png") else write_rows(rows, args.out)
    print(f"wrote {len(rows)} rows to {args.out}")


if __name__ == "__main__":
    main()
