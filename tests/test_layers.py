"""The shared layers against values worked out by hand, and batch normalisation on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import lax
from jax.sharding import PartitionSpec

from cnnfamily import create_model
from cnnfamily.errors import UsageError
from cnnfamily.models import layers
from cnnfamily.models.layers import (
    BatchNorm,
    Conv,
    Linear,
    SqueezeExcite,
    adaptive_average,
    check_images,
    choose,
    conv_and_norm,
    dropout,
    local_response_norm,
)
from cnnfamily.models.pooling import max_pool_to_the_edge


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Convolution and linear layer


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "outputs"),
    [
        (8, 3, 1, "symmetric", 8),
        (8, 3, 1, "same", 8),
        (8, 3, 1, "valid", 6),
        (8, 3, 2, "symmetric", 4),
        (8, 3, 2, "same", 4),
        (8, 3, 2, "valid", 3),
        (7, 3, 2, "symmetric", 4),
        (7, 3, 2, "same", 4),
        (8, 1, 2, "symmetric", 4),
        (8, 5, 2, "same", 4),
        (8, 2, 1, "symmetric", 7),  # an even kernel has no middle
        (8, 2, 1, "same", 8),
    ],
)
def test_conv_sizes(size, kernel, stride, padding, outputs):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    conv = Conv(4, kernel, stride, padding)
    found, variables = jax.eval_shape(conv.init_with_output, jax.random.key(0), images)
    assert found.shape == (2, outputs, outputs, 4)
    assert jax.tree.map(lambda x: x.shape, variables) == {"params": {"kernel": (kernel, kernel, 3, 4)}}


@pytest.mark.parametrize(
    ("padding", "stride", "expected"),
    [
        # Of a row 1, 2, 3, 4 under the kernel 1, 10, 100: out of sight is 0.
        ("symmetric", 1, [210, 321, 432, 43]),
        ("same", 1, [210, 321, 432, 43]),
        ("valid", 1, [321, 432]),
        ("symmetric", 2, [210, 432]),  # one zero before
        ("same", 2, [321, 43]),  # one zero after
        ("valid", 2, [321]),
    ],
)
def test_conv_values(padding, stride, expected):
    # The middle row of a 3x3 kernel on a map of 4x4 whose second row holds the numbers: output row 1, or 0 without padding.
    images = np.zeros((1, 4, 4, 1), np.float32)
    images[0, :, :, 0] = [1, 2, 3, 4]
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, :, 0, 0] = [1, 10, 100]
    output = Conv(1, 3, stride, padding).apply({"params": {"kernel": kernel}}, images)
    np.testing.assert_array_equal(output[0, 0, :, 0], expected)


def test_conv_groups_and_bias():
    images = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 1, 1, 4)
    kernel = np.array([[1.0, 10.0], [100.0, 1000.0]], np.float32).reshape(1, 1, 2, 2)  # [inputs of a group, filters]
    bias = np.array([0.5, -0.5], np.float32)
    output = Conv(2, 1, groups=2, bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, images)
    np.testing.assert_array_equal(output.ravel(), [1 * 1 + 2 * 100 + 0.5, 3 * 10 + 4 * 1000 - 0.5])


def test_linear():
    kernel, bias = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32), np.array([0.5, 0.0, -0.5], np.float32)
    output = Linear(3).apply({"params": {"kernel": kernel, "bias": bias}}, np.array([[1.0, 10.0]], np.float32))
    np.testing.assert_array_equal(output, [[41.5, 52, 62.5]])


def test_linear_without_bias():
    output, variables = Linear(3, bias=False).init_with_output(jax.random.key(0), np.ones((1, 2), np.float32))
    assert variables["params"].keys() == {"kernel"}
    np.testing.assert_allclose(output[0], variables["params"]["kernel"].sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("layer", [Conv(4, 3, bias=True, dtype="bfloat16"), Linear(4, dtype="bfloat16")])
def test_parameters_stay_float32(layer):
    output, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "expected"),  # at -4, -3, -1, 0, 1, 3, 4: relu6(x + 3) / 6, and x times it
    [("hard_sigmoid", [0, 0, 1 / 3, 1 / 2, 2 / 3, 1, 1]), ("hard_swish", [0, 0, -1 / 3, 0, 2 / 3, 3, 4])],
)
def test_hard_activations(name, expected):
    x = jnp.array([-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0])
    np.testing.assert_allclose(layers.ACTIVATIONS[name](x), expected, rtol=1e-6)


@pytest.mark.usefixtures("on_cpu")  # elsewhere after the convolution too
@pytest.mark.parametrize("fields", [{}, {"batch_norm": False}, {"norm_place": "after"}, {"preactivation": True}])
def test_in_evaluation_bfloat16_is_rounded_once(fields):
    """From a convolution to the activation behind its norm: in float32 from the same operands and rounded, but for ties."""
    network = create_model("resnet20_cifar", **fields)

    class Part(nn.Module):
        dtype: str

        @nn.compact
        def __call__(self, x):
            conv, norm = conv_and_norm(network.clone(dtype=self.dtype, parent=None), train=False)
            return norm(nn.silu, name="norm")(x if network.preactivation else conv(8, 3, name="conv")(x))

    x = jnp.asarray(draw(2, 9, 9, 4), jnp.bfloat16)
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), Part("float32").init(jax.random.key(0), x))
    found = jax.jit(Part("bfloat16").apply)(variables, x)
    exact = jax.jit(Part("float32").apply)(variables, x.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    assert np.mean(found == exact.astype(jnp.bfloat16)) > 0.99


def test_in_evaluation_a_sum_is_rounded_once():
    """Squeeze-and-excitation and the sum with the shortcut, in float32 from norms that are not rounded, but for ties."""
    network = create_model("resnet20_cifar", dtype="bfloat16", stage_sizes=(1, 1), shortcut="B", se_reduction=4)
    images = jnp.asarray(draw(4, 8, 8, 3))
    variables = network.init(jax.random.key(0), images)
    apply = jax.jit(partial(network.apply, capture_intermediates=lambda module, _: "stage2_block1" in module.path))
    found = flatten_dict(apply(variables, images)[1]["intermediates"]["stage2_block1"], sep="/")
    gated = found["branch/se/__call__"][0]
    assert gated.dtype == jnp.float32
    gate = nn.sigmoid(found["branch/se/expand/__call__"][0]).astype(jnp.float32)
    np.testing.assert_allclose(gated, found["branch/norm2/__call__"][0] * gate, rtol=2**-7)  # the gate is in bfloat16
    output = found["__call__"][0]
    assert output.dtype == jnp.bfloat16
    expected = nn.relu(gated + found["shortcut/norm/__call__"][0]).astype(jnp.bfloat16)
    assert np.mean(output == expected) > 0.99


@pytest.mark.parametrize("name", [pytest.param("efficientnet_b0", marks=pytest.mark.full), "mobilenet_v3_small"])
def test_in_evaluation_squeeze_and_excitation_sees_what_is_not_rounded(name):
    network = create_model(name, dtype="bfloat16")
    streams = {stream: jax.random.key(0) for stream in ("params", "stochastic_depth", "dropout")}
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, SqueezeExcite) and context.method_name == "__call__":
            seen.append(args[0].dtype)
        return call(*args, **kwargs)

    def inputs(**fields):
        seen.clear()
        with nn.intercept_methods(record):
            jax.eval_shape(partial(network.init, **fields), streams, jnp.zeros((1, 32, 32, 3)))
        return set(seen)

    assert inputs() == {jnp.dtype("float32")}
    assert inputs(train=True) == {jnp.dtype("bfloat16")}


# Batch normalisation

SCALE, BIAS = np.array([1.5, -0.5], np.float32), np.array([0.25, 2.0], np.float32)
OLD_MEAN, OLD_VAR = np.array([3.0, -1.0], np.float32), np.array([2.0, 5.0], np.float32)
NORM = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": OLD_MEAN, "var": OLD_VAR}}


def by_hand(x, group, epsilon=1e-5):
    """Output and the statistics' means over contiguous groups; the variance divides by n."""
    outputs, means, variances = [], [], []
    for part in np.split(np.asarray(x, np.float64), len(x) // group):
        mean = part.sum((0, 1, 2)) / part[..., 0].size
        var = ((part - mean) ** 2).sum((0, 1, 2)) / part[..., 0].size
        outputs.append((part - mean) / np.sqrt(var + epsilon) * SCALE + BIAS)
        means.append(mean)
        variances.append(var)
    return np.concatenate(outputs), np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize("group", [0, 8, 4, 2, 1])
def test_batch_norm_in_training(group):
    x = 2 * draw(8, 3, 3, 2) + 1
    expected, mean, var = by_hand(x, group or 8)
    norm = BatchNorm(train=True, momentum=0.75, group=group)
    output, updates = norm.apply(NORM, x, mutable=["batch_stats"])
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    running = updates["batch_stats"]
    np.testing.assert_allclose(running["mean"], 0.75 * OLD_MEAN + 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.75 * OLD_VAR + 0.25 * var, rtol=1e-5)


def test_batch_norm_in_evaluation():
    x = draw(4, 3, 3, 2)
    output, updates = BatchNorm(train=False, epsilon=0.1).apply(NORM, x, mutable=["batch_stats"])
    np.testing.assert_allclose(output, (x - OLD_MEAN) / np.sqrt(OLD_VAR + 0.1) * SCALE + BIAS, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], NORM["batch_stats"])


