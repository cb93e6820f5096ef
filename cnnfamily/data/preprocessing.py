"""What an image goes through before a network with published weights: resize, centre crop, normalise.

The numbers are those of torchvision 0.28.0 (`weights.transforms()`, equal in 0.29), read from it; `tests/test_preprocessing.py`
compares every row and every pixel with it.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from cnnfamily.errors import UsageError, unknown

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` pixels (antialiased), centre crop of `crop` pixels square, then `(pixels - mean) / std`.

    `mean` and `std` are per channel, of pixels scaled to 0..1.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"  # or "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The network's input, float32 `[crop, crop, 3]`.

        Args:
          image: a PIL image, of which grey, palette and transparent ones are turned to RGB as Pillow does; or uint8
            `[height, width, 3]`, RGB. An orientation in its EXIF data is left alone, as torchvision does.

        Raises:
          UsageError: an array of another shape or type, or an image of more than 8 bits a channel.
        """
        image = _as_rgb(image)
        width, height = resized_size(image.size, self.resize)
        left, top = crop_corner((width, height), self.crop)
        image = image.resize((width, height), FILTERS[self.interpolation])
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)), np.float32)
        return (pixels / np.float32(255) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with the shorter side brought to `shorter` pixels and the longer one rounded down."""
    width, height = size
    # The product first: 224 * 115 / 112 is 230, but 224 * (115 / 112) falls just short of it.
    return (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)


def crop_corner(size: tuple[int, int], crop: int) -> tuple[int, int]:
    """(left, top) of the centre crop; half a pixel goes to the even side, as Python's `round` does."""
    width, height = size
    return round((width - crop) / 2), round((height - crop) / 2)


def _as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            shape = ", ".join(map(str, array.shape))
            raise UsageError(f"the image is {array.dtype} [{shape}]; expected uint8 [height, width, 3] or a PIL image")
        image = Image.fromarray(array)
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255: nearly white
        raise UsageError(f"the image has Pillow's mode {image.mode!r}; expected 8 bits a channel")
    return image.convert("RGB")


_V1 = Preprocessing(256, 224)
_V2 = Preprocessing(232, 224)  # torchvision's newer recipe; its accuracies are at this size
# Trained in Caffe, on RGB from 0 to 255 less the mean. The file has no classifier (NaN): these weights give features only.
_FEATURES = Preprocessing(256, 224, mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))

# network -> {torchvision's name of the weights: what its images go through}
WEIGHTS: dict[str, dict[str, Preprocessing]] = {
    "alexnet": {"IMAGENET1K_V1": _V1},
    "vgg11": {"IMAGENET1K_V1": _V1},
    "vgg11_bn": {"IMAGENET1K_V1": _V1},
    "vgg13": {"IMAGENET1K_V1": _V1},
    "vgg13_bn": {"IMAGENET1K_V1": _V1},
    "vgg16": {"IMAGENET1K_V1": _V1, "IMAGENET1K_FEATURES": _FEATURES},
    "vgg16_bn": {"IMAGENET1K_V1": _V1},
    "vgg19": {"IMAGENET1K_V1": _V1},
    "vgg19_bn": {"IMAGENET1K_V1": _V1},
    "resnet18": {"IMAGENET1K_V1": _V1},
    "resnet34": {"IMAGENET1K_V1": _V1},
    "resnet50": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "resnet101": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "resnet152": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "resnext50_32x4d": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "resnext101_32x8d": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "resnext101_64x4d": {"IMAGENET1K_V1": _V2},  # its first weights are of the newer recipe
    "wide_resnet50_2": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "wide_resnet101_2": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "googlenet": {"IMAGENET1K_V1": _V1},  # the network itself changes to the mean and std of 0.5 that it was trained with
    "mobilenet_v2": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "mobilenet_v3_large": {"IMAGENET1K_V1": _V1, "IMAGENET1K_V2": _V2},
    "mobilenet_v3_small": {"IMAGENET1K_V1": _V1},
    "efficientnet_b0": {"IMAGENET1K_V1": Preprocessing(256, 224, "bicubic")},
    "efficientnet_b1": {"IMAGENET1K_V1": Preprocessing(256, 240, "bicubic"), "IMAGENET1K_V2": Preprocessing(255, 240)},
    "efficientnet_b2": {"IMAGENET1K_V1": Preprocessing(288, 288, "bicubic")},  # the paper's resolution is 260
    "efficientnet_b3": {"IMAGENET1K_V1": Preprocessing(320, 300, "bicubic")},
    "efficientnet_b4": {"IMAGENET1K_V1": Preprocessing(384, 380, "bicubic")},
    "efficientnet_b5": {"IMAGENET1K_V1": Preprocessing(456, 456, "bicubic")},
    "efficientnet_b6": {"IMAGENET1K_V1": Preprocessing(528, 528, "bicubic")},
    "efficientnet_b7": {"IMAGENET1K_V1": Preprocessing(600, 600, "bicubic")},
}


def preprocess(name: str) -> Preprocessing:
    """What images go through before a network with published weights: `preprocess("resnet50.IMAGENET1K_V2")(image)`.

    Args:
      name: a network, `resnet50`, which stands for its weights IMAGENET1K_V1; or a network and the name of its weights.

    Raises:
      UsageError: no such network or weights; the nearest is suggested.
    """
    network, _, weights = name.partition(".")
    if network not in WEIGHTS:
        raise unknown("network with published weights", network, WEIGHTS)
    weights = weights if "." in name else "IMAGENET1K_V1"
    if weights not in WEIGHTS[network]:
        raise unknown(f"weights of {network}", weights, WEIGHTS[network])
    return WEIGHTS[network][weights]


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes, in the order of the logits of published weights."""
    # As torchvision 0.28.0 (BSD-3-Clause) has them in `weights.meta["categories"]`: one short name a class, each once.
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines())
