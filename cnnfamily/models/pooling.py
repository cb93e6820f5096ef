"""Maximum over windows, with a gradient of its own on a CPU.

XLA's CPU compiler writes the gradient of `reduce_window` as a window over pairs of values and positions, one pair at a time:
of a step of ResNet-50 it takes a tenth. Here the first tap that holds the maximum is found once for each output, and each
pixel sums over the windows that it lies in. Times: milliseconds for both, float32, batch 16, two Zen 5 cores.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from cnnfamily.models.cpu_forms import sum_dtype


class Windows(NamedTuple):
    """Square windows: side, stride, and the padding of rows and of columns."""

    side: int
    stride: int
    edges: tuple[tuple[int, int], tuple[int, int]]


def max_pool(x: Array, window: int, stride: int, edges: Sequence[Sequence[int]] = ((0, 0), (0, 0))) -> Array:
    """Maxima of the square windows that lie wholly in the image and its `edges`, the padding ((top, bottom), (left, right)).

    `[batch, height, width, channels]`, floating. The gradient goes to the first maximum of a window, row by row. Differentiable
    by reverse mode alone.
    """
    return _max_pool(x, Windows(window, stride, tuple(tuple(int(pad) for pad in pair) for pair in edges)))


def max_pool_to_the_edge(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """`max_pool` whose last window of a row need not lie wholly inside (torch's `ceil_mode`).

    The windows start inside the image or its padding on the near side: one that would lie in the far padding alone is left out.
    """
    edges = []
    for size in x.shape[1:3]:
        windows = -(-(size + 2 * padding - window) // stride) + 1
        if (windows - 1) * stride >= size + padding:
            windows -= 1
        edges.append((padding, max(0, (windows - 1) * stride + window - size - padding)))
    return max_pool(x, window, stride, edges)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Array, windows: Windows) -> Array:
    return nn.max_pool(x, (windows.side,) * 2, (windows.stride,) * 2, padding=windows.edges)


def _forward(x: Array, windows: Windows) -> tuple[Array, tuple[Array, Array]]:
    y = _max_pool(x, windows)
    return y, (x, y)


@partial(jax.jit, static_argnums=0)
def _backward(windows: Windows, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    return (
        lax.platform_dependent(
            *residuals, cotangent, cpu=partial(_to_images_on_cpu, windows), default=partial(_to_images, windows)
        ),
    )


_max_pool.defvjp(_forward, _backward)


def _to_images(windows: Windows, x: Array, y: Array, cotangent: Array) -> Array:
    pool = partial(nn.max_pool, window_shape=(windows.side,) * 2, strides=(windows.stride,) * 2, padding=windows.edges)
    return jax.vjp(pool, x)[1](cotangent)[0]


def _to_images_on_cpu(windows: Windows, x: Array, y: Array, cotangent: Array) -> Array:
    """Of the stride x stride phases of the padded map each is a sum over the taps that reach it."""
    side, stride, edges = windows
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), *edges, (0, 0)), constant_values=-jnp.inf)
    first = jnp.full(y.shape, side * side, jnp.int32)
    for tap in reversed(range(side * side)):
        row, column = divmod(tap, side)
        stop = [start + (count - 1) * stride + 1 for start, count in zip((row, column), y.shape[1:3], strict=True)]
        seen = lax.slice(padded, (0, row, column, 0), (batch, *stop, channels), (1, stride, stride, 1))
        first = jnp.where(seen == y, tap, first)
    rows, columns = -(-padded.shape[1] // stride), -(-padded.shape[2] // stride)
    before = (side - 1) // stride  # how many windows further back than its own a pixel can lie in
    around = (before, rows - y.shape[1]), (before, columns - y.shape[2])
    first = jnp.pad(first, ((0, 0), *around, (0, 0)), constant_values=side * side)
    cotangent = jnp.pad(cotangent, ((0, 0), *around, (0, 0)))

    def phase(row: int, column: int) -> Array:
        total = jnp.zeros((batch, rows, columns, channels), sum_dtype(x))
        for r in range(row, side, stride):
            for c in range(column, side, stride):
                start = 0, before - r // stride, before - c // stride, 0
                stop = batch, start[1] + rows, start[2] + columns, channels
                here = lax.slice(first, start, stop) == r * side + c
                total += jnp.where(here, lax.slice(cotangent, start, stop).astype(total.dtype), 0)
        return total.astype(x.dtype)

    phases = jnp.stack([jnp.stack([phase(r, c) for c in range(stride)], 3) for r in range(stride)], 2)
    images = phases.reshape(batch, rows * stride, columns * stride, channels)
    return lax.slice(images, (0, edges[0][0], edges[1][0], 0), (batch, edges[0][0] + height, edges[1][0] + width, channels))
