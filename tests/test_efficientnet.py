"""EfficientNet's layer table, its squeezes, and what the coefficients do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.models import create_model, efficientnet, stochastic_depth
from cnnfamily.models.stochastic_depth import Drop
from cnnfamily.summary import summarize

# Tan and Le 2019, Table 1 (B0 at 224 pixels), as the authors' code has it: side, filters and blocks of each stage's output.
B0 = [(112, 16, 1), (56, 24, 2), (28, 40, 2), (14, 80, 3), (14, 112, 3), (7, 192, 4), (7, 320, 1)]
EXPANSIONS, KERNELS = [1, 6, 6, 6, 6, 6, 6], [3, 3, 5, 3, 5, 5, 3]


def layers_of(name, **fields):
    return {layer.name: layer for layer in summarize(create_model(name, **fields)).layers}


def blocks_of(found):
    return list(dict.fromkeys(name.split("/")[0] for name in found if "_block" in name))


def test_layers_of_b0():
    found = layers_of("efficientnet_b0")
    assert found["stem"].output == (112, 112, 32)
    previous = 32
    for i, (side, filters, repeats) in enumerate(B0, start=1):
        for j in range(1, repeats + 1):
            block = f"stage{i}_block{j}"
            assert found[f"{block}/project"].output == (side, side, filters)
            expanded = previous * EXPANSIONS[i - 1]
            assert found[f"{block}/depthwise"].output == (side, side, expanded)
            assert found[f"{block}/depthwise"].params == expanded * KERNELS[i - 1] ** 2
            assert (f"{block}/expand" in found) == (i > 1)
            # A quarter of the block's input filters, not of the expanded ones.
            assert found[f"{block}/se/reduce"].output == (1, 1, previous // 4)
            assert found[f"{block}/se/expand"].output == (1, 1, expanded)
            previous = filters
    assert blocks_of(found) == [f"stage{i}_block{j}" for i, row in enumerate(B0, 1) for j in range(1, row[2] + 1)]
    assert found["head"].output == (7, 7, 1280)
    assert found["classifier"].output == (1000,)


def test_coefficients_of_b3():
    # Width 1.2, depth 1.4, by hand: 32, 16, 24, 40, 80, 112, 192, 320 and 1280 times 1.2 are 38.4, 19.2, 28.8, 48, 96, 134.4,
    # 230.4, 384 and 1536, rounded to eights; 1, 2, 2, 3, 3, 4 and 1 times 1.4 are rounded up.
    found = layers_of("efficientnet_b3")
    assert found["stem"].output[2] == 40
    filters, repeats = [24, 32, 48, 96, 136, 232, 384], [2, 3, 3, 5, 5, 6, 2]
    assert blocks_of(found) == [f"stage{i}_block{j}" for i in range(1, 8) for j in range(1, repeats[i - 1] + 1)]
    for name in blocks_of(found):
        assert found[f"{name}/project"].output[2] == filters[int(name[5]) - 1]
    assert found["stage2_block2/depthwise"].output[2] == 6 * 32
    assert found["head"].output == (10, 10, 1536)  # 300 pixels, halved five times and rounded up


def test_without_squeeze_and_excitation():
    assert not any("/se/" in name for name in layers_of("efficientnet_b0", se_ratio=0.0))


def test_se_never_squeezes_to_nothing():
    found = layers_of("efficientnet_b0", se_ratio=0.01, depth=0.1)
    assert {layer.output for name, layer in found.items() if name.endswith("se/reduce")} == {(1, 1, 1)}


def test_batch_norm_of_the_variants():
    # torchvision 0.29.1: B5 to B7 are ported with epsilon 1e-3 and momentum 0.01, that is 0.99 kept.
    for i in range(8):
        network = create_model(f"efficientnet_b{i}")
        assert (network.norm_epsilon, network.norm_momentum) == ((1e-3, 0.99) if i > 4 else (1e-5, 0.9))


def test_stochastic_depth_of_b0():
    network = create_model("efficientnet_b0")
    rates = stochastic_depth.drop_rates(network.stochastic_depth, 16, network.stochastic_depth_schedule)
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def train(network, images, variables=None, position=None):
    rngs = dict.fromkeys(("stochastic_depth", "dropout"), jax.random.key(0))
    return network.apply(variables, images, train=True, position=position, rngs=rngs, mutable=["batch_stats"])[0]


def test_every_block_counts_for_stochastic_depth(monkeypatch):
    asked = []

    def record(network, blocks, train, position):
        asked.append(blocks)
        return [Drop()] * blocks

    monkeypatch.setattr(efficientnet, "drops", record)
    for name in ("efficientnet_b0", "efficientnet_b1"):
        summarize(name)
    assert asked == [16, 23]  # blocks without a shortcut too, and depth scales them


def test_shortcuts_only_at_stride_1():
    # With its last scale at 0 a block is its shortcut, or nothing. On a map of one pixel stride 2 does not change the shape.
    stages = ((1, 32, 1, 16, 3), (1, 32, 1, 1, 3), (1, 32, 1, 2, 3))
    network = create_model("efficientnet_b0", stages=stages, num_classes=3)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    for block in ("stage2_block1", "stage3_block1"):
        variables["params"][block]["project_norm"]["scale"] = np.zeros(32, np.float32)
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0]) for name, values in updates["intermediates"].items()}
    assert maps["stage1"].shape == (1, 1, 1, 32)
    assert (maps["stage1"] != 0).all()
    np.testing.assert_array_equal(maps["stage2"], maps["stage1"])
    np.testing.assert_array_equal(maps["stage3"], np.zeros((1, 1, 1, 32)))


def test_dropout_only_in_training_and_by_its_rate():
    network = create_model("efficientnet_b0", stages=((1, 16, 1, 1, 3),), num_classes=4, dropout=0.999999)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    np.testing.assert_array_equal(train(network, images, variables), np.zeros((2, 4)))  # all dropped: the biases remain
    assert (network.apply(variables, images) != 0).all()
    kept = train(network.clone(dropout=0.0), images, variables)
    assert (kept != 0).all()


@pytest.mark.parametrize("pixels", [32, 33, 61])
def test_any_size_from_32_up(pixels):
    network = create_model("efficientnet_b0")
    logits, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))
    assert logits.shape == (1, 1000)
