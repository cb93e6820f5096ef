"""One update is the same on any number of devices and micro-batches, and its randomness depends on positions alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
from conftest import mesh_of
from flax import linen as nn
from jax import export

from cnnfamily import config as configs
from cnnfamily import optim, parallel
from cnnfamily.data import augment, feed
from cnnfamily.models import build, create_model, initialize, variable_shapes
from cnnfamily.models.layers import BatchNorm, Linear
from cnnfamily.step import Objective, create_state, train_step

BATCH = 16


def view(keys, images, store):
    images = augment.augment(keys, images, crop_padding=1, flip=True)
    return augment.normalize(images, (0.5,), (0.25,)).astype(jnp.float64)


def small_network(**fields):
    """Two blocks with stochastic depth, in float64 so that rounding does not hide a wrong factor."""
    fields = {"stage_sizes": (1, 1), "filters": 8, "in_channels": 1, "stochastic_depth": 0.5, "dtype": "float64"} | fields
    return create_model("resnet20_cifar", **fields)


class OneLayer(nn.Module):
    """For what does not depend on the network: it compiles at once."""

    axis_name: str | None = None
    resolution = 8
    in_channels = 1
    num_classes = 10
    dtype = "float64"

    @nn.compact
    def __call__(self, images, train=False, position=None):
        x = BatchNorm(train, axis_name=self.axis_name, dtype=self.dtype, name="norm")(images)
        return Linear(10, dtype=self.dtype, name="classifier")(x.reshape(len(images), -1))


def update_of(network, mesh, optimizer, **fields):
    objective = Objective(network.clone(axis_name="data"), view, seed=3, label_smoothing=fields.pop("label_smoothing", 0.0))
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, **fields)
    return parallel.map_over_devices(step, mesh, batch_axis=1, outputs=2)


def batch_of(step: int, micro_batches: int):
    images = np.random.default_rng(step).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
    arrays = {"images": images, "labels": np.arange(BATCH, dtype=np.int32) % 10, "position": np.arange(BATCH, dtype=np.int32)}
    return {name: array.reshape(micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}


def train(devices: int, micro_batches: int = 1, steps: int = 3, **fields):
    network = small_network(**fields)
    optimizer = optax.sgd(0.05, momentum=0.9)
    mesh = mesh_of(devices)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=True)
    state = parallel.replicate(state, mesh)
    update = update_of(network, mesh, optimizer, ema_decay=0.9, label_smoothing=0.1)
    losses = []
    for step in range(steps):
        batch = parallel.place(batch_of(step, micro_batches), mesh, batch_axis=1)
        state, metrics = update(state, batch, {})
        losses.append(float(metrics["loss"]))  # also awaits the step: programs of two meshes in flight can deadlock
    return jax.device_get(state), losses


def assert_same(ours, theirs, tolerance=1e-9):
    """Relative to each array's largest value; or to 1e-6, for a bias before a batch norm has the gradient 0 and is noise."""
    for (path, value), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(np.abs(value).max(), 1e-6)
        assert np.abs(value - other).max() <= tolerance * scale, jax.tree_util.keystr(path)


# The running step with everything on, on the digits


# Form of stochastic depth, batch-norm group, devices, micro-batches. A device has 8 or 4 of the 32 examples at a time: groups
# smaller than that, and the whole batch. Equal to it: two processes, in test_processes.py. Larger ones: the ResNet below.
LAYOUTS = [
    ("example", 4, 2, 2),
    pytest.param("example", 4, 4, 1, marks=pytest.mark.full),
    pytest.param("subset", 0, 8, 1, marks=pytest.mark.full),
    pytest.param("example", 4, 2, 1, marks=pytest.mark.full),
    pytest.param("example", 4, 4, 2, marks=pytest.mark.full),
    pytest.param("batch", 0, 4, 1, marks=pytest.mark.full),
    pytest.param("subset", 4, 2, 2, marks=pytest.mark.full),
    pytest.param("subset", 4, 8, 1, marks=pytest.mark.full),
    pytest.param("batch", 0, 8, 1, marks=pytest.mark.full),
]


@functools.cache
def twenty_steps(form: str, group: int, devices: int, micro_batches: int):
    return recorded.twenty_steps(form, group, mesh_of(devices), micro_batches)


