"""Layers that the families share. A network binds dtype, normalisation and padding once and hands them to its blocks.

Parameters and batch statistics are float32 (float64 where `dtype` is float64); `dtype` is the arithmetic between them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cnnfamily import rng
from cnnfamily.errors import UsageError, unknown
from cnnfamily.models import initializers
from cnnfamily.models.convolution import convolution
from cnnfamily.models.initializers import parameter

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
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


def parameter_dtype_of(dtype: str) -> jnp.dtype:
    """Of parameters, statistics and logits when the arithmetic is in `dtype`."""
    return jnp.dtype("float64" if jnp.finfo(dtype).bits == 64 else "float32")


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
        y = convolution(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=(self.stride,) * 2,
            padding=tuple(tuple(pair) for pair in padding),
            groups=self.groups,
        )
        if self.bias:
            bias = parameter(self, "bias", self.bias_init, (self.filters,), parameter_dtype)
            y = y + bias.astype(self.dtype)
        return y


class Linear(nn.Module):
    """Affine map of `[..., inputs]` to `[..., units]`."""

    units: int
    kernel_init: Callable = initializers.uniform_fan_out
    bias_init: Callable = initializers.zeros
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        parameter_dtype = parameter_dtype_of(self.dtype)
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.units), parameter_dtype)
        bias = parameter(self, "bias", self.bias_init, (self.units,), parameter_dtype)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


def logits(x: jax.Array) -> jax.Array:
    """Class scores leave the network in float32 (float64 where it computes in that)."""
    return x.astype(parameter_dtype_of(x.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the global batch (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167).

    `group` is the number of examples that share statistics, 0 for the whole batch. It counts in the global batch: where
    `axis_name` is mapped over devices, a group that fits a device needs no communication and a larger one is reduced over the
    devices that hold it, so the function does not depend on the number of devices. The running statistics take the mean over
    the groups; those of one device are averaged over devices by the training step, once for all layers. `momentum` is the
    share of the old value that is kept (torch's momentum is 1 minus it), the variance is the biased one (torch stores the
    unbiased).
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    group: int = 0
    axis_name: str | None = None
    scale_init: Callable = initializers.ones
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        parameter_dtype, shape = parameter_dtype_of(self.dtype), (x.shape[-1],)
        scale = parameter(self, "scale", self.scale_init, shape, parameter_dtype)
        bias = parameter(self, "bias", initializers.zeros, shape, parameter_dtype)
        running_mean = self.variable("batch_stats", "mean", np.zeros, shape, parameter_dtype)
        running_var = self.variable("batch_stats", "var", np.ones, shape, parameter_dtype)
        wide = x.astype(parameter_dtype)
        if self.train:
            grouped, mean, var = self._statistics(wide)
            if not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean.mean(axis=(0, 1, 2, 3))
                running_var.value = keep * running_var.value + (1 - keep) * var.mean(axis=(0, 1, 2, 3))
        else:
            grouped, mean, var = wide, running_mean.value, running_var.value
        y = (grouped - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype)

    def _statistics(self, x):
        """x as `[groups, examples, height, width, channels]`, mean and variance as `[groups, 1, 1, 1, channels]`."""
        local = x.shape[0]
        devices = lax.axis_size(self.axis_name) if self.axis_name else 1
        group = self.group or local * devices
        if (local * devices) % group or (local % group and group % local):
            raise UsageError(
                f"batch-norm groups of {group} examples (model.norm_group) do not divide a batch of "
                f"{local * devices} in {devices} x {local}: expected a divisor of it that divides, or is a multiple of, {local}"
            )
        x = x.reshape(-1, min(group, local), *x.shape[1:])
        mean = x.mean(axis=(1, 2, 3), keepdims=True)
        # Two passes: E[x^2] - E[x]^2 loses all digits where the mean is large beside the deviation.
        var = jnp.square(x - mean).mean(axis=(1, 2, 3), keepdims=True)
        if group > local:  # one collective: gather each device's moments and combine them without cancellation
            members = [list(range(i, i + group // local)) for i in range(0, devices, group // local)]
            means, variances = lax.all_gather(jnp.stack([mean, var]), self.axis_name, axis_index_groups=members, axis=1)
            mean = means.mean(axis=0)
            var = (variances + jnp.square(means - mean)).mean(axis=0)
        return x, mean, var


def conv_and_norm(network: nn.Module, train: bool) -> tuple[Callable, Callable]:
    """The convolution and the batch norm of a network, with its padding, dtype, statistics and switches bound.

    `conv(filters, kernel, stride, ...)` is a `Conv`, with a bias where the network has no batch norm. `norm(activation, ...)`
    is a `BatchNorm` and an activation (default: none), in the order of `network.norm_place`; the activation alone where
    `network.batch_norm` is False. Both map `[batch, height, width, channels]`.

    Raises:
      UsageError: an unknown `norm_place`, or `zero_init_last` without a norm.
    """
    before = choose("norm_place", network.norm_place, ("before", "after")) == "before"
    if not network.batch_norm and getattr(network, "zero_init_last", False):
        raise UsageError("zero_init_last=True with batch_norm=False: no norm is left whose scale could start at 0")

    def conv(filters: int, kernel: int, stride: int = 1, **fields):
        fields = {"padding": getattr(network, "padding", "symmetric"), "bias": not network.batch_norm} | fields
        return Conv(filters, kernel, stride, dtype=network.dtype, **fields)

    def norm(activation: Callable = ACTIVATIONS["identity"], group: int = network.norm_group, **fields):
        if not network.batch_norm:
            return activation
        statistics = (network.norm_momentum, network.norm_epsilon, group, network.axis_name)
        layer = BatchNorm(train, *statistics, dtype=network.dtype, **fields)
        return (lambda x: activation(layer(x))) if before else (lambda x: layer(activation(x)))

    return conv, norm


class SqueezeExcite(nn.Module):
    """Channel attention: global mean, two 1x1 convolutions with bias, a gate (Hu et al. 2018, https://arxiv.org/abs/1709.01507)."""

    squeezed: int
    activation: Callable = nn.relu
    gate: Callable = nn.sigmoid
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        mean = x.mean(axis=(1, 2), keepdims=True, dtype=parameter_dtype_of(self.dtype))
        hidden = self.activation(Conv(self.squeezed, 1, bias=True, dtype=self.dtype, name="reduce")(mean))
        return x * self.gate(Conv(x.shape[-1], 1, bias=True, dtype=self.dtype, name="expand")(hidden))


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Maxima of square windows; the last window of a row need not lie wholly inside (torch's `ceil_mode`).

    The windows start inside the image or its padding on the near side: one that would lie in the far padding alone is left out.
    """
    edges = []
    for size in x.shape[1:3]:
        windows = -(-(size + 2 * padding - window) // stride) + 1
        if (windows - 1) * stride >= size + padding:
            windows -= 1
        edges.append((padding, max(0, (windows - 1) * stride + window - size - padding)))
    return nn.max_pool(x, (window, window), (stride, stride), padding=edges)


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
