"""Layers that the families share. A network binds dtype, normalisation and padding once and hands them to its blocks.

Parameters and batch statistics are float32 (float64 where `dtype` is float64); `dtype` is the arithmetic between them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from cnnfamily import rng
from cnnfamily.errors import UsageError, unknown
from cnnfamily.models import initializers, onednn
from cnnfamily.models.batch_norm import BatchNorm, parameter_dtype_of
from cnnfamily.models.convolution import KEPT, convolution, matrix_product
from cnnfamily.models.geometry import Geometry, is_narrow
from cnnfamily.models.initializers import parameter

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "gelu": partial(nn.gelu, approximate=False),
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "hard_sigmoid": nn.hard_sigmoid,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "identity": lambda x: x,
}


def choose(kind: str, name: str, choices: dict | Sequence[str]):
    """`choices[name]`, or the name itself from a sequence; a `UsageError` naming the nearest for one that does not exist."""
    if name not in choices:
        raise unknown(kind, name, choices)
    return choices[name] if isinstance(choices, dict) else name


def check_images(images: jax.Array, in_channels: int, smallest: int) -> None:
    """Refuses a batch of another rank or channel count, or with sides below `smallest` pixels."""
    if images.ndim != 4 or images.shape[-1] != in_channels:
        raise UsageError(
            f"images of shape {tuple(images.shape)}: expected [batch, height, width, {in_channels}]; "
            f"field in_channels sets another number of channels"
        )
    if min(images.shape[1:3]) < smallest:
        raise UsageError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels are smaller than this network can take: "
            f"expected {smallest} x {smallest} or more (data.resolution)"
        )


class Conv(nn.Module):
    """Convolution of `[batch, height, width, channels]` with a square HWIO kernel.

    `padding` is "symmetric" (torch: (kernel - 1) // 2 on each side), "same" (TensorFlow: the smallest that gives
    ceil(size / stride), the odd pixel at the far end) or "valid"; the first two differ where the stride is 2.
    """

    filters: int
    kernel: int
    stride: int = 1
    padding: str = "symmetric"
    groups: int = 1
    bias: bool = False
    kernel_init: Callable | None = None
    bias_init: Callable = initializers.zeros
    rounded: bool = True  # to `dtype`; else the dtype of sums, for what follows to round
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        channels, parameter_dtype = x.shape[-1], parameter_dtype_of(self.dtype)
        shape = (self.kernel, self.kernel, channels // self.groups, self.filters)
        kernel = parameter(self, "kernel", self.kernel_init or initializers.he_fan_out(self.groups), shape, parameter_dtype)
        if choose("padding", self.padding, ("symmetric", "same", "valid")) == "symmetric":
            padding = ((self.kernel - 1) // 2,) * 2, ((self.kernel - 1) // 2,) * 2
        else:
            padding = lax.padtype_to_pads(x.shape[1:3], shape[:2], (self.stride,) * 2, self.padding.upper())
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding, stride = tuple(tuple(pair) for pair in padding), (self.stride,) * 2
        bias = parameter(self, "bias", self.bias_init, (self.filters,), parameter_dtype) if self.bias else None
        geometry = Geometry(x.shape[1:3], shape[:2], stride, padding, self.groups)
        if onednn.applies(x, kernel, geometry):
            pending = onednn.Pending(x, kernel, bias, geometry)
            return pending.output() if self.rounded or not self.bias else pending
        rounded = self.rounded and not self.bias
        y = convolution(x, kernel, stride=stride, padding=padding, groups=self.groups, rounded=rounded)
        if self.bias:
            y = y + bias
        return checkpoint_name(y.astype(self.dtype), KEPT) if self.rounded and self.bias else y


class Linear(nn.Module):
    """Affine map of `[..., inputs]` to `[..., units]`, linear without `bias`."""

    units: int
    kernel_init: Callable = initializers.uniform_fan_out
    bias_init: Callable = initializers.zeros
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        parameter_dtype = parameter_dtype_of(self.dtype)
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.units), parameter_dtype)
        y = matrix_product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias:
            y = y + parameter(self, "bias", self.bias_init, (self.units,), parameter_dtype)
        return y.astype(self.dtype)


def logits(x: jax.Array) -> jax.Array:
    """Class scores leave the network in float32 (float64 where it computes in that)."""
    return x.astype(parameter_dtype_of(x.dtype))


def conv_and_norm(network: nn.Module, train: bool) -> tuple[Callable, Callable]:
    """The convolution and the batch norm of a network, with its padding, dtype, statistics and switches bound.

    `conv(filters, kernel, stride, ...)` is a `Conv`, with a bias where the network has no batch norm. `norm(activation, ...)`
    is a `BatchNorm` and an activation (default: none), in the order of `network.norm_place`; the activation alone where
    `network.batch_norm` is False. Both map `[batch, height, width, channels]`. In evaluation `conv` leaves the rounding to
    `norm`, which has to follow; not with `network.preactivation`, where a sum may follow. `norm(..., rounded=False)` leaves it
    to what follows in turn, a sum or squeeze-and-excitation; in training all is rounded. By oneDNN what stands between
    them may be an `onednn.Pending` instead of an array.

    Raises:
      UsageError: an unknown `norm_place`, or `zero_init_last` without a norm.
    """
    before = choose("norm_place", network.norm_place, ("before", "after")) == "before"
    if not network.batch_norm and getattr(network, "zero_init_last", False):
        raise UsageError("zero_init_last=True with batch_norm=False: no norm is left whose scale could start at 0")

    conv_rounds = train or getattr(network, "preactivation", False)  # in training the norm keeps what it gets

    def conv(filters: int, kernel: int, stride: int = 1, **fields):
        fields = {"padding": getattr(network, "padding", "symmetric"), "bias": not network.batch_norm} | fields
        return Conv(filters, kernel, stride, rounded=conv_rounds, dtype=network.dtype, **fields)

    def norm(activation: Callable = ACTIVATIONS["identity"], group: int = network.norm_group, rounded: bool = True, **fields):
        def leave(x):
            return x.astype(network.dtype) if train or rounded else x

        if not network.batch_norm:

            def end(x):
                if not isinstance(x, onednn.Pending):
                    return leave(activation(x))
                waits = not rounded and activation is ACTIVATIONS["identity"]  # for a sum, which it can take up
                return x if waits else x.output(activation)

            return end
        statistics = (network.norm_momentum, network.norm_epsilon, group, network.axis_name)
        layer = BatchNorm(train, *statistics, rounded=train, dtype=network.dtype, **fields)
        if not before:
            return lambda x: leave(layer(activation(onednn.finished(x))))
        # In evaluation apart, so that what leaves the layer is what leaves torch's and Keras's.
        return lambda x: layer(x, activation) if train else leave(activation(layer(onednn.finished(x))))

    return conv, norm


Activated = jax.Array | onednn.Pending  # what a norm that does not round leaves


def residual_sum(
    shortcut: Activated, branch: Activated, dtype: str, activation: Callable = ACTIVATIONS["identity"]
) -> jax.Array:
    """The activation of shortcut + branch, both `[batch, height, width, channels]`, rounded to `dtype` after it."""
    shortcut = onednn.finished(shortcut)
    if isinstance(branch, onednn.Pending):
        return branch.output(activation, shortcut)
    return activation(shortcut.astype(branch.dtype) + branch).astype(dtype)


class SqueezeExcite(nn.Module):
    """Channel attention: global mean, two 1x1 convolutions with bias, a gate (Hu et al. 2018, https://arxiv.org/abs/1709.01507)."""

    squeezed: int
    activation: Callable = nn.relu
    gate: Callable = nn.sigmoid
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = onednn.finished(x)
        # Or XLA widens narrow x once for both uses, and writes that.
        seen = lax.optimization_barrier(x) if is_narrow(x) else x
        mean = seen.mean(axis=(1, 2), keepdims=True, dtype=parameter_dtype_of(self.dtype))
        hidden = self.activation(Conv(self.squeezed, 1, bias=True, dtype=self.dtype, name="reduce")(mean))
        gate = self.gate(Conv(x.shape[-1], 1, bias=True, dtype=self.dtype, name="expand")(hidden))
        return x * gate.astype(x.dtype)


def adaptive_average(x: jax.Array, size: int) -> jax.Array:
    """Means over `size` x `size` bins that cover the image: bin i of n pixels is [floor(i n / size), ceil((i + 1) n / size)).

    torch's `adaptive_avg_pool2d`. Bins overlap where `size` does not divide n; where n is `size`, x is returned.
    """
    if x.shape[1:3] == (size, size):
        return x

    def bins(pixels: int) -> np.ndarray:
        rows = np.zeros((size, pixels))
        for i in range(size):
            start, stop = i * pixels // size, -((i + 1) * pixels // -size)
            rows[i, start:stop] = 1 / (stop - start)
        return rows.astype(x.dtype)

    return jnp.einsum("bhwc,ih,jw->bijc", x, bins(x.shape[1]), bins(x.shape[2]))


def local_response_norm(x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> jax.Array:
    """x / (k + alpha * sum of the squares of `size` neighbouring channels)^beta, Krizhevsky et al. 2012, section 3.3.

    The paper's alpha is used as it stands; Caffe's and torch's layers divide theirs by `size`.
    """
    squares = jnp.pad(jnp.square(x), ((0, 0), (0, 0), (0, 0), (size // 2, size // 2)))
    total = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return x * (k + alpha * total) ** -beta


def dropout(network: nn.Module, x: jax.Array, rate: float, position: jax.Array) -> jax.Array:
    """Zeroes each unit of `[batch, ...]` with probability `rate` and scales the others by 1 / (1 - rate), in training.

    The mask of an example depends on its `position` `[batch]` in the global batch alone (Srivastava et al. 2014) and on the
    stream `dropout` of `network`, whose next layer with dropout draws another.
    """
    keep = rng.example_uniform(network.make_rng("dropout"), position, x.shape[1:]) < 1 - rate
    network.sow("choices", "dropout", keep)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
