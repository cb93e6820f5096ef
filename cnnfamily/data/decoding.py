"""From the bytes of an image file to the pixels that the network gets: decoding and cropping, on the host.

JPEG goes through libjpeg-turbo in its strict mode: of a file with bytes missing or overwritten in the middle Pillow and OpenCV
return a wrong picture without a word, here it is an error wherever the decoder stumbles (a single wrong bit may still decode).
On undamaged files the pixels are Pillow's, byte for byte. All else, CMYK JPEG included, goes through Pillow. Formats are told
by content: a PNG named `.JPEG` is read as what it is. An orientation in EXIF data is left alone, as torchvision and TensorFlow
do; transparency is dropped; 16 bits of grey become 8 by division by 257, of colour (Pillow) by 256.
"""

import dataclasses
import io
import math
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from cnnfamily.data.preprocessing import FILTERS, crop_corner, resized_size
from cnnfamily.errors import UsageError, unknown

# Of more than this (89 million) Pillow only warns, yet a small file may hold gigabytes. Once and for all, because the context
# managers of `warnings` are not for threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class BadImageError(Exception):
    """An image cannot be decoded; the message says why."""


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """A picture of mode RGB, or L for one channel (ITU-R 601 luma).

    Raises:
      BadImageError: no image, a damaged or truncated one, or one of more than `MAX_PIXELS`.
    """
    try:
        picture = _decode_jpeg(data) if data.startswith(b"\xff\xd8\xff") else None
        picture, mode = picture or _decode_with_pillow(data), "RGB" if channels == 3 else "L"
        return picture if picture.mode == mode else picture.convert(mode)  # which copies even where nothing is to be changed
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("it is no image that Pillow knows" if data else "it is empty") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and more for what is no image
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _decode_jpeg(data: bytes) -> Image.Image | None:
    """None for CMYK, which is only looked at: libjpeg-turbo rounds its colours unlike Pillow."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise BadImageError(f"it has {width} x {height} pixels; expected at most {MAX_PIXELS:,}")
    pixels = simplejpeg.decode_jpeg(data, "Gray" if space == "Gray" else "RGB")
    if space not in ("YCbCr", "RGB", "Gray"):
        return None
    return Image.fromarray(pixels[:, :, 0] if space == "Gray" else pixels)


def _decode_with_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255: nearly white
            return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise BadImageError(f"it has Pillow's mode {picture.mode!r}, 32 bits a pixel; expected 8 or 16")
        return picture.convert("RGBA") if "transparency" in picture.info else picture.copy()


def crop_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random part of an image of `size` (width, height), as (left, top, right, bottom).

    Its area is a uniform share of the image's between the two of `scale`, its width over its height log-uniform between the two
    of `ratio`, its place uniform: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6, with torchvision's rule
    (`RandomResizedCrop`) for what does not fit: after ten tries the largest part in the middle with a ratio that is allowed.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class TrainCrop:
    """A random part of the image, brought to `resolution` pixels square: uint8 `[resolution, resolution, channels]`."""

    resolution: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check(self.interpolation, self.resolution)
        for name, pair, largest in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= largest:
                expected = f"two numbers above 0{' and up to 1' if largest == 1 else ''}, the smaller first"
                raise UsageError(f"augment.crop_{name}={tuple(pair)}: expected {expected}")

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        part = picture.crop(crop_box(rng, picture.size, self.scale, self.ratio))
        return _pixels(part.resize((self.resolution,) * 2, FILTERS[self.interpolation]))


@dataclasses.dataclass(frozen=True)
class ScaleCrop:
    """The whole image with its shorter side brought to a random number of pixels between two, then a random square of it.

    As the papers of AlexNet (256 alone), VGG (256 to 512) and ResNet (256 to 480) cut theirs, before parts of random shape.
    """

    resolution: int
    shorter: tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check(self.interpolation, self.resolution)
        if len(self.shorter) != 2 or not self.resolution <= self.shorter[0] <= self.shorter[1]:
            expected = f"two numbers of pixels from data.resolution={self.resolution}, the smaller first, or none"
            raise UsageError(f"augment.crop_shorter={tuple(self.shorter)}: expected {expected}")

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        size = resized_size(picture.size, int(rng.integers(self.shorter[0], self.shorter[1] + 1)))
        left, top = (int(rng.integers(side - self.resolution + 1)) for side in size)
        picture = _resize(picture, size, self.interpolation)
        return _pixels(picture.crop((left, top, left + self.resolution, top + self.resolution)))


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """The shorter side brought to `resize` pixels, then the middle: uint8 `[resolution, resolution, channels]`.

    `resize` 0 stands for the usual 8/7 of the resolution: 256 for 224. With `corners` also the four corners, for ten-crop
    testing (Krizhevsky et al. 2012, section 4.1): `[5, resolution, resolution, channels]`, as torchvision's `FiveCrop` orders
    them: top left, top right, bottom left, bottom right, middle.
    """

    resolution: int
    resize: int = 0
    interpolation: str = "bilinear"
    corners: bool = False

    def __post_init__(self):
        _check(self.interpolation, self.resolution)
        if self.resize and self.resize < self.resolution:
            raise UsageError(f"data.resize={self.resize}: expected 0 or at least data.resolution={self.resolution}")

    def __call__(self, picture: Image.Image) -> np.ndarray:
        width, height = size = resized_size(picture.size, self.resize or round(self.resolution * 8 / 7))
        pixels = _pixels(_resize(picture, size, self.interpolation))
        right, bottom = width - self.resolution, height - self.resolution
        places = [crop_corner(size, self.resolution)]
        if self.corners:
            places = [(0, 0), (right, 0), (0, bottom), (right, bottom), *places]
        parts = [pixels[top : top + self.resolution, left : left + self.resolution] for left, top in places]
        return np.stack(parts) if self.corners else parts[0]


def _check(interpolation: str, resolution: int) -> None:
    if interpolation not in FILTERS:
        raise unknown("data.interpolation", interpolation, FILTERS)
    if resolution < 1:
        raise UsageError(f"data.resolution is {resolution}; expected at least 1")


def _resize(picture: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Limited as decoding is: a strip one pixel wide and 30,000 long becomes two billion at 256 wide."""
    if size[0] * size[1] > MAX_PIXELS:
        found = f"it has {picture.width} x {picture.height} pixels, and would have {size[0]} x {size[1]} when it is cropped"
        raise BadImageError(f"{found}; expected at most {MAX_PIXELS:,}")
    return picture.resize(size, FILTERS[interpolation])


def _pixels(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
