"""Operations on whole images that Pillow defines, and the policies that draw them: AutoAugment, RandAugment, TrivialAugment.

Each takes ONE image uint8 [height, width, 1 or 3] and returns its shape and dtype, under `jit` and `vmap`. Under `vmap` each
image may draw another operation, and a switch would compute all fifteen for each: instead an operation is a place in three
stages, of which two leave the image as it is: an affine map, a table of 256 values, and a blend with a poorer version of it.

Against Pillow: equal, but for one grey level where floats are rounded on the way to a whole number, in blends and autocontrast,
and for the pixels of affine maps (fewer than one in a hundred) that its fixed-point coordinates put beyond an edge.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cnnfamily.errors import unknown

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
TABLES = ("posterize", "solarize", "autocontrast", "equalize", "invert")
BLENDS = ("brightness", "color", "contrast", "sharpness")
OPERATIONS = ("identity", *GEOMETRIC, *BLENDS, *TABLES)
FILL = 128  # grey, where an affine map looks outside the image: as in EfficientNet's code


def operate(image, operation, magnitude):
    """One operation, given by its place in `OPERATIONS`, at a float32 magnitude in Pillow's units.

    Shears are tangents, translations pixels, rotations degrees, blends 1 less than the factor of `ImageEnhance`; posterize
    takes the bits to keep, solarize the lowest level that is inverted; the others take none.
    """
    pixels = jnp.asarray(image, jnp.int32)
    pixels = _affine(pixels, _coefficients(operation, magnitude, *image.shape[:2]))
    pixels = _look_up(pixels, operation, magnitude)
    return enhance(pixels, operation, magnitude).astype(image.dtype)


def _is(operation, name: str):
    return operation == OPERATIONS.index(name)


def _coefficients(operation, magnitude, height: int, width: int):
    """(a, b, c, d, e, f): the pixel at (x, y) is that of the image at (a x + b y + c, d x + e y + f)."""
    angle = -jnp.where(_is(operation, "rotate"), magnitude, 0.0) * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shear_x, shear_y, shift_x, shift_y = (jnp.where(_is(operation, name), magnitude, 0.0) for name in GEOMETRIC[:4])
    # About the middle for the rotation, about the corner for the shears; only one of them is on.
    right, down = width / 2, height / 2
    c = right - cos * right - sin * down + jnp.trunc(shift_x)
    f = down + sin * right - cos * down + jnp.trunc(shift_y)
    return cos, sin + shear_x, c, -sin + shear_y, cos, f


def _affine(image, coefficients):
    """The nearest pixel; `FILL` outside."""
    a, b, c, d, e, f = coefficients
    height, width = image.shape[:2]
    y, x = (jnp.arange(side, dtype=jnp.float32) + 0.5 for side in (height, width))
    y = y[:, None]
    column, row = jnp.floor(a * x + b * y + c).astype(jnp.int32), jnp.floor(d * x + e * y + f).astype(jnp.int32)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    moved = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], moved, FILL)


def _look_up(image, operation, magnitude):
    """Each channel through a table of its 256 levels."""
    levels = jnp.arange(256)
    counts = jax.vmap(lambda channel: jnp.zeros(256, jnp.int32).at[channel.ravel()].add(1), in_axes=2)(image)
    lost = 8 - jnp.clip(jnp.where(_is(operation, "posterize"), magnitude, 8.0).astype(jnp.int32), 0, 8)
    table = (levels >> lost) << lost
    from_level = jnp.where(_is(operation, "solarize"), magnitude, jnp.where(_is(operation, "invert"), 0.0, 256.0))
    table = jnp.where(levels.astype(jnp.float32) >= from_level, 255 - levels, table)
    tables = jnp.broadcast_to(table, counts.shape)
    tables = jnp.where(_is(operation, "autocontrast"), jax.vmap(_stretch)(counts), tables)
    tables = jnp.where(_is(operation, "equalize"), jax.vmap(_flatten)(counts), tables)
    return jax.vmap(lambda table, channel: table[channel], in_axes=(0, 2), out_axes=2)(tables, image)


def _stretch(counts):
    """The table that brings the lowest level to 0 and the highest to 255."""
    levels = jnp.arange(256)
    low, high = jnp.argmax(counts > 0), 255 - jnp.argmax(counts[::-1] > 0)
    return jnp.where(high > low, jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255), levels)


def _flatten(counts):
    """The table under which levels are about equally frequent; those of one level, or nearly, stay as they are."""
    last = counts[255 - jnp.argmax(counts[::-1] > 0)]
    step = (counts.sum() - last) // 255
    before = jnp.cumsum(counts) - counts
    return jnp.where(step > 0, jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255), jnp.arange(256))


def grey(image):
    """ITU-R 601 luma in integers, as Pillow rounds it: int32 [height, width, 1]."""
    if image.shape[-1] == 1:
        return image
    weights = jnp.asarray([19595, 38470, 7471])
    return (jnp.sum(image * weights, -1, keepdims=True) + 0x8000) >> 16


def _smooth(image):
    """Pillow's filter of that name: the middle five times and its eight neighbours, over 13; the border stays."""
    height, width = image.shape[:2]
    total = 4 * image[1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            total = total + image[top : top + height - 2, left : left + width - 2]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def enhance(image, operation, magnitude):
    """The blends alone, int32 to int32; other operations leave the image as it is."""
    luma = grey(image)
    mean = jnp.floor(luma.astype(jnp.float32).mean() + 0.5).astype(jnp.int32)
    poorer = jnp.where(_is(operation, "color"), luma, image)
    poorer = jnp.where(_is(operation, "contrast"), mean, poorer)
    poorer = jnp.where(_is(operation, "brightness"), 0, poorer)
    if min(image.shape[:2]) > 2:
        poorer = jnp.where(_is(operation, "sharpness"), _smooth(image), poorer)
    # Where nothing is to be blended the two are equal, whatever the factor.
    mixed = poorer.astype(jnp.float32) + (1 + magnitude) * (image - poorer).astype(jnp.float32)
    return jnp.clip(mixed, 0, 255).astype(jnp.int32)


# The policies. Magnitudes are those of torchvision.


def _magnitudes(
    bins: int, *, size: int, shear: float, shift: float | None, rotate: float, blend: float, bits: int
) -> np.ndarray:
    """[operations, bins] for images of `size` pixels; `shift` None is the papers' share of the side, 150 of 331."""
    even = np.linspace(0, 1, bins)
    table = {"posterize": 8 - np.round(even * bits), "solarize": 255 * (1 - even)}
    table |= dict.fromkeys(("shear_x", "shear_y"), shear * even) | dict.fromkeys(BLENDS, blend * even)
    table |= dict.fromkeys(("translate_x", "translate_y"), even * (size * 150 / 331 if shift is None else shift))
    table |= {"rotate": rotate * even}
    return np.array([table.get(name, 0 * even) for name in OPERATIONS], np.float32)


_SIGNED = np.array([name in (*GEOMETRIC, *BLENDS) for name in OPERATIONS])
_USUAL = {"shear": 0.3, "shift": None, "rotate": 30.0, "blend": 0.9, "bits": 4}
_WIDE = {"shear": 0.99, "shift": 32.0, "rotate": 135.0, "blend": 0.99, "bits": 6}


def _signed(key, operation, magnitude):
    sign = jnp.where(jax.random.bernoulli(key), -1.0, 1.0)
    return jnp.where(jnp.asarray(_SIGNED)[operation], sign, 1.0) * magnitude


def rand_augment(key, image, *, count: int = 2, magnitude: int = 9):
    """`count` operations one after another, each at `magnitude` of 0 to 30: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719."""
    magnitudes = jnp.asarray(_magnitudes(31, size=min(image.shape[:2]), **_USUAL))[:, magnitude]
    for each in jax.random.split(key, count):
        which, sign = jax.random.split(each)
        operation = jax.random.randint(which, (), 0, len(OPERATIONS) - 1)  # all but the last, to invert
        image = operate(image, operation, _signed(sign, operation, magnitudes[operation]))
    return image


def trivial_augment(key, image):
    """One operation at any magnitude: Müller and Hutter 2021, https://arxiv.org/abs/2103.10158, its wide ranges."""
    which, where, sign = jax.random.split(key, 3)
    operation = jax.random.randint(which, (), 0, len(OPERATIONS) - 1)
    magnitude = jnp.asarray(_magnitudes(31, size=0, **_WIDE))[operation, jax.random.randint(where, (), 0, 31)]
    return operate(image, operation, _signed(sign, operation, magnitude))


def auto_augment(key, image, *, policy: str = "imagenet"):
    """One of 25 pairs of operations that a search has found: Cubuk et al. 2019, https://arxiv.org/abs/1805.09501, appendix."""
    if policy not in AUTO_AUGMENT:
        raise unknown("AutoAugment policy", policy, AUTO_AUGMENT)
    pairs = [pair.split(", ") for pair in AUTO_AUGMENT[policy]]
    rows = np.array([[_parse(step) for step in pair] for pair in pairs], np.float32)  # [25, 2, (operation, probability, bin)]
    which, coins, *signs = jax.random.split(key, 4)
    chosen = jnp.asarray(rows)[jax.random.randint(which, (), 0, len(rows))]
    magnitudes = jnp.asarray(_magnitudes(10, size=min(image.shape[:2]), **_USUAL))
    happens = jax.random.uniform(coins, (2,), jnp.float32) < chosen[:, 1]
    for (operation, _, level), now, sign in zip(chosen, happens, signs, strict=True):
        operation = jnp.where(now, operation, 0).astype(jnp.int32)  # or the first, which does nothing
        image = operate(image, operation, _signed(sign, operation, magnitudes[operation, level.astype(jnp.int32)]))
    return image


def _parse(step: str) -> tuple[int, float, int]:
    name, probability, level = step.split()
    return OPERATIONS.index(name), float(probability), int(level)


# Operation, probability, magnitude of 0 to 9 (0 where there is none).
AUTO_AUGMENT = {
    "imagenet": (
        *("posterize .4 8, rotate .6 9", "solarize .6 5, autocontrast .6 0", "equalize .8 0, equalize .6 0"),
        *("posterize .6 7, posterize .6 6", "equalize .4 0, solarize .2 4", "equalize .4 0, rotate .8 8"),
        *("solarize .6 3, equalize .6 0", "posterize .8 5, equalize 1 0", "rotate .2 3, solarize .6 8"),
        *("equalize .6 0, posterize .4 6", "rotate .8 8, color .4 0", "rotate .4 9, equalize .6 0"),
        *("equalize 0 0, equalize .8 0", "invert .6 0, equalize 1 0", "color .6 4, contrast 1 8"),
        *("rotate .8 8, color 1 2", "color .8 8, solarize .8 7", "sharpness .4 7, invert .6 0"),
        *("shear_x .6 5, equalize 1 0", "color .4 0, equalize .6 0", "equalize .4 0, solarize .2 4"),
        *("solarize .6 5, autocontrast .6 0", "invert .6 0, equalize 1 0", "color .6 4, contrast 1 8"),
        "equalize .8 0, equalize .6 0",
    ),
    "cifar10": (
        *("invert .1 0, contrast .2 6", "rotate .7 2, translate_x .3 9", "sharpness .8 1, sharpness .9 3"),
        *("shear_y .5 8, translate_y .7 9", "autocontrast .5 0, equalize .9 0", "shear_y .2 7, posterize .3 7"),
        *("color .4 3, brightness .6 7", "sharpness .3 9, brightness .7 9", "equalize .6 0, equalize .5 0"),
        *("contrast .6 7, sharpness .6 5", "color .7 7, translate_x .5 8", "equalize .3 0, autocontrast .4 0"),
        *("translate_y .4 3, sharpness .2 6", "brightness .9 6, color .2 8", "solarize .5 2, invert 0 0"),
        *("equalize .2 0, autocontrast .6 0", "equalize .2 0, equalize .6 0", "color .9 9, equalize .6 0"),
        *("autocontrast .8 0, solarize .2 8", "brightness .1 3, color .7 0", "solarize .4 5, autocontrast .9 0"),
        *("translate_y .9 9, translate_y .7 9", "autocontrast .9 0, solarize .8 3", "equalize .8 0, invert .1 0"),
        "translate_y .7 9, autocontrast .9 0",
    ),
}
