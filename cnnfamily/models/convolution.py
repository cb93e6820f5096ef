"""The convolution that every layer calls, and what runs in its place on a CPU.

XLA's CPU compiler is slow at two kinds of convolution of which the mobile families are made: depthwise ones (the filter
gradient it expands to a dense channels x channels convolution) and the filter gradient of 1x1 ones. It also is at the
filter gradient of grouped ones and of those with many or few channels, at both gradients with a stride, at all in
bfloat16 or with 64 filters, and at maps with fewer pixels than the kernel has taps, which small images leave at the end
of a deep network. A convolution is bilinear, so each kind is written here as three products,

    output(images, kernel)    to_images(cotangent, kernel)    to_kernel(images, cotangent)

the second and third being the gradients of the first. The gradients of each of the three are the other two, so
derivatives of any order stay among them. Each product is chosen at lowering: the form in `cpu_forms` or `cpu_depthwise` (or
`onednn_forms`, in training that asks for it), or the plain convolution and its transposes on every other platform. The
choice stands inside the differentiation rules because the gradient of a conditional would keep the residuals of both
branches.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from cnnfamily.models import cpu_depthwise, onednn_forms
from cnnfamily.models import cpu_forms as cpu
from cnnfamily.models.geometry import NHWC, Geometry, Pair, sum_dtype
from cnnfamily.models.initializers import outputs_are_read

KEPT = "convolution"  # under this name a policy of `jax.checkpoint` finds every output
# (product, kind): its form on every other platform in place of the plain one, for experiments/speed/candidates.py to measure.
ELSEWHERE: dict[tuple[str, str], Callable] = {}
MOST_TAPS = 49  # of those that become a product a tap: for the 256 of a 16x16 kernel that compiles for five seconds
# Of a dense convolution, the fewest channels, in or out, and of the last kind channels times filters, with which
# products a tap win; the measurements are in `cpu_forms`. And the fewest with which its kernel's gradient stands apart.
FEWEST_HALVED, FEWEST_STRIDED, FEWEST_WIDE, FEWEST_DENSE = 96, 16, 64 * 128, 16
# Of a convolution of few channels (`cpu.MOST_FEW`), as at the start of a network: of taps times channels the most that are
# put side by side for the kernel's gradient and, with a stride, for the output.
MOST_IN_A_PATCH, MOST_IN_AN_OUTPUT = 160, 32


def convolution(
    images: Array,
    kernel: Array,
    *,
    stride: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
    groups: int = 1,
    rounded: bool = True,
) -> Array:
    """Convolves images [batch, height, width, channels] with a kernel [height, width, channels / groups, filters].

    Returns [batch, (height + low + high - kernel height) // stride + 1, likewise the width, filters] in the dtype of
    `images`, equal to `lax.conv_general_dilated` with NHWC and HWIO up to the order of summation; below 32 bits the
    sums are kept in float32, and without `rounded` returned in it (on a CPU as they are, elsewhere rounded before).
    `padding` is ((top, bottom), (left, right)), none negative; the dtype is a float.

    Differentiable by reverse mode to any order; forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) raises TypeError for
    most: grouped and 1x1 kernels, 16 channels or more in and out, up to 4 in and 32 or more out, maps smaller than the kernel,
    and all that is not rounded.
    Shapes or dtypes that disagree raise what `lax.conv_general_dilated` does.
    """
    rows, padding_rows = _live_taps(images.shape[1], kernel.shape[0], stride[0], padding[0])
    columns, padding_columns = _live_taps(images.shape[2], kernel.shape[1], stride[1], padding[1])
    kernel = kernel[rows, columns]
    geometry = Geometry(images.shape[1:3], kernel.shape[:2], tuple(stride), (padding_rows, padding_columns), groups)
    kind, rounded = _kind(images, kernel, geometry), rounded or sum_dtype(images) == images.dtype
    plain = kind == "plain" and rounded and not _IN_A_BRANCH.get()
    if min(geometry.output_size) <= 0 or plain or not outputs_are_read():
        output = _plain_output(images, kernel, geometry).astype(images.dtype if rounded else sum_dtype(images))
    else:
        output = _output(*_vary_alike(images, kernel), geometry._replace(kind=kind, rounded=rounded))
    return checkpoint_name(output, KEPT) if rounded else output  # else who rounds names what is kept


def matrix_product(x: Array, kernel: Array) -> Array:
    """x `[..., inputs]` times a kernel `[inputs, units]`; below 32 bits in float32, not rounded, and without forward mode.

    There it is a convolution of one pixel, for a CPU: of `@` with a narrow result XLA's compiler widens the operands, and the
    optimizer reads the gradient of the kernel across its rows. A step of AlexNet in bfloat16, batch 16: 535 ms with `@`, 228
    so, and 260 in float32 (two Zen 5 cores, JAX 0.10.2).
    """
    if sum_dtype(x) == x.dtype:
        return x @ kernel
    pixels = x.reshape(-1, 1, 1, x.shape[-1])
    return convolution(pixels, kernel[None, None], rounded=False).reshape(*x.shape[:-1], kernel.shape[1])


_IN_A_BRANCH = contextvars.ContextVar("in_a_branch", default=False)


@contextlib.contextmanager
def in_a_branch() -> Iterator[None]:
    """For what is traced into the branch of a conditional: there no gradient is left to JAX, whose own are slow on a CPU.

    So forward mode raises for every convolution.
    """
    before = _IN_A_BRANCH.set(True)
    try:
        yield
    finally:
        _IN_A_BRANCH.reset(before)


def _kind(images: Array, kernel: Array, geometry: Geometry) -> str:
    """Which of the forms below a convolution takes on a CPU; "plain" too where it is an error, or nothing comes out."""
    agree = images.dtype == kernel.dtype and images.shape[3] == kernel.shape[2] * geometry.groups
    if not agree or kernel.shape[3] % geometry.groups or min(geometry.output_size) <= 0:
        return "plain"
    if onednn_forms.applies(images, kernel, geometry):
        return "onednn"
    if geometry.groups > 1:
        return "depthwise" if geometry.groups == images.shape[3] == kernel.shape[3] else "grouped"
    if geometry.is_pointwise:
        return "pointwise"
    pixels, taps = min(math.prod(geometry.image_size), math.prod(geometry.output_size)), math.prod(geometry.kernel_size)
    if taps > MOST_TAPS:
        return "plain"
    channels, weights = min(kernel.shape[2:]), math.prod(kernel.shape[2:])
    in_a_patch = taps * kernel.shape[2]
    if jnp.finfo(images.dtype).bits < 32 and channels >= FEWEST_HALVED:
        return "halved"
    if pixels < taps:
        return "tiny"
    if max(geometry.stride) > 1 and channels >= FEWEST_STRIDED:
        return "strided"
    if kernel.shape[2] <= cpu.MOST_FEW and kernel.shape[3] >= cpu.FEWEST_PATCHED and in_a_patch <= MOST_IN_A_PATCH:
        return "patches" if max(geometry.stride) > 1 and in_a_patch <= MOST_IN_AN_OUTPUT else "few"
    if weights >= FEWEST_WIDE:
        return "wide"
    return "dense" if channels >= FEWEST_DENSE else "plain"


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

    A product with the other's 1 does so by public means on every JAX version, and XLA folds it. To trace it takes time all the
    same, so where both vary alike, as they do outside of that, it is left out.
    """

    def varying(x):
        return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", None)

    def one_of(x, dtype):
        # Of an array that is not traced, ones_like would take over the sharding, which a scalar cannot have.
        return jnp.ones_like(x, dtype, ()) if isinstance(x, jax.core.Tracer) else jnp.ones((), dtype)

    if varying(images) == varying(kernel) is not None:
        return images, kernel
    return images * one_of(kernel, images.dtype), kernel * one_of(images, kernel.dtype)


