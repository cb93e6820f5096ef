"""Every network by name: what it takes, what it gives, and that all of it is used."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import cnnfamily
from cnnfamily.errors import UsageError
from cnnfamily.models import NETWORKS, build, create_model, initialize, list_models, model_config, variable_shapes
from cnnfamily.models.googlenet import MODULES
from cnnfamily.models.layers import ACTIVATIONS

STREAMS = ("stochastic_depth", "dropout")


# Names, configs, errors


def test_list_models():
    everything = list_models()
    assert everything == sorted(NETWORKS)
    assert list_models("resnet*_v1") == ["resnet101_v1", "resnet152_v1", "resnet50_v1"]
    assert list_models("efficientnet_b[01]") == ["efficientnet_b0", "efficientnet_b1"]
    assert list_models("lenet5") == ["lenet5"]
    assert list_models("nothing*") == []
    assert cnnfamily.list_models is list_models


@pytest.mark.parametrize("name", NETWORKS)
def test_model_config(name):
    config = model_config(name)
    network = build(config)
    fields = set(network.__dataclass_fields__) - {"parent", "name", "axis_name"}
    assert set(config) == fields | {"name"}
    assert config.name == name
    for field in fields:
        assert getattr(network, field) == config[field]
    assert create_model(name) == network


def test_overrides():
    network = create_model("resnet18", num_classes=7, width=2)  # an int where a float is expected is one
    assert (network.num_classes, network.width, type(network.width)) == (7, 2.0, float)
    config = model_config("efficientnet_b0")
    config.stochastic_depth = 0.5
    assert build(config).stochastic_depth == 0.5


def test_lists_become_tuples():
    # What a config.json gives back; a linen module must be hashable.
    stages = [list(stage) for stage in model_config("efficientnet_b0").stages]
    network = create_model("efficientnet_b0", stages=stages)
    assert network == create_model("efficientnet_b0")
    assert hash(network) == hash(create_model("efficientnet_b0"))
    assert create_model("resnet18", stage_sizes=[1, 1]).stage_sizes == (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnt50"}, "unknown model 'resnt50'; did you mean 'resnet50'\\? known: .*lenet5, "),
        ({}, "unknown model ''"),
        ({"name": "resnet50", "widht": 2.0}, "unknown field of resnet50 'widht'; did you mean 'width'\\? known: activation, "),
        ({"name": "resnet50", "axis_name": "data"}, "unknown field of resnet50 'axis_name'"),
        ({"name": "resnet50", "num_classes": "ten"}, "resnet50.num_classes='ten': expected int, as in 1000"),
        ({"name": "resnet50", "num_classes": 10.0}, "resnet50.num_classes=10.0: expected int"),
        ({"name": "resnet50", "zero_init_last": 1}, "resnet50.zero_init_last=1: expected bool, as in False"),
        ({"name": "resnet50", "norm_group": True}, "resnet50.norm_group=True: expected int"),
        ({"name": "resnet50", "width": "1"}, "resnet50.width='1': expected float, as in 1.0"),
        ({"name": "resnet50", "stage_sizes": 3}, "resnet50.stage_sizes=3: expected tuple"),
        ({"name": "resnet50", "dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
    ],
)
def test_build_errors(fields, message):
    with pytest.raises(UsageError, match=message):
        build(ConfigDict(fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet18", {"shortcut": "D"}, "unknown shortcut 'D'"),
        ("resnet18", {"stem": "cifar10"}, "unknown stem 'cifar10'; did you mean 'cifar'"),
        ("resnet18", {"block": "bottlenek"}, "unknown block 'bottlenek'; did you mean 'bottleneck'"),
        ("resnet18", {"stride_on": "2x2"}, "unknown stride_on '2x2'"),
        ("resnet18", {"padding": "full"}, "unknown padding 'full'"),
        ("resnet18", {"activation": "mish"}, "unknown activation 'mish'"),
        ("mobilenet_v1", {"activation": "relu7"}, "unknown activation 'relu7'; did you mean 'relu'"),
        ("mobilenet_v3_small", {"width_rule": "kera"}, "unknown width_rule 'kera'; did you mean 'keras'"),
        ("efficientnet_b0", {"activation": "swish"}, "unknown activation 'swish'"),
        ("efficientnet_b0", {"stochastic_depth_form": "examples"}, "unknown stochastic-depth form 'examples'; did you mean"),
        ("lenet5", {"pool": "mean"}, "unknown pool 'mean'"),
        ("lenet5_1998", {"output": "softmax"}, "unknown output 'softmax'"),
    ],
)
def test_errors_when_called(name, fields, message):
    network = create_model(name, **fields)
    with pytest.raises(UsageError, match=message):
        variable_shapes(network, resolution=32)


# Shapes and dtypes of all, from tracing alone


def abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


def traced(network, batch=2):
    """Shapes of (logits, variables) from init, and of (logits, updates) from a training step."""
    images = jax.ShapeDtypeStruct((batch, network.resolution, network.resolution, network.in_channels), jnp.float32)
    rngs = dict.fromkeys(STREAMS, abstract_key())
    evaluated = jax.eval_shape(network.init_with_output, abstract_key(), images)

    def train(variables, images, rngs):
        return network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats", "intermediates"])

    return evaluated, jax.eval_shape(train, evaluated[1], images, rngs)


def assert_types(network):
    (logits, variables), (train_logits, updates) = traced(network)
    for found in (logits, train_logits):
        assert (found.shape, found.dtype) == ((2, network.num_classes), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    maps = updates.pop("intermediates")
    assert {values[0].dtype for values in maps.values()} == {jnp.dtype(network.dtype)}
    assert all(len(values) == 1 for values in maps.values())
    stats = {key: value for key, value in variables.items() if key != "params"}
    assert set(stats) <= {"batch_stats"}
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} <= {np.dtype(np.float32)}


FIRST = {network: name for name, (network, _) in reversed(NETWORKS.items())}.values()  # of each class


# In the dtype that has casts; test_golden_logits.py has float32.
OTHERS = [pytest.param(name, "float32", marks=pytest.mark.full) for name in NETWORKS]


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(FIRST, ("bfloat16",)), *OTHERS])
def test_shapes_and_dtypes(name, dtype):
    # One block a stage or two: every kind of layer of the row is there. All of its layers are traced in test_summary.py.
    shallow = {"depth": 0.01} if "depth" in model_config(name) else {}
    assert_types(create_model(name, dtype=dtype, **shallow))


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet110_cifar", "efficientnet_b2"])
def test_shapes_and_dtypes_at_full_depth(name):
    assert_types(create_model(name))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lenet5", {"pool": "average", "activation": "tanh"}),
        ("lenet5_1998", {}),
        pytest.param("lenet5_1998", {"output": "linear"}, marks=pytest.mark.full),
        ("resnet20_cifar", {"depth": 0.1, "shortcut": "A_average", "se_reduction": 4}),
        pytest.param("mobilenet_v1", {"depth": 0.1}, marks=pytest.mark.full),
        pytest.param("mobilenet_v2", {"depth": 0.1}, marks=pytest.mark.full),
        pytest.param("mobilenet_v3_small", {}, marks=pytest.mark.full),
        ("efficientnet_b0", {"depth": 0.1}),
        ("airbench94", {}),
    ],
)
def test_everything_is_float64_if_asked(x64, name, fields):
    assert {leaf.dtype for leaf in jax.tree.leaves(traced(create_model(name, dtype="float64", **fields)))} == {
        np.dtype("float64")
    }


NORMED = [name for name in FIRST if "batch_norm" in model_config(name)]


@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_is_a_switch(name):
    """Without it no statistics and scales are left, and the convolutions have the bias that the norms had."""
    arrays = {}
    for switch in (True, False):
        arrays[switch] = variable_shapes(create_model(name, batch_norm=switch))
    scales = sum(leaf.size for path, leaf in flatten_dict(arrays[True]["params"]).items() if path[-1] == "scale")
    assert scales > 0
    assert arrays[False]["batch_stats"] == {}
    with_norms, without = (sum(leaf.size for leaf in jax.tree.leaves(arrays[switch]["params"])) for switch in (True, False))
    always = name.startswith(("alexnet", "vgg"))  # whose convolutions have a bias anyway
    assert with_norms - without == (2 if always else 1) * scales


BY_HAND = [name for name in NORMED if name not in ("vgg11", "resnet18", "mobilenet_v2")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in BY_HAND)) for n in NORMED])
def test_the_norm_stands_before_or_after_the_activation(name):
    """Nothing but the order changes, and that everywhere: the arrays stay, and every activation sees another input."""
    network = create_model(name, batch_norm=True)
    orders, shapes = [], []
    for place in ("before", "after"):
        called = []

        def activation(x, called=called):
            called.append("activation")
            return x

        def record(call, args, kwargs, context, called=called):
            if context.method_name == "__call__" and type(context.module).__name__ in ("BatchNorm", "Conv"):
                called.append(type(context.module).__name__)
            return call(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, nn.intercept_methods(record):
            patch.setitem(ACTIVATIONS, network.activation, activation)
            shapes.append(variable_shapes(network.clone(norm_place=place)))
        orders.append("".join({"Conv": "c", "BatchNorm": "n", "activation": "a"}[name] for name in called))
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    assert "cna" in orders[0]
    assert "can" not in orders[0]
    if name == "resnet18":  # the sum, and often a projection, stands between a block's last norm and the activation
        block, widening = "cancna", "cancncna"
        assert orders[1] == "can" + 2 * block + 3 * (widening + block)
    else:
        assert orders[1] == orders[0].replace("cna", "can")


def test_a_network_without_norms_trains_under_stochastic_depth():
    fields = {"stage_sizes": (1,), "stochastic_depth": 0.5, "stochastic_depth_group": 4, "batch_norm": False}
    for form in ("example", "batch", "subset"):
        network = create_model("resnet20_cifar", stochastic_depth_form=form, **fields)
        train = functools.partial(network.apply, train=True, mutable=["batch_stats"])
        rngs, images = {"stochastic_depth": jax.random.key(2)}, jnp.ones((8, 32, 32, 3))
        logits, updates = jax.eval_shape(train, initialize(network, jax.random.key(0)), images, rngs=rngs)
        assert (logits.shape, jax.tree.leaves(updates)) == ((8, 10), [])


def test_a_last_scale_needs_a_last_norm():
    for fields in ({"batch_norm": False}, {"preactivation": True}):
        network = create_model("resnet18", zero_init_last=True, **fields)
        with pytest.raises(UsageError, match=f"zero_init_last=True with {next(iter(fields))}=.*: no .*norm"):
            variable_shapes(network)


# Values of one small network a family

SMALL = {
    "lenet5": ("lenet5", {}),
    "lenet5_1998": ("lenet5_1998", {}),
    "alexnet": ("alexnet", {"width": 0.125, "hidden": 512, "num_classes": 10}),
    "vgg": ("vgg11", {"width": 0.125, "hidden": 512, "pooled": 2, "num_classes": 10, "stage_sizes": (1, 2)}),
    "googlenet": ("googlenet", {"width": 0.25, "num_classes": 10, "modules": MODULES[2:3]}),
    "resnet": ("resnet20_cifar", {"depth": 0.34}),
    # MobileNets not with ReLU: it hands on a scale, which the depthwise convolution keeps to its channel and a norm removes.
    "mobilenet_v1": ("mobilenet_v1", {"stages": ((8, 2, 2),), "activation": "silu", "num_classes": 10, "dropout": 0.2}),
    "mobilenet_v2": (
        "mobilenet_v2",
        {"stages": ((1, 8, 1, 1), (6, 8, 2, 2)), "activation": "silu", "num_classes": 10, "stochastic_depth": 0.2},
    ),
    "mobilenet_v3": (
        "mobilenet_v3_small",
        {"stages": ((3, 16, 24, True, "HS", 2),), "depth": 2.0, "num_classes": 10, "stochastic_depth": 0.2},
    ),
    "efficientnet": ("efficientnet_b0", {"stages": ((1, 8, 1, 1, 3), (6, 8, 2, 2, 5)), "width": 0.5, "num_classes": 10}),
    "airbench": ("airbench94", {"width": 0.125}),
}
BATCH = 8


# The others' blocks and layers are these, or have tests of their own.
IN_THE_SUITE = ("lenet5", "resnet", "efficientnet")
PARAMS = [pytest.param(name, marks=[pytest.mark.full] * (name not in IN_THE_SUITE)) for name in SMALL]


@pytest.fixture(scope="module", params=PARAMS)
def small(request):
    """`train(images, position)`: logits and gradients of a small network in training.

    In float64: in float32 the order of a sum, which a batch's order changes, decides on which side of a ReLU's kink a value
    lies, and on some processors that changes a gradient by a hundredth.
    """
    name, fields = SMALL[request.param]
    with jax.enable_x64(True):  # and no longer: other tests of this module run before a fixture of the module ends
        return request.param, *in_training(create_model(name, **fields, dtype="float64"), 64 if name == "alexnet" else 32)


def in_training(network, pixels):
    """`train` as above, and a batch of images."""
    variables = initialize(network, jax.random.key(0), resolution=pixels)
    rngs = dict.fromkeys(STREAMS, jax.random.key(1))

    @jax.jit
    def train(images, position):
        def loss(params):
            logits, _ = network.apply(
                {**variables, "params": params}, images, train=True, position=position, rngs=rngs, mutable=["batch_stats"]
            )
            labels = jax.nn.one_hot(position % 10, 10)
            return -(jax.nn.log_softmax(logits) * labels).sum(1).mean(), logits

        return jax.grad(loss, has_aux=True)(variables["params"])[::-1]

    return train, np.random.default_rng(0).normal(size=(BATCH, pixels, pixels, network.in_channels))


def test_every_parameter_is_used(small, x64):
    _, train, images = small
    _, grads = train(images, jnp.arange(BATCH))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # The last bias of a linear bottleneck without shortcut meets only linear maps until a batch norm removes it.
        removed = path[0].key.endswith("block1") and path[-2].key == "project_norm" and path[-1].key == "bias"
        # A maximum of nine normalised values is positive, so ReLU passes all of it on and the next norm removes the bias.
        removed |= [key.key for key in path] == ["conv3", "norm", "bias"]
        assert (float(abs(grad).max()) < 1e-10) is removed, jax.tree_util.keystr(path)


def test_an_example_takes_its_random_choices_along(small, x64):
    name, train, images = small
    logits, grads = train(images, jnp.arange(BATCH))
    order = np.random.default_rng(1).permutation(BATCH)
    permuted, same_grads = train(images[order], jnp.asarray(order))
    np.testing.assert_allclose(permuted, logits[order], rtol=1e-9, atol=1e-12)
    for a, b in zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    if name.startswith(("efficientnet", "mobilenet")):  # which have random choices
        elsewhere, _ = train(images, jnp.arange(BATCH) + 100)
        assert abs(elsewhere - logits).max() > 0.1 * abs(logits).max()


def test_a_position_that_is_not_given_is_the_place_in_the_batch():
    network = create_model("resnet20_cifar", stage_sizes=(1,), stochastic_depth=0.5)
    variables = initialize(network, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    def train(**fields):
        rngs = {"stochastic_depth": jax.random.key(2)}
        return network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"], **fields)[0]

    np.testing.assert_array_equal(train(), train(position=jnp.arange(4)))
