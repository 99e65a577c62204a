"""
Frozen features: any encoder, any pictures, kept on disk.

What probe.py needs before it can ask anything. An encoder is a run directory, an exported vision/ folder or a hub id;
a set of pictures is the drawn world, folders, or a hub data set. Pictures are opened one by one and their features
written to a file as they come, so memory stays bounded whatever the size of the set. The file's name is a hash of the
encoder's weights, its preprocessing and the pictures: the next probe finds it, another encoder or another picture does
not, and an extraction that was killed goes on where it was.
"""
import contextlib
import glob
import json
import os
import shutil
import time
from functools import partial

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset
from datasets import Image as ImageColumn
from datasets import load_dataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import data
import parallel
import scenes
from model import MLLM, Encoder, InputError, first_line, open_vision, to_pixels
from rows import Rows
from sources import Lines

VERSION = "1"  # of the features; raised when the code below would give others


# ---- encoders --------------------------------------------------------------------------------------------------------


def open_encoder(source, feature_layer=None):
    """A run directory -> MLLM; an exported vision/ folder or a hub id -> Encoder. Its features are the same tensor."""
    if is_run(source):
        return MLLM.load(source)
    if not os.path.exists(source) and os.path.isdir(os.path.dirname(source)):
        raise InputError(f"{source}: {os.path.dirname(source)} holds no such run or encoder")
    vision, image_processor = open_vision(source)
    return Encoder(vision, image_processor, getattr(vision.config, "feature_layer", feature_layer))


def is_run(source):
    """Is it a run directory, with a connector and an LLM?"""
    return os.path.isfile(os.path.join(source, "connector.safetensors"))


def random_like(encoder, seed):
    """An encoder of the same shape with fresh weights: what a probe reads when nothing was learnt. Of an MLLM the
    connector is fresh too."""
    with torch.random.fork_rng():
        torch.manual_seed(1_000_000 + seed)  # apart from the seeds of training: not the start's own first weights
        vision = type(encoder.vision)(encoder.vision.config)
        if not isinstance(encoder, MLLM):
            return Encoder(vision, encoder.image_processor)
        hidden = encoder.connector.down.in_features if encoder.connector.down else 0
        return MLLM(vision, encoder.image_processor, encoder.llm, encoder.tokenizer, pool=encoder.pool, hidden=hidden)


def shape_of(encoder):
    """Equal for encoders that differ in their weights only"""
    config = encoder.vision.config.to_dict()
    for where_from in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(where_from, None)
    return json.dumps([config, encoder.image_processor.to_dict()], sort_keys=True, default=str)


def prepare(image_processor, size, images):
    """PIL pictures -> (B,3,H,W) by the encoder's own preprocessing; if `size` = (H, W) is given, resized to it without
    cropping, so that masks and boxes stay where they are"""
    if size is None:
        return to_pixels(image_processor, images)
    resized = [image.convert("RGB").resize(size[::-1], Image.BICUBIC) for image in images]
    no_crop = {"do_center_crop": False} if hasattr(image_processor, "do_center_crop") else {}
    return image_processor(resized, do_resize=False, return_tensors="pt", **no_crop)["pixel_values"]


def squash(encoder, images):
    """PIL pictures -> (B,3,H,W), the whole picture squeezed into the encoder's grid"""
    return prepare(encoder.image_processor, [side * encoder.vision.config.patch_size for side in encoder.grid], images)


def pooled(encoder, pixels, pool):
    """pixels (B,3,H,W) -> (B,D), one vector a picture from the layer that the LLM reads.

    pool: "mean" of the patch tokens; "cls", the class token of CLIP, DINOv2 and ViT; "attention", SigLIP's own pooling
    head behind its own final norm. That head was trained on the last layer: at feature layer -1 it is exactly SigLIP's
    pooler output, at an earlier layer it reads what it was not made for."""
    if pool == "mean":
        return encoder.features(pixels).mean(1)
    tokens = encoder.vision(pixel_values=pixels).last_hidden_state                      # (B,N',D), special ones first
    if pool == "cls":
        if not encoder.n_special:
            raise InputError(f"--pool cls: encoders of type '{encoder.vision.config.model_type}' have no class token")
        return tokens[:, 0]
    tail = {name.rpartition(".")[2]: module.to(pixels.device) for name, module in encoder.vision_tail.items()}
    if "head" not in tail:
        raise InputError("--pool attention: this encoder has no attention-pooling head; SigLIP and SigLIP2 have one")
    return tail["head"](tail["post_layernorm"](tokens))


