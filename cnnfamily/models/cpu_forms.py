"""What runs on a CPU in place of the convolutions that XLA's compiler is slow at there; `convolution` chooses.

Each form is one of the three products of `convolution`: `..._output(images, kernel)`, `..._to_images(cotangent, kernel)` and
`..._to_kernel(images, cotangent)`, equal to the plain one up to the order of summation. An output comes in the dtype of sums,
which `convolution` rounds.

Times in this file: milliseconds, float32 unless it says bfloat16, batch 16, two Zen 5 cores, JAX 0.10.2 / 0.12.0.1, medians of
3 to 7. In all, depthwise 14x14x480 3x3: forward 32 / 24 plain, 1.4 / 1.3 here; and both gradients 138 / 104, here 5.5 / 6.0.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnnfamily.models.cpu_windows import of_windows
from cnnfamily.models.geometry import NHWC, Geometry, Pair, flat, is_narrow, pad, seen_by_taps, spread, strided, sum_dtype

# Where images are laid side by side, of filters the fewest, and what is too many, and of columns times filters.
FEWEST_SHARED, MOST_SHARED, SHARED_COLUMNS = 64, 96, 64 * 112
PIXELS_TOGETHER = 28 * 28  # the most of an image whose part in the gradient of a small kernel is a product of its own
MOST_FEW, FEWEST_PATCHED = 4, 32  # channels of a convolution whose kernel's gradient is a product over patches, and filters
FEWEST_BY_IMAGES = 32  # channels and filters with which a kernel's gradient is a product for each image


def channel_sums(terms: Sequence[Array]) -> Array:
    """Sums of arrays [..., channels] over all but the channels, [terms, channels]; what they are computed from is read once.

    A reduction with an operand for each, over 8 values that lie far apart, so that the batch is cut and not the rows: so short
    a loop the compiler unrolls, and vectorises the one over channels. The eighth that is left single sums add up. Reduced
    over height and width it would run through each image once for every channel. Sums and moments of the gradient
    of a batch norm with ReLU, float32, JAX 0.10.2 / 0.12.0.1, two cores of a Xeon: 118 / 121 to 7.6 / 7.2 at
    112x112x96, 2.2 / 3.7 to 0.8 / 0.9 at 14x14x576. Over 16 values it is no longer unrolled: with SiLU 142 / 129
    to 14 / 12, and 80 / 94. Nine taps in float32 at 112x112x96: 202 / 203 to 33 / 33, three at a time
    42 / 47; in bfloat16 155 / 119 to 112 / 56 and 28 / 33.
    """
    pixels = math.prod(terms[0].shape[:-1])
    block = max(size for size in range(1, 9) if pixels % size == 0)
    blocks = [term.reshape(block, -1, term.shape[-1]) for term in terms]
    zeros = [jnp.zeros((), terms[0].dtype)] * len(terms)
    sums = lax.reduce(blocks, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (0,))
    return jnp.stack([part.sum(axis=0) for part in sums])


# 1x1: matrix products over the pixels that the stride leaves. The kernel's gradient gains most, 45 to 10 /
# 57 to 13 at 14x14x1024 to 256; the others are equal or better, 12 to 8.7 / 11.3 to 10.9. bfloat16 operands with a
# float32 result: 4.7 / 5.1, with a bfloat16 one 9.7 / 7.7. The kernel's gradient: see `_product_over_pixels`.


def pointwise_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _wide_product(strided(images, geometry.stride), kernel[0, 0], (3,), (0,))


def pointwise_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    images = _wide_product(cotangent, kernel[0, 0], (3,), (1,)).astype(cotangent.dtype)
    return pad(images, *spread((0, 0), geometry))


def pointwise_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    product = _product_over_pixels(strided(images, geometry.stride), cotangent)
    return product.astype(images.dtype)[None, None]


# Few channels, as at the start of a network: all that an output sees side by side, and one product. 224x224x3, stride 2, 3x3
# to 32, JAX 0.10.2: 12.1 to 5.0, bfloat16 14 to 5.4; 0.12.0.1: 4.7 to 7.1, bfloat16 8.0 to 6.8; with stride 1, or 7x7, the
# convolution is faster (22 for 29 to 64). The gradient of the kernel: 8.3 / 8.8 to 5.3 / 6.5; 7x7, stride 2, to 64: 59 / 51
# to 38 / 52; 3x3, stride 1, to 64: 59 to 37; to 16 filters neither is faster.


def patches_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _wide_product(patches(images, geometry), kernel.reshape(-1, kernel.shape[3]), (3,), (0,))


def patches_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """The patches take memory: of 224x224x3, 7x7 with stride 2, batch 16, 118 MB."""
    dtype = sum_dtype(images)
    product = _product_over_pixels(patches(images.astype(dtype), geometry), cotangent.astype(dtype))
    return product.astype(images.dtype).reshape(*geometry.kernel_size, images.shape[3], -1)


def patches(images: Array, geometry: Geometry) -> Array:
    """`[batch, *outputs, taps x channels]`, in pieces of as many columns as the stride has, which lie side by side already."""
    batch, channels, step = images.shape[0], images.shape[3], geometry.stride[1]
    (rows, columns), outputs = geometry.kernel_size, geometry.output_size
    pieces = -(-columns // step)
    low = geometry.padding[1][0]
    high = (outputs[1] + pieces - 1) * step - low - geometry.image_size[1]
    padded = pad(images, (geometry.padding[0], (low, high)))
    padded = padded.reshape(batch, padded.shape[1], outputs[1] + pieces - 1, step * channels)
    last = (outputs[0] - 1) * geometry.stride[0] + 1
    seen = [
        lax.slice(
            padded,
            (0, row, piece, 0),
            (batch, row + last, piece + outputs[1], min(step, columns - piece * step) * channels),
            (1, geometry.stride[0], 1, 1),
        )
        for row in range(rows)
        for piece in range(pieces)
    ]
    return jnp.concatenate(seen, axis=3)


# Between dense and depthwise (ResNeXt): the kernel's gradient, which XLA expands to a dense one, as a batched product
# for each tap. 14x14x512 in 32 groups: 2754 to 29 (JAX 0.10.2).


def grouped_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:3], geometry.groups, x.shape[3] // geometry.groups)

    shape = (*geometry.kernel_size, images.shape[3] // geometry.groups, cotangent.shape[3])
    padded, cotangent = pad(images, geometry.padding), split(cotangent)
    products = [
        jnp.einsum("nhwgi,nhwgo->igo", split(window), cotangent, preferred_element_type=sum_dtype(images))
        for window in seen_by_taps(padded, geometry.kernel_size, geometry.stride, geometry.output_size)
    ]
    return jnp.stack(products).reshape(shape).astype(images.dtype)


# A matrix product for each tap, for four kinds. Tiny maps, with fewer pixels in images or outputs than the kernel has
# taps: XLA has a plain loop for them. The 3x3 convolution of 2x2x512, batch 64, takes 403, here 3.6, and the gradient of its
# images 409 for 4.2 (JAX 0.10.2); that of the kernel is fast as it stands. And bfloat16: XLA widens the operands of a
# convolution to float32, but not those of a product with a float32 result, which the CPU's own bfloat16 instructions
# compute. 14x14x256 3x3: 9.7 to 6.0, the gradient of its images 9.7 to 5.8; 14x14x512: 39 to 21 and 43 to 20.
# In float32 the convolution is as fast as products are: 9.2 for 11.6 at 14x14x256.
# The gradients of a convolution with a stride, and that of the kernel with many channels; float32, 3x3, two cores of a
# Xeon. Stride 2, 56x56x64 to 128: images 21 / 14 to 13 / 8.9, kernel 34 / 34 to 27 / 27; 32x32x16 to 32, batch 128: images
# 5.7 / 7.4 to 3.9 / 3.7, kernel 16 / 9.1 to 7.3 / 6.7. Within ResNet-50 56x56x128 took 168 for 30 alone. Stride 1, the
# kernel: 28x28x128 60 / 44 to 36 / 34, 56x56x64 to 192 221 / 168 to 95 / 85, 14x14x256 18 / 43 to 21 / 22; but
# 56x56x64 101 / 49 to 82 / 60, which within ResNet-50 is no faster.


def by_taps_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    padded = pad(images, geometry.padding)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    windows = seen_by_taps(padded, geometry.kernel_size, geometry.stride, geometry.output_size)
    products = [_wide_product(window, tap, (3,), (0,)) for window, tap in zip(windows, taps, strict=True)]
    return sum(products)


def by_taps_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    total = 0
    for row, column in np.ndindex(*geometry.kernel_size):
        product = _wide_product(cotangent, kernel[row, column], (3,), (1,))
        total += pad(product, *spread((row, column), geometry))
    return total.astype(cotangent.dtype)


def by_taps_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    if is_narrow(images):  # 28x28x128: 18 to 8.6, 14x14x256: 13 to 5.9, 56x56x128 with stride 2: 21 to 8.5 (JAX 0.10.2)
        turned = _turned(cotangent)
        products = of_windows(lambda window: _product_of_turned(turned, window).T, images, cotangent, geometry)
    else:
        products = of_windows(lambda window: _product_over_pixels(window, cotangent), images, cotangent, geometry)
    return jnp.stack(products).reshape(*geometry.kernel_size, *products[0].shape).astype(images.dtype)


# The products of a dense or grouped convolution as convolutions in the order of dimensions for which XLA's CPU compiler has
# fast code. It brings others into this order itself, but only in a program's entry: in the branch of a conditional, or in a
# scan, those that JAX makes become a plain loop.


def ordered_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _ordered_convolution(images, kernel, geometry.stride, geometry.padding, geometry.groups)


def ordered_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    height, width, channels, filters = kernel.shape
    groups = geometry.groups
    split = kernel[::-1, ::-1].reshape(height, width, channels, groups, filters // groups)
    turned = split.transpose((0, 1, 4, 3, 2)).reshape(height, width, filters // groups, groups * channels)
    around = []
    for size, outputs, taps, stride, (low, _) in geometry.sides:
        before = taps - 1 - low
        around.append((before, size - (outputs - 1) * stride - 1 + taps - 1 - before))
    return _ordered_convolution(cotangent, turned, (1, 1), around, groups, geometry.stride)


def ordered_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Of a dense convolution: channels take the place of the batch, and the batch that of channels."""
    sides = geometry.sides
    around = [(low, taps + (outputs - 1) * stride - size - low) for size, outputs, taps, stride, (low, _) in sides]
    images, cotangent = images.transpose((3, 1, 2, 0)), cotangent.transpose((1, 2, 0, 3))
    return lax.conv_general_dilated(
        images, cotangent, (1, 1), around, rhs_dilation=geometry.stride, dimension_numbers=NHWC
    ).transpose((1, 2, 0, 3))