@pytest.mark.parametrize(("form", "group", "devices", "micro_batches"), LAYOUTS)
def test_the_same_run_on_any_number_of_devices(x64, form, group, devices, micro_batches):
    """SGD, because Adam would hide a gradient that is N times too large."""
    state, steps, _ = twenty_steps(form, group, 1, 1)
    other, other_steps, shards = twenty_steps(form, group, devices, micro_batches)
    for ours, theirs in zip(steps, other_steps, strict=True):
        paths = jax.tree_util.tree_leaves_with_path(ours["choices"])
        for (path, choice), same in zip(paths, jax.tree.leaves(theirs["choices"]), strict=True):
            np.testing.assert_array_equal(choice, same, err_msg=jax.tree_util.keystr(path))
    assert_same(state, other)
    assert_same([step["loss"] for step in steps], [step["loss"] for step in other_steps])
    for copies in jax.tree.leaves(shards, is_leaf=lambda x: isinstance(x, list)):
        assert len(copies) == devices
        assert all(np.array_equal(copy, copies[0]) for copy in copies)
    if form == "example":
        assert_recorded(steps)


def assert_recorded(steps):
    """All of the choices are there, with an entry an example, and two steps choose unlike."""
    first = steps[0]["choices"]
    assert first.keys() == {"index", "images", "labels", "mix", "stochastic_depth", "dropout"}
    np.testing.assert_array_equal(first["labels"], recorded.digits().train.labels[first["index"]])
    assert first["images"].shape == (32, 32, 32, 3)
    assert first["dropout"][0].shape == (32, 32)
    assert first["stochastic_depth"][0].shape == (32, 1)
    for choice in ("index", "images", "stochastic_depth", "dropout", "mix"):
        leaves = [jax.tree.leaves(step["choices"][choice]) for step in steps]
        assert all((a != b).any() for a, b in zip(leaves[0], leaves[1], strict=True)), f"{choice} of two steps"


@pytest.mark.full
def test_update_of_a_resnet_is_the_same_on_any_number_of_devices(x64):
    one, four = (train(devices, stage_sizes=(1,), norm_group=8, stochastic_depth_form="batch") for devices in (1, 4))
    assert_same(one, four)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(x64):
    network, optimizer, mesh = OneLayer(), optax.adam(0.05), mesh_of(2)
    update = update_of(network, mesh, optimizer, ema_decay=0.9)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=True)
    batch = parallel.place(batch_of(0, 1), mesh, batch_axis=1)
    state, metrics = update(parallel.replicate(state, mesh), batch, {})
    assert int(state.step) == 1
    kernel = state.params["classifier"]["kernel"]
    state.params["classifier"]["kernel"] = kernel.at[0, 0].set(1e308)  # the logits overflow
    after, metrics = update(state, batch, {})
    assert not np.isfinite(metrics["loss"])
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_groups_matter(x64):
    """The tests above could not pass if `norm_group` were ignored."""
    images = np.random.default_rng(0).normal(size=(BATCH, 8, 8, 1))
    logits = []
    for group in (0, 4):
        network = small_network(norm_group=group, stochastic_depth=0.0)
        variables = initialize(network, jax.random.key(1), resolution=8)
        apply = jax.jit(functools.partial(network.apply, train=True, mutable=["batch_stats"]))
        logits.append(apply(variables, images)[0])
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_dropped_blocks_and_crops_follow_the_position(x64):
    """With statistics of each example alone, an example's loss depends on its own image and position only."""
    network = small_network(norm_group=1)
    variables = initialize(network, jax.random.key(1), resolution=8)
    rngs = {"stochastic_depth": jax.random.key(5)}
    images = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 8, 8, 1)))
    apply = jax.jit(functools.partial(network.apply, variables, train=True, rngs=rngs, mutable=["batch_stats"]))
    whole, _ = apply(images, position=jnp.arange(BATCH))
    part, _ = apply(images[5:9], position=jnp.arange(5, 9))
    moved, _ = apply(images[5:9], position=jnp.arange(4))
    np.testing.assert_allclose(part, whole[5:9], rtol=1e-9, atol=1e-9)
    assert np.abs(moved - part).max() > 1e-3


