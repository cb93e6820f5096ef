"""LeNet-5 of 1998, layer by layer, and the dense one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnnfamily.errors import UsageError
from cnnfamily.models import create_model
from cnnfamily.models.lenet import C3_TABLE, SparseConv, Subsample, rbf_codes, scaled_tanh, sum_pool
from cnnfamily.summary import summarize


def test_the_network_of_1998():
    # LeCun et al. 1998, section II-B: trainable parameters layer by layer.
    found = summarize("lenet5_1998")
    assert {layer.name: layer.params for layer in found.layers} == {
        "c1": 156,
        "s2": 12,
        "c3": 1_516,
        "s4": 32,
        "c5": 48_120,
        "f6": 10_164,
    }
    assert found.params == 60_000
    assert [layer.output for layer in found.layers] == [(28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (1, 1, 120), (84,)]
    # The paper's 340,908 connections are these, a bias for each output, 4 inputs and a bias in each sub-sampling unit, and the
    # fixed ones of the 10 codes.
    biases = 28 * 28 * 6 + 10 * 10 * 16 + 120 + 84
    assert found.macs == 28 * 28 * 150 + 10 * 10 * 1500 + 48_000 + 10_080
    assert found.macs + biases + 5 * (14 * 14 * 6 + 5 * 5 * 16) + 10 * 84 == 340_908
    assert summarize(create_model("lenet5_1998", output="linear")).params == 60_850


def test_the_dense_network():
    layers = {layer.name: (layer.params, layer.macs) for layer in summarize("lenet5").layers}
    assert layers == {
        "c1": (156, 117_600),
        "c3": (2_416, 240_000),
        "c5": (48_120, 48_000),
        "f6": (10_164, 10_080),
        "classifier": (850, 840),
    }


def test_table_1():
    assert len(set(C3_TABLE)) == 16
    assert [len(row) for row in C3_TABLE] == [3] * 6 + [4] * 9 + [6]
    counts = np.bincount(np.concatenate(C3_TABLE))
    assert counts.tolist() == [10] * 6  # each map of S2 is seen ten times
    rows = np.array([[source in row for row in C3_TABLE] for source in range(6)])
    # The columns of the paper's table: runs of three and of four, wrapping around.
    for start in range(6):
        assert sorted((start + i) % 6 for i in range(3)) == np.flatnonzero(rows[:, start]).tolist()
        assert sorted((start + i) % 6 for i in range(4)) == np.flatnonzero(rows[:, 6 + start]).tolist()


def test_sparse_convolution():
    draw = np.random.default_rng(0).normal
    x = draw(size=(2, 7, 7, 6)).astype(np.float32)
    layer = SparseConv(C3_TABLE, "float32")
    kernel = draw(size=(5, 5, 60)).astype(np.float32)
    bias = draw(size=16).astype(np.float32)
    dense, connection = np.zeros((5, 5, 6, 16), np.float32), 0
    for target, sources in enumerate(C3_TABLE):
        for source in sources:
            dense[:, :, source, target] = kernel[:, :, connection]
            connection += 1
    expected = lax.conv_general_dilated(x, dense, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias

    def apply(x):
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    np.testing.assert_allclose(apply(x), expected, rtol=1e-5, atol=1e-5)
    for source in range(6):
        changed = x.copy()
        changed[..., source] += 1
        differs = abs(apply(changed) - apply(x)).max((0, 1, 2)) > 1e-3
        assert differs.tolist() == [source in row for row in C3_TABLE]


def test_sparse_convolution_starts_within_each_maps_own_fan_in():
    kernel = SparseConv(C3_TABLE, "float32").init(jax.random.key(0), jnp.zeros((1, 5, 5, 6)))["params"]["kernel"]
    fan_in = 25 * np.concatenate([[len(row)] * len(row) for row in C3_TABLE])
    largest = abs(kernel).max((0, 1)) * fan_in / 2.4
    assert largest.max() <= 1
    assert largest.min() > 0.6  # of 25 uniform numbers, none above: 0.6^25 = 3e-6


def test_subsampling():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1) * np.array([1, -1], np.float32)
    layer = Subsample("float32")
    sums = np.array([[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]])
    variables = {"params": {"scale": np.array([0.5, 2.0], np.float32), "bias": np.array([1.0, 0.0], np.float32)}}
    output = layer.apply(variables, x)[0]
    np.testing.assert_array_equal(output[..., 0], 0.5 * sums + 1)
    np.testing.assert_array_equal(output[..., 1], -2 * sums)
    start = layer.init_with_output(jax.random.key(0), x)[0]  # starts as the mean
    np.testing.assert_array_equal(start[0, ..., 0], sums / 4)
    np.testing.assert_array_equal(sum_pool(x, (2, 2), (2, 2))[0, ..., 0], sums)


@pytest.mark.parametrize(("pool", "expected"), [("max", 5.0), ("average", 2.5)])
def test_pools_of_the_dense_network(pool, expected):
    network = create_model("lenet5", pool=pool, activation="identity")
    variables = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1))))
    variables["params"]["c1"]["kernel"] = variables["params"]["c1"]["kernel"].at[0, 0, 0, 0].set(1.0)  # passes pixels on
    image = np.zeros((1, 32, 32, 1), np.float32)
    image[0, 2:4, 2:4, 0] = [[0, 1], [4, 5]]
    _, updates = network.apply(variables, image, mutable=["intermediates"])
    assert updates["intermediates"]["s2_output"][0][0, 1, 1, 0] == expected


def test_scaled_tanh():
    # Appendix A: f(1) = 1 and f(-1) = -1, to the digits that it prints; the slope is steepest, 1.7159 * 2 / 3, at 0.
    np.testing.assert_allclose(scaled_tanh(jnp.array([1.0, -1.0])), [1, -1], atol=2e-5)
    np.testing.assert_allclose(scaled_tanh(jnp.array([0.0, 100.0])), [0, 1.7159], rtol=1e-6)
    assert jax.grad(scaled_tanh)(0.0) == pytest.approx(1.7159 * 2 / 3, rel=1e-6)


def test_rbf_codes():
    codes = rbf_codes()
    assert codes.shape == (10, 84)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    distances = {(a, b): int((codes[a] != codes[b]).sum()) for a, b in itertools.combinations(range(10), 2)}
    assert min(distances.values()) == distances[6, 8] == 7  # digits that look alike are near, as in the paper's figure 3


def test_rbf_output_is_the_distance_from_the_codes():
    network = create_model("lenet5_1998")
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    variables = network.init(jax.random.key(0), image)
    assert "classifier" not in variables["params"]
    logits, updates = network.apply(variables, image, mutable=["intermediates"])
    f6 = updates["intermediates"]["f6_output"][0]
    expected = [[-sum((a - b) ** 2 for a, b in zip(x, code, strict=True)) for code in rbf_codes()] for x in np.asarray(f6)]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "pixels", "message"),
    [
        ("lenet5_1998", {"num_classes": 5}, 32, "num_classes=5: the codes of output='rbf' are the 10 digits; output='linear'"),
        ("lenet5", {}, 33, r"images of 33 x 33 pixels: .* takes 32 x 32 \(model.resolution\)"),
        ("lenet5_1998", {}, 28, "images of 28 x 28 pixels are smaller"),
        ("lenet5", {"in_channels": 3}, 32, "field in_channels"),
    ],
)
def test_errors(name, fields, pixels, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(create_model(name, **fields).init, jax.random.key(0), jnp.zeros((1, pixels, pixels, 1)))


def test_a_linear_output_takes_any_number_of_classes():
    assert summarize(create_model("lenet5_1998", output="linear", num_classes=5)).params == 60_000 + 85 * 5


def test_a_larger_image():
    assert summarize(create_model("lenet5", resolution=36)).layers[2].output == (2, 2, 120)