def test_batch_norm_starts_from_zero_and_one_whatever_it_is_initialised_with():
    variables = BatchNorm(train=True).init(jax.random.key(0), 5 + draw(4, 2, 2, 2))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])


def on_devices(step, devices, *operands, outputs):
    """`step(shared, x)` on as many devices, x cut along the batch, and its outputs, "cut" likewise or the same on all."""
    specs = {"cut": PartitionSpec("data"), "same": PartitionSpec()}
    outputs = jax.tree.map(specs.get, outputs)
    mapped = jax.shard_map(
        step, mesh=mesh_of(devices), in_specs=(specs["same"], specs["cut"]), out_specs=outputs, check_vma=False
    )
    # Programs of different numbers of CPU devices that are in flight together can deadlock.
    return jax.block_until_ready(jax.jit(mapped)(*operands))


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.full) for n in (1, 2)), 4])
@pytest.mark.parametrize(
    "group", [2, pytest.param(4, marks=pytest.mark.full), 8, pytest.param(0, marks=pytest.mark.full)]
)  # on 4 devices of 2 examples: one device, two, all
def test_batch_norm_is_the_same_function_on_any_number_of_devices(x64, devices, group):
    x = np.float64(draw(8, 2, 2, 2))
    target = np.float64(draw(8, 2, 2, 2, seed=1))
    weights = {"before": np.array([0.7, -1.3]), **jax.tree.map(np.float64, NORM["params"])}
    stats = jax.tree.map(np.float64, NORM["batch_stats"])

    def local_loss(output, target):
        return (jnp.tanh(output) * target).mean()  # not linear: the gradient passes through mean and variance

    def step(weights, both):
        """One device's step, as `train_step` has it: local loss, then the mean over devices of all that is shared."""

        def loss(weights):
            norm = BatchNorm(train=True, group=group, axis_name="data", dtype="float64")
            params = {"scale": weights["scale"], "bias": weights["bias"]}
            variables = {"params": params, "batch_stats": stats}
            output, updates = norm.apply(variables, both[0] * weights["before"] + both[0] ** 3, mutable=["batch_stats"])
            return local_loss(output, both[1]), (output, updates["batch_stats"])

        grads, (output, updates) = jax.grad(loss, has_aux=True)(weights)
        return output, lax.pmean(grads, "data"), lax.pmean(updates, "data")

    output, grads, updates = on_devices(step, devices, weights, (x, target), outputs=("cut", "same", "same"))

    def plainly(weights):
        grouped = (x * weights["before"] + x**3).reshape(-1, group or 8, 2, 2, 2)
        mean, var = grouped.mean((1, 2, 3), keepdims=True), jnp.var(grouped, (1, 2, 3), keepdims=True)
        output = (grouped - mean) / jnp.sqrt(var + 1e-5) * weights["scale"] + weights["bias"]
        output = output.reshape(x.shape)
        return local_loss(output, target), (output, mean.mean((0, 1, 2, 3)), var.mean((0, 1, 2, 3)))

    expected, (plain_output, mean, var) = jax.grad(plainly, has_aux=True)(jax.tree.map(jnp.asarray, weights))
    np.testing.assert_allclose(output, plain_output, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(updates["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(updates["var"], 0.9 * stats["var"] + 0.1 * var, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), grads, expected)


@pytest.mark.parametrize("devices", [1, 4])
def test_batch_norm_with_a_mean_large_beside_the_deviation(devices):
    # A float32 near 1000 has steps of 6e-5. E[x^2] - E[x]^2 has errors near 0.06 where the variance is 0.01.
    x = np.float32(1000 + 0.1 * draw(8, 4, 4, 2))
    norm = BatchNorm(train=True, axis_name="data")

    def step(variables, x):
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    output = on_devices(step, devices, NORM, x, outputs="cut")
    np.testing.assert_allclose(output, by_hand(x, 8)[0], atol=0.03)  # the mean itself is off by up to 2e-4


@pytest.mark.parametrize("group", [3, 16, 5])
def test_batch_norm_groups_must_divide_the_batch(group):
    with pytest.raises(UsageError, match=rf"groups of {group} examples \(model.norm_group\) do not divide a batch of 8"):
        BatchNorm(train=True, group=group).apply(NORM, jnp.ones((8, 1, 1, 2)), mutable=["batch_stats"])


def test_batch_norm_groups_must_not_cut_a_device_in_the_middle():
    def step(variables, x):
        return BatchNorm(train=True, group=6, axis_name="data").apply(variables, x, mutable=["batch_stats"])[0]

    with pytest.raises(UsageError, match="in 3 x 4: expected a divisor"):
        on_devices(step, 3, NORM, jnp.ones((12, 1, 1, 2)), outputs="cut")


# Squeeze-and-excitation, dropout


# Pooling and local response normalisation


def image_of(rows):
    return np.asarray(rows, np.float32)[None, :, :, None]


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding", "outputs"),
    [  # of torch's MaxPool2d with ceil_mode=True, worked out by its rule
        (112, 3, 2, 0, 56),
        (7, 3, 2, 0, 3),  # fits exactly
        (8, 3, 2, 0, 4),  # the last window hangs over by one
        (5, 2, 2, 0, 3),
        (3, 2, 2, 0, 2),
        (5, 3, 1, 1, 5),
        (2, 1, 3, 1, 1),  # a second window would start in the far padding
    ],
)
def test_max_pool_sizes(size, window, stride, padding, outputs):
    found = jax.eval_shape(lambda x: max_pool_to_the_edge(x, window, stride, padding), jnp.zeros((1, size, size + stride, 2)))
    assert found.shape[1:3] == (outputs, outputs + 1)


def test_max_pool_values():
    rows = [[1, 2, 3, 9], [4, 5, 6, -1], [7, 8, 0, -2], [-3, -4, -5, -6]]
    np.testing.assert_array_equal(max_pool_to_the_edge(image_of(rows), 3, 2)[0, ..., 0], [[8, 9], [8, 0]])
    np.testing.assert_array_equal(
        max_pool_to_the_edge(-image_of(rows), 3, 1, 1)[0, ..., 0][3], [4, 5, 6, 6]
    )  # of what is there, no zeros


def test_adaptive_average():
    """Bins of 5 in 3: [0, 2), [1, 4), [3, 5); of 2 in 3: [0, 1), [0, 2), [1, 2)."""
    x = np.arange(10, dtype=np.float32).reshape(1, 5, 2, 1)
    rows = np.stack([x[0, 0:2].mean(0), x[0, 1:4].mean(0), x[0, 3:5].mean(0)])[..., 0]
    expected = np.stack([rows[:, 0], rows.mean(1), rows[:, 1]], axis=1)
    np.testing.assert_allclose(adaptive_average(x, 3)[0, ..., 0], expected, rtol=1e-6)
    whole = draw(2, 7, 7, 3)
    assert adaptive_average(whole, 7) is whole
    np.testing.assert_allclose(adaptive_average(whole, 1)[:, 0, 0], whole.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(adaptive_average(draw(1, 1, 1, 3), 6), np.broadcast_to(draw(1, 1, 1, 3), (1, 6, 6, 3)))
    # 14 in 4 as torchvision's GoogLeNet has it: not the paper's windows of 5 at a stride of 3.
    ramp = np.broadcast_to(np.arange(14, dtype=np.float32)[:, None], (14, 14))
    np.testing.assert_allclose(adaptive_average(image_of(ramp), 4)[0, :, 0, 0], [1.5, 4.5, 8.5, 11.5], rtol=1e-6)


def test_local_response_norm():
    x = draw(2, 3, 3, 7) * 30
    expected = np.empty_like(x, np.float64)
    for i in range(7):
        neighbours = x[..., max(0, i - 2) : min(7, i + 3)].astype(np.float64)
        expected[..., i] = x[..., i] / (2 + 1e-4 * (neighbours**2).sum(-1)) ** 0.75
    np.testing.assert_allclose(local_response_norm(x), expected, rtol=1e-5)
    assert local_response_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_squeeze_excite():
    x = np.array([[[1.0, 10.0], [3.0, -10.0]]], np.float32)[None]  # means 2 and 0
    reduce = {"kernel": np.array([[2.0], [7.0]], np.float32)[None, None], "bias": np.array([-1.0], np.float32)}
    expand = {"kernel": np.array([[1.0, -1.0]], np.float32)[None, None], "bias": np.array([0.0, 0.5], np.float32)}
    output = SqueezeExcite(1).apply({"params": {"reduce": reduce, "expand": expand}}, x)
    hidden = 2 * 2 + 7 * 0 - 1
    gates = 1 / (1 + np.exp([-hidden, hidden - 0.5]))
    np.testing.assert_allclose(output, x * gates, rtol=1e-6)
    blocked = SqueezeExcite(1).apply({"params": {"reduce": reduce, "expand": expand}}, -x)  # the hidden unit at -5 is cut off
    np.testing.assert_allclose(blocked, -x / (1 + np.exp([0.0, -0.5])), rtol=1e-6)


class Dropouts(nn.Module):
    """Two layers with dropout in a row."""

    rate: float

    def __call__(self, x, position):
        once = dropout(self, x, self.rate, position)
        return once, dropout(self, x, self.rate, position)


def masks(position, rate=0.3, shape=(40, 50)):
    rngs = {"dropout": jax.random.key(1)}
    x = jnp.ones((len(position), *shape))
    (found, other), recorded = Dropouts(rate).apply({}, x, jnp.asarray(position), rngs=rngs, mutable=["choices"])
    assert (found != other).any(), "each layer draws for itself"
    np.testing.assert_array_equal(found > 0, recorded["choices"]["dropout"][0])
    return np.asarray(found)


def test_dropout_rate_and_scale():
    found = masks(range(4))
    assert set(np.unique(found)) == {0, np.float32(1 / 0.7)}
    # 8,000 draws: the share that is kept has a deviation of sqrt(0.3 * 0.7 / 8000).
    assert abs((found > 0).mean() - 0.7) < 5 * (0.3 * 0.7 / found.size) ** 0.5


def test_dropout_masks_belong_to_positions():
    whole = masks(range(6), shape=(8,))
    assert len(np.unique(whole, axis=0)) == 6
    np.testing.assert_array_equal(masks([4, 0, 2], shape=(8,)), whole[[4, 0, 2]])
    np.testing.assert_array_equal(np.concatenate([masks(range(3), shape=(8,)), masks(range(3, 6), shape=(8,))]), whole)


# Checks


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 32, 32), r"images of shape \(2, 32, 32\): expected \[batch, height, width, 3\]"),
        ((2, 32, 32, 1), r"\(2, 32, 32, 1\): expected .* 3\]; field in_channels"),
        ((2, 32, 31, 3), "images of 32 x 31 pixels are smaller .* expected 32 x 32 or more"),
    ],
)
def test_check_images(shape, message):
    with pytest.raises(UsageError, match=message):
        check_images(jnp.zeros(shape), 3, smallest=32)
    check_images(jnp.zeros((0, 32, 40, 3)), 3, smallest=32)


def test_choose():
    assert choose("activation", "relu6", layers.ACTIVATIONS) is nn.relu6
    assert choose("form", "b", ("a", "b")) == "b"
    with pytest.raises(UsageError, match="unknown activation 'swish'; did you mean 'hard_swish'\\? known: relu, "):
        choose("activation", "swish", layers.ACTIVATIONS)


@pytest.mark.parametrize(
    ("name", "at_minus_2_and_7"),
    [
        ("relu", [0, 7]),
        ("relu6", [0, 6]),
        ("gelu", [-2 * 0.0227501319, 7]),
        ("silu", [-2 / (1 + np.exp(2)), 7 / (1 + np.exp(-7))]),
        ("hard_swish", [-2 * 1 / 6, 7]),
        ("tanh", [np.tanh(-2), np.tanh(7)]),
        ("sigmoid", [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-7))]),
        ("identity", [-2, 7]),
    ],
)
def test_activations(name, at_minus_2_and_7):
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.array([-2.0, 7.0])), at_minus_2_and_7, rtol=1e-6)
