"""The networks in plain Flax, to measure what our own layers and step are worth.

Under the families of `cnnfamily.models` linen's `nn.Conv`, `nn.BatchNorm`, `nn.Dense`, `nn.max_pool` and `nn.Dropout` take the
place of our layers, with the same names of parameters, so that one set of variables serves both. Blocks, activations,
squeeze-and-excitation's mean and stochastic depth are the families' own. The step is the usual one: `jax.jit` of
`jax.value_and_grad`, and optax.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from flax import linen as nn
from side import AUXILIARY, DEVIATION, LEARNING_RATE, MEAN, MOMENTUM

import cnnfamily
from cnnfamily import models
from cnnfamily.data.augment import normalize
from cnnfamily.models import initializers

TOLERANCE = 2e-5  # of the largest logit, in float32; sums are taken in another order


def conv(
    filters: int,
    kernel: int,
    stride: int = 1,
    padding: str = "symmetric",
    groups: int = 1,
    bias: bool = False,
    kernel_init: Callable | None = None,
    bias_init: Callable = initializers.zeros,
    rounded: bool = True,
    dtype: str = "float32",
    name: str | None = None,
) -> nn.Conv:
    """Which rounds whether it is told to or not, as does `batch_norm`."""
    return nn.Conv(
        filters,
        (kernel, kernel),
        stride,
        padding=(kernel - 1) // 2 if padding == "symmetric" else padding.upper(),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init or initializers.he_fan_out(groups),
        bias_init=bias_init,
        dtype=dtype,
        name=name,
    )


def batch_norm(
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    group: int = 0,
    axis_name: str | None = None,
    scale_init: Callable = initializers.ones,
    rounded: bool = True,
    dtype: str = "float32",
    name: str | None = None,
) -> Callable:
    """`nn.BatchNorm` over the whole batch of one device; linen has no groups of examples."""
    if group or axis_name:
        raise ValueError(f"batch norm with group={group}, axis_name={axis_name}: the plain form has neither")
    layer = nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, scale_init=scale_init, dtype=dtype, name=name
    )
    return lambda x, activation=lambda x: x: activation(layer(x))


def linear(
    units: int,
    kernel_init: Callable = initializers.uniform_fan_out,
    bias_init: Callable = initializers.zeros,
    dtype: str = "float32",
    name: str | None = None,
) -> nn.Dense:
    return nn.Dense(units, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, name=name)


def max_pool(x: jax.Array, window: int, stride: int, edges: Sequence[Sequence[int]] = ((0, 0), (0, 0))) -> jax.Array:
    return nn.max_pool(x, (window, window), (stride, stride), padding=[tuple(int(pad) for pad in pair) for pair in edges])


def dropout(network: nn.Module, x: jax.Array, rate: float, position: jax.Array) -> jax.Array:
    return nn.Dropout(rate, deterministic=False)(x)


REPLACED = {"Conv": conv, "BatchNorm": batch_norm, "Linear": linear, "max_pool": max_pool, "dropout": dropout}


@contextlib.contextmanager
def layers_replaced() -> Iterator[None]:
    """Plain layers for every network that is traced meanwhile; what is compiled then stays plain."""
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("cnnfamily.models")]:
            for name, plain in REPLACED.items():
                if getattr(getattr(module, name, None), "__module__", "").startswith("cnnfamily.models"):
                    stack.enter_context(mock.patch.object(module, name, plain))
        yield


def check(name: str, *, resolution: int = 0, **fields: Any) -> float:
    """Holds the plain form of a network against ours: equal trees, and equal logits in evaluation for the same variables.

    Returns the largest difference of the logits as a share of the largest logit.

    Raises:
      AssertionError: the trees differ, or the logits by more than `TOLERANCE`.
    """
    network = cnnfamily.create_model(name, **fields)
    resolution = resolution or network.resolution
    check_trees(network, resolution)
    variables = _uneven(models.initialize(network, jax.random.key(0), resolution=resolution))
    images = np.random.default_rng(0).normal(size=(2, resolution, resolution, network.in_channels)).astype(np.float32)
    ours = np.asarray(jax.jit(network.apply)(variables, images))
    with layers_replaced():
        # A function of its own, for jit remembers what it traced before.
        plain = np.asarray(jax.jit(lambda *given: network.apply(*given))(variables, images))
    difference = float(np.abs(ours - plain).max() / np.abs(ours).max())
    assert difference <= TOLERANCE, f"{name}: logits differ by {difference:.1e} of the largest, expected {TOLERANCE:.0e}"
    return difference


def check_trees(network: nn.Module, resolution: int = 0) -> None:
    """Raises an AssertionError where names, shapes or dtypes of the variables differ between the two forms."""
    ours = models.variable_shapes(network, resolution=resolution)
    with layers_replaced():
        plain = models.variable_shapes(network, resolution=resolution)
    ours, plain = (dict(jax.tree_util.tree_leaves_with_path(shapes)) for shapes in (ours, plain))
    differ = [path for path in ours | plain if str(ours.get(path)) != str(plain.get(path))]
    assert not differ, f"{type(network).__name__}: {len(differ)} variables differ, first {jax.tree_util.keystr(differ[0])}"


def _uneven(variables: dict) -> dict:
    """Batch statistics that differ from 0 and 1, so that no norm is the identity."""
    rng = np.random.default_rng(1)

    def shake(path, value):
        factor = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
        return value * factor if path[-1].key == "var" else value + 0.1 * (factor - 1)

    return variables | {"batch_stats": jax.tree_util.tree_map_with_path(shake, variables["batch_stats"])}


def training(network: nn.Module, variables: dict, images: np.ndarray, labels: np.ndarray) -> Callable[[int], float]:
    """The step of any Flax example with SGD, on uint8 images: a function that takes so many and returns the last loss."""
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def loss_of(params, batch_stats, images, labels, key):
        streams = dict(zip(("dropout", "stochastic_depth"), jax.random.split(key), strict=True))
        variables, mutable = {"params": params, "batch_stats": batch_stats}, ["batch_stats", "aux_logits"]
        images = normalize(images, MEAN, DEVIATION)
        logits, updates = network.apply(variables, images, train=True, rngs=streams, mutable=mutable)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        for auxiliary in jax.tree.leaves(updates.get("aux_logits", {})):
            loss += AUXILIARY * optax.softmax_cross_entropy_with_integer_labels(auxiliary, labels).mean()
        return loss, updates.get("batch_stats", {})

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, labels, key):
        params, batch_stats, opt_state = state
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), grads = gradient(params, batch_stats, images, labels, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    params, batch_stats = jax.device_put((variables["params"], variables["batch_stats"]))
    state, count = (params, batch_stats, optimizer.init(params)), itertools.count()
    images, labels, key = jax.device_put((images, labels, jax.random.key(0)))

    def burst(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, loss = step(state, images, labels, jax.random.fold_in(key, next(count)))
        jax.block_until_ready(state)
        return float(loss)

    return burst