def _ordered_convolution(
    images: Array, kernel: Array, stride: Pair, padding: Sequence[Pair], groups: int, between: Pair = (1, 1)
) -> Array:
    """In the dtype of sums, with `between - 1` zeros between the pixels of the images.

    YNNPACK shares out filters times columns among threads, and nothing else: with 64 filters a second thread has work from
    112 columns on. So all images are laid side by side: 56x56x64, 3x3, JAX 0.10.2, 19 to 9.5 (0.12.0.1 shares this out
    itself: 10.8 and 11.8).
    """
    batch, height, width, filters = *images.shape[:3], kernel.shape[3]
    low, high = padding[1]
    small = FEWEST_SHARED <= filters < MOST_SHARED and width * filters < SHARED_COLUMNS
    if not small or stride != (1, 1) or between != (1, 1) or groups > 1 or batch < 2 or min(low, high) < 0:
        return lax.conv_general_dilated(
            images,
            kernel,
            stride,
            padding,
            lhs_dilation=between,
            dimension_numbers=NHWC,
            feature_group_count=groups,
            preferred_element_type=sum_dtype(images),
        )
    columns, seen = width + low + high, kernel.shape[1]
    row = pad(images, ((0, 0), (low, high))).transpose((1, 0, 2, 3)).reshape(1, height, batch * columns, images.shape[3])
    row = lax.conv_general_dilated(
        row,
        kernel,
        (1, 1),
        (padding[0], (0, seen - 1)),
        dimension_numbers=NHWC,
        preferred_element_type=sum_dtype(images),
    )
    split = row.reshape(row.shape[1], batch, columns, filters)  # what spans two images is cut off
    return split[:, :, : columns - seen + 1].transpose((1, 0, 2, 3))


