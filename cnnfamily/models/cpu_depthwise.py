"""The depthwise convolution on a CPU: shifted multiply-adds, which XLA fuses into a single loop over the padded map.

To pad each product instead of the images is faster for a 3x3 alone (0.29 for 0.80 at 28x28x240, stride 2), but not between
batch norm and SiLU. What the times are: see `cpu_forms`.
"""

import jax.numpy as jnp
from jax import Array, lax

from cnnfamily.models.cpu_forms import channel_sums
from cnnfamily.models.geometry import Geometry, Pair, pad, seen_by_taps, sum_dtype


def depthwise_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _multiply_add(images, kernel[:, :, 0], geometry.stride, geometry.padding)


def depthwise_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    """Each of the stride x stride phases of the map is a correlation of stride 1 with the taps that reach it.

    A cotangent dilated with zeros takes three times as long: 9.2 for 2.9 at 56x56x144, 5x5, stride 2.
    """
    (height, width), (row_stride, column_stride) = geometry.image_size, geometry.stride
    rows, columns = -(-height // row_stride), -(-width // column_stride)

    def phase(row, column):
        row_taps, row_padding = _phase(row, 0, rows, cotangent.shape[1], geometry)
        column_taps, column_padding = _phase(column, 1, columns, cotangent.shape[2], geometry)
        flipped = kernel[row_taps, column_taps, 0][::-1, ::-1]
        return _multiply_add(cotangent, flipped, (1, 1), (row_padding, column_padding)).astype(cotangent.dtype)

    phases = jnp.stack([jnp.stack([phase(r, c) for c in range(column_stride)], 3) for r in range(row_stride)], 2)
    images = phases.reshape(cotangent.shape[0], rows * row_stride, columns * column_stride, cotangent.shape[3])
    return images[:, :height, :width]


def _phase(phase: int, axis: int, size: int, outputs: int, geometry: Geometry) -> tuple[slice, Pair]:
    """The taps that join pixels phase, phase + stride, ... to outputs, and the padding that yields `size` of them."""
    stride, low = geometry.stride[axis], geometry.padding[axis][0]
    shift, first = divmod(phase + low, stride)
    taps = len(range(first, geometry.kernel_size[axis], stride))
    before = taps - 1 - shift
    return slice(first, None, stride), (before, size + taps - 1 - outputs - before)


def depthwise_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Sums over the pixels, of nine taps at once or in bfloat16, whose products are longer programs, of a row of taps."""
    dtype = sum_dtype(images)
    windows = seen_by_taps(pad(images, geometry.padding), geometry.kernel_size, geometry.stride, geometry.output_size)
    products = [window.astype(dtype) * cotangent.astype(dtype) for window in windows]
    together = 9 if images.dtype == dtype else geometry.kernel_size[1]
    sums = [channel_sums(products[i : i + together]) for i in range(0, len(products), together)]
    return jnp.concatenate(sums).astype(images.dtype).reshape(*geometry.kernel_size, 1, -1)


def _multiply_add(images: Array, kernel: Array, stride: Pair, padding: tuple[Pair, Pair]) -> Array:
    """The depthwise correlation with a kernel [height, width, channels].

    The barrier: of the tap in the middle XLA would read the images, and not the padded map, so that both had to be written
    first. EfficientNet-B0 infers in 98 ms without and 90 so, in bfloat16 96 and 94, MobileNetV2 in 58 and 54, 50 and 48
    (folded, JAX 0.10.2, in turn, n = 15); in training it makes no difference.
    """
    dtype = sum_dtype(images)
    padded = lax.optimization_barrier(pad(images.astype(dtype), padding))
    outputs = tuple((padded.shape[1 + axis] - kernel.shape[axis]) // stride[axis] + 1 for axis in (0, 1))
    total = jnp.zeros((images.shape[0], *outputs, images.shape[3]), dtype)
    taps = kernel.astype(dtype).reshape(-1, 1, 1, 1, kernel.shape[2])
    for tap, window in enumerate(seen_by_taps(padded, kernel.shape[:2], stride, outputs)):
        total += window * taps[tap]
    return total