def layers(encoder, pixels):
    """pixels (B,3,H,W) -> (B,L,N',D): patch tokens after each block, the last one is `encoder.features`"""
    states = encoder.vision(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
    return torch.stack(states, 1)[:, :, encoder.n_special:]


# ---- pictures --------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures by number, each opened when it is asked for, so that a set of any size fits.

    `rows`: paths of files, or records with a picture in `column` (drawn world, `rows.Rows`, hub data set)."""

    def __init__(self, rows, column="image"):
        self.rows, self.column = rows, column

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        return self.rows[i] if isinstance(self.rows, list) else f"of row {i}, column '{self.column}',"

    def __getitem__(self, i):
        """-> PIL picture, in RGB"""
        image = self.stored(i)
        if image.mode.startswith("I"):
            raise InputError(f"picture {self.name(i)} has 16 or 32 bits a pixel; save it with 8")
        return image.convert("RGB")

    def mask(self, i):
        """-> (H,W) integers of a label picture"""
        labels = np.array(self.stored(i))
        if labels.ndim != 2:
            raise InputError(f"picture {self.name(i)} is not a label picture: it has {labels.shape[2]} channels")
        return labels

    def stored(self, i):
        """-> PIL picture as it is stored: labels must not become colours"""
        try:
            row = self.rows[i]
            if isinstance(row, str):
                with Image.open(row) as image:
                    return image.copy()
            picture = row[self.column]
            if isinstance(picture, np.ndarray):
                return Image.fromarray(picture)
            picture.load()                                                              # a file is only read now
            return picture
        except data.BadRow:
            raise
        except Exception as error:  # whatever PIL or the data set say of a broken picture, the reader wants its name
            raise InputError(f"picture {self.name(i)} cannot be read ({error})") from None

    def take(self, numbers):
        """The pictures of these numbers"""
        if isinstance(self.rows, Dataset):
            return Pictures(self.rows.select(numbers), self.column)
        return Pictures([self.rows[i] for i in numbers], self.column)

    def identity(self):
        """A short name of what the pictures are, for a key; of files: path, size and time of the last change"""
        rows = self.rows.rows if isinstance(self.rows, Rows) else self.rows
        if isinstance(rows, Dataset):
            return f"{rows._fingerprint} {self.column}"
        if isinstance(rows, (list, Lines)):
            name = lambda row: row if isinstance(row, str) else row.get("image") or row["images"][0]
            paths = [os.path.join(getattr(self.rows, "folder", ""), name(row)) for row in rows]
            return common.digest(json.dumps([(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]))
        with open(scenes.__file__) as f:                                                # redrawn if the drawing changes
            return common.digest(f.read(), json.dumps(vars(rows)))


def files_in(folder):
    """Sorted picture files of a folder, by PIL's own list of endings"""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    known = tuple(Image.registered_extensions())
    found = sorted(name for name in os.listdir(folder) if name.lower().endswith(known))
    if not found:
        raise InputError(f"{folder}: it holds no pictures")
    return found


def thirds(*lists):
    """Sets every third item aside for testing -> the train part of each of `lists`, then the test part of each
    (Pictures or arrays: both know `take`)"""
    if len(lists[0]) < 3:
        raise InputError(f"{len(lists[0])} pictures are too few to set a third aside for testing")
    numbers = np.arange(len(lists[0]))
    for part in (numbers[numbers % 3 != 2], numbers[numbers % 3 == 2]):
        yield from (x.take(part) for x in lists)


def hub(source, flag):
    """A hub id or a folder of parquet files -> training Dataset, Dataset to test on or None"""
    try:
        found = load_dataset(source)
    except Exception as error:  # each failure of the hub or of a file has its own type
        raise InputError(f"{flag} {source} cannot be loaded: {first_line(error)}") from error
    train = found.get("train") or found[next(iter(found))]
    names = [name for name in ("validation", "val", "valid", "test") if name in found and found[name] is not train]
    return train, found[names[0]] if names else None  # validation before test: a test's labels are often withheld


def class_folders(folder, classes=None):
    """FOLDER/class/picture -> Pictures, labels (n,), class names"""
    if not os.path.isdir(folder):
        raise InputError(f"--classification {folder}: no such folder")
    found = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    classes = classes or found
    if not found:
        raise InputError(f"--classification {folder}: it holds no class folders")
    if unknown := sorted(set(found) - set(classes)):
        raise InputError(f"--classification {folder}: classes {unknown} are not in the training folder")
    paths = [[os.path.join(folder, name, file) for file in files_in(os.path.join(folder, name))] for name in found]
    labels = np.repeat([classes.index(name) for name in found], [len(part) for part in paths])
    return Pictures([path for part in paths for path in part]), labels, classes


def is_hub(source):
    """A hub id, or a folder of parquet files in the hub's form: anything but a folder of class folders"""
    files = (file for _, _, files in os.walk(source) for file in files)
    return not os.path.isdir(source) or any(file.endswith(".parquet") for file in files)


def hub_classes(source):
    """A labelled set of the hub -> [(Pictures, labels (n,)) of train, and of test if there is one], class names"""
    train, test = hub(source, "--classification")
    image = next((name for name, kind in train.features.items() if isinstance(kind, ImageColumn)), None)
    named = [name for name, kind in train.features.items() if isinstance(kind, ClassLabel)]
    label = "label" if "label" in train.features else named[0] if named else None
    if not (image and label):
        raise InputError(f"--classification {source}: it needs a picture column and a class label column; it has "
                         f"{', '.join(train.features)}")
    classes, parts = np.unique(train[label]), []                                        # numbers need not start at 0
    for part in (train, test) if test else (train,):
        labels = np.array(part[label])
        if unknown := sorted(set(labels.tolist()) - set(classes.tolist())):
            raise InputError(f"--classification {source}: the test split's '{label}' has {unknown[:5]}, which the "
                             "training split has not (-1 stands for withheld labels)")
        parts.append((Pictures(part.select_columns([image]), image), np.searchsorted(classes, labels)))
    print(f"classes     column '{label}' of {source}")
    return parts, classes.tolist()


def classification_data(sources, n, seed, world="scenes"):
    """--classification -> train Pictures, labels (n,), test Pictures, labels, class names"""
    if not sources:
        sets = [scenes.Scenes(split, count, "red", seed, world=world)
                for split, count in (("train", n), ("test", n // 2))]
        labels = [np.array([rows.about(i)[0]["label"] for i in range(len(rows))]) for rows in sets]
        return Pictures(sets[0]), labels[0], Pictures(sets[1]), labels[1], scenes.SHAPES
    if len(sources) > 2 or len(sources) == 2 and is_hub(sources[0]):
        raise InputError("--classification takes TRAIN [TEST] folders, or one hub id or parquet folder")
    if is_hub(sources[0]):
        parts, classes = hub_classes(sources[0])
    else:
        pictures, labels, classes = class_folders(sources[0])
        parts = [(pictures, labels)] + [class_folders(folder, classes)[:2] for folder in sources[1:]]
    if len(classes) < 2:
        raise InputError(f"--classification {sources[0]}: it has a single class")
    return *(thirds(*parts[0]) if len(parts) == 1 else parts[0] + parts[1]), classes


def mask_folders(images, masks):
    """Two folders with files of the same names (endings may differ) -> Pictures, Pictures of labels"""
    stems = {os.path.splitext(name)[0]: name for name in files_in(masks)}
    pictures = files_in(images)
    for name in pictures:
        if os.path.splitext(name)[0] not in stems:
            raise InputError(f"{os.path.join(images, name)} has no mask in {masks}")
    return Pictures([os.path.join(images, name) for name in pictures]), \
        Pictures([os.path.join(masks, stems[os.path.splitext(name)[0]]) for name in pictures])


def segmentation_data(sources, n, seed, world="scenes"):
    """--segmentation -> train Pictures, train Pictures of labels, test Pictures, test Pictures of labels"""
    if not sources:
        sets = [scenes.Scenes(split, max(3, n // 8), "vqa", seed, world=world) for split in ("train", "test")]
        return [Pictures(rows, column) for rows in sets for column in ("image", "mask")]
    if len(sources) == 1:
        train, test = hub(sources[0], "--segmentation")
        columns = [name for name, kind in train.features.items() if isinstance(kind, ImageColumn)]
        if len(columns) != 2:
            raise InputError(f"--segmentation {sources[0]}: it needs two picture columns, pictures and masks; it has "
                             f"{', '.join(train.features)}")
        columns.sort(key=lambda name: name not in ("image", "pixel_values"))
        parts = [Pictures(part.select_columns([name]), name) for part in (train, test) if part for name in columns]
        print(f"masks       column '{columns[1]}' of {sources[0]}, pictures in '{columns[0]}'")
    elif len(sources) in (2, 4):
        parts = [part for at in range(0, len(sources), 2) for part in mask_folders(*sources[at:at + 2])]
    else:
        raise InputError("--segmentation takes a hub id, IMAGES MASKS, or IMAGES MASKS TEST_IMAGES TEST_MASKS")
    return parts if len(parts) == 4 else list(thirds(*parts))


# ---- features on disk ------------------------------------------------------------------------------------------------


class Frozen:
    """A frozen encoder that reads each set of pictures once: `frozen(pictures, what)` -> features, memory-mapped.

    what: "mean", "cls" or "attention" -> (n,D), one vector a picture, of the encoder's own preprocessing;
          "patches" -> (n,N,D), of the whole picture, uncropped;
          "layers" -> (n,L,D), the mean over patches after each block.
    With `through_connector` all but "layers" are image tokens of the LLM, and "mean" is the only pooling."""

    def __init__(self, encoder, name, cache, batch_size, workers, autocast, through_connector=False):
        if through_connector and not isinstance(encoder, MLLM):
            raise InputError(f"--through_connector: {name} has no connector; give run directories only")
        self.encoder, self.name, self.cache, self.batch_size, self.workers = encoder, name, cache, batch_size, workers
        self.autocast, self.through_connector = autocast, through_connector
        self.grid = tuple(side // encoder.pool for side in encoder.grid) if through_connector else encoder.grid
        parts = [encoder.vision, *encoder.vision_tail.values()] + ([encoder.connector] if through_connector else [])
        weights = [part for module in parts for named in module.state_dict().items() for part in named]
        self.key = common.digest(VERSION, transformers.__version__, encoder.device.type, shape_of(encoder), *weights)

    def read(self, pixels, what):
        """pixels (B,3,H,W) -> the features named `what`, on the CPU in fp32"""
        with self.autocast(), torch.no_grad():
            if what == "layers":
                x = layers(self.encoder, pixels).mean(2)
            elif self.through_connector:
                x = self.encoder.image_tokens(pixels)
                x = x if what == "patches" else x.mean(1)
            else:
                x = self.encoder.features(pixels) if what == "patches" else pooled(self.encoder, pixels, what)
        return x.float().cpu()

    def __call__(self, pictures, what):
        if self.through_connector and what in ("cls", "attention"):
            raise InputError(f"--through_connector has no --pool {what}: a connector passes patch tokens only")
        path = os.path.join(self.cache, common.digest(self.key, pictures.identity(), what) + ".npy")
        try:
            if not parallel.all_max(os.path.exists(path)):                              # all see it, or none
                self.extract(pictures, what, path)
            return np.load(path, mmap_mode="r")
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} or its .part cannot be read ({error}); remove both") from None

    def extract(self, pictures, what, path):
        """Fills PATH.part row by row, each process its share, PATH.count says how far it got; renamed to PATH when all
        is there"""
        patch = self.encoder.vision.config.patch_size
        size = [side * patch for side in self.encoder.grid] if what == "patches" else None
        to_batch = partial(open_batch, pictures, partial(prepare, self.encoder.image_processor, size))
        first, end = (len(pictures) * r // parallel.WORLD for r in (parallel.RANK, parallel.RANK + 1))
        part, done, begun = path + ".part", first, parallel.all_max(os.path.exists(path + ".part"))
        count = path + ".count" + f"{parallel.RANK}of{parallel.WORLD}" * (parallel.WORLD > 1)
        os.makedirs(self.cache, exist_ok=True)
        if not begun:
            shape = (len(pictures), *self.read(sure(to_batch([0])).to(self.encoder.device), what).shape[1:])
            if 4 * np.prod(shape) > shutil.disk_usage(self.cache).free:
                raise InputError(f"--cache {self.cache}: {4 * np.prod(shape) / 1e9:.1f} GB are needed and not free")
            for old in glob.glob(glob.escape(path) + ".count*"):                        # of a part that is gone
                with contextlib.suppress(FileNotFoundError):
                    os.remove(old)
            empty = f"{part}.{os.getpid()}"
            np.lib.format.open_memmap(empty, "w+", np.float32, shape)
            with contextlib.suppress(FileExistsError):                                  # another process was faster:
                os.link(empty, part)                                                    # its file is not emptied
            os.remove(empty)
        elif os.path.exists(count):
            with open(count) as f:
                done = int(f.read())
        parallel.wait()
        array = np.load(part, mmap_mode="r+")                                           # two may fill it, with the same
        loader = DataLoader(range(done, end), self.batch_size, collate_fn=to_batch, num_workers=self.workers)
        saved = time.time()
        with tqdm(total=end, initial=done, desc=f"{self.name} {what}", unit="picture") as bar:
            for batch in loader:
                pixels = sure(batch)
                array[done:done + len(pixels)] = self.read(pixels.to(self.encoder.device), what)
                done += len(pixels)
                bar.update(len(pixels))
                if time.time() - saved > 10 or done == end:                             # a kill loses ten seconds
                    array.flush()
                    with open(f"{count}.{os.getpid()}", "w") as f:
                        f.write(str(done))
                    os.replace(f.name, count)
                    saved = time.time()
        parallel.wait()
        with contextlib.suppress(FileNotFoundError):                                    # another process was faster
            os.replace(part, path)
        for old in glob.glob(glob.escape(path) + ".count*"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(old)
        parallel.wait()


def sure(batch):
    """A batch as it is, or its error raised"""
    if isinstance(batch, InputError):
        raise batch
    return batch


def open_batch(pictures, to_pixels, numbers):
    """Picture numbers -> (B,3,H,W), or the error: raised in a worker process it would arrive as a page of traceback"""
    try:
        return to_pixels([pictures[i] for i in numbers])
    except InputError as error:
        return error
