"""VGG: the columns of its Table 1, and the place of the norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.models import create_model, initialize
from cnnfamily.summary import summarize


@pytest.mark.parametrize(
    ("name", "sides"),
    [  # Table 1, from top to bottom: the filters of each convolution, stage by stage
        ("vgg11", [[64], [128], [256] * 2, [512] * 2, [512] * 2]),
        ("vgg13_bn", [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2]),
        ("vgg16_bn", [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]),
        ("vgg19", [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4]),
    ],
)
def test_columns(name, sides):
    layers = [layer for layer in summarize(name).layers if layer.kind == "Conv"]
    assert [layer.output for layer in layers] == [
        (224 >> stage, 224 >> stage, filters) for stage, row in enumerate(sides) for filters in row
    ]
    weights = [layer for layer in summarize(name).layers if layer.kind != "BatchNorm"]
    assert len(weights) == int(name[3:5])  # its number counts the layers that have weights
    assert [layer.output for layer in weights[-3:]] == [(4096,), (4096,), (1000,)]


def test_a_map_of_another_size_is_averaged():
    fields = {"width": 0.125, "hidden": 64, "num_classes": 5}
    network = create_model("vgg11", **fields)
    variables = initialize(network, jax.random.key(0))
    assert variables["params"]["hidden1"]["kernel"].shape == (7 * 7 * 64, 8)
    assert network.apply(variables, jnp.ones((1, 96, 64, 3))).shape == (1, 5)
    assert network.apply(variables, jnp.ones((1, 32, 32, 3))).shape == (1, 5)


@pytest.mark.full
def test_the_norm_stands_before_or_after_the_activation():
    """Behind ReLU its output has negative values that a following ReLU would have removed."""
    for place, kept in (("before", False), ("after", True)):
        network = create_model("vgg11_bn", width=0.125, hidden=64, norm_place=place)
        variables = initialize(network, jax.random.key(0), resolution=32)
        images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
        rngs = {"dropout": jax.random.key(0)}
        _, updates = network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats", "intermediates"])
        assert bool((updates["intermediates"]["stage1"][0] < 0).any()) is kept


def test_biases_stay_under_a_norm():
    """torchvision's `_bn` networks have them: 2 more numbers a channel than without norms, not 1."""
    plain, normed = summarize("vgg11"), summarize("vgg11_bn")
    channels = 64 + 128 + 2 * 256 + 4 * 512
    assert normed.params - plain.params == 2 * channels
