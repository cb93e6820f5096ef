"""The convolution that every layer calls, and what runs in its place on a CPU.

XLA's CPU compiler is slow at two kinds of convolution of which the mobile families are made: depthwise ones (the filter
gradient it expands to a dense channels x channels convolution) and the filter gradient of 1x1 ones. It also is at the
filter gradient of grouped ones, and at maps with fewer pixels than the kernel has taps, which small images leave at the
end of a deep network. A convolution is bilinear, so each kind is written here as three products,

    output(images, kernel)    to_images(cotangent, kernel)    to_kernel(images, cotangent)

the second and third being the gradients of the first. The gradients of each of the three are the other two, so
derivatives of any order stay among them. Each product is chosen at lowering: the CPU form below, or the plain
convolution and its transposes on every other platform. The choice stands inside the differentiation rules because
the gradient of a conditional would keep the residuals of both branches.

Times in this file: milliseconds, float32, batch 16, two Zen 5 cores, JAX 0.10.2 / 0.12.0.1, medians of 5 to 7. In all,
14x14x480 3x3: forward 32 / 24 plain, 1.4 / 1.3 here; with both gradients 138 / 104 plain, 5.5 / 6.0 here.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Pair = tuple[int, int]
MOST_TAPS = 49  # of a tiny convolution: a product for each of the 256 of a 16x16 kernel compiles for five seconds


class Geometry(NamedTuple):
    """What is static about one convolution, the batch left out; height before width."""

    image_size: Pair
    kernel_size: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    groups: int
    kind: str = "plain"

    @property
    def output_size(self) -> Pair:
        sides = zip(self.image_size, self.kernel_size, self.stride, self.padding, strict=True)
        return tuple((size + sum(padding) - taps) // stride + 1 for size, taps, stride, padding in sides)


def convolution(
    images: Array,
    kernel: Array,
    *,
    stride: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> Array:
    """Convolves images [batch, height, width, channels] with a kernel [height, width, channels / groups, filters].

    Returns [batch, (height + low + high - kernel height) // stride + 1, likewise the width, filters] in the dtype of
    `images`, equal to `lax.conv_general_dilated` with NHWC and HWIO up to the order of summation; below 32 bits the
    sums are kept in float32. `padding` is ((top, bottom), (left, right)), none negative; the dtype is a float.

    Differentiable by reverse mode to any order; forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) raises
    TypeError for grouped and 1x1 kernels and for maps with fewer pixels than the kernel has taps. Shapes or dtypes
    that disagree raise what `lax.conv_general_dilated` does.
    """
    rows, padding_rows = _live_taps(images.shape[1], kernel.shape[0], stride[0], padding[0])
    columns, padding_columns = _live_taps(images.shape[2], kernel.shape[1], stride[1], padding[1])
    kernel = kernel[rows, columns]
    geometry = Geometry(images.shape[1:3], kernel.shape[:2], tuple(stride), (padding_rows, padding_columns), groups)
    kind = _kind(images, kernel, geometry)
    if kind == "plain":
        return _plain_output(images, kernel, geometry)
    return _output(*_vary_alike(images, kernel), geometry._replace(kind=kind))


def _kind(images: Array, kernel: Array, geometry: Geometry) -> str:
    """Which of the forms below a convolution takes on a CPU; "plain" too where it is an error, or nothing comes out."""
    agree = images.dtype == kernel.dtype and images.shape[3] == kernel.shape[2] * geometry.groups
    if not agree or kernel.shape[3] % geometry.groups or min(geometry.output_size) <= 0:
        return "plain"
    if geometry.groups > 1:
        return "depthwise" if geometry.groups == images.shape[3] == kernel.shape[3] else "grouped"
    if geometry.kernel_size == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return "pointwise"
    pixels, taps = min(math.prod(geometry.image_size), math.prod(geometry.output_size)), math.prod(geometry.kernel_size)
    return "tiny" if pixels < taps <= MOST_TAPS else "plain"


def _live_taps(size: int, taps: int, stride: int, padding: Pair) -> tuple[slice, Pair]:
    """The taps of one dimension that see an image at all, and the padding that remains for a kernel of only those.

    A 5-tap kernel on a map of one pixel multiplies 24 zeros in 25. This also turns the 3x3 convolutions of a dense
    network whose map has shrunk to one pixel into matrix products.
    """
    low, high = padding
    outputs = (size + low + high - taps) // stride + 1
    live = [tap for tap in range(taps) if any(0 <= o * stride + tap - low < size for o in range(outputs))]
    if not live or len(range(live[0], live[-1] + 1)) == taps:
        return slice(0, taps), (low, high)
    first, last = live[0], live[-1]
    return slice(first, last + 1), (low - first, (outputs - 1) * stride + last + 1 - low - size)


def _vary_alike(images: Array, kernel: Array) -> tuple[Array, Array]:
    """Casts both to vary over the same manual axes, without which `shard_map(check_vma=True)` refuses the gradients.

    A product with the other's 1 does so by public means on every JAX version, and XLA folds it.
    """

    def one_of(x, dtype):
        # Of an array that is not traced, ones_like would take over the sharding, which a scalar cannot have.
        return jnp.ones_like(x, dtype, ()) if isinstance(x, jax.core.Tracer) else jnp.ones((), dtype)

    return images * one_of(kernel, images.dtype), kernel * one_of(images, kernel.dtype)


def _plain_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        geometry.stride,
        geometry.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )


def _plain_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    shape = (cotangent.shape[0], *geometry.image_size, kernel.shape[2] * geometry.groups)
    images = jnp.zeros_like(cotangent, shape=shape)
    return jax.vjp(lambda images: _plain_output(images, kernel, geometry), images)[1](cotangent)[0]


def _plain_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    shape = (*geometry.kernel_size, images.shape[3] // geometry.groups, cotangent.shape[3])
    kernel = jnp.zeros_like(images, shape=shape)
    return jax.vjp(lambda kernel: _plain_output(images, kernel, geometry), kernel)[1](cotangent)[0]


# On a CPU, depthwise: shifted multiply-adds, which XLA fuses into a single loop over the padded map. To pad each
# product instead of the images is faster for a 3x3 alone (0.29 for 0.80 at 28x28x240, stride 2), but not between
# batch norm and SiLU.


def _depthwise_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _multiply_add(images, kernel[:, :, 0], geometry.stride, geometry.padding)


def _depthwise_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    """Each of the stride x stride phases of the map is a correlation of stride 1 with the taps that reach it.

    A cotangent dilated with zeros takes three times as long: 9.2 for 2.9 at 56x56x144, 5x5, stride 2.
    """
    (height, width), (row_stride, column_stride) = geometry.image_size, geometry.stride
    rows, columns = -(-height // row_stride), -(-width // column_stride)

    def phase(row, column):
        row_taps, row_padding = _phase(row, 0, rows, cotangent.shape[1], geometry)
        column_taps, column_padding = _phase(column, 1, columns, cotangent.shape[2], geometry)
        flipped = kernel[row_taps, column_taps, 0][::-1, ::-1]
        return _multiply_add(cotangent, flipped, (1, 1), (row_padding, column_padding))

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


def _depthwise_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """One reduction with an operand for each tap, so that all sums grow together in one pass over the map.

    A reduction for each tap takes 79 for 7.7 at 28x28x240, 5x5. The batch is left to a second sum: 17 without.
    """
    dtype = _sum_dtype(images)
    zero = jnp.zeros((), dtype)
    padded = _pad(images, geometry.padding)
    outputs = cotangent.shape[1:3]
    products = [
        window.astype(dtype) * cotangent.astype(dtype)
        for window in _windows(padded, geometry.kernel_size, geometry.stride, outputs)
    ]
    sums = lax.reduce(products, [zero] * len(products), lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1, 2))
    kernel = jnp.stack(sums).sum(1).astype(images.dtype)
    return kernel.reshape(*geometry.kernel_size, 1, -1)


def _multiply_add(images: Array, kernel: Array, stride: Pair, padding: tuple[Pair, Pair]) -> Array:
    """The depthwise correlation with a kernel [height, width, channels]."""
    dtype = _sum_dtype(images)
    padded = _pad(images, padding)
    outputs = tuple((padded.shape[1 + axis] - kernel.shape[axis]) // stride[axis] + 1 for axis in (0, 1))
    total = jnp.zeros((images.shape[0], *outputs, images.shape[3]), dtype)
    taps = kernel.astype(dtype).reshape(-1, 1, 1, 1, kernel.shape[2])
    for tap, window in enumerate(_windows(padded, kernel.shape[:2], stride, outputs)):
        total += window.astype(dtype) * taps[tap]
    return total.astype(images.dtype)


def _windows(padded: Array, kernel_size: Pair, stride: Pair, outputs: Pair) -> list[Array]:
    """For each tap, in row-major order, the pixels that it multiplies: [batch, *outputs, channels]."""
    batch, channels = padded.shape[0], padded.shape[3]
    last = [(count - 1) * step + 1 for count, step in zip(outputs, stride, strict=True)]
    return [
        lax.slice(padded, (0, r, c, 0), (batch, r + last[0], c + last[1], channels), (1, *stride, 1))
        for r in range(kernel_size[0])
        for c in range(kernel_size[1])
    ]


def _pad(images: Array, padding: tuple[Pair, Pair]) -> Array:
    """Pads the two sides of height and width; a negative padding cuts off."""
    return lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0)))


def _sum_dtype(images: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if jnp.finfo(images.dtype).bits < 32 else images.dtype


# On a CPU, 1x1: matrix products over the pixels that the stride leaves. The kernel's gradient gains most, 45 to 10 /
# 57 to 13 at 14x14x1024 to 256; the others are equal or better, 12 to 8.7 / 11.3 to 10.9. bfloat16 operands with a
# float32 result: 4.7 / 5.1, with a bfloat16 one 9.7 / 7.7.


def _pointwise_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    return _product_over(_strided(images, geometry.stride), kernel[0, 0], (3,), (0,))


def _pointwise_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    images = _product_over(cotangent, kernel[0, 0], (3,), (1,))
    spread = [  # zeros between the pixels, and after the last one where the stride left some over
        (0, size - (count - 1) * step - 1, step - 1)
        for size, count, step in zip(geometry.image_size, cotangent.shape[1:3], geometry.stride, strict=True)
    ]
    return lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *spread, (0, 0, 0)))


def _pointwise_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    return _product_over(_strided(images, geometry.stride), cotangent, (0, 1, 2), (0, 1, 2))[None, None]


# On a CPU, between dense and depthwise (ResNeXt): the kernel's gradient, which XLA expands to a dense one, as a batched product
# for each tap. 14x14x512 in 32 groups: 2754 to 29 (JAX 0.10.2).


def _grouped_to_kernel(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:3], geometry.groups, x.shape[3] // geometry.groups)

    shape = (*geometry.kernel_size, images.shape[3] // geometry.groups, cotangent.shape[3])
    padded, cotangent = _pad(images, geometry.padding), split(cotangent)
    products = [
        jnp.einsum("nhwgi,nhwgo->igo", split(window), cotangent, preferred_element_type=_sum_dtype(images))
        for window in _windows(padded, geometry.kernel_size, geometry.stride, geometry.output_size)
    ]
    return jnp.stack(products).reshape(shape).astype(images.dtype)


# On a CPU, tiny maps, with fewer pixels in images or outputs than the kernel has taps: a matrix product for each tap.
# XLA has a plain loop for them: the 3x3 convolution of 2x2x512, batch 64, takes 403, here 3.6, and the gradient of its
# images 409 for 4.2 (JAX 0.10.2). That of the kernel is fast as it stands.


def _tiny_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    padded = _pad(images, geometry.padding)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    windows = _windows(padded, geometry.kernel_size, geometry.stride, geometry.output_size)
    products = [
        lax.dot_general(window, tap, (((3,), (0,)), ((), ())), preferred_element_type=_sum_dtype(images))
        for window, tap in zip(windows, taps, strict=True)
    ]
    return sum(products).astype(images.dtype)


def _tiny_to_images(cotangent: Array, kernel: Array, geometry: Geometry) -> Array:
    """The transpose sums over taps in the dtype of the images, so that is the wider one here."""
    dtype = _sum_dtype(cotangent)
    images = jnp.zeros_like(cotangent, dtype, (cotangent.shape[0], *geometry.image_size, kernel.shape[2]))
    transpose = jax.vjp(lambda images: _tiny_output(images, kernel.astype(dtype), geometry), images)[1]
    return transpose(cotangent.astype(dtype))[0].astype(cotangent.dtype)


def _strided(images: Array, stride: Pair) -> Array:
    return lax.slice(images, (0, 0, 0, 0), images.shape, (1, *stride, 1))


def _product_over(left: Array, right: Array, left_axes: tuple[int, ...], right_axes: tuple[int, ...]) -> Array:
    product = lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=_sum_dtype(left))
    return product.astype(left.dtype)


# The choice, and the gradients of each product in terms of the other two.


def _product(elsewhere: Callable, **on_cpu: Callable) -> jax.custom_vjp:
    @partial(jax.jit, static_argnums=2)  # a shape that repeats, as most blocks of a network do, is traced once
    def product(left: Array, right: Array, geometry: Geometry) -> Array:
        here = on_cpu.get(geometry.kind, elsewhere)
        return lax.platform_dependent(
            left, right, cpu=partial(here, geometry=geometry), default=partial(elsewhere, geometry=geometry)
        )

    return jax.custom_vjp(product, nondiff_argnums=(2,))


_output = _product(_plain_output, depthwise=_depthwise_output, pointwise=_pointwise_output, tiny=_tiny_output)
_to_images = _product(_plain_to_images, depthwise=_depthwise_to_images, pointwise=_pointwise_to_images, tiny=_tiny_to_images)
_to_kernel = _product(
    _plain_to_kernel, depthwise=_depthwise_to_kernel, pointwise=_pointwise_to_kernel, grouped=_grouped_to_kernel
)

_output.defvjp(
    lambda images, kernel, geometry: (_output(images, kernel, geometry), (images, kernel)),
    lambda geometry, operands, cotangent: (
        _to_images(cotangent, operands[1], geometry),
        _to_kernel(operands[0], cotangent, geometry),
    ),
)
_to_images.defvjp(
    lambda cotangent, kernel, geometry: (_to_images(cotangent, kernel, geometry), (cotangent, kernel)),
    lambda geometry, operands, images: (
        _output(images, operands[1], geometry),
        _to_kernel(images, operands[0], geometry),
    ),
)
_to_kernel.defvjp(
    lambda images, cotangent, geometry: (_to_kernel(images, cotangent, geometry), (images, cotangent)),
    lambda geometry, operands, kernel: (
        _to_images(operands[1], kernel, geometry),
        _output(operands[0], kernel, geometry),
    ),
)
