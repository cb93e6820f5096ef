"""The three products of a convolution (see `convolution`) by oneDNN, for training on a CPU that asks for it (`config.onednn`).

Shapes and equality are those of `cpu_forms`; but an output is rounded here where it is to be.

Milliseconds in this file: bfloat16, batch 16, as `cpu_forms` has it and here, two Zen 5 cores, JAX 0.10.2, medians of 9 in
turn. In all, a step of ResNet-50 at 224 pixels: see experiments/speed/README.md.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from cnnfamily.models import cpu_forms as cpu
from cnnfamily.models import onednn
from cnnfamily.models.cpu_windows import of_windows, slice_after
from cnnfamily.models.geometry import Geometry, flat, is_narrow, pad, spread, strided, sum_dtype

# Channels and filters of a 1x1 convolution, filters of one of few channels; of others both, and the sides of its output.
FEWEST, FEWEST_OF_OTHERS, SMALLEST = 16, 24, 7
MOST_TAPS = 49  # as many products has a gradient with a stride, and images are copied as often for patches


def applies(images: Array, kernel: Array, geometry: Geometry) -> bool:
    """Whether a convolution that is being traced takes these forms: a dense one in training that asks for oneDNN.

    Where the forms of `cpu_forms` were found faster they stay (in turn, on a machine that did other work): for small maps
    (2x2x512, 3x3, batch 128, output 9.5 to 15 and gradient of images 6.8 to 14; 7x7 on 7x7x512, batch 64, gradient of images 88
    to 364) and for 16 channels (32x32x16, 3x3, batch 128, gradient of the kernel 10 to 19; from 24 on it is faster).
    """
    channels, filters = kernel.shape[2:]
    if geometry.is_pointwise:
        worth = min(channels, filters) >= FEWEST
    else:
        fewest = FEWEST if channels <= cpu.MOST_FEW else FEWEST_OF_OTHERS
        worth = filters >= fewest and (channels <= cpu.MOST_FEW or channels >= fewest) and min(geometry.output_size) >= SMALLEST
    return geometry.groups == 1 and worth and onednn.applies(images, kernel, geometry, "training")


# The output, 1x1 as a product, 3x3 as a convolution: 56x56, 64 to 256: 4.5 to 1.9; 256 to 64: 3.5 to 1.9; 14x14, 1024 to 256:
# 1.7 and 1.8; 3x3 of 56x56x64: 9.8 to 3.9; 28x28x128: 8.2 to 3.8; 14x14x256: 5.3 to 3.7; 7x7x512: 4.6 to 4.1. Of 224x224x3,
# 7x7 with stride 2 to 64: 19 to 5.5; 3x3, stride 2, to 32: 4.4 to 1.1; 3x3 to 64: 22 to 8.0.


def output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    dtype = images.dtype if geometry.rounded else sum_dtype(images)
    if not geometry.is_pointwise:
        return onednn.convolution(images, kernel, geometry, dtype)
    seen = strided(images, geometry.stride)
    return onednn.product(flat(seen), kernel[0, 0], dtype).reshape(*seen.shape[:3], -1)


# The gradient of the images: 56x56, 64 to 256: 3.5 to 1.9; 256 to 64: 4.3 to 2.0; 7x7, 1024 to 2048: 3.5 and 3.5, and as a
# convolution 4.6. 3x3 of 56x56x64: 10.4 to 3.9; 28x28x128: 6.2 to 3.7; 14x14x256: 5.1 to 3.7; 7x7x512: 5.0 to 4.3, and 6.0
# where XLA transposes the kernel.


def to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    if geometry.is_pointwise:
        product = onednn.product(flat(cotangent), kernel[0, 0], cotangent.dtype, right_turned=True)
        product = product.reshape(*cotangent.shape[:3], -1)
        return product if geometry.stride == (1, 1) else pad(product, *spread((0, 0), geometry))
    if kernel.shape[2] <= cpu.MOST_FEW or math.prod(geometry.kernel_size) > MOST_TAPS:
        return cpu.ordered_to_images(cotangent, kernel, geometry)
    around = tuple(tuple(side.taps - 1 - padding for padding in side.padding) for side in geometry.sides)
    if geometry.stride != (1, 1) or min(map(min, around)) < 0:
        return cpu.by_taps_to_images(cotangent, kernel, geometry)
    back = Geometry(geometry.output_size, geometry.kernel_size, (1, 1), around, 1)
    return onednn.convolution(cotangent, kernel[::-1, ::-1], back, cotangent.dtype, turned=True)


def to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Products over the pixels: with a stride one for each tap, else one for all.

    That is of images shifted by the columns of the kernel, side by side, and of the cotangent shifted by its rows, with zeros
    around. 1x1, 56x56, 64 to 256: 7.5 to 4.1; 14x14, 1024 to 256: 3.5 to 2.0. 3x3 of 56x56x64: 14.8 to 9.5, a product for each
    tap 13.4; 28x28x128: 7.3 to 6.4, 7.8; 14x14x256: 6.0 to 6.0, 5.9; 7x7x512: 6.3 to 5.8, 5.9. Of 224x224x3, over patches, 7x7
    with stride 2 to 64: 40 to 22; 11x11, stride 4, to 64: 16 to 12; 3x3, stride 2, to 32: 6.0 to 5.1; 3x3 to 64: 40 to 28.
    """
    (rows, columns), width = geometry.kernel_size, geometry.output_size[1]
    channels, filters = images.shape[3], cotangent.shape[3]
    copies = rows * columns * channels / math.prod(geometry.stride)
    if channels <= cpu.MOST_FEW and filters >= cpu.FEWEST_PATCHED and copies <= MOST_TAPS:
        patches = _of_bits(cpu.patches(_bits(images), geometry), images.dtype)
        product = onednn.product(flat(patches), flat(cotangent), images.dtype, left_turned=True)
        return product.reshape(rows, columns, channels, filters)
    if channels <= cpu.MOST_FEW or rows * columns > MOST_TAPS:
        return cpu.ordered_to_kernel(images, cotangent, geometry)
    if geometry.stride == (1, 1):
        padded = pad(images, geometry.padding)
        # They wait for the cotangent: `of_windows`. Temporary memory of VGG16's step, batch 16, float32, 3,635 to 2,841
        # MiB, of ResNet-50's 1,702 to 1,475; 1.20 (0.99 to 1.41, n = 7) and 1.08 times as fast (0.78 to 1.61, n = 21; Zen 3).
        size = padded.shape[1], width
        by_columns = _side_by_side([slice_after(cotangent, padded, (0, first), size) for first in range(columns)])
        by_rows = _side_by_side([pad(cotangent, ((row, rows - 1 - row), (0, 0))) for row in range(rows)])
        product = onednn.product(flat(by_columns), flat(by_rows), images.dtype, left_turned=True)
        return product.reshape(columns, channels, rows, filters).transpose(2, 0, 1, 3)

    def product(window: Array) -> Array:
        return onednn.product(flat(window), flat(cotangent), images.dtype, left_turned=True)

    products = of_windows(product, images, cotangent, geometry)
    return jnp.stack(products).reshape(rows, columns, channels, filters)


def _side_by_side(parts: list[Array]) -> Array:
    """Joined along the channels: 56x56x64, three times, 4.9 to 1.4."""
    whole = jnp.stack([_bits(part) for part in parts], axis=3)
    return _of_bits(whole.reshape(*whole.shape[:3], -1), parts[0].dtype)


def _bits(x: Array) -> Array:
    """bfloat16 as whole numbers, to be moved: XLA would widen it to float32 for that."""
    return lax.bitcast_convert_type(x, jnp.uint16) if is_narrow(x) else x


def _of_bits(x: Array, dtype: jnp.dtype) -> Array:
    return lax.bitcast_convert_type(x, dtype)
