"""The numbers that parameters start from: their spread, and that drawing them at once changes none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from flax.traverse_util import flatten_dict

from cnnfamily import models
from cnnfamily.errors import UsageError
from cnnfamily.models import convolution, create_model, initializers


@pytest.mark.parametrize(
    ("shape", "groups", "fan_out"),
    [
        ((3, 3, 64, 128), 1, 9 * 128),
        ((3, 3, 16, 128), 4, 9 * 32),
        ((5, 5, 1, 640), 640, 25),  # depthwise: the area alone
        ((1, 1, 256, 64), 1, 64),
    ],
)
def test_he_fan_out(shape, groups, fan_out):
    numbers = np.asarray(initializers.he_fan_out(groups)(jax.random.key(0), shape, jnp.float32), np.float64)
    n, std = math.prod(shape), math.sqrt(2 / fan_out)
    assert numbers.shape == shape
    # Of n normal numbers the mean has a deviation of std / sqrt(n), the standard deviation one of std / sqrt(2 n).
    assert abs(numbers.mean()) < 5 * std / math.sqrt(n)
    assert abs(numbers.std() - std) < 5 * std / math.sqrt(2 * n)
    assert abs(numbers).max() > 3.5 * std  # not truncated


def test_normal():
    numbers = np.asarray(initializers.normal(0.01)(jax.random.key(0), (512, 100), jnp.float32), np.float64)
    n = numbers.size
    assert numbers.shape == (512, 100)
    assert abs(numbers.mean()) < 5 * 0.01 / math.sqrt(n)
    assert abs(numbers.std() - 0.01) < 5 * 0.01 / math.sqrt(2 * n)
    assert abs(numbers).max() > 0.035  # not truncated


@pytest.mark.parametrize(
    ("init", "shape", "bound"),
    [
        (initializers.uniform_fan_out, (300, 25), 1 / 5),
        (initializers.uniform_fan_in, (5, 5, 6, 40), 2.4 / 150),
        (initializers.uniform_fan_in, (120, 84), 2.4 / 120),
        (initializers.xavier_fan_in, (5, 5, 3, 40), 0.2),
        (initializers.torch_uniform(64), (7, 300), 1 / 8),
    ],
)
def test_uniform(init, shape, bound):
    numbers = np.asarray(init(jax.random.key(0), shape, jnp.float32))
    n = numbers.size
    assert abs(numbers).max() <= bound
    # The chance that none of n falls in the outer share q at an end is (1 - q)^n.
    assert min(numbers.max(), -numbers.min()) > bound * (1 - 40 / n)
    assert abs(numbers.mean()) < 5 * bound / math.sqrt(3 * n)


def test_partial_identity():
    """A channel each as it is, whatever lies beside it, and the other filters as drawn; with few filters some channels."""
    draw, key = initializers.normal(1.0), jax.random.key(0)
    kernel = initializers.partial_identity(draw)(key, (3, 3, 2, 5), np.float32)
    images = np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype(np.float32)
    maps = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(maps[..., :2], images)
    np.testing.assert_array_equal(kernel[..., 2:], draw(key, (3, 3, 2, 5), np.float32)[..., 2:])
    few = initializers.partial_identity(draw)(key, (3, 3, 5, 2), np.float32)
    assert [tuple(place) for place in np.argwhere(few)] == [(1, 1, 0, 0), (1, 1, 1, 1)]


def test_a_bound_for_each_column():
    bound = np.array([0.1, 10.0])
    numbers = initializers.symmetric_uniform(jax.random.key(0), (1000, 2), jnp.float32, bound)
    np.testing.assert_allclose(abs(numbers).max(0), bound, rtol=0.03)


@pytest.mark.parametrize("shape", [(7,), (1024,), (5, 5, 41)])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_cut_from_a_larger_draw_is_the_draw(kind, shape):
    key = jax.random.key(3)
    expected = getattr(jax.random, kind)(key, shape)
    np.testing.assert_array_equal(initializers._random(kind, key, shape, jnp.float32), expected)
    np.testing.assert_array_equal(jax.jit(lambda key: initializers._random(kind, key, shape, jnp.float32))(key), expected)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_many_numbers_are_drawn_in_pieces(kind, monkeypatch):
    """Each with a key of its own, the first with that of a draw that fits; eager and traced alike."""
    monkeypatch.setattr(initializers, "MOST_DRAWN", 1024)
    key, draw = jax.random.key(3), getattr(jax.random, kind)
    expected = [draw(key if piece == 0 else jax.random.fold_in(key, piece), (1024,)) for piece in range(3)]
    found = initializers._random(kind, key, (50, 51), jnp.float32)
    np.testing.assert_array_equal(found.ravel(), jnp.concatenate(expected)[: 50 * 51])
    traced = jax.jit(lambda key: initializers._random(kind, key, (50, 51), jnp.float32))(key)
    np.testing.assert_array_equal(traced, found)
    assert len(np.unique(found)) > 2540  # 2550, but for values of 23 bits that meet by chance


def test_a_network_that_has_its_parameters_draws_none(monkeypatch):
    # Drawn again in every trace of `apply`, those of wide_resnet101_2 took 3 seconds.
    network, images = create_model("lenet5", width=0.2), jnp.zeros((1, 32, 32, 1))
    variables = models.initialize(network, jax.random.key(0))
    monkeypatch.delattr(initializers, "_random")
    network.apply(variables, images)
    variables["params"]["classifier"]["kernel"] = jnp.zeros((16, 10))
    with pytest.raises(ScopeParamShapeError, match="classifier"):
        network.apply(variables, images)


def test_draws_come_in_few_sizes():
    before = initializers._draw._cache_size()
    for size in range(1025, 4097, 256):
        initializers._random("normal", jax.random.key(0), (size,), jnp.dtype(jnp.bfloat16))
    assert initializers._draw._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("name", "fields"), [("lenet5", {}), ("lenet5_1998", {}), ("resnet20_cifar", {"depth": 0.34, "shortcut": "B"})]
)
def test_initialize_is_init(name, fields):
    network, key = create_model(name, **fields), jax.random.key(5)
    expected = {"batch_stats": {}, **network.init(key, jnp.zeros((1, 32, 32, network.in_channels)))}
    found = models.initialize(network, key)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert not isinstance(a, jax.core.Tracer)
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert models.variable_shapes(network) == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)


def test_shapes_are_traced_without_a_draw_and_by_the_plain_convolution_alone(monkeypatch):
    """And afterwards all is as before, after an error too."""
    network = create_model("lenet5", width=0.2)
    with monkeypatch.context() as context:
        context.delattr(initializers, "_random")
        context.delattr(convolution, "_output")
        shapes = models.variable_shapes(network)
        with pytest.raises(UsageError, match="33 x 33"):
            models.variable_shapes(network, resolution=33)
        with pytest.raises(NameError, match="_output"):
            network.apply(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), jnp.zeros((1, 32, 32, 1)))
    assert jax.tree.leaves(models.initialize(network, jax.random.key(0)))[-1].any()


OF_MODULES = [
    ("resnet20_cifar", {"depth": 0.34}),
    pytest.param("googlenet", {"width": 0.125, "aux": True}, marks=pytest.mark.full),
    ("airbench94", {"width": 0.25}),
    ("lenet5_1998", {"output": "linear"}),
]


@pytest.mark.parametrize(("name", "fields"), OF_MODULES)
def test_modules_that_are_asked_for_are_drawn_alone_and_alike(name, fields, monkeypatch):
    network, key = create_model(name, **fields), jax.random.key(3)
    expected = flatten_dict(models.initialize(network, key))
    drawn, draw = [], initializers._random
    monkeypatch.setattr(initializers, "_random", lambda *given: drawn.append(given) or draw(*given))
    modules = [path[1:-1] for path in expected if path[-2] in ("classifier", "hidden", "stem", "stem_norm", "pool1")]
    found = flatten_dict(models.initialize(network, key, modules=modules))
    assert found.keys() == {path for path in expected if path[1:-1] in modules} != set()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=str(path))
    assert len(drawn) == sum(path[0] == "params" and path[-1] == "kernel" for path in found)


def test_no_module_draws_nothing_and_one_that_is_not_there_is_a_usage_error():
    assert models.initialize(create_model("lenet5"), jax.random.key(0), modules=()) == {"params": {}, "batch_stats": {}}
    with pytest.raises(UsageError, match="unknown module 'clasifier'; did you mean 'classifier'"):
        models.initialize(create_model("lenet5"), jax.random.key(0), modules=[("clasifier",)])


def test_initialize_at_another_resolution():
    network = create_model("resnet20_cifar", depth=0.1)
    small, large = (models.initialize(network, jax.random.key(0), resolution=size) for size in (0, 48))
    jax.tree.map(np.testing.assert_array_equal, small, large)


def test_initialize_a_network_that_asks_linen_for_its_parameters():
    class Plain(nn.Module):
        resolution: int = 4
        in_channels: int = 2
        dtype: str = "float32"

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    found = models.initialize(Plain(), jax.random.key(0))
    expected = Plain().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, {"batch_stats": {}, "params": expected})
    assert models.variable_shapes(Plain()) == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)
