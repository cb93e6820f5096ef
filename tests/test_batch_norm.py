"""Batch norm with its activation against the same mathematics left to autodiff; test_layers.py has statistics and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnnfamily.models.batch_norm import BatchNorm, _moments_in_one_pass
from cnnfamily.models.layers import ACTIVATIONS

CHANNELS = 3


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def variables(dtype=jnp.float64):
    params = {"scale": jnp.array([0.7, -1.3, 0.0], dtype), "bias": jnp.array([0.1, 0.4, -0.2], dtype)}
    return {"params": params, "batch_stats": {"mean": jnp.zeros(CHANNELS, dtype), "var": jnp.ones(CHANNELS, dtype)}}


def plainly(x, params, group, activation):
    grouped = x.reshape(-1, group, *x.shape[1:])
    mean = grouped.mean((1, 2, 3), keepdims=True)
    var = jnp.square(grouped - mean).mean((1, 2, 3), keepdims=True)
    y = activation((grouped - mean) * lax.rsqrt(var + 1e-5) * params["scale"] + params["bias"])
    running = {"mean": 0.1 * mean.mean((0, 1, 2, 3)), "var": 0.9 + 0.1 * var.mean((0, 1, 2, 3))}
    return y.reshape(x.shape), running


def ours(x, params, group, activation):
    norm = BatchNorm(train=True, group=group, dtype=str(x.dtype))
    y, updates = norm.apply({**variables(params["scale"].dtype), "params": params}, x, activation, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def loss_of(function, group, activation):
    """Of output and running statistics: both have gradients."""

    def loss(x, params):
        y, running = function(x, params, group, activation)
        weights = draw(*y.shape, seed=1)
        return (y * weights).sum() + jnp.sin(running["mean"]).sum() + jnp.square(running["var"]).sum()

    return loss


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gradients_with_each_activation(x64, name):
    x, params = 2 * draw(4, 3, 2, CHANNELS) + 1, variables()["params"]
    found, expected = (
        jax.jit(jax.value_and_grad(loss_of(f, 2, ACTIVATIONS[name]), argnums=(0, 1)))(x, params) for f in (ours, plainly)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


def test_without_a_scale_it_is_1_and_no_parameter(x64):
    x = draw(4, 3, 2, CHANNELS)
    given = variables()
    bare = {"params": {"bias": given["params"]["bias"]}, "batch_stats": given["batch_stats"]}
    ones = given | {"params": given["params"] | {"scale": jnp.ones(CHANNELS)}}
    for train in (True, False):
        norm, without = (BatchNorm(train, dtype="float64", **fields) for fields in ({}, {"scale_init": None}))
        assert without.init(jax.random.key(0), x)["params"].keys() == {"bias"}
        expected, found = norm.apply(ones, x, mutable=["batch_stats"]), without.apply(bare, x, mutable=["batch_stats"])
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gradients_of_gradients(x64):
    x, params = draw(2, 2, 2, CHANNELS), variables()["params"]

    def second(function):
        gradient = jax.grad(loss_of(function, 2, jnp.tanh))
        return jax.jit(jax.grad(lambda x, params: jnp.square(gradient(x, params)).sum(), argnums=(0, 1)))(x, params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), second(ours), second(plainly))


def test_what_is_kept_for_the_gradient_is_the_input_alone():
    """The input in bfloat16, of the rest a number a channel: what memory was saved for."""
    x, params = jnp.asarray(draw(4, 8, 8, CHANNELS), jnp.bfloat16), variables(jnp.float32)["params"]
    _, gradients = jax.vjp(lambda x, params: ours(x, params, 4, jax.nn.silu)[0], x, params)
    kept = [leaf for leaf in jax.tree.leaves(gradients) if isinstance(leaf, jax.Array) and leaf.size >= x.size]
    assert [(leaf.size, leaf.dtype) for leaf in kept] == [(x.size, jnp.bfloat16)]


def test_a_variance_that_is_no_number_gives_no_gradient_that_is_one():
    x, params = jnp.full((2, 2, 2, CHANNELS), jnp.inf, jnp.float32), variables(jnp.float32)["params"]
    gradient = jax.grad(lambda x, params: ours(x, params, 2, jax.nn.relu)[0].sum(), argnums=(0, 1))(x, params)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("platform", "conditionals"), [("cpu", 2), ("cuda", 0), ("tpu", 0)])
def test_the_conditionals_are_a_cpu_matter(platform, conditionals):
    x, params = jnp.ones((2, 2, 2, CHANNELS), jnp.float32), variables(jnp.float32)["params"]
    gradient = jax.jit(jax.grad(lambda x, params: ours(x, params, 2, jax.nn.relu)[0].sum()))
    lowered = gradient.trace(x, params).lower(lowering_platforms=(platform,))
    assert lowered.compiler_ir("hlo").as_hlo_text().count(" conditional(") == conditionals


@pytest.mark.parametrize("middle", [None, 0.0, 900.0, 5000.0])
def test_moments_in_one_pass_keep_their_digits(middle):
    """The mean is 10,000 deviations, and the middle rows, about whose mean they are taken, are as far off as they can be."""
    x = np.array(1000 + 0.1 * draw(2, 4, 15, 15, CHANNELS), np.float32)
    if middle is not None:
        x[:, :, 7] = middle
    mean, var = jax.jit(_moments_in_one_pass)(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((1, 2, 3), keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((1, 2, 3), keepdims=True), rtol=2e-5)


def test_the_variance_of_a_constant_is_not_below_zero():
    for value in (0.1, 1e4, 3e7):
        var = jax.jit(_moments_in_one_pass)(jnp.full((1, 3, 5, 7, CHANNELS), value, jnp.float32))[1]
        assert (var >= 0).all()
