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
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from cnnfamily.data import arrays, folder, tfds
from cnnfamily.data.arrays import Split, expect
from cnnfamily.data.decoding import CentreCrop
from cnnfamily.data.known import KNOWN
from cnnfamily.data.photographs import Photographs, Reader
from cnnfamily.errors import unknown, warn


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    name: str
    train: Split | Photographs
    test: Split | Photographs
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    fingerprint: str  # of the arrays as the source holds them, before they are fitted to a resolution
    whitening: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # `whitening()` of the training images, or {}

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
    zca_epsilon: float = 0.0,
) -> Dataset:
    """Reads a source and fits its images to [resolution, resolution, channels].

    `mean` and `std`, where empty, are those of the table of well-known sets, else of the fitted training images; of
    photographs, of about a thousand of them. With `zca_epsilon` they are 0 and 1, and `whitening` takes their place.
    Raises UsageError if the source cannot be used, with one line that names the file or array.
    """
    prefix, _, rest = source.partition(":")
    if fit not in FITS:
        raise unknown("data.fit", fit, FITS)
    expect(channels in (1, 3), f"model.in_channels is {channels}", "1 (grey) or 3 (RGB)")
    if prefix not in FORMS:
        raise unknown("data source", prefix, FORMS)
    complete = not rest if prefix == "digits" else rest or prefix == "fake"
    expect(complete, f"data source is {source!r}", FORMS[prefix])
    for key, given in (("mean", mean), ("std", std)):
        one_each = len(given) in (0, channels)
        expect(one_each, f"data.{key} is {tuple(given)}", f"{channels} values, one a channel, or none")
    expect(all(value > 0 for value in std), f"data.std is {tuple(std)}", "values above 0")
    if zca_epsilon:
        expect(not (mean or std), "data.zca_epsilon and data.mean or data.std are set", "either: whitening takes their place")
        expect(fit != "crop", "data.zca_epsilon is set and data.fit is 'crop'", "'resize' or 'pad': it is for small images")
        mean, std = (0.0,) * channels, (1.0,) * channels
    known = KNOWN.get(re.split("[/:]", rest)[0]) if prefix == "tfds" else None
    if known and known.channels == channels and not (mean or std):
        mean, std = known.mean, known.std
    if prefix in PHOTOGRAPHS:
        read = PHOTOGRAPHS[prefix]
        name, train, test, class_names, fingerprint = read(rest, directory=dir, test_share=test_share, split_seed=split_seed)
        if known and known.num_classes == len(class_names):
            class_names = known.class_names
        size = {"resolution": resolution, "channels": channels}
        reading = {"shape": (resolution, resolution, channels), "workers": workers, "bad_images": bad_images}
        if fit == "crop":
            crop = CentreCrop(resolution, resize, interpolation)
            some = np.arange(0, len(train), -(-len(train) // 1000))
            sample = train if mean and std else _decoded(train, some, crop, **reading)
        else:
            fitted = functools.partial(fit_picture, **size, fit=fit)
            train, test = (_decoded(split, np.arange(len(split)), fitted, **reading) for split in (train, test))
            sample = train
    else:
        expect(fit != "crop", f"data.fit is 'crop' and data.source {source!r}", "'resize' or 'pad', for images in arrays")
        name, train, test, class_names, fingerprint = arrays.read(prefix, rest, source)
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
        whitening=whitening(train.images, zca_epsilon) if zca_epsilon else {},
    )


PHOTOGRAPHS = {"tfds": tfds.read, "folder": folder.read}
FORMS = {
    "digits": "digits",
    "npz": "npz:PATH",
    "idx": "idx:DIR",
    "tfds": "tfds:NAME",
    "folder": "folder:PATH",
    "fake": "fake or fake:n=512,size=32",
}
FITS = ("resize", "pad", "crop")


def _decoded(
    split: Photographs, index: np.ndarray, crop: Callable[[Image.Image], np.ndarray], *, shape: tuple[int, ...], **reading
) -> Split:
    """Photographs as arrays in memory."""
    with contextlib.closing(Reader(split, channels=shape[-1], **reading)) as reader:
        found = Split(**reader.images(index, lambda picture, *_: crop(picture), shape=shape))
        if reader.bad_images:
            warn(f"warning: {reader.bad_images} of {len(index)} images were replaced")
        return found


def fit_images(images: np.ndarray, *, resolution: int, channels: int, fit: str = "resize") -> np.ndarray:
    """uint8 [n, height, width, 1 or 3] to uint8 [n, resolution, resolution, channels], once, on the host.

    `resize` is Pillow's antialiased bilinear filter (the aspect ratio is not kept); `pad` centres the image in zeros,
    as LeNet's paper puts 28 pixels into 32. Grey becomes colour by repetition, colour becomes grey by ITU-R 601 luma.
    Image by image: matrix products on the whole array gave the same bytes, 2.6 times faster for MNIST (2 s here) but
    1.3 to 19 times slower for colour.
    """
    expect(resolution >= 1, f"data.resolution is {resolution}", "at least 1")
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
    expect(max(height, width) <= resolution, found, "a data.resolution not smaller, or data.fit='resize'")
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


LARGEST_WHITENED = 4096  # numbers an image; its matrix has 64 MiB, and takes half a minute


def whitening(images: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """ZCA whitening of uint8 images [n, height, width, channels]: `whitening_mean` [d] and `whitening_matrix` [d, d], float32.

    (x - mean) @ matrix of flattened pixels x scaled to 0..1 has the covariance C (C + epsilon)^-1, of all linear maps that do
    so the one nearest to x: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images", appendix A. `epsilon`
    (1e-2 for example) keeps directions without variance from being blown up.
    """
    size = math.prod(images.shape[1:])
    expect(size <= LARGEST_WHITENED, f"data.zca_epsilon with images of {size} numbers", f"at most {LARGEST_WHITENED}: 36x36x3")
    flat = images.reshape(len(images), size)
    mean, products = flat.mean(axis=0, dtype=np.float64), np.zeros((size, size))
    for start in range(0, len(flat), 4096):
        part = flat[start : start + 4096] - mean
        products += part.T @ part
    variances, directions = np.linalg.eigh(products / len(flat) / 255**2)
    matrix = (directions / np.sqrt(np.maximum(variances, 0) + epsilon)) @ directions.T
    return {"whitening_mean": (mean / 255).astype(np.float32), "whitening_matrix": matrix.astype(np.float32)}
