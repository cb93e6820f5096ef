"""Batch norm folded into convolutions: the same logits, in float64, for every family that has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from cnnfamily import create_model
from cnnfamily.errors import UsageError
from cnnfamily.fold import fold_batch_norm
from cnnfamily.models import initialize, variable_shapes
from cnnfamily.models.googlenet import MODULES

SMALL = {
    "resnet20_cifar": {"stage_sizes": (1, 1, 1)},
    "resnet50": {"stage_sizes": (1, 1), "width": 0.25},
    "vgg11_bn": {"width": 0.125},
    "googlenet": {"width": 0.25, "modules": MODULES[2:3]},
    "mobilenet_v1": {"stages": ((8, 2, 2),)},
    "mobilenet_v2": {"stages": ((1, 8, 1, 1), (6, 8, 2, 2))},
    "mobilenet_v3_small": {"stages": ((3, 16, 16, True, "RE", 2), (3, 16, 16, True, "HS", 1))},
    "efficientnet_b0": {"stages": ((1, 8, 1, 1, 3), (6, 8, 2, 2, 5))},
}


def with_statistics(variables):
    """Running statistics and norms of a trained network: none of them 0 or 1."""
    draw = np.random.default_rng(0)

    def change(path, x):
        name = path[-1].key
        return jnp.asarray(draw.uniform(0.5, 2.0, x.shape) if name in ("var", "scale") else x + draw.normal(0, 0.3, x.shape))

    return jax.tree_util.tree_map_with_path(change, variables)


BY_HAND = ("vgg11_bn", "resnet20_cifar", "googlenet", "mobilenet_v1", "mobilenet_v3_small")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in BY_HAND)) for n in SMALL])
def test_the_same_logits(x64, name):
    network = create_model(name, num_classes=7, dtype="float64", **SMALL[name])
    side = 32 if name != "googlenet" else 64
    network = network.clone(resolution=side)
    variables = with_statistics(initialize(network, jax.random.key(0), resolution=side))
    folded, without = fold_batch_norm(network, variables)
    assert not without["batch_stats"]
    assert not any("norm" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(without))
    images = np.random.default_rng(1).normal(size=(2, side, side, 3))
    expected = jax.jit(network.apply)(variables, images)
    np.testing.assert_allclose(jax.jit(folded.apply)(without, images), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_what_cannot_be_folded(x64):
    for name, fields, words in (
        ("vgg11", {}, "batch_norm=False: nothing to fold"),
        ("resnet20_cifar", {"preactivation": True}, "follows no convolution directly"),
        ("mobilenet_v2", {"norm_place": "after"}, "follows no convolution directly"),
    ):
        network = create_model(name, **fields)
        with pytest.raises(UsageError, match=words):
            fold_batch_norm(network, variable_shapes(network))


def test_variables_of_another_network_are_an_error_and_those_for_evaluation_alone_are_not():
    network = create_model("resnet20_cifar", depth=0.34)
    variables = initialize(network, jax.random.key(0))
    with pytest.raises(ScopeParamShapeError, match="classifier"):
        fold_batch_norm(network.clone(num_classes=7), variables)
    del variables["params"]["classifier"]
    with pytest.raises(ScopeParamNotFoundError, match="classifier"):
        fold_batch_norm(network, variables)
    variables = initialize(create_model("googlenet", width=0.125, aux=False), jax.random.key(0))
    folded, _ = fold_batch_norm(create_model("googlenet", width=0.125, aux=True), variables)
    assert not folded.aux
