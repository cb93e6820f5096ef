"""Where images come from: each source becomes one `Dataset`.

Small images are uint8 arrays in memory at the size the network takes; photographs (`data.fit="crop"`) are decoded when needed.

| source      | what it reads                                                                                   |
|-------------|-------------------------------------------------------------------------------------------------|
| `digits`    | 1,797 digits of 8x8 pixels, shipped with the package (digits.LICENSE.txt)                       |
| `npz:PATH`  | `train_images` uint8 [n, h, w] or [n, h, w, c], `train_labels` int [n], `test_images`,          |
|             | `test_labels`, and `class_names` if any                                                         |
| `idx:DIR`   | the four files of MNIST (http://yann.lecun.com/exdb/mnist), gzipped or not                      |
| `tfds:NAME` | what TensorFlow Datasets has prepared, without TensorFlow (`tfds.py`)                            |
| `folder:PATH` | photographs in `train/CLASS/` and `val/CLASS/`, or in one tree that is split (`folder.py`)     |
| `fake`      | seeded random images with a learnable class; `fake:n=512,size=32,channels=3,classes=10`         |
"""

import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cnnfamily.data import folder, tfds
from cnnfamily.data.decoding import CentreCrop
from cnnfamily.data.photographs import Photographs, Reader
from cnnfamily.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    images: np.ndarray  # uint8 [n, height, width, channels]
    labels: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    name: str
    train: Split | Photographs
    test: Split | Photographs
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    fingerprint: str  # of the arrays as the source holds them, before they are fitted to a resolution

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load(
    source: str,
    *,
    resolution: int,
    channels: int,
    dir: str = "",
    fit: str = "resize",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    resize: int = 0,
    interpolation: str = "bilinear",
    test_share: float = 0.2,
    split_seed: int = 0,
    workers: int = -1,
    bad_images: str = "stop",
) -> Dataset:
    """Reads a source and fits its images to [resolution, resolution, channels].

    `mean` and `std`, where empty, are those of the fitted training images; of photographs, of about a thousand of them.
    Raises UsageError if the source cannot be used, with one line that names the file or array.
    """
    prefix, _, rest = source.partition(":")
    if fit not in FITS:
        raise unknown("data.fit", fit, FITS)
    _expect(channels in (1, 3), f"model.in_channels is {channels}", "1 (grey) or 3 (RGB)")
    if prefix not in FORMS:
        raise unknown("data source", prefix, FORMS)
    complete = not rest if prefix == "digits" else rest or prefix == "fake"
    _expect(complete, f"data source is {source!r}", FORMS[prefix])
    for key, given in (("mean", mean), ("std", std)):
        one_each = len(given) in (0, channels)
        _expect(one_each, f"data.{key} is {tuple(given)}", f"{channels} values, one a channel, or none")
    _expect(all(value > 0 for value in std), f"data.std is {tuple(std)}", "values above 0")
    if prefix in PHOTOGRAPHS:
        read = PHOTOGRAPHS[prefix]
        name, train, test, class_names, fingerprint = read(rest, directory=dir, test_share=test_share, split_seed=split_seed)
        size = {"resolution": resolution, "channels": channels}
        reading = {**size, "workers": workers, "bad_images": bad_images}
        if fit == "crop":
            crop = CentreCrop(resolution, resize, interpolation)
            some = np.arange(0, len(train), -(-len(train) // 1000))
            sample = train if mean and std else _decoded(train, some, crop, **reading)
        else:
            fitted = functools.partial(fit_picture, **size, fit=fit)
            train, test = (_decoded(split, np.arange(len(split)), fitted, **reading) for split in (train, test))
            sample = train
    else:
        _expect(fit != "crop", f"data.fit is 'crop' and data.source {source!r}", "'resize' or 'pad', for images in arrays")
        name, arrays = READERS[prefix](rest)
        train, test, class_names = _checked(arrays, source)
        fingerprint = _fingerprint(train, test)
        train, test = (
            Split(fit_images(split.images, resolution=resolution, channels=channels, fit=fit), split.labels)
            for split in (train, test)
        )
        sample = train
    measured_mean, measured_std = ((), ()) if mean and std else measure(sample.images)
    return Dataset(
        name=name,
        train=train,
        test=test,
        class_names=class_names,
        mean=tuple(map(float, mean)) or measured_mean,
        std=tuple(map(float, std)) or measured_std,
        fingerprint=fingerprint,
    )


def _read_digits(rest: str) -> tuple[str, dict]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    # A contract: results on `digits` compare only on this split.
    order = np.random.default_rng(0).permutation(1797)
    images = np.round(images[order] * (255 / 16)).astype(np.uint8)
    labels = labels[order]
    return "digits", _split(images, labels, 1437)


def _read_npz(rest: str) -> tuple[str, dict]:
    path = Path(rest).expanduser()
    if not path.is_file():
        raise _missing(path)
    try:
        # Opened here, because np.load leaves the file open when the archive is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            is_archive = isinstance(archive, np.lib.npyio.NpzFile)
            _expect(is_archive, f"{path} holds one array", f"an .npz archive of {', '.join(ARRAYS)}")
            for key in ARRAYS:
                _expect(key in archive, f"{path} has no {key!r} but {', '.join(archive)}", ", ".join(ARRAYS))
            return path.stem, {key: archive[key] for key in (*ARRAYS, "class_names") if key in archive}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as an .npz archive of plain arrays: {error}") from error


def _read_idx(rest: str) -> tuple[str, dict]:
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise _missing(folder)
    arrays = {
        f"{split}_{kind}": _read_idx_file(folder, f"{prefix}-{kind}-idx{rank}-ubyte", rank)
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for kind, rank in (("images", 3), ("labels", 1))
    }
    return folder.resolve().name, arrays


def _read_idx_file(folder: Path, name: str, rank: int) -> np.ndarray:
    """One file: two zero bytes, the type (8 is ubyte), the rank, one big-endian uint32 a dimension, the values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        exists = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UsageError(f"{folder} has no {name} or {name}.gz; it holds: {exists}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be decompressed: {error}") from error
    header_size = 4 + 4 * rank
    magic = bytes([0, 0, 8, rank])
    _expect(content[:4] == magic, f"{path} starts with bytes {content[:4].hex() or 'none'}", magic.hex())
    _expect(len(content) >= header_size, f"{path} is truncated: {len(content)} bytes", f"a header of {header_size}")
    shape = struct.unpack(f">{rank}I", content[4:header_size])
    size = header_size + math.prod(shape)
    _expect(len(content) == size, f"{path} is truncated or damaged: {len(content)} bytes", f"{size} by its header")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _read_fake(rest: str) -> tuple[str, dict]:
    """A coarse pattern per class under noise as strong; a quarter as many test images, of the same classes."""
    spec = {"n": 512, "size": 32, "channels": 3, "classes": 10}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in spec:
            raise unknown("key of data source fake", key, spec)
        is_count = value.isdecimal() and int(value) > 0
        _expect(is_count, f"data source 'fake:{rest}' has {item!r}", f"{key}=INTEGER from 1")
        spec[key] = int(value)
    rng = np.random.default_rng(0)  # not the run's seed: a sweep over seeds compares on the same images
    n_total, size, classes = spec["n"] + max(spec["n"] // 4, 1), spec["size"], spec["classes"]
    patterns = rng.integers(0, 128, (classes, 4, 4, spec["channels"]), dtype=np.uint8)
    # Coarse, so that neither pooling nor a resize averages the class away.
    place = np.arange(size) * 4 // size
    patterns = patterns[:, place][:, :, place]
    labels = (np.arange(n_total) % classes).astype(np.int32)
    noise = rng.integers(0, 128, (n_total, *patterns.shape[1:]), dtype=np.uint8)
    images = patterns[labels] + noise
    return "fake", {**_split(images, labels, spec["n"]), "class_names": np.arange(classes).astype(str)}


READERS = {"digits": _read_digits, "npz": _read_npz, "idx": _read_idx, "fake": _read_fake}
PHOTOGRAPHS = {"tfds": tfds.read, "folder": folder.read}
FORMS = {
    "digits": "digits",
    "npz": "npz:PATH",
    "idx": "idx:DIR",
    "tfds": "tfds:NAME",
    "folder": "folder:PATH",
    "fake": "fake or fake:n=512,size=32",
}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


FITS = ("resize", "pad", "crop")


def _decoded(split: Photographs, index: np.ndarray, crop: Callable[[Image.Image], np.ndarray], **reading) -> Split:
    """Photographs as arrays in memory."""
    reader = Reader(split, **reading)
    with contextlib.closing(reader):
        return Split(**reader.images(index, lambda picture, _: crop(picture), here=np.ones(len(index), bool)))


def _split(images: np.ndarray, labels: np.ndarray, n: int) -> dict[str, np.ndarray]:
    return dict(zip(ARRAYS, (images[:n], labels[:n], images[n:], labels[n:]), strict=True))


def _missing(path: Path) -> UsageError:
    expected = "expected data.source=npz:FILE or idx:DIRECTORY that exists, or digits or fake, which need none"
    if not path.parent.is_dir():
        return UsageError(f"{path} does not exist, nor does its folder; {expected}")
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    kind = "is not a file" if path.is_dir() else "does not exist"
    return UsageError(f"{path} {kind}; " + (f"did you mean {near[0]!r} in that folder? " if near else "") + expected)


def _expect(ok: bool, found: str, expected: str) -> None:
    if not ok:
        raise UsageError(f"{found}; expected {expected}")


def _checked(arrays: dict, source: str) -> tuple[Split, Split, tuple[str, ...]]:
    """The two splits with images of rank 4 and int32 labels, and the class names, or one line on what is wrong."""

    def describe(key: str) -> str:
        return f"{source}: {key} is {arrays[key].dtype} {list(arrays[key].shape)}"

    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        is_images = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
        _expect(is_images, describe(f"{split}_images"), "uint8 [n, height, width] or [n, height, width, 1 or 3]")
        _expect(images.size > 0, describe(f"{split}_images"), "at least one image")
        is_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        _expect(is_labels, describe(f"{split}_labels"), f"integers [{len(images)}], one an image")
    if "class_names" in arrays:
        class_names, origin = arrays["class_names"], "class_names"
        _expect(class_names.dtype.kind == "U" and class_names.ndim == 1, describe("class_names"), "strings [classes]")
    else:
        # At most 65,536: a stray label such as 2**32 - 1 must not make as many classes.
        classes = min(max(int(arrays["train_labels"].max()) + 1, 1), 2**16)
        class_names, origin = np.arange(classes).astype(str), "train_labels"
    for split in ("train", "test"):
        low, high = int(arrays[f"{split}_labels"].min()), int(arrays[f"{split}_labels"].max())
        in_range = low >= 0 and high < len(class_names)
        found = f"{source}: {split}_labels run from {low} to {high}"
        _expect(in_range, found, f"0 to {len(class_names) - 1}, the {len(class_names)} classes of {origin}")
    train, test = (
        Split(images.reshape(*images.shape[:3], -1), labels.astype(np.int32))
        for images, labels in ((arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    )
    return train, test, tuple(map(str, class_names))


def _fingerprint(train: Split, test: Split) -> str:
    digest = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def fit_images(images: np.ndarray, *, resolution: int, channels: int, fit: str = "resize") -> np.ndarray:
    """uint8 [n, height, width, 1 or 3] to uint8 [n, resolution, resolution, channels], once, on the host.

    `resize` is Pillow's antialiased bilinear filter (the aspect ratio is not kept); `pad` centres the image in zeros,
    as LeNet's paper puts 28 pixels into 32. Grey becomes colour by repetition, colour becomes grey by ITU-R 601 luma.
    Image by image: matrix products on the whole array gave the same bytes, 2.6 times faster for MNIST (2 s here) but
    1.3 to 19 times slower for colour.
    """
    _expect(resolution >= 1, f"data.resolution is {resolution}", "at least 1")
    if images.shape[1:] == (resolution, resolution, channels):
        return images
    fitted = np.empty((len(images), resolution, resolution, channels), np.uint8)
    for i, image in enumerate(images):
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        fitted[i] = fit_picture(picture, resolution=resolution, channels=channels, fit=fit)
    return fitted


def fit_picture(picture: Image.Image, *, resolution: int, channels: int, fit: str = "resize") -> np.ndarray:
    """One picture of mode RGB or L as uint8 [resolution, resolution, channels]; as `fit_images`."""
    width, height = (resolution, resolution) if fit == "resize" else picture.size
    found = f"images of {height}x{width} pixels cannot be padded to data.resolution={resolution}"
    _expect(max(height, width) <= resolution, found, "a data.resolution not smaller, or data.fit='resize'")
    top, left = (resolution - height) // 2, (resolution - width) // 2
    canvas = np.zeros((resolution, resolution, channels), np.uint8)
    pixels = np.asarray(
        picture.convert("L" if channels == 1 else picture.mode).resize((width, height), Image.Resampling.BILINEAR)
    )
    canvas[top : top + height, left : left + width] = np.atleast_3d(pixels)
    return canvas


def measure(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images [n, height, width, channels], scaled to 0..1.

    A channel without variance gets 1, so that normalising constant images gives 0 and not NaN.
    """
    channels = images.shape[-1]
    count, total, squares = images.size // channels, [0] * channels, [0] * channels
    for start in range(0, len(images), 256):
        for channel in range(channels):
            pixels = images[start : start + 256, :, :, channel].ravel().astype(np.float64)
            # Sums of integers below 2**53 are exact in float64, hence the same in any order and on any machine.
            total[channel] += int(pixels.sum())
            squares[channel] += int(pixels @ pixels)
    mean = tuple(first / count / 255 for first in total)
    variances = (count * second - first**2 for first, second in zip(total, squares, strict=True))
    return mean, tuple(math.sqrt(variance) / count / 255 or 1.0 for variance in variances)
