"""features.py against transformers' own outputs and live forward passes: encoders of every family, sets of pictures, features on disk."""
import contextlib
import json
import os
import types

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipModel, SiglipVisionModel

import data
import features
import scenes
from conftest import VISION
from features import Frozen, Pictures
from model import MLLM, Encoder, InputError
from rows import Rows
from test_model import own_hidden_states

close = lambda a, b, atol=1e-5: torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Ten picture files of different sizes and shapes"""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    sizes = [(24, 24), (40, 30), (30, 50), (64, 64), (25, 90)] * 2
    for i, (h, w) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(len(sizes))]


@pytest.fixture
def freeze(tmp_path):
    """freeze(encoder) -> Frozen that keeps its features in tmp_path/cache"""
    def freeze(encoder, through_connector=False, workers=0, batch_size=3):
        return Frozen(encoder.eval(), "name", str(tmp_path / "cache"), batch_size, workers, contextlib.nullcontext, through_connector)
    return freeze


def count(module):
    """-> a list that grows by the number of pictures of every forward pass of `module`"""
    seen = []
    module.register_forward_hook(lambda module, args, kwargs, out: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    return seen


# ---- encoders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_an_encoder_alone_says_what_the_llm_reads(name, make, vision_dirs, pictures, tmp_path):
    # Encoder = MLLM = transformers' hidden states, layer by layer; a run's vision/ folder says itself at which layer it was read
    for layer in (-1, 1):
        model, alone = make(name, feature_layer=layer), Encoder.from_pretrained(vision_dirs[name], layer).eval()
        pixels = model.pixels(pictures)
        hidden_states, n_special = own_hidden_states(name, vision_dirs[name], pixels)
        found, depth = features.layers(alone, pixels), 3 if layer == -1 else 1
        assert torch.equal(alone.pixels(pictures), pixels) and torch.equal(alone.features(pixels), model.features(pixels))
        assert torch.equal(found[:, -1], alone.features(pixels)) and found.shape == (4, depth, 9, 16)
        close(found, torch.stack(hidden_states[1:depth + 1], 1)[:, :, n_special:])
        model.save(run := str(tmp_path / f"run{layer}"))
        exported, whole = features.open_encoder(f"{run}/vision").eval(), features.open_encoder(run).eval()
        assert type(exported) is Encoder and type(whole) is MLLM and exported.feature_layer == whole.feature_layer == layer
        assert torch.equal(exported.features(exported.pixels(pictures)), model.features(pixels))
        assert torch.equal(whole.features(whole.pixels(pictures)), model.features(pixels))


@pytest.mark.parametrize("name", VISION)
def test_checkpoint_run_and_exported_folder_have_one_shape(name, make, vision_dirs, tmp_path):
    # they differ in weights only, so one random encoder stands for all three, and how far they moved is known
    make(name).save(run := str(tmp_path / "run"))
    shapes = [features.shape_of(features.open_encoder(source)) for source in (vision_dirs[name], run, f"{run}/vision")]
    assert shapes[0] == shapes[1] == shapes[2]
    other = features.shape_of(Encoder.from_pretrained(vision_dirs[name], 1))
    assert other != shapes[0]


def test_feature_layer_is_for_encoders_that_do_not_say(make, vision_dirs, tmp_path):
    # -2 by default, the flag for a checkpoint, an exported folder its own layer: a run and its export are never read at two layers
    make(feature_layer=1).save(run := str(tmp_path / "run"))
    layer = lambda source, flag: features.open_encoder(source, flag).feature_layer
    assert [layer(vision_dirs["siglip"], flag) for flag in (None, -1)] == [-2, -1]
    assert [layer(f"{run}/vision", None), layer(run, -1), layer(f"{run}/vision", -1)] == [1, 1, 1]
    with pytest.raises(InputError, match="feature_layer 9: the vision encoder has 3 layers"):
        features.open_encoder(vision_dirs["siglip"], 9)
    with pytest.raises(InputError, match="runs/none cannot be opened"):
        features.open_encoder("runs/none")


@pytest.mark.parametrize("pool", (1, 3))
@torch.no_grad()
def test_what_the_llm_receives_is_what_the_probe_reads(pool, make, freeze, tmp_path):
    # the input embeddings at the image positions, caught at the LLM's door, against the features kept on disk
    model, rows = make(pool=pool, feature_layer=-1), scenes.Scenes("test", 3, "maps")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, row in zip(files, rows):
        row["image"].resize((24, 24)).save(file)                                          # the encoder's own size: nothing to resize
    records = Rows("own", [{**rows[i], "image": files[i]} for i in range(3)], "pairs")
    batch, dropped = data.Collator(records, model, ("chosen", "rejected"))([[0], [1], [2]])
    caught = []
    model.llm.base_model.register_forward_pre_hook(lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model.token_logps(batch)
    received = {-1 - int(i): embed for i, embed in zip(batch.input_ids.flatten(), caught[0].flatten(0, 1)) if i < 0}
    received = torch.stack([received[n] for n in range(len(received))]).view(3, 9 // pool**2, 32)
    assert torch.equal(torch.from_numpy(np.array(freeze(model, True)(Pictures(files), "patches"))), received)
    assert torch.equal(torch.from_numpy(np.array(freeze(model, True)(Pictures(files), "mean"))), received.mean(1))
    assert freeze(model, True).grid == (3 // pool, 3 // pool) and freeze(model).grid == (3, 3)


@torch.no_grad()
def test_one_vector_a_picture(vision_dirs, pictures):
    # mean and class token of transformers' hidden states; at the last layer SigLIP's attention pooling is its own pooler output
    for name in VISION:
        for layer in (-1, -2):
            encoder = Encoder.from_pretrained(vision_dirs[name], layer).eval()
            pixels = encoder.pixels(pictures)
            hidden_states, n_special = own_hidden_states(name, vision_dirs[name], pixels)
            close(features.pooled(encoder, pixels, "mean"), hidden_states[layer][:, n_special:].mean(1))
            if n_special:
                close(features.pooled(encoder, pixels, "cls"), hidden_states[layer][:, 0])
                with pytest.raises(InputError, match="no attention-pooling head"):
                    features.pooled(encoder, pixels, "attention")
            else:
                own = SiglipModel.from_pretrained(vision_dirs[name]).vision_model if name == "siglip_full" else \
                    SiglipVisionModel.from_pretrained(vision_dirs[name])
                expected = own.eval()(pixels).pooler_output if layer == -1 else own.eval().head(own.post_layernorm(hidden_states[-2]))
                close(features.pooled(encoder, pixels, "attention"), expected)
                with pytest.raises(InputError, match="have no class token"):
                    features.pooled(encoder, pixels, "cls")


@torch.no_grad()
def test_random_encoder_has_the_shape_but_not_the_weights(make, vision_dirs, pictures):
    # the same layer, grid and pooling; every matrix drawn anew, the connector's too; the encoder that was copied stays as it was
    encoders = [Encoder.from_pretrained(vision_dirs[name], 1).eval() for name in ("siglip", "clip", "dinov2", "vit_mae")]
    single = make(feature_layer=1, pool=3)
    single.connector.down = None                                                          # as --hidden 0 makes it
    for encoder in encoders + [make(feature_layer=-1), single]:
        pixels, before = encoder.pixels(pictures), encoder.features(encoder.pixels(pictures))
        other = features.random_like(encoder, 1).eval()
        assert type(other) is type(encoder) and features.shape_of(other) == features.shape_of(encoder)
        assert (other.feature_layer, other.grid) == (encoder.feature_layer, encoder.grid)
        assert other.features(pixels).shape == before.shape and torch.equal(encoder.features(pixels), before)
        mine, its = dict(encoder.vision.named_parameters()), dict(other.vision.named_parameters())
        assert all(not torch.equal(mine[name], its[name]) for name in mine if mine[name].ndim > 1 and not name.endswith("mask_token"))
        if isinstance(encoder, MLLM):
            assert (other.connector.down is None) == (encoder.connector.down is None) and other.pool == encoder.pool
            assert not torch.equal(other.connector.up.weight, encoder.connector.up.weight)
            assert other.image_tokens(pixels).shape == (4, encoder.n_image, 32)
    again, another = (features.random_like(encoder, seed).eval().features(pixels) for seed in (1, 2))      # the seed draws it, whatever was drawn before
    assert torch.equal(again, other.features(pixels)) and not torch.equal(another, again)


@pytest.mark.parametrize("name", VISION)
def test_squash_keeps_boxes_in_place(name, vision_dirs):
    # a wide picture with a white left edge: squeezed, not cropped, also where the encoder's own preprocessing crops
    encoder = Encoder.from_pretrained(vision_dirs[name])
    image = Image.new("RGB", (144, 36), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 36, 36))
    squashed, own = features.squash(encoder, [image])[0].mean(0), encoder.pixels([image])[0].mean(0)
    white, black = squashed.max(), squashed.min()
    assert squashed.shape == own.shape == (24, 24) and white - black > 1
    assert ((squashed[:, :5] - white).abs() < .1).all() and ((squashed[:, 8:] - black).abs() < .1).all()    # a quarter of 24 columns
    crops = "clip" in name or "dinov2" in name
    assert (own[:, 0] - (black if crops else white)).abs().max() < .1
    same = Image.effect_noise((24, 24), 90).convert("RGB")                                # of the encoder's own size: the same pixels
    if not crops:
        assert torch.equal(features.squash(encoder, [same]), encoder.pixels([same]))


# ---- features on disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("siglip", "clip", "dinov2_with_registers"))
@torch.no_grad()
def test_from_disk_as_live_and_read_once(name, make, freeze, paths, tmp_path):
    # one vector by the encoder's own preprocessing, patches and layers as they say; a second encounter computes nothing
    model, images = make(name), [Image.open(path) for path in paths]
    own, whole = model.pixels(images), features.squash(model, images)
    live = {"mean": model.features(own).mean(1), "patches": model.features(whole), "layers": features.layers(model, own).mean(2),
            **({"attention": features.pooled(model, own, "attention")} if name == "siglip" else {"cls": features.pooled(model, own, "cls")})}
    frozen = freeze(model)
    for what, expected in live.items():
        found = frozen(Pictures(paths), what)
        assert isinstance(found, np.memmap)
        close(torch.from_numpy(np.array(found)), expected)
    seen = count(model.vision)
    for what, expected in live.items():
        close(torch.from_numpy(np.array(freeze(model)(Pictures(paths), what))), expected)
    assert not seen and len(os.listdir(tmp_path / "cache")) == len(live)                  # no .part, no .count is left


def test_another_name_for_whatever_changes_features(make, vision_dirs, freeze, paths, tmp_path):
    # each of these makes one new file; asked again it makes none
    files = lambda: set(os.listdir(tmp_path / "cache"))
    def is_new(frozen, pictures, what="mean"):
        before = files() if os.path.exists(tmp_path / "cache") else set()
        frozen(pictures, what)
        new = len(files() - before)
        frozen(pictures, what)
        return new == 1 and len(files()) == len(before) + 1
    def encoder(change=lambda e: None, layer=None, name="siglip"):
        new = Encoder.from_pretrained(vision_dirs[name], layer)
        with torch.no_grad():
            change(new)
        return freeze(new)
    some = Pictures(paths[:2])
    assert is_new(encoder(), some) and not is_new(encoder(), some)
    assert is_new(encoder(), some, "attention") and is_new(encoder(), some, "patches")
    assert is_new(encoder(lambda e: e.vision.embeddings.patch_embedding.bias[0].add_(1e-3)), some)
    assert is_new(encoder(lambda e: e.vision_tail["head"].probe.add_(1e-3)), some, "attention")
    assert is_new(encoder(lambda e: setattr(e.image_processor, "image_mean", [.4] * 3)), some)
    assert is_new(encoder(layer=1), some)
    assert is_new(encoder(), Pictures(paths[1:3])) and is_new(encoder(), Pictures(paths[:3])) and is_new(encoder(), Pictures(paths[1::-1]))
    os.utime(paths[1], ns=(1, 1))                                                         # as if it had been written again
    assert is_new(encoder(), some)
    plain, noisy, seed, more = (Pictures(scenes.Scenes("test", 2, *how, world=world)) for world, *how in
                                (("scenes", "maps"), ("noisy", "maps"), ("scenes", "maps", 1), ("scenes", "maps", 0, 2)))
    assert all(is_new(encoder(), pictures) for pictures in (plain, noisy, seed, more))    # `more`: two rows a picture
    model, moved = make(), make()
    with torch.no_grad():
        moved.connector.up.bias[0] += 1e-3
    assert is_new(freeze(model, True), some) and is_new(freeze(moved, True), some)        # image tokens know their connector,
    freeze(model)(some, "mean")
    assert not is_new(freeze(moved), some)                                                # features do not


def test_captions_of_every_source_name_their_pictures(tmp_path, paths, freeze, vision_dirs):
    # .jsonl with pictures beside it, parquet, drawn world: features of their pictures, in their order, found again by the next probe
    folder, rows = os.path.dirname(paths[0]), [{"image": os.path.basename(path), "caption": path} for path in paths[:3]]
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        f.write("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "hub", "train", image=paths[:3], caption=["a", "b", "c"])
    frozen = freeze(Encoder.from_pretrained(vision_dirs["siglip"]))
    expected = np.array(frozen(Pictures(paths[:3]), "layers"))
    for source in (os.path.join(folder, "rows.jsonl"), str(tmp_path / "hub")):
        a, b = (Pictures(data.load(source, "captions", n)) for n in (3, 2))
        assert np.array_equal(frozen(a, "layers"), expected) and np.array_equal(frozen(b, "layers"), expected[:2])
        assert a.identity() == Pictures(data.load(source, "captions", 3)).identity() != b.identity()
    drawn = Pictures(data.load("scenes/test/maps", "captions", 3))
    assert drawn.identity() == Pictures(scenes.Scenes("test", 3, "maps")).identity() != Pictures(data.load("noisy/test/maps", "captions", 3)).identity()


class Killed(BaseException):
    """As a signal would"""


@pytest.mark.parametrize("saves", (True, False))
def test_a_killed_extraction_goes_on_where_it_was(saves, vision_dirs, freeze, paths, tmp_path, monkeypatch):
    # killed in the third batch of two: what was counted is not read again, and the whole is what an uninterrupted pass gives
    clock = iter(range(10**6))
    monkeypatch.setattr(features, "time", types.SimpleNamespace(time=lambda: next(clock) * (11 if saves else 0)))
    encoder = Encoder.from_pretrained(vision_dirs["siglip"])
    expected = np.array(freeze(encoder)(Pictures(paths), "patches"))
    whole = set(os.listdir(tmp_path / "cache"))
    os.remove(tmp_path / "cache" / whole.pop())
    seen, frozen = count(encoder.vision), freeze(encoder, batch_size=2)
    def kill(*_):
        if sum(seen) == 7:                                                                # one to learn the shape, three batches of two
            raise Killed
    handle = encoder.vision.register_forward_hook(kill)
    with pytest.raises(Killed):
        frozen(Pictures(paths), "patches")
    handle.remove()
    name, = {file.split(".")[0] for file in os.listdir(tmp_path / "cache")}
    assert set(os.listdir(tmp_path / "cache")) == {f"{name}.npy.part"} | ({f"{name}.npy.count"} if saves else set())
    part = np.load(tmp_path / "cache" / f"{name}.npy.part", mmap_mode="r+")
    part[0] = 7                                                                           # would be overwritten if it were computed again
    part.flush()
    seen.clear()
    found = np.array(freeze(encoder, batch_size=2)(Pictures(paths), "patches"))
    assert sum(seen) - (6 if saves else 10) in (0, 1)                                       # one more to learn the shape
    assert (found[0] == 7).all() if saves else np.allclose(found[0], expected[0], atol=1e-5)
    assert np.allclose(found[1:], expected[1:], atol=1e-5) and os.listdir(tmp_path / "cache") == [f"{name}.npy"]


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("place", (0, 4))
def test_a_broken_picture_is_named(workers, place, vision_dirs, freeze, paths, tmp_path):
    # wherever it stands and whoever opens it
    broken = str(tmp_path / "broken.png")
    with open(paths[0], "rb") as whole, open(broken, "wb") as f:
        f.write(whole.read()[:200])                                                       # cut off in the middle
    frozen = freeze(Encoder.from_pretrained(vision_dirs["siglip"]), workers=workers)
    with pytest.raises(InputError) as error:
        frozen(Pictures(paths[:place] + [broken] + paths[place:]), "mean")
    assert str(error.value).startswith(f"picture {broken} cannot be read") and "\n" not in str(error.value)    # a line, not a worker's traceback


def test_what_a_connector_cannot_give_is_said(make, vision_dirs, freeze, paths):
    with pytest.raises(InputError, match="--through_connector: name has no connector"):
        freeze(Encoder.from_pretrained(vision_dirs["siglip"]), through_connector=True)
    for pool in ("cls", "attention"):
        with pytest.raises(InputError, match=f"--through_connector has no --pool {pool}"):
            freeze(make("clip"), through_connector=True)(Pictures(paths), pool)


# ---- pictures --------------------------------------------------------------------------------------------------------------


def tint(shade, size=(8, 8)):
    return Image.new("RGB", size, (int(shade), 0, 0))


def shade(picture):
    return np.array(picture.convert("RGB"))[0, 0, 0]


def write_parquet(folder, split, types=None, **columns):
    """A parquet file of a split; columns whose values are paths of pictures become picture columns"""
    rows = datasets.Dataset.from_dict(columns)
    for name, kind in {**{n: datasets.Image() for n, v in columns.items() if str(v[0]).endswith(".png")}, **(types or {})}.items():
        rows = rows.cast_column(name, kind)
    os.makedirs(folder, exist_ok=True)
    rows.to_parquet(os.path.join(folder, f"{split}.parquet"))


def write_classes(folder, classes):
    """{class: shades} -> one folder a class, one picture a shade"""
    for name, shades in classes.items():
        os.makedirs(folder / name)
        for s in shades:
            tint(s).save(folder / name / f"{s:03}.png")
    (folder / "notes.txt").write_text("no class")
    return str(folder)


def test_folders_of_classes(tmp_path):
    # labels by class name, also where the test folder lacks a class; without a test folder every third picture is for testing
    train = write_classes(tmp_path / "train", {"b": [50, 60, 70], "a": [10, 20, 30], "c": [90]})
    test = write_classes(tmp_path / "test", {"c": [95], "b": [55]})
    of = lambda pictures, labels: [(shade(pictures[i]), int(labels[i])) for i in range(len(pictures))]
    x, y, test_x, test_y, classes = features.classification_data([train, test], 0, 0)
    assert classes == ["a", "b", "c"] and of(test_x, test_y) == [(55, 1), (95, 2)]
    everything = [(10, 0), (20, 0), (30, 0), (50, 1), (60, 1), (70, 1), (90, 2)]
    assert of(x, y) == everything and len(y) == 7
    x, y, test_x, test_y, classes = features.classification_data([train], 0, 0)
    assert of(test_x, test_y) == everything[2::3] and of(x, y) == [item for i, item in enumerate(everything) if i % 3 != 2]
    with pytest.raises(InputError, match=r"classes \['a'\] are not in the training folder"):
        features.classification_data([test, train], 0, 0)
    with pytest.raises(InputError, match="notes: it holds no class folders"):
        os.makedirs(tmp_path / "notes")
        features.classification_data([str(tmp_path / "notes")], 0, 0)
    with pytest.raises(InputError, match="nowhere"):
        features.classification_data([train, str(tmp_path / "nowhere")], 0, 0)
    with pytest.raises(InputError, match="empty"):
        os.makedirs(tmp_path / "empty" / "a")
        features.classification_data([str(tmp_path / "empty")], 0, 0)


def test_parquet_of_classes(tmp_path):
    # picture and class label by their types, validation as test; without a split for testing every third row
    for s in range(0, 120, 10):
        tint(s).save(tmp_path / f"{s}.png")
    files, label = (lambda shades: [str(tmp_path / f"{s}.png") for s in shades]), datasets.ClassLabel(names=["cat", "dog", "cow"])
    write_parquet(tmp_path / "hub", "train", {"kind": label}, kind=[2, 0, 1, 0], pic=files([20, 0, 10, 30]), note=list("abcd"))
    one = features.classification_data([str(tmp_path / "hub")], 0, 0)
    of = lambda pictures, labels: [(shade(pictures[i]), int(labels[i])) for i in range(len(pictures))]
    assert of(*one[:2]) == [(20, 2), (0, 0), (30, 0)] and of(*one[2:4]) == [(10, 1)] and len(one[4]) == 3
    write_parquet(tmp_path / "two", "train", {"label": label}, pic=files([20, 0, 10]), label=[2, 0, 1])
    write_parquet(tmp_path / "two", "validation", {"label": label}, pic=files([80, 70]), label=[2, 1])
    write_parquet(tmp_path / "two", "test", {"label": label}, pic=files([90]), label=[-1])
    x, y, test_x, test_y, classes = features.classification_data([str(tmp_path / "two")], 0, 0)
    assert of(x, y) == [(20, 2), (0, 0), (10, 1)] and of(test_x, test_y) == [(80, 2), (70, 1)]
    assert x.identity() == features.classification_data([str(tmp_path / "two")], 0, 0)[0].identity() != test_x.identity()
    write_parquet(tmp_path / "held", "train", {"label": label}, pic=files([20, 0]), label=[1, 0])
    write_parquet(tmp_path / "held", "test", {"label": label}, pic=files([90]), label=[-1])  # what the hub puts where labels are withheld
    with pytest.raises(InputError, match=r"the test split's 'label' has \[-1\]"):
        features.classification_data([str(tmp_path / "held")], 0, 0)
    write_parquet(tmp_path / "none", "train", pic=files([0, 10]), note=["a", "b"])
    with pytest.raises(InputError, match="needs a picture column and a class label column; it has pic, note"):
        features.classification_data([str(tmp_path / "none")], 0, 0)
    with pytest.raises(InputError, match=r"takes TRAIN \[TEST\] folders, or one hub id"):
        features.classification_data([str(tmp_path / "hub"), str(tmp_path / "two")], 0, 0)
    with pytest.raises(InputError, match="no/where cannot be loaded"):
        features.classification_data(["no/where"], 0, 0)


@pytest.mark.parametrize("labels", (["dog", "cat", "cow", "dog"], [7, 3, 5, 7]))
def test_parquet_of_labels_without_names(labels, tmp_path):
    # a column `label` of words, or of numbers that do not start at 0: numbered in their own order
    for s in range(0, 40, 10):
        tint(s).save(tmp_path / f"{s}.png")
    for split in ("train", "test"):
        write_parquet(tmp_path / "hub", split, image=[str(tmp_path / f"{s}.png") for s in range(0, 40, 10)], label=labels)
    _, y, _, test_y, classes = features.classification_data([str(tmp_path / "hub")], 0, 0)
    assert [classes[i] for i in y] == [classes[i] for i in test_y] == labels and sorted(set(y.tolist())) == [0, 1, 2]


def test_pictures_with_masks(tmp_path):
    # folders by stem, whatever the ending; a label picture keeps its numbers (a palette's too); parquet with two picture columns
    for folder in ("images", "masks", "hub"):
        os.makedirs(tmp_path / folder)
    for s in (10, 20, 30):
        tint(s).save(tmp_path / f"images/{s}.jpg", quality=100)
        mask = Image.new("L", (8, 8), s)
        if s == 20:
            mask = Image.new("P", (8, 8), s)
            mask.putpalette(list(range(255, -1, -1)) * 3)
        mask.save(tmp_path / f"masks/{s}.png")
    folders = [str(tmp_path / "images"), str(tmp_path / "masks")]
    of = lambda pictures, masks: [(round(int(shade(pictures[i])), -1), int(masks.mask(i)[0, 0])) for i in range(len(pictures))]
    train, masks, test, test_masks = features.segmentation_data(folders, 0, 0)
    assert of(train, masks) == [(10, 10), (20, 20)] and of(test, test_masks) == [(30, 30)]
    x, masks, test, test_masks = features.segmentation_data(folders * 2, 0, 0)
    assert of(x, masks) == of(test, test_masks) == [(10, 10), (20, 20), (30, 30)]
    files = lambda folder, ending: [str(tmp_path / folder / f"{s}.{ending}") for s in (10, 30)]
    two = dict(image=datasets.Image(), annotation=datasets.Image())
    write_parquet(tmp_path / "hub", "train", two, annotation=files("masks", "png"), image=files("images", "jpg"))
    write_parquet(tmp_path / "hub", "validation", two, annotation=files("masks", "png"), image=files("images", "jpg"))
    x, masks, test, test_masks = features.segmentation_data([str(tmp_path / "hub")], 0, 0)
    assert of(x, masks) == of(test, test_masks) == [(10, 10), (30, 30)]
    write_parquet(tmp_path / "one", "train", image=files("masks", "png"))
    with pytest.raises(InputError, match="needs two picture columns, pictures and masks; it has image"):
        features.segmentation_data([str(tmp_path / "one")], 0, 0)
    with pytest.raises(InputError, match="IMAGES MASKS TEST_IMAGES TEST_MASKS"):
        features.segmentation_data(folders + ["third"], 0, 0)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        features.segmentation_data([folders[0], "nowhere"], 0, 0)
    os.remove(tmp_path / "masks/20.png")
    with pytest.raises(InputError, match=r"images/20\.jpg has no mask in"):
        features.segmentation_data(folders, 0, 0)


def test_pictures_are_rgb_and_masks_are_numbers(tmp_path):
    # a grey and a palette picture become RGB; as masks they keep their numbers; 16 bits and colours where labels should be are refused
    grey, palette, deep = Image.new("L", (4, 4), 90), Image.new("P", (4, 4), 5), Image.fromarray(np.full((4, 4), 3000, np.uint16))
    palette.putpalette([c for i in range(256) for c in (10 * i % 256, 0, i)])
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, image in zip(files, (grey, palette, deep, tint(7))):
        image.save(file)
    pictures = Pictures(files)
    assert pictures[0].mode == pictures[1].mode == "RGB" and pictures[0].getpixel((0, 0)) == (90, 90, 90) and pictures[1].getpixel((0, 0)) == (50, 0, 5)
    assert (pictures.mask(0) == 90).all() and (pictures.mask(1) == 5).all() and (pictures.mask(2) == 3000).all()
    with pytest.raises(InputError, match="2.png has 16 or 32 bits a pixel"):
        pictures[2]
    with pytest.raises(InputError, match="3.png is not a label picture: it has 3 channels"):
        pictures.mask(3)


def test_drawn_sets_are_disjoint_and_labelled():
    # the label is the shape of the red object, counted in the picture's own mask; pictures and masks belong together
    x, y, test_x, test_y, classes = features.classification_data(None, 30, 0)
    assert (len(x), len(y), len(test_x), len(test_y), classes) == (30, 30, 15, 15, scenes.SHAPES)
    for split, pictures, labels in (("train", x, y), ("test", test_x, test_y)):
        for i in range(len(labels)):
            rgb, mask = np.array(pictures[i]).astype(int), scenes.Scenes(split, 30, "red")[i]["mask"]
            red = (rgb[..., 0] > rgb[..., 1] + 90) & (rgb[..., 0] > rgb[..., 2] + 90) & (mask > 0)
            assert np.bincount(mask[red]).argmax() == 1 + labels[i]
    train, masks, test, test_masks = features.segmentation_data(None, 64, 0)
    assert len(train) == len(masks) == len(test) == 8
    for pictures, labels in ((train, masks), (test, test_masks)):
        for i in range(8):
            bright, objects = np.array(pictures[i]).max(-1) > 128, labels.mask(i) > 0
            assert (bright == objects).mean() > .95
    assert train.identity() != test.identity()


# ---- captions --------------------------------------------------------------------------------------------------------------


def test_captions_and_their_stand_ins(paths):
    # a caption, the first of a list of captions, or text, answer or chosen in its place; a source with none of them is refused
    rows = lambda **more: Rows("own", [{"image": paths[0], **more}], "captions")
    assert rows(caption="a", text="b")[0]["caption"] == "a"
    assert rows(caption=["first", "second"])[0]["caption"] == "first"
    assert rows(chosen="c", answer="b", text=["a", "z"])[0]["caption"] == "a"
    assert rows(chosen="c", answer="b")[0]["caption"] == "b" and rows(chosen="c", rejected="d")[0]["caption"] == "c"
    drawn = data.load("scenes/test/maps", "captions", 2)
    assert drawn[1]["caption"] == scenes.Scenes("test", 2, "maps")[1]["chosen"] and drawn[1]["image"].size == (36, 36)
    for bad, message in (([], "'caption' is empty"), (None, "'caption' is missing"), (5, "'caption' is of type int")):
        with pytest.raises(data.BadRow, match=f"own row 0: {message}"):
            rows(caption=bad)[0]


def test_captions_without_a_column_for_them(tmp_path, paths):
    with open(tmp_path / "rows.jsonl", "w") as f:
        json.dump({"image": paths[0], "title": "a"}, f)
    with pytest.raises(InputError, match="rows.jsonl has no column 'caption'; it has: image, title"):
        data.load(str(tmp_path / "rows.jsonl"), "captions")
