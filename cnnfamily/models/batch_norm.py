"""Batch normalisation, and the activation that follows it, in training as one function that saves nothing but its input.

Left to autodiff the two keep the centred input in float32, the normalised one, and for SiLU its sigmoid as well. All of that is
a few operations from the input, which the convolution before has written anyway, so the gradient computes it anew: temporary
memory of a step of EfficientNet-B0 (224 pixels, batch 16, bfloat16, CPU) is 0.64 GB for 1.48 GB.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from cnnfamily.errors import UsageError
from cnnfamily.models import initializers
from cnnfamily.models.cpu_forms import channel_sums
from cnnfamily.models.initializers import parameter

KEPT = "statistics"  # under this name a policy of `jax.checkpoint` finds means and variances


def parameter_dtype_of(dtype: str) -> jnp.dtype:
    """Of parameters, statistics and logits when the arithmetic is in `dtype`."""
    return jnp.dtype("float64" if jnp.finfo(dtype).bits == 64 else "float32")


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the global batch (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167).

    `group` is the number of examples that share statistics, 0 for the whole batch. It counts in the global batch: where
    `axis_name` is mapped over devices, a group that fits a device needs no communication and a larger one is reduced over the
    devices that hold it, so the function does not depend on the number of devices. The running statistics take the mean over
    the groups; those of one device are averaged over devices by the training step, once for all layers. `momentum` is the
    share of the old value that is kept (torch's momentum is 1 minus it), the variance is the biased one (torch stores the
    unbiased). In training it is differentiable by reverse mode alone (`jax.jvp` raises TypeError).
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    group: int = 0
    axis_name: str | None = None
    scale_init: Callable | None = initializers.ones  # None: the scale is 1, and no parameter
    rounded: bool = True  # to `dtype`, in evaluation; else the dtype of sums, for what follows to round
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, activation: Callable[[Array], Array] = lambda x: x) -> Array:
        """`activation` of the normalised x, `[batch, height, width, channels]`; elementwise."""
        parameter_dtype, shape = parameter_dtype_of(self.dtype), (x.shape[-1],)
        if self.scale_init:
            scale = parameter(self, "scale", self.scale_init, shape, parameter_dtype)
        else:
            scale = jnp.ones(shape, parameter_dtype)
        bias = parameter(self, "bias", initializers.zeros, shape, parameter_dtype)
        running_mean = self.variable("batch_stats", "mean", np.zeros, shape, parameter_dtype)
        running_var = self.variable("batch_stats", "var", np.ones, shape, parameter_dtype)
        if self.train:
            members, size = self._groups(x.shape[0])
            statics = Statics(activation, self.epsilon, self.axis_name, members, self.dtype)
            y, mean, var = _normalise(x.reshape(-1, size, *x.shape[1:]), scale, bias, statics)
            if not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean.mean(axis=(0, 1, 2, 3))
                running_var.value = keep * running_var.value + (1 - keep) * var.mean(axis=(0, 1, 2, 3))
            return y.reshape(x.shape)
        inverse = lax.rsqrt(running_var.value + self.epsilon)
        y = (x.astype(parameter_dtype) - running_mean.value) * (inverse * scale) + bias
        y = activation(y)
        return y.astype(self.dtype) if self.rounded else y

    def _groups(self, local: int) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
        """The devices that share a group, None where it fits a device; and how many of its examples lie on this one."""
        devices = lax.axis_size(self.axis_name) if self.axis_name else 1
        group = self.group or local * devices
        if (local * devices) % group or (local % group and group % local):
            raise UsageError(
                f"batch-norm groups of {group} examples (model.norm_group) do not divide a batch of "
                f"{local * devices} in {devices} x {local}: expected a divisor of it that divides, or is a multiple of, {local}"
            )
        if group <= local:
            return None, group
        each = group // local
        return tuple(tuple(range(i, i + each)) for i in range(0, devices, each)), local


class Statics(NamedTuple):
    """What is static about one call of `_normalise`."""

    activation: Callable[[Array], Array]
    epsilon: float
    axis_name: str | None
    members: tuple[tuple[int, ...], ...] | None  # devices that share a group
    dtype: str


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: Array, scale: Array, bias: Array, statics: Statics) -> tuple[Array, Array, Array]:
    """Of x `[groups, examples, height, width, channels]` the output, and mean and variance `[groups, 1, 1, 1, channels]`."""
    return _forward(x, scale, bias, statics)[0]


@partial(jax.jit, static_argnums=3)
def _forward(x: Array, scale: Array, bias: Array, statics: Statics):
    mean, var = _moments(x, scale)
    wide = x.astype(scale.dtype)
    if statics.members:  # one collective: gather each device's moments and combine them without cancellation
        both = jnp.stack([mean, var])
        means, variances = lax.all_gather(both, statics.axis_name, axis_index_groups=_lists(statics.members), axis=1)
        mean = means.mean(axis=0)
        var = (variances + jnp.square(means - mean)).mean(axis=0)
    mean, var = checkpoint_name(mean, KEPT), checkpoint_name(var, KEPT)
    y = _affine(wide - mean, scale, bias, var, statics)
    return (statics.activation(y).astype(statics.dtype), mean, var), (x, scale, bias, mean, var)


def _moments(x: Array, scale: Array) -> tuple[Array, Array]:
    """Mean and variance, `[groups, 1, 1, 1, channels]`.

    On a CPU in the branch of a conditional, as the gradient: else the 25 products of the depthwise convolution before it are
    computed anew inside the sums, and a step of EfficientNet-B0 (float32, 224 pixels, batch 16, two cores of a Xeon, JAX
    0.10.2) takes 1003 ms (958 to 1085, n = 6) in one pass, 704 (683 to 1028) so, and 751 (713 to 808) in two passes.
    """

    def undefined(x):  # nor is the output, then
        return (jnp.full((x.shape[0], 1, 1, 1, x.shape[-1]), jnp.nan, scale.dtype),) * 2

    def defined(x):  # widened here: an operand of the conditional is written to memory
        return _moments_in_one_pass(x.astype(scale.dtype))

    def apart(x, scale):
        return lax.cond(scale[0] < jnp.inf, defined, undefined, x)

    def together(x, scale):
        return _moments_in_two_passes(x.astype(scale.dtype))

    return lax.platform_dependent(x, scale, cpu=apart, default=together)


def _moments_in_two_passes(x: Array) -> tuple[Array, Array]:
    """E[x^2] - E[x]^2 loses all digits where the mean is large beside the deviation."""
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean, jnp.square(x - mean).mean(axis=(1, 2, 3), keepdims=True)


def _moments_in_one_pass(x: Array) -> tuple[Array, Array]:
    """About the mean m of the middle row of every image, as mean = m + E[x - m], var = E[(x - m)^2] - E[x - m]^2.

    With the rows a share p of all pixels, (mean - m)^2 is at most var (1 - p) / p whatever x is, so that the subtraction
    loses at most a factor of 2 / p - 1 in precision: 3 bits for 7x7 and 8 for 112x112, and for images as they are none.
    With the output, SiLU of it, in two passes and so, JAX 0.10.2 / 0.12.0.1, two cores of a Xeon, batch 16, 112x112x96:
    22 / 27 and 17 / 19 ms, bfloat16 29 / 53 and 16 / 29; 14x14x672: 2.4 / 2.5 and 2.0 / 2.1, bfloat16 2.8 / 3.6 and 1.7 / 1.7.
    """
    near = x[:, :, x.shape[2] // 2].mean(axis=(1, 2))[:, None, None, None]
    offset = x - near
    first, second = (total / x[0, ..., 0].size for total in _sums_in_one_pass(offset, jnp.square(offset)))
    return near + first, jnp.maximum(second - jnp.square(first), 0)


def _affine(centred: Array, scale: Array, bias: Array, var: Array, statics: Statics) -> Array:
    return centred * (lax.rsqrt(var + statics.epsilon) * scale) + bias


@partial(jax.jit, static_argnums=0)
def _backward(statics: Statics, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    return lax.platform_dependent(
        residuals, cotangents, cpu=partial(_gradients_apart, statics), default=partial(_gradients, statics, _sums)
    )


def _gradients_apart(statics: Statics, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    """In the branch of a conditional, which XLA's fusion does not cross.

    On a CPU it copies whatever is cheap into each of its users, and so computed the depthwise convolutions before and after
    this layer anew for its sums and for its gradient: EfficientNet-B0 in float32 trained at 14.7 images/s, and at 27 so (224
    pixels, batch 16). An optimization barrier does nothing: XLA removes it before it fuses. The devices that share a group
    have the same variance, so they take the same branch.
    """

    def undefined(residuals, cotangents):  # the variance is infinite or no number
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), residuals[:3])

    defined = residuals[-1].reshape(-1)[0] < jnp.inf
    return lax.cond(defined, partial(_gradients, statics, _sums_in_one_pass), undefined, residuals, cotangents)


def _gradients(
    statics: Statics, add_up: Callable, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Of x, scale and bias. `before` is the cotangent before the activation; mean and variance have cotangents of their own."""
    x, scale, bias, mean, var = residuals
    y_bar, mean_bar, var_bar = cotangents
    centred = x.astype(scale.dtype) - mean
    y = _affine(centred, scale, bias, var, statics)
    before = jax.vjp(statics.activation, y)[1](y_bar.astype(scale.dtype))[0]
    sums = add_up(before, before * centred)
    inverse = lax.rsqrt(var + statics.epsilon)
    bias_bar, scale_bar = sums[0].sum(axis=(0, 1, 2, 3)), (sums[1] * inverse).sum(axis=(0, 1, 2, 3))
    count = x[0, ..., 0].size
    parts = jnp.stack([*sums, mean_bar, var_bar])
    if statics.members:
        parts = lax.psum(parts, statics.axis_name, axis_index_groups=_lists(statics.members))
        count *= len(statics.members[0])
    total, moment, mean_bar, var_bar = parts
    factor = inverse * scale
    along = (2 * var_bar - factor * jnp.square(inverse) * moment) / count
    offset = (mean_bar - factor * total) / count
    x_bar = (factor * before + along * centred + offset).astype(x.dtype)
    return x_bar, scale_bar, bias_bar


def _sums(*terms: Array) -> list[Array]:
    """Sums over all but groups and channels, which stay: `[groups, 1, 1, 1, channels]`."""
    return [term.sum(axis=(1, 2, 3), keepdims=True) for term in terms]


def _sums_in_one_pass(*terms: Array) -> list[Array]:
    """All together: XLA's CPU compiler gives each sum a loop of its own, and what it adds up an array of its own before."""
    return list(jax.vmap(lambda *terms: channel_sums(terms))(*terms).swapaxes(0, 1)[:, :, None, None, None])


def _lists(members: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(devices) for devices in members]


_normalise.defvjp(_forward, _backward)
