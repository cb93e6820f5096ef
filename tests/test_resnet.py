"""Blocks, shortcuts and strides of the residual networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnnfamily.models import create_model, initialize, variable_shapes
from cnnfamily.models.layers import BatchNorm, Conv
from cnnfamily.models.resnet import Shortcut
from cnnfamily.summary import summarize


def shapes_of(name, **fields):
    return variable_shapes(create_model(name, **fields))["params"]


# Shortcuts

X = np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3, 1) * np.array([1, -1], np.float32)
CORNERS = np.array([[1, 3], [7, 9]])
MEANS = np.array([[(1 + 2 + 4 + 5) / 4, (3 + 6) / 2], [(7 + 8) / 2, 9]])  # an odd side: a square divides by what it has


def shortcut(kind, stride):
    return Shortcut(kind, Conv, functools.partial(BatchNorm, False, epsilon=0.0), stride)


@pytest.mark.parametrize(("kind", "expected"), [("A", CORNERS), ("A_average", MEANS)])
def test_shortcut_without_parameters(kind, expected):
    found, variables = shortcut(kind, 2).init_with_output(jax.random.key(0), X, (1, 2, 2, 5))
    assert variables == {}
    np.testing.assert_array_equal(found[0, ..., 0], expected)
    np.testing.assert_array_equal(found[0, ..., 1], -expected)
    np.testing.assert_array_equal(found[..., 2:], np.zeros((1, 2, 2, 3)))
    widened = shortcut(kind, 1).apply({}, X, (1, 3, 3, 3))  # more channels at stride 1
    np.testing.assert_array_equal(widened, np.concatenate([X, np.zeros((1, 3, 3, 1))], axis=3))


@pytest.mark.parametrize("kind", ["B", "C"])
def test_shortcut_by_projection(kind):
    kernel = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], np.float32)[None, None]
    norm = {"scale": np.array([1.0, 1.0, 10.0], np.float32), "bias": np.array([0.5, 0.0, 0.0], np.float32)}
    stats = {"norm": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}}
    variables = {"params": {"conv": {"kernel": kernel}, "norm": norm}, "batch_stats": stats}
    found = shortcut(kind, 2).apply(variables, X, (1, 2, 2, 3))[0]
    np.testing.assert_allclose(found, np.stack([CORNERS + 0.5, -3 * CORNERS, 20 * CORNERS], axis=2), rtol=1e-6)


@pytest.mark.parametrize("kind", ["A", "A_average", "B"])
def test_where_the_shape_stays_the_input_is_the_shortcut(kind):
    found, variables = shortcut(kind, 1).init_with_output(jax.random.key(0), X, X.shape)
    assert found is X
    assert variables == {}


def projections(name, **fields):
    return {path[0] for path in flatten_dict(shapes_of(name, **fields)) if path[1] == "shortcut"}


def test_where_projections_stand():
    first = {f"stage{i}_block1" for i in (2, 3, 4)}
    every = {f"stage{i}_block{j}" for i in (1, 2, 3, 4) for j in (1, 2)}
    assert projections("resnet18") == first
    assert projections("resnet18", shortcut="C") == every
    for kind in ("A", "A_average", "none"):
        assert projections("resnet18", shortcut=kind) == set()
    # A bottleneck widens to 256 in its first stage too, at stride 1.
    assert projections("resnet50") == first | {"stage1_block1"}
    assert projections("resnet20_cifar", shortcut="B") == {"stage2_block1", "stage3_block1"}
    assert projections("resnet20_cifar") == projections("plain18") == set()
    params = shapes_of("resnet50")["stage1_block1"]["shortcut"]
    assert params["conv"]["kernel"].shape == (1, 1, 64, 256)
    assert set(params["norm"]) == {"scale", "bias"}


def test_the_plain_network_adds_nothing():
    # With the last scale at 0 a residual block hands its input on, a plain one nothing at all.
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    for name, alive in (("plain20_cifar", False), ("resnet20_cifar", True)):
        network = create_model(name, stage_sizes=(1,), zero_init_last=True)
        _, updates = network.apply(initialize(network, jax.random.key(0)), images, mutable=["intermediates"])
        assert bool((updates["intermediates"]["stage1"][0] != 0).any()) is alive


# Shapes


def outputs(name, pixels=None):
    return {layer.name: layer.output for layer in summarize(name, resolution=pixels).layers}


def test_stages_of_resnet50():
    # He et al. 2015, Table 1.
    found = outputs("resnet50")
    assert found["stem"] == (112, 112, 64)
    for i, (side, inner, blocks) in enumerate([(56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)], start=1):
        assert found[f"stage{i}_block{blocks}/branch/conv2"] == (side, side, inner)
        assert found[f"stage{i}_block{blocks}/branch/conv3"] == (side, side, 4 * inner)
        assert f"stage{i}_block{blocks + 1}/branch/conv1" not in found
    assert found["classifier"] == (1000,)


@pytest.mark.parametrize(("name", "side"), [("resnet50", 56), ("resnet50_v1", 28)])
def test_which_convolution_strides(name, side):
    found = outputs(name)
    assert found["stage2_block1/branch/conv1"] == (side, side, 128)
    assert found["stage2_block1/branch/conv2"] == (28, 28, 128)
    assert found["stage1_block1/branch/conv1"] == (56, 56, 64)  # the pool has halved before


@pytest.mark.parametrize(
    ("name", "kernel", "widened"),
    [
        ("resnext50_32x4d", (3, 3, 4, 128), 256),  # arXiv 1611.05431, Table 1
        ("resnext101_64x4d", (3, 3, 4, 256), 256),
        ("wide_resnet50_2", (3, 3, 128, 128), 256),
    ],
)
def test_groups_and_width(name, kernel, widened):
    block = shapes_of(name, depth=0.1)["stage1_block1"]["branch"]
    assert block["conv2"]["kernel"].shape == kernel
    assert block["conv3"]["kernel"].shape == (1, 1, kernel[3], widened)


def test_se_squeezes_the_blocks_output():
    for name, channels in (("se_resnet18", 64), ("se_resnet50", 256)):
        se = shapes_of(name, depth=0.1)["stage1_block1"]["branch"]["se"]
        assert se["reduce"]["kernel"].shape == (1, 1, channels, channels // 16)
        assert se["expand"]["kernel"].shape == (1, 1, channels // 16, channels)


@pytest.mark.parametrize("layers", [20, 32, 44, 56, 110])
def test_cifar_depth_is_6n_plus_2(layers):
    found = outputs(f"resnet{layers}_cifar")
    weighted = [name for name in found if "conv" in name or name in ("stem", "classifier")]
    assert len(weighted) == layers
    n = (layers - 2) // 6
    for i, (side, filters) in enumerate([(32, 16), (16, 32), (8, 64)], start=1):
        assert {found[f"stage{i}_block{j}/branch/conv2"] for j in range(1, n + 1)} == {(side, side, filters)}
    assert found["stem"] == (32, 32, 16)


# Values


def test_zero_init_last_makes_each_block_the_identity():
    network = create_model("resnet20_cifar", stage_sizes=(2, 2), zero_init_last=True)
    variables = initialize(network, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    # Two blocks a stage: within a stage the identity, between stages the shortcut A. The stem's output is not below 0.
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0]) for name, values in updates["intermediates"].items()}
    assert maps["stage1"].min() >= 0
    assert maps["stage1"].max() > 0
    expected = maps["stage1"][:, ::2, ::2]
    np.testing.assert_array_equal(maps["stage2"], np.concatenate([expected, np.zeros_like(expected)], axis=3))


def test_preactivation():
    """He et al. 2016: the norms stand before the convolutions, one is at the end, and what a block hands on is a plain sum."""
    params = shapes_of("resnet50", preactivation=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_549_352  # timm's resnetv2_50
    assert set(params["stage1_block1"]) == {"norm", "branch", "shortcut"}
    assert set(params["stage1_block1"]["shortcut"]) == {"conv"}
    assert set(params["stage1_block1"]["branch"]) == {"conv1", "norm2", "conv2", "norm3", "conv3"}
    assert "stem_norm" not in params
    assert params["head_norm"]["scale"].shape == (2048,)
    # Without its last convolution a block is the identity, below 0 too.
    network = create_model("resnet20_cifar", stage_sizes=(2,), preactivation=True)
    variables = initialize(network, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    stem = Conv(16, 3).apply({"params": variables["params"]["stem"]}, images)
    for j in (1, 2):
        last = variables["params"][f"stage1_block{j}"]["branch"]["conv2"]
        last["kernel"] = jnp.zeros_like(last["kernel"])
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    assert stem.min() < 0
    np.testing.assert_array_equal(updates["intermediates"]["stage1"][0], stem)


def test_padding_same_and_symmetric_differ_only_in_where_they_look():
    shapes = [shapes_of("resnet18", padding=padding) for padding in ("same", "symmetric")]
    assert shapes[0] == shapes[1]
    found = [summarize(create_model("resnet18", padding=padding)) for padding in ("same", "symmetric")]
    assert found[0].layers == found[1].layers
