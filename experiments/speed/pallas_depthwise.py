"""A depthwise convolution as one kernel in Pallas, for `candidates.py` to measure on a GPU beside cuDNN's.

`output` and, with stride 1, `to_images` in the sense of `cnnfamily/models/convolution.py`; `check()` compares them with
the plain convolution, on a machine without a GPU by interpreting them.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cnnfamily.models import convolution
from cnnfamily.models.geometry import Geometry, pad

MOST_COLUMNS, MOST_CHANNELS = 16, 64  # of the tile that a program computes, powers of two


def output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _correlate(images, kernel[:, :, 0], geometry.stride, geometry.padding)


def to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    if geometry.stride != (1, 1):
        return convolution._plain_to_images(cotangent, kernel, geometry)
    sides = zip(geometry.kernel_size, geometry.padding, geometry.image_size, geometry.output_size, strict=True)
    padding = [(taps - 1 - low, size + low - outputs) for taps, (low, _), size, outputs in sides]
    return _correlate(cotangent, kernel[::-1, ::-1, 0], (1, 1), tuple(padding))


def _correlate(images: Array, kernel: Array, stride: tuple[int, int], padding: tuple) -> Array:
    padded = pad(images, padding)
    batch, _, _, channels = padded.shape
    height, width = ((padded.shape[1 + i] - kernel.shape[i]) // stride[i] + 1 for i in (0, 1))
    columns = min(MOST_COLUMNS, pl.next_power_of_2(width))
    depth = math.gcd(channels, MOST_CHANNELS)

    def tile(images_ref, kernel_ref, output_ref):
        image, row = pl.program_id(0) // height, pl.program_id(0) % height
        column = pl.program_id(1) * columns + lax.broadcasted_iota(jnp.int32, (columns, depth), 0)
        channel = pl.program_id(2) * depth + lax.broadcasted_iota(jnp.int32, (columns, depth), 1)
        inside, total = column < width, jnp.zeros((columns, depth), jnp.float32)
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                pixels = (image, row * stride[0] + i, column * stride[1] + j, channel)
                window = triton.load(images_ref.at[pixels], mask=inside, other=0)
                total += window.astype(jnp.float32) * kernel_ref[i, j, channel[0]].astype(jnp.float32)[None]
        triton.store(output_ref.at[image, row, column, channel], total.astype(output_ref.dtype), mask=inside)

    return pl.pallas_call(
        tile,
        grid=(batch * height, pl.cdiv(width, columns), channels // depth),
        out_shape=jax.ShapeDtypeStruct((batch, height, width, channels), images.dtype),
        interpret=jax.default_backend() == "cpu",
    )(padded, kernel)


def check() -> None:
    """Raises where one of them is not the plain convolution."""
    for size, taps, stride in ((7, 3, 1), (8, 3, 2), (9, 5, 1), (20, 5, 2)):
        around = ((taps - 1) // 2, taps // 2)
        geometry = Geometry((size, size), (taps, taps), (stride, stride), (around, around), 24)
        keys = jax.random.split(jax.random.key(0), 3)
        images = jax.random.normal(keys[0], (2, size, size, 24))
        kernel = jax.random.normal(keys[1], (taps, taps, 1, 24))
        cotangent = jax.random.normal(keys[2], (2, *geometry.output_size, 24))
        pairs = (
            (output(images, kernel, geometry), convolution._plain_output(images, kernel, geometry)),
            (to_images(cotangent, kernel, geometry), convolution._plain_to_images(cotangent, kernel, geometry)),
        )
        for found, expected in pairs:
            if not jnp.allclose(found, expected, rtol=1e-2, atol=1e-2):  # TensorFloat-32 of the plain one
                raise RuntimeError(f"the kernel in Pallas differs from the convolution: {geometry}")


if __name__ == "__main__":
    check()
    print("as the plain convolution")
