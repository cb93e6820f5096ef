"""One update is the same on any number of devices and micro-batches, and its randomness depends on positions alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

from cnnfamily import parallel
from cnnfamily.data import augment
from cnnfamily.models import create_model, initialize
from cnnfamily.step import create_state, train_step

BATCH = 16


def view(keys, images):
    images = augment.augment(keys, images, crop_padding=1, flip=True)
    return augment.normalize(images, (0.5,), (0.25,)).astype(jnp.float64)


def small_network(**fields):
    """Two blocks with stochastic depth, in float64 so that rounding does not hide a wrong factor."""
    fields = {"stage_sizes": (1, 1), "filters": 8, "in_channels": 1, "stochastic_depth": 0.5, "dtype": "float64"} | fields
    return create_model("resnet20_cifar", **fields)


def update_of(network, mesh, optimizer, **fields):
    step = functools.partial(
        train_step, network=network.clone(axis_name="data"), optimizer=optimizer, view=view, seed=3, **fields
    )
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


def assert_same(ours, theirs):
    for path, value in jax.tree_util.tree_leaves_with_path(ours[0]):
        other = functools.reduce(
            lambda tree, key: getattr(tree, key.name) if hasattr(key, "name") else tree[_index(key)], path, theirs[0]
        )
        scale = np.abs(value).max() + 1e-12
        assert np.abs(value - other).max() <= 1e-9 * scale, jax.tree_util.keystr(path)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-9)


def _index(key):
    return key.key if hasattr(key, "key") else key.idx


@pytest.mark.parametrize(("group", "devices"), [(0, 2), (0, 4), (4, 4), (2, 4), (8, 4)])
def test_update_is_the_same_on_any_number_of_devices(x64, group, devices):
    """SGD, because Adam would hide a gradient that is N times too large."""
    assert_same(train(1, norm_group=group), train(devices, norm_group=group))


@pytest.mark.parametrize("devices", [1, 2])
def test_update_is_the_same_with_micro_batches(x64, devices):
    """With batch-norm groups no larger than a micro-batch, accumulation changes nothing, running statistics included."""
    assert_same(train(1, norm_group=4), train(devices, micro_batches=2, norm_group=4))


def test_groups_matter(x64):
    """The tests above could not pass if `norm_group` were ignored."""
    whole, grouped = train(1), train(1, norm_group=4)
    assert abs(whole[1][0] - grouped[1][0]) > 1e-3


def test_dropped_blocks_and_crops_follow_the_position(x64):
    """With statistics of each example alone, an example's loss depends on its own image and position only."""
    network = small_network(norm_group=1)
    variables = initialize(network, jax.random.key(1), resolution=8)
    rngs = {"stochastic_depth": jax.random.key(5)}
    images = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 8, 8, 1)))
    apply = functools.partial(network.apply, variables, train=True, rngs=rngs, mutable=["batch_stats"])
    whole, _ = apply(images, position=jnp.arange(BATCH))
    part, _ = apply(images[5:9], position=jnp.arange(5, 9))
    moved, _ = apply(images[5:9], position=jnp.arange(4))
    np.testing.assert_allclose(part, whole[5:9], rtol=1e-9, atol=1e-9)
    assert np.abs(moved - part).max() > 1e-3


def test_averages_follow_their_formula(x64):
    """Three steps by hand: decay 0.9, but at most (1 + step) / (10 + step) with warm-up."""
    network, optimizer, mesh = small_network(), optax.sgd(0.05), mesh_of(1)
    for warmup in (False, True):
        state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=True)
        update = update_of(network, mesh, optimizer, ema_decay=0.9, ema_warmup=warmup)
        expected = jax.device_get(state.params["classifier"]["kernel"])
        for step in range(3):
            state, _ = update(state, batch_of(step, 1), {})
            decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
            expected = decay * expected + (1 - decay) * np.asarray(state.params["classifier"]["kernel"])
        np.testing.assert_allclose(state.ema["params"]["classifier"]["kernel"], expected, rtol=1e-6)


def test_store_and_sent_images_give_the_same_update(x64):
    network, optimizer, mesh = small_network(), optax.sgd(0.05), mesh_of(2)
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