def apart_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """`by_images_to_kernel`, below 32 channels or filters `ordered_to_kernel`, in a conditional, which fusion does not cross.

    Outside of one XLA computes the images anew where it transposes them, each number by itself: in a residual network the sums
    of all blocks before. ResNet-110, batch 128, JAX 0.10.2: 2,960 ms a step, of which 63 % were such transposes, and 1,650 so.
    """
    shape = (*geometry.kernel_size, images.shape[3], cotangent.shape[3])
    runs = ordered_to_kernel if min(shape[2:]) < FEWEST_BY_IMAGES else by_images_to_kernel
    if not cotangent.size:
        return runs(images, cotangent, geometry)

    def undefined(images, cotangent):
        return jnp.full_like(cotangent, jnp.nan, shape=shape)

    return lax.cond(cotangent[0, 0, 0, 0] < jnp.inf, partial(runs, geometry=geometry), undefined, images, cotangent)


def by_images_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """For each tap a product for each image, or part of one, which are summed: threads share them out, and the kernel is small.

    The ordered convolution and so (JAX 0.10.2, batch of the last two 128): 56x56x64 28 to 20, bfloat16 28 to 15 (0.12.0.1: 20
    to 23, 18 to 12); 112x112x64 222 to 78, and 232 to 61; 8x8x64 5.0 to 2.3; 16x16x32 6.2 to 3.6. By taps 33 and 27, 132 and
    126, 5.0, 4.4. With more channels the sums of the products cost more than they gain: 14x14x256 36, by taps 13.
    """
    (height, width), channels, filters = geometry.output_size, images.shape[3], cotangent.shape[3]
    rows = max(rows for rows in range(1, height + 1) if height % rows == 0 and (rows == 1 or rows * width <= PIXELS_TOGETHER))
    parts = images.shape[0] * height // rows
    turned = _turned_images(cotangent.reshape(parts, rows, width, filters)).reshape(parts, filters, rows * width)

    def product(window: Array) -> Array:
        pixels = window.reshape(parts, rows * width, channels)
        dimensions = (((2,), (1,)), ((0,), (0,)))
        return lax.dot_general(turned, pixels, dimensions, preferred_element_type=sum_dtype(images)).sum(axis=0).T

    sums = jnp.stack(of_windows(product, images, cotangent, geometry))
    return sums.reshape(*geometry.kernel_size, channels, filters).astype(images.dtype)