def _plain_output(images: Array, kernel: Array, geometry: Geometry) -> Array:
    if geometry.kind == "pointwise" and geometry.image_size == (1, 1):  # of a linear layer, which is no convolution elsewhere
        return lax.dot_general(images, kernel[0, 0], (((3,), (0,)), ((), ())))
    return lax.conv_general_dilated(
        images,
        kernel,
        geometry.stride,
        geometry.padding,
        dimension_numbers=NHWC,
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


# The choice, and the gradients of each product in terms of the other two.


def _product(which: str, default: Callable, /, **on_cpu: Callable) -> jax.custom_vjp:
    @partial(jax.jit, static_argnums=2)  # a shape that repeats, as most blocks of a network do, is traced once
    def product(left: Array, right: Array, geometry: Geometry) -> Array:
        here = on_cpu.get(geometry.kind, default)
        there = ELSEWHERE.get((which, geometry.kind), default)
        dtype = left.dtype if geometry.rounded else sum_dtype(left)

        def form(compute: Callable) -> Callable:
            return lambda left, right: compute(left, right, geometry).astype(dtype)

        return lax.platform_dependent(left, right, cpu=form(here), default=form(there))

    return jax.custom_vjp(product, nondiff_argnums=(2,))


_output = _product(
    "output",
    _plain_output,
    onednn=onednn_forms.output,
    depthwise=cpu_depthwise.depthwise_output,
    pointwise=cpu.pointwise_output,
    patches=cpu.patches_output,
    plain=cpu.ordered_output,
    few=cpu.ordered_output,
    dense=cpu.ordered_output,
    wide=cpu.ordered_output,
    strided=cpu.ordered_output,
    grouped=cpu.ordered_output,
    tiny=cpu.by_taps_output,
    halved=cpu.by_taps_output,
)
_to_images = _product(
    "to_images",
    _plain_to_images,
    onednn=onednn_forms.to_images,
    plain=cpu.ordered_to_images,
    patches=cpu.ordered_to_images,
    few=cpu.ordered_to_images,
    dense=cpu.ordered_to_images,
    grouped=cpu.ordered_to_images,
    wide=cpu.ordered_to_images,
    depthwise=cpu_depthwise.depthwise_to_images,
    pointwise=cpu.pointwise_to_images,
    tiny=cpu.by_taps_to_images,
    halved=cpu.by_taps_to_images,
    strided=cpu.by_taps_to_images,
)
_to_kernel = _product(
    "to_kernel",
    _plain_to_kernel,
    onednn=onednn_forms.to_kernel,
    plain=cpu.ordered_to_kernel,
    dense=cpu.apart_to_kernel,
    tiny=cpu.ordered_to_kernel,
    depthwise=cpu_depthwise.depthwise_to_kernel,
    pointwise=cpu.pointwise_to_kernel,
    patches=cpu.patches_to_kernel,
    few=cpu.patches_to_kernel,
    grouped=cpu.grouped_to_kernel,
    halved=cpu.by_taps_to_kernel,
    strided=cpu.by_taps_to_kernel,
    wide=cpu.by_taps_to_kernel,
)


def _output_gradients(geometry: Geometry, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    (images, kernel), geometry = operands, geometry._replace(rounded=True)
    cotangent = cotangent.astype(images.dtype)
    return _to_images(cotangent, kernel, geometry), _to_kernel(images, cotangent, geometry)


_output.defvjp(
    lambda images, kernel, geometry: (_output(images, kernel, geometry), (images, kernel)),
    _output_gradients,
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
