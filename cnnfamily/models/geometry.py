"""What is static about a convolution, and the pixels that its taps see."""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

Pair = tuple[int, int]
NHWC = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """What is static about one convolution, the batch left out; height before width."""

    image_size: Pair
    kernel_size: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    groups: int
    kind: str = "plain"
    rounded: bool = True

    @property
    def output_size(self) -> Pair:
        sides = zip(self.image_size, self.kernel_size, self.stride, self.padding, strict=True)
        return tuple((size + sum(padding) - taps) // stride + 1 for size, taps, stride, padding in sides)

    @property
    def is_pointwise(self) -> bool:
        """1x1 without padding: a matrix product over pixels."""
        return self.kernel_size == (1, 1) and self.padding == ((0, 0), (0, 0))

    @property
    def sides(self) -> Iterator["Side"]:
        """Height and width."""
        return map(Side, self.image_size, self.output_size, self.kernel_size, self.stride, self.padding)


class Side(NamedTuple):
    """One dimension of a convolution."""

    size: int
    outputs: int
    taps: int
    stride: int
    padding: Pair


def seen_by_taps(padded: Array, kernel_size: Pair, stride: Pair, outputs: Pair) -> list[Array]:
    """For each tap, in row-major order, the pixels that it multiplies: [batch, *outputs, channels]."""
    batch, channels = padded.shape[0], padded.shape[3]
    rows, columns = extent(outputs, stride)
    return [
        lax.slice(padded, (0, r, c, 0), (batch, r + rows, c + columns, channels), (1, *stride, 1))
        for r in range(kernel_size[0])
        for c in range(kernel_size[1])
    ]


def extent(outputs: Pair, stride: Pair) -> Pair:
    """From the first pixel that a tap multiplies to the last: how many rows and columns."""
    return tuple((count - 1) * step + 1 for count, step in zip(outputs, stride, strict=True))


def pad(images: Array, padding: tuple[Pair, Pair], between: Pair = (0, 0)) -> Array:
    """Pads the two sides of height and width, and between pixels; a negative padding cuts off."""
    height, width = ((*pair, inner) for pair, inner in zip(padding, between, strict=True))
    return lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), height, width, (0, 0, 0)))


def sum_dtype(images: Array) -> jnp.dtype:
    """In which sums are kept: float32 for narrower numbers."""
    return jnp.dtype(jnp.float32) if is_narrow(images) else images.dtype


def is_narrow(images: Array) -> bool:
    return jnp.finfo(images.dtype).bits < 32


def spread(tap: Pair, geometry: Geometry) -> tuple[tuple[Pair, Pair], Pair]:
    """The padding around the outputs, and the zeros between them, that put each onto the pixel that `tap` multiplies."""
    around = []
    for first, side in zip(tap, geometry.sides, strict=True):
        start = first - side.padding[0]
        around.append((start, side.size - start - (side.outputs - 1) * side.stride - 1))
    return tuple(around), tuple(stride - 1 for stride in geometry.stride)


def flat(x: Array) -> Array:
    """`[pixels of all images, channels]`."""
    return x.reshape(-1, x.shape[-1])


def strided(images: Array, stride: Pair) -> Array:
    return lax.slice(images, (0, 0, 0, 0), images.shape, (1, *stride, 1))