def _product_over_pixels(images: Array, cotangent: Array) -> Array:
    """[channels, filters], in the dtype of sums.

    Over the pixels in one dimension, not over batch, height and width: float32, 56x56, 24 to 144, two cores of a Xeon: 1.8 /
    2.0 for 3.9 / 4.3. XLA has its library (YNNPACK) for products whose left factor is summed along its rows; a sum down the
    columns of both it leaves to Eigen, for which it first widens bfloat16. So in bfloat16 the factor with fewer channels is
    turned, or the images where the kernel is larger than they are. As they are and so, JAX 0.10.2: 14x14, 1024 to 256: 8.4
    to 2.8; 28x28, 512 to 128: 9.8 to 3.3; 240 to 40: 2.5 to 1.2; 56x56, 64 to 256: 10.9 to 7.6; 112x112, 16 to 96: 8.7 to
    7.2; 7x7, 160 to 960: 0.84 to 0.58; a step of ResNet-50 1.19 to 1.03 s. In float32, alone, 8.0 to 4.3, 8.4 to 6.1, but 3.5
    to 5.1 at 112x112; ResNet-50 1.50 to 1.54 s.
    """
    if not is_narrow(images):
        return _wide_product(flat(cotangent), flat(images), (0,), (0,)).T
    pixels, channels, filters = math.prod(images.shape[:3]), images.shape[3], cotangent.shape[3]
    if pixels * channels <= pixels * filters + 2 * channels * filters:  # else the product is turned, for the optimizer to read
        return _product_of_turned(_turned(images), cotangent)
    return _product_of_turned(_turned(cotangent), images).T


def _product_of_turned(turned: Array, right: Array) -> Array:
    """[rows of `turned`, channels of `right`].

    The barrier: a transpose of the result would otherwise become a product of transposes, which in bfloat16 JAX 0.10.2
    compiles and then cannot run ("Unsupported element type for DotThunk").
    """
    return lax.optimization_barrier(_wide_product(turned, flat(right), (1,), (0,)))


def _turned(x: Array) -> Array:
    """`[channels, pixels]` of `[batch, height, width, channels]` in 16 bits, stored in this order.

    First image by image, whose lines stay in a cache until all channels have been read from them: 50176 pixels of 256
    channels take 18 at once and 11 so. Barriers keep XLA from undoing both; as integers, for of bfloat16 it would make float32
    at a barrier. In four dimensions and reshaped after: XLA holds what comes from a transpose to be stored by columns.
    """
    bits = lax.bitcast_convert_type(_turned_images(x), jnp.uint16)
    bits = lax.optimization_barrier(bits.transpose((1, 0, 2, 3)))
    return lax.bitcast_convert_type(bits, x.dtype).reshape(x.shape[3], -1)


def _turned_images(x: Array) -> Array:
    """`[batch, channels, height, width]` of `[batch, height, width, channels]`, stored in this order."""
    if not is_narrow(x):
        return lax.optimization_barrier(x.transpose((0, 3, 1, 2)))
    bits = lax.bitcast_convert_type(x, jnp.uint16)
    return lax.bitcast_convert_type(lax.optimization_barrier(bits.transpose((0, 3, 1, 2))), x.dtype)


def _wide_product(left: Array, right: Array, left_axes: tuple[int, ...], right_axes: tuple[int, ...]) -> Array:
    """The product summed over these axes, in the dtype of sums: float32 for narrower operands."""
    return lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=sum_dtype(left))