@pytest.mark.parametrize(
    ("warmup", "decays"), [pytest.param(False, (0.15, 0.15, 0.15), marks=pytest.mark.full), (True, (0.1, 0.15, 0.15))]
)
def test_averages_follow_their_formula(warmup, decays, x64):
    """Three steps by hand: decay 0.15, but at most (1 + step) / (10 + step) with warm-up, which binds at the first step."""
    network, optimizer, mesh = OneLayer(), optax.sgd(0.05), mesh_of(1)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=True)
    update = update_of(network, mesh, optimizer, ema_decay=0.15, ema_warmup=warmup)
    expected = jax.device_get(state.params["classifier"]["kernel"])
    for step, decay in enumerate(decays):
        state, _ = update(state, batch_of(step, 1), {})
        expected = decay * expected + (1 - decay) * np.asarray(state.params["classifier"]["kernel"])
    np.testing.assert_allclose(state.ema["params"]["classifier"]["kernel"], expected, rtol=1e-6)


def test_store_and_sent_images_give_the_same_update(x64):
    network, optimizer, mesh = OneLayer(), optax.sgd(0.05), mesh_of(2)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=False)
    update = update_of(network, mesh, optimizer)
    sent = batch_of(0, 1)
    order = np.random.default_rng(1).permutation(BATCH).astype(np.int32)
    store = {name: np.empty_like(sent[name][0]) for name in ("images", "labels")}
    for name, array in store.items():
        array[order] = sent[name][0]
    kept = {"index": order[None], "position": sent["position"]}
    one, _ = update(state, sent, {})
    two, _ = update(state, kept, store)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@pytest.mark.full
def test_mirrored_images_are_turned_before_all_else_on_any_number_of_devices(x64):
    network, optimizer = OneLayer(), optax.sgd(0.05)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=False)
    batch = batch_of(0, 1) | {"index": np.arange(BATCH, dtype=np.int32)[None]}
    flips = np.random.default_rng(0).integers(0, 2, (1, BATCH)).astype(bool)
    turned = batch | {"images": np.where(flips[..., None, None, None], batch["images"][..., ::-1, :], batch["images"])}
    seen = []
    for devices, given in ((1, turned), (1, batch | {"mirrored": flips}), (8, batch | {"mirrored": flips})):
        mesh = mesh_of(devices)
        update = update_of(network, mesh, optimizer, record=True)
        _, metrics = update(parallel.replicate(state, mesh), parallel.place(given, mesh, batch_axis=1), {})
        seen.append(np.asarray(metrics["choices"]["images"]))
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


# Stochastic depth's form, and how many stages of the network. Micro-batches have to be traced three times, so not of all.
FORMS = [
    ("example", 2),
    *(pytest.param(*form, marks=pytest.mark.full) for form in (("batch", 2), ("subset", 2), ("example", 7))),
]


@pytest.mark.parametrize(("form", "stages"), FORMS)
def test_the_step_of_efficientnet_b0_lowers_for_gpu_and_tpu(form, stages):
    """With averages and micro-batches on eight devices: what cannot run here is at least known to compile to StableHLO."""
    config = configs.load_config("configs/efficientnet_b0.py", {"model.stochastic_depth_form": form})
    assert len(config.model.stages) == 7
    config.model.stages = config.model.stages[:stages]
    micro_batches = 1 if stages == 7 else 2
    network = build(config.model)
    optimizer = optim.make_optimizer(config.optim, lambda step: 0.1)
    state = jax.eval_shape(functools.partial(create_state, optimizer=optimizer, ema=True), variable_shapes(network))
    normal = functools.partial(feed.train_view, config={"flip": True}, mean=(0.5,) * 3, std=(0.2,) * 3, side=224)
    mix = functools.partial(augment.mix, mixup=0.2, cutmix=1.0, group=16)
    objective = Objective(network.clone(axis_name="data"), normal, 0, mix, label_smoothing=0.1)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.9999, ema_warmup=True)
    update = parallel.map_over_devices(step, mesh_of(8), batch_axis=1, outputs=2, donate=True)
    whole = {name: jax.ShapeDtypeStruct((micro_batches, 128), jnp.int32) for name in ("labels", "position", "index")}
    batch = {"images": jax.ShapeDtypeStruct((micro_batches, 128, 224, 224, 3), jnp.uint8), **whole}
    exported = export.export(update, platforms=("cuda", "tpu"))(state, batch, {})
    assert (exported.platforms, exported.nr_devices) == (("cuda", "tpu"), 8)
    text = exported.mlir_module()
    assert "feature_group_count = 96" in text, "a depthwise convolution is one there, not its form for a CPU"
    assert len(exported.out_avals) == len(jax.tree.leaves(state)) + 3
