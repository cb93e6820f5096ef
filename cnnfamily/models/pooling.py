"""Maximum over windows, with forms of its own on a CPU.

XLA's CPU compiler runs through the windows of `reduce_window` number by number: 12.0 ms, and in bfloat16 24.5, at
112x112x64, 3x3 with stride 2; as maxima of shifted maps, which vectorise, 3.9 and 3.5 (0.12.0.1: 21 and 77, 6.1 and 6.3).
28x28x256, stride 1: 6.3 and 20.9 to 1.5 and 2.3; 2x2 at 224x224x64: 6.7 and 3.1 to 5.7 and 2.8 (batch 16, two Zen 5 cores,
JAX 0.10.2, medians of 9). The gradient it writes as a window over pairs of values and positions: of a step of ResNet-50
that took a tenth. Here the first tap that holds the maximum is found once for each output, and each pixel sums over the
windows that it lies in.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from cnnfamily.models.geometry import seen_by_taps, sum_dtype


class Windows(NamedTuple):
    """Square windows: side, stride, and the padding of rows and of columns."""

    side: int
    stride: int
    edges: tuple[tuple[int, int], tuple[int, int]]


def max_pool(x: Array, window: int, stride: int, edges: Sequence[Sequence[int]] = ((0, 0), (0, 0))) -> Array:
    """Maxima of the square windows that lie wholly in the image and its `edges`, the padding ((top, bottom), (left, right)).

    `[batch, height, width, channels]`, floating; nothing where no window does. The gradient goes to the first maximum of a
    window, row by row. Differentiable by reverse mode alone.
    """
    windows = Windows(window, stride, tuple(tuple(int(pad) for pad in pair) for pair in edges))
    beyond = any(size + sum(pair) < window for size, pair in zip(x.shape[1:3], edges, strict=True))
    return _output(windows, x) if beyond else _max_pool(x, windows)


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


def max_pool_of_map(x: Array) -> Array:
    """The maximum of each map, `[batch, channels]` of `[batch, height, width, channels]`; the gradient goes to the first.

    As torch's `MaxPool2d` over the whole map; floating, with at least one pixel (else ValueError, of `argmax`). The gradient of
    `jnp.max` is divided by how many pixels equal the maximum, and was NaN in float64 with LLVM's optimisations off: most likely
    XLA had computed x anew for it, with other roundings, so that none did.
    """
    pixels = lax.collapse(x, 1, 3)
    first = jnp.argmax(lax.stop_gradient(pixels), axis=1, keepdims=True)
    return jnp.where(jnp.arange(pixels.shape[1])[:, None] == first, pixels, 0).sum(axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Array, windows: Windows) -> Array:
    return lax.platform_dependent(x, cpu=partial(_output_on_cpu, windows), default=partial(_output, windows))


def _output(windows: Windows, x: Array) -> Array:
    return nn.max_pool(x, (windows.side,) * 2, (windows.stride,) * 2, padding=windows.edges)


def _output_on_cpu(windows: Windows, x: Array) -> Array:
    """In float32, to which XLA widens each maximum of two anyway, and rounds it."""
    return reduce(jnp.maximum, _seen_by_taps(windows, _padded(windows, x.astype(sum_dtype(x))))).astype(x.dtype)


def _padded(windows: Windows, x: Array) -> Array:
    return jnp.pad(x, ((0, 0), *windows.edges, (0, 0)), constant_values=-jnp.inf)


def _seen_by_taps(windows: Windows, padded: Array) -> list[Array]:
    """For each tap of a window, row by row, what it sees in all windows: `[batch, height, width, channels]` of the output."""
    outputs = tuple((size - windows.side) // windows.stride + 1 for size in padded.shape[1:3])
    return seen_by_taps(padded, (windows.side,) * 2, (windows.stride,) * 2, outputs)


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
    return jax.vjp(partial(_output, windows), x)[1](cotangent)[0]


def _to_images_on_cpu(windows: Windows, x: Array, y: Array, cotangent: Array) -> Array:
    """Of the stride x stride phases of the padded map each is a sum over the taps that reach it."""
    side, stride, edges = windows
    batch, height, width, channels = x.shape
    padded = _padded(windows, x)
    first = jnp.full(y.shape, side * side, jnp.int32)
    for tap, seen in reversed(list(enumerate(_seen_by_taps(windows, padded)))):
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
