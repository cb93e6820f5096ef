"""Batches on the devices: repeats, resolutions of training, several views of a test image, whitening."""

import contextlib
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from flax import linen as nn
from PIL import Image
from test_photographs import FILES, assert_equal_runs, config_for, data, folder  # noqa: F401

from cnnfamily import checkpoint, errors, evaluate, parallel, train
from cnnfamily import config as configs
from cnnfamily.data import feed, sources
from cnnfamily.data.decoding import CentreCrop, TrainCrop, decode
from cnnfamily.errors import UsageError
from cnnfamily.step import eval_step


def test_the_repeats_of_an_image_are_cut_unlike():
    """And the first of them as without repeats."""
    config = config_for(**{"augment.repeats": 4, "augment.crop_scale": (0.1, 1.0)})
    with contextlib.closing(feed.TrainFeed(data(), config, mesh_of(2))) as ours:
        batch = {name: np.asarray(array[0]) for name, array in ours.batch(4).items()}
    np.testing.assert_array_equal(batch["index"], np.tile(batch["index"][:2], 4))
    for row, index in enumerate(batch["index"]):
        numbers = (0, 1, index, feed.CROP_PURPOSE, row // 2)[: 4 if row < 2 else 5]
        expected = TrainCrop(32, (0.1, 1.0))(decode(FILES[index]), np.random.default_rng(numbers))
        np.testing.assert_array_equal(batch["images"][row], expected)
    assert len(np.unique(batch["images"][::2], axis=0)) == 4
    with pytest.raises(UsageError, match=r"augment\.repeats=3; expected a divisor of batch_size=8"):
        feed.TrainFeed(data(), config_for(**{"augment.repeats": 3}), mesh_of(1)).make_batch(0)


SIDES = {"data.train_resolutions": (24, 40, 32), "data.train_boundaries_epochs": (1.0, 2.5)}


def test_photographs_come_in_the_resolution_of_their_epoch():
    with contextlib.closing(feed.TrainFeed(data(), config_for(**SIDES), mesh_of(1))) as ours:
        assert ours.steps_per_epoch == 3
        assert [ours.resolution(step) for step in range(10)] == [24] * 3 + [40] * 5 + [32] * 2
        for step in (0, 3, 9, 2):
            batch = ours.batch(step)
            assert batch["images"].shape == (1, 8, *(ours.resolution(step),) * 2, 3)
        crop, index = TrainCrop(40), int(ours.batch(3)["index"][0, 0])
        expected = crop(decode(FILES[index]), np.random.default_rng((0, 1, index, feed.CROP_PURPOSE)))
        np.testing.assert_array_equal(ours.batch(3)["images"][0, 0], expected)


def test_alternating_flips_are_the_same_on_any_number_of_devices_and_from_any_step():
    fields = {"augment.flip_alternating": True, "batch_size": 400, "accumulate_steps": 2}
    config = configs.load_config("configs/lenet5_digits.py", fields)
    digits, seen = feed.load_data(config), {}
    for devices in (1, 2, 8):
        for first in (0, 4):  # a resumed run begins with another step
            with contextlib.closing(feed.TrainFeed(digits, config, mesh_of(devices))) as ours:
                assert ours.steps_per_epoch == 3
                for step in range(first, 9):
                    index, flips = (np.asarray(ours.batch(step)[name]).ravel() for name in ("index", "mirrored"))
                    for image, flip in zip(index.tolist(), flips.tolist(), strict=True):
                        assert seen.setdefault((image, step // 3), flip) is flip
    assert len(seen) == 3 * 1200
    for (image, epoch), flip in seen.items():
        assert seen.get((image, epoch + 1), not flip) is not flip
    with pytest.raises(UsageError, match=r"augment\.flip and augment\.flip_alternating are both True"):
        config = configs.load_config("configs/lenet5_digits.py", fields | {"augment.flip": True})
        feed.TrainFeed(digits, config, mesh_of(1))


def test_a_sample_is_spread_over_the_training_images_as_an_evaluation_sees_them():
    digits = feed.load_data(configs.load_config("configs/lenet5_digits.py"))
    found = feed.sample(digits, 100)
    expected = (digits.train.images[::15].astype(np.float64) / 255 - digits.mean) / digits.std
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(found) == 96
    assert len(feed.sample(digits)) == 1437
    with pytest.raises(UsageError, match="expected 'resize' or 'pad'"):
        feed.sample(data())


def test_arrays_are_resized_on_the_device():
    """As Pillow does it, to the grey level that it loses by rounding between rows and columns."""
    config = configs.load_config("configs/lenet5_digits.py", {"data.train_resolutions": (20,), "augment.shift": 0})
    digits = feed.load_data(config)
    with contextlib.closing(feed.TrainFeed(digits, config, mesh_of(1))) as ours:
        images = digits.train.images[:4]
        seen = ours.view(20)(jax.random.split(jax.random.key(0), 4), jnp.asarray(images), {})
    assert seen.shape == (4, 20, 20, 1)
    pixels = (np.asarray(seen) * digits.std + digits.mean) * 255
    for ours, image in zip(pixels, images, strict=True):
        theirs = Image.fromarray(image[:, :, 0]).resize((20, 20), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(ours[:, :, 0], np.asarray(theirs), atol=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.train_resolutions": (24, 32)}, "for each but the first the epoch in which it begins"),
        ({"data.train_boundaries_epochs": (2.0,)}, r"train_resolutions=\(32,\) and .*boundaries_epochs=\(2\.0,\): expected"),
        ({"data.train_resolutions": (0,)}, "expected whole numbers above 0"),
        (SIDES | {"data.train_boundaries_epochs": (2.0, 1.0)}, "expected epochs above 0 that grow"),
        ({"data.train_resolutions": (24,), "data.zca_epsilon": 0.1}, "whitening is for images of one size"),
        ({"evaluate.crops": 5}, r"evaluate\.crops=5: expected 1, 2 \(mirrored too\) or 10"),
        ({"evaluate.crops": 10, "data.fit": "pad"}, r"evaluate\.crops=10 and data\.fit='pad': expected data\.fit='crop'"),
    ],
)
def test_wrong_fields_are_one_line(fields, message):
    config = config_for(**fields)
    with pytest.raises(UsageError, match=message):
        for each in (feed.TrainFeed, feed.TestFeed):
            each(data(), config, mesh_of(1))


RESNET = {
    "model.name": "resnet20_cifar",
    "model.stage_sizes": (1,),
    "model.filters": 8,
    "model.num_classes": 3,
    "data.fit": "crop",
    "data.resolution": 32,
    "data.train_resolutions": (16, 24),
    "data.train_boundaries_epochs": (1.0,),
    "batch_size": 8,
    "total_epochs": 2.0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 3,
    "log.every_steps": 1,
    "optim.warmup_epochs": 0.0,
}


@pytest.fixture(scope="module")
def grown(folder, tmp_path_factory):  # noqa: F811
    """A run whose images grow in its second epoch, stopped in the step after that and gone on with: (config, workdir)."""
    config = configs.load_config("configs/default.py", RESNET | {"data.source": f"folder:{folder}"})
    workdir, original = tmp_path_factory.mktemp("grown") / "run", feed.TrainFeed.make_batch

    def make_batch(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with pytest.MonkeyPatch.context() as context, pytest.raises(errors.Stopped):
        context.setattr(feed.TrainFeed, "make_batch", make_batch)
        train.run_training(config, workdir, quiet=True)
    train.run_training(config, workdir, quiet=True)
    return config, workdir


@pytest.mark.full
def test_a_run_whose_images_grow_ends_with_the_same_bits(grown, tmp_path, monkeypatch):
    config, workdir = grown
    steps, original = [], parallel.map_over_devices

    def map_over_devices(function, *arguments, **options):
        steps.extend([function] if options.get("donate") else [])
        return original(function, *arguments, **options)

    monkeypatch.setattr(parallel, "map_over_devices", map_over_devices)
    train.run_training(config, tmp_path / "run", quiet=True)
    assert_equal_runs(tmp_path / "run", workdir)
    assert len(steps) == 2, "one compilation a size"


def test_a_network_for_one_size_is_refused_before_anything_is_written(tmp_path):
    fields = {"data.train_resolutions": (32, 40), "data.train_boundaries_epochs": (3.0,)}
    config = configs.load_config("configs/lenet5_digits.py", fields)
    with pytest.raises(UsageError, match="images of 40 x 40 pixels: LeNet-5 flattens its maps and takes 32 x 32"):
        train.run_training(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# Evaluation


def test_five_crops_are_the_corners_and_the_middle():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    whole = np.asarray(picture.resize((44, 32), Image.Resampling.BILINEAR))
    crops = CentreCrop(20, 32, corners=True)(picture)
    for crop, (top, left) in zip(crops, [(0, 0), (0, 24), (12, 0), (12, 24), (6, 12)], strict=True):
        np.testing.assert_array_equal(crop, whole[top : top + 20, left : left + 20])
    np.testing.assert_array_equal(CentreCrop(20, 32)(picture), crops[4])


class Scores(nn.Module):
    """Not symmetric, so that a mirror image has other scores."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, kernel_init=nn.initializers.normal(1.0))(x.reshape(len(x), -1))


@pytest.mark.parametrize("crops", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 10])
def test_probabilities_are_means_over_the_views(crops):
    config = config_for(**{"evaluate.crops": crops, "data.resolution": 16})
    network, sums = Scores(), 0.0
    with contextlib.closing(feed.TestFeed(data(), config, mesh_of(1))) as test:
        variables = network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        for batch in test.batches():
            step = jax.vmap(
                lambda batch: eval_step(variables, batch, {}, network=network, view=test.view, mirrored=test.mirrored),
                axis_name="data",
            )
            sums += float(step(jax.tree.map(lambda x: x[None], batch))["loss"][0])
    expected = 0.0
    for i, file in enumerate(FILES):
        views = CentreCrop(16, corners=crops == 10)(decode(file)).reshape(-1, 16, 16, 3)
        views = np.concatenate([views, views[:, :, ::-1]])[: None if crops > 1 else 1]
        assert len(views) == crops
        pixels = (views.astype(np.float32) / 255 - 0.5) / 0.25
        probabilities = np.asarray(jax.nn.softmax(network.apply(variables, pixels)), np.float64)
        expected -= np.log(probabilities.mean(axis=0)[i % 3])
    assert sums == pytest.approx(expected, rel=1e-4)


def test_the_mean_of_checkpoints_and_statistics_measured_anew(grown):
    config, workdir = grown
    network, state, _ = evaluate.load_state(workdir, which="newest")
    states = checkpoint.restore_newest(workdir / "checkpoints", state, 2)
    assert [int(each.step) for each in states] == [6, 5]
    _, mean, _ = evaluate.load_state(workdir, which="newest", average=2)
    kernels = [np.asarray(each.params["stem"]["kernel"], np.float64) for each in states]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    np.testing.assert_allclose(mean.params["stem"]["kernel"], sum(kernels) / 2, rtol=1e-5)
    with pytest.raises(UsageError, match=r"the mean of 9 checkpoints: .* has 3, expected 1 to so many; checkpoint\.keep=9"):
        evaluate.evaluate_run(workdir, average=9)

    photographs = feed.load_data(config)
    with contextlib.closing(feed.TestFeed(photographs, config, mesh_of(4), of_training=16)) as images:
        anew = evaluate.recalibrated(network, mean, images).batch_stats["stem_norm"]
        (batch,) = images.batches()
        pixels = images.view(np.asarray(batch["images"]), {})
    assert len(np.unique(np.asarray(batch["index"]))) == 16
    assert len(np.unique(np.asarray(batch["labels"]))) == 3, "at random, not the first of a sorted folder"
    maps = jax.lax.conv_general_dilated(
        *(pixels, mean.params["stem"]["kernel"], (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(anew["mean"], np.asarray(maps, np.float64).mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(anew["var"], np.asarray(maps, np.float64).var((0, 1, 2)), rtol=1e-4)
    scaled = network.clone(stochastic_depth=0.5, stochastic_depth_scaling="test")
    with pytest.raises(UsageError, match="'test' scales branches in evaluation, and statistics are measured as in training"):
        evaluate.recalibrated(scaled, mean, images)
    metrics = evaluate.evaluate_run(workdir, average=2, crops=10, recalibrate=16)
    assert metrics["test_examples"] == 9
    assert metrics["test_loss"] != evaluate.evaluate_run(workdir)["test_loss"]


# Whitening


def test_whitened_images_have_hardly_any_covariance():
    config = configs.load_config("configs/lenet5_digits.py", {"data.zca_epsilon": 0.01, "augment.shift": 0})
    digits = feed.load_data(config)
    assert (digits.mean, digits.std) == ((0.0,), (1.0,))
    flat = digits.train.images.reshape(1437, -1) / 255
    variances = np.linalg.eigvalsh(np.cov(flat, rowvar=False, bias=True))
    with contextlib.closing(feed.TrainFeed(digits, config, mesh_of(2))) as ours:
        keys = jax.random.split(jax.random.key(0), 1437)
        seen = np.asarray(ours.view(32)(keys, ours.store["images"], ours.store))
    with contextlib.closing(feed.TestFeed(digits, config, mesh_of(1))) as test:
        np.testing.assert_allclose(test.view(digits.train.images[:5], test.store), seen[:5], atol=1e-4)
    white = seen.reshape(1437, -1).astype(np.float64)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    found = np.linalg.eigvalsh(np.cov(white, rowvar=False, bias=True))
    np.testing.assert_allclose(found, variances / (variances + 0.01), atol=1e-3)
    matrix = digits.whitening["whitening_matrix"]
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4)  # of all whitenings the one nearest to the images


def test_whitening_refuses_what_it_cannot_do():
    for fields, message in (
        ({"mean": (0.5,)}, "either: whitening takes their place"),
        ({"fit": "crop"}, "it is for small images"),
        ({"resolution": 65}, "at most 4096"),
    ):
        with pytest.raises(UsageError, match=message):
            sources.load("digits", **{"resolution": 8, "channels": 1, "zca_epsilon": 0.1} | fields)
