"""The first part of a step that is not finite is named, wherever it is and on whichever device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from flax import linen as nn

from cnnfamily import nonfinite
from cnnfamily.models import create_model, initialize
from cnnfamily.step import Objective, create_state


@functools.cache
def prepared(form: str, micro_batches: int = 1):
    """A state, a batch of 8 on two devices, and a function of them that names the first part that is not finite."""
    fields = {"norm_group": 2, "stochastic_depth": 0.3, "stochastic_depth_form": form}  # one device sees nothing of another
    network = create_model("resnet20_cifar", stage_sizes=(1, 1), filters=4, **fields)
    mesh = mesh_of(2)

    def view(keys, images, store):  # one image of the global batch may be 255: the only one that overflows below
        return jnp.where(images == 255, jnp.float32(3e38), images.astype(jnp.float32) / 64 - 1)

    objective = Objective(network.clone(axis_name="data"), view, seed=0)
    state = create_state(initialize(network, jax.random.key(0)), optax.sgd(0.1), ema=False)
    images = np.random.default_rng(0).integers(0, 128, (8, 8, 8, 3), np.uint8)
    batch = {"images": images, "labels": np.arange(8, dtype=np.int32), "position": np.arange(8, dtype=np.int32)}
    batch = {name: array.reshape(micro_batches, -1, *array.shape[1:]) for name, array in batch.items()}
    return state, batch, functools.partial(nonfinite.cause_of, objective=objective, mesh=mesh)


def with_parameter(state, path: str, value: float):
    params = jax.tree.map(jnp.copy, state.params)
    *groups, name = path.split("/")
    leaf = functools.reduce(lambda group, key: group[key], groups, params)
    leaf[name] = jnp.full_like(leaf[name], value)
    return state.replace(params=params)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("stem_norm/scale", 1.0, ""),
        ("stem/kernel", np.nan, "parameter stem/kernel"),
        pytest.param("stage1_block1/branch/norm1/scale", 3e38, "stage1_block1/branch/norm1", marks=pytest.mark.full),
        ("stage1_block1/branch/norm2/scale", 1e38, "stage1_block1/branch/norm2"),
        pytest.param("classifier/kernel", 3e38, "classifier", marks=pytest.mark.full),
    ],
)
def test_the_first_part_is_named(path, value, expected):
    state, batch, cause = prepared("none")
    found = cause(with_parameter(state, path, value), batch, {})
    assert found == expected


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.full), 2])
def test_one_example_on_the_last_device_is_enough(micro_batches):
    state, batch, cause = prepared("none", micro_batches)
    images = batch["images"].copy()
    assert cause(state, batch, {}) == ""
    images[-1, -1] = 255
    assert cause(state, batch | {"images": images}, {}) == "stem_norm"  # the square of 3e38


class Root(nn.Module):
    """Multiplies by the square root of a parameter that starts at 0: finite, but for its derivative."""

    @nn.compact
    def __call__(self, x):
        return x * jnp.sqrt(self.param("scale", nn.initializers.zeros, (), x.dtype))


class Roots(nn.Module):
    """One or two of them, with an affine map after the first."""

    two: bool
    num_classes: int = 4

    @nn.compact
    def __call__(self, images, train=False, position=None):
        x = nn.Dense(4, name="middle")(Root(name="first")(images.mean(axis=(1, 2))))
        return Root(name="last")(x) if self.two else x


@pytest.mark.parametrize(("two", "expected"), [(True, "gradient of last/scale"), (False, "gradient of first/scale")])
def test_gradients_are_looked_at_from_the_last_layer_to_the_first(two, expected):
    network = Roots(two)
    objective = Objective(network, lambda keys, images, store: images.astype(jnp.float32), seed=0)
    batch = prepared("none")[1]
    batch = batch | {"labels": batch["labels"] % 4}
    variables = {"batch_stats": {}, **network.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))}
    state = create_state(variables, optax.sgd(0.1), ema=False)
    assert nonfinite.cause_of(state, batch, {}, objective=objective, mesh=mesh_of(2)) == expected


def test_a_branch_in_a_conditional_is_one_with_its_block():
    state, batch, cause = prepared("batch")
    found = cause(with_parameter(state, "stage1_block1/branch/norm2/scale", 3e38), batch, {})
    assert found == "stage1_block1"
