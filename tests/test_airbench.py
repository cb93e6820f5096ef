"""The network of airbench: its table, what whitens, and that the whitening stays through training, averages and a resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from cnnfamily import config as configs
from cnnfamily import evaluate, parallel, runlog, train
from cnnfamily.data import feed
from cnnfamily.models import create_model, initialize
from cnnfamily.models.airbench import Whitening, whitening_kernel
from cnnfamily.summary import summarize


def test_table():
    outputs = {layer.name: layer.output for layer in summarize("airbench94").layers}
    assert outputs.pop("stem") == (31, 31, 24)
    assert outputs.pop("classifier") == (10,)
    sides = {"conv1": (31, 15, 7), "norm1": (15, 7, 3), "conv2": (15, 7, 3), "norm2": (15, 7, 3)}
    assert outputs == {
        f"group{group + 1}_{layer}": (side[group], side[group], filters)
        for group, filters in enumerate((64, 256, 256))
        for layer, side in sides.items()
    }


def test_whitening_by_hand():
    """Eight images of one patch, +-4, +-2, +-1 and twice +-0 in one of its pixels each: moments of 4, 1, 1/4 and 0."""
    images = np.concatenate([np.diag([4.0, 2.0, 1.0, 0.0]), np.diag([-4.0, -2.0, -1.0, 0.0])]).reshape(8, 2, 2, 1)
    kernel = whitening_kernel(images).reshape(4, 8)
    expected = np.zeros((4, 4))
    for filter_, (pixel, moment) in enumerate([(3, 0), (2, 0.25), (1, 1), (0, 4)]):
        expected[pixel, filter_] = 1 / np.sqrt(moment + 5e-4)
    np.testing.assert_allclose(kernel, np.concatenate([expected, -expected], axis=1), rtol=1e-12, atol=1e-12)


def pictures(n=300):
    """Smooth ones in correlated colours, with a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(n, 4, 4, 3)) @ rng.normal(size=(3, 3))
    smooth = np.stack([[np.kron(channel, np.ones((4, 4))) for channel in np.moveaxis(image, 2, 0)] for image in coarse])
    return (np.moveaxis(smooth, 1, 3) + rng.normal(scale=0.3, size=(n, 16, 16, 3))).astype(np.float32)


def test_whitened_patches_are_white():
    images = pictures()
    kernel = whitening_kernel(images)
    variables = {"params": {"bias": np.zeros(24, np.float32)}, "batch_stats": {"kernel": np.asarray(kernel, np.float32)}}
    maps = np.asarray(Whitening("float32").apply(variables, images), np.float64)
    assert maps.shape == (300, 15, 15, 24)
    np.testing.assert_allclose(maps[..., 12:], -maps[..., :12], atol=1e-4)
    flat = maps[..., :12].reshape(-1, 12)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(12), atol=0.01)  # 5e-4 beside variances of 0.09 and more
    before = images[:, 1:, :-1].reshape(-1, 3)  # of one pixel of the patches
    assert np.abs(np.corrcoef(before.T) - np.eye(3)).max() > 0.3
    np.testing.assert_allclose(whitening_kernel(images[::-1]), kernel, rtol=1e-6, atol=1e-9)  # signs too


def test_a_start_without_images_takes_each_number_of_a_patch():
    network = create_model("airbench94", width=0.125)
    variables = initialize(network, jax.random.key(0))
    patches = np.random.default_rng(0).normal(size=(5, 2, 2, 3)).astype(np.float32)
    stem = {name: variables[name]["stem"] for name in ("params", "batch_stats")}
    found = Whitening("float32").apply(stem, patches).reshape(5, 24)
    np.testing.assert_allclose(found, np.concatenate([patches.reshape(5, 12), -patches.reshape(5, 12)], axis=1), rtol=1e-6)
    trained = create_model("airbench94", width=0.125, whitening=False)
    variables = initialize(trained, jax.random.key(0))
    assert variables["params"]["stem"]["kernel"].shape == (2, 2, 3, 24)
    assert trained.start_from(variables, patches) is variables


def test_the_classifier_starts_small_and_has_no_bias():
    network = create_model("airbench94", width=0.25)
    variables = initialize(network, jax.random.key(0))
    classifier = variables["params"]["classifier"]
    assert classifier.keys() == {"kernel"}
    assert float(np.std(classifier["kernel"])) == pytest.approx(1, abs=0.05)
    _, found = network.apply(variables, pictures(4), train=True, mutable=["batch_stats", "intermediates"])
    maps = np.asarray(found["intermediates"]["group3_output"][0]).max(axis=(1, 2))
    logits, _ = network.apply(variables, pictures(4), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, maps @ classifier["kernel"] / 64, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_the_whitening_stays_through_training_averages_and_a_resume(dies_at_3, tmp_path, monkeypatch):
    """On two devices, whose mean of equal numbers is exact; a run that goes on does not measure again."""
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(2))
    overrides = {"ema.decay": 0.9, "optim.weight_decay": 0.1, "model.width": 0.125}
    config = configs.load_config("configs/cifar10_fast.py:smoke", overrides)
    expected = whitening_kernel(feed.sample(feed.load_data(config))).astype(np.float32)

    dies_at_3(config, tmp_path / "run")
    monkeypatch.delattr(feed, "sample")
    result = train.run_training(config, tmp_path / "run", quiet=True)
    assert runlog.read_manifest(tmp_path / "run")["sessions"][-1]["first_step"] == 2
    assert result.step == 4
    network, variables, _ = evaluate.load_run(tmp_path / "run")
    _, state, _ = evaluate.load_state(tmp_path / "run", which="newest")
    for found in (state.batch_stats, variables["batch_stats"]):
        np.testing.assert_array_equal(found["stem"]["kernel"], expected)
    assert np.abs(state.params["stem"]["bias"]).min() > 0
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert names == {"kernel", "bias"}  # no scale
    assert expected.shape not in [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    images = jnp.asarray(feed.test_view(feed.load_data(config).test.images, {}, mean=(0.5,) * 3, std=(0.25,) * 3))
    assert np.isfinite(network.apply(variables, images)).all()
