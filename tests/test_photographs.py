"""Decoding in threads and ahead of the step: the same for any number of them, and bad images by the stated rule."""

import contextlib
import io
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets
from conftest import mesh_of
from PIL import Image
from test_train import assert_equal_states, final_state, lines_without_timing

from cnnfamily import checkpoint, errors, evaluate, predict, runlog, train
from cnnfamily import config as configs
from cnnfamily.data import feed, sources
from cnnfamily.data.decoding import CentreCrop, TrainCrop, decode
from cnnfamily.data.photographs import Ahead, Photographs, Reader
from cnnfamily.errors import UsageError

N = 24


def picture(i):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (40 + i, 60 - i, 3), np.uint8))


def encoded(i):
    file = io.BytesIO()
    picture(i).save(file, "jpeg")
    return file.getvalue()


FILES = [encoded(i) for i in range(N)]


def photographs(bad=()):
    def read(index):
        return b"no image" if index in bad else FILES[index], index % 3

    return Photographs(N, read, lambda index: f"{index}.jpg")


def centre(picture, index, row):
    return CentreCrop(16)(picture)


def images(split, index, here=None, **fields):
    reader = Reader(split, channels=3, **{"workers": 0, **fields})
    try:
        index = np.asarray(index)
        return reader.images(index, centre, shape=(16, 16, 3), here=here), reader.bad_images
    finally:
        reader.close()


@pytest.mark.parametrize("workers", [-1, 0, 1, 2, 8])
def test_images_are_in_the_order_asked_for_with_any_number_of_workers(workers):
    index = np.random.default_rng(0).permutation(N)
    found, bad = images(photographs(), index, workers=workers)
    for i, pixels, label in zip(index, found["images"], found["labels"], strict=True):
        np.testing.assert_array_equal(pixels, centre(decode(FILES[i]), i, 0))
        assert label == i % 3
    assert bad == 0


def test_only_what_belongs_here_is_read():
    here = np.arange(N) % 4 == 1
    split = photographs(bad=np.flatnonzero(~here))
    found, _ = images(split, np.arange(N), here)
    assert found["images"].shape == (N, 16, 16, 3)
    assert found["images"][here].any(axis=(1, 2, 3)).all()
    assert not found["images"][~here].any()
    assert images(photographs(), np.arange(4), np.zeros(4, bool))[0]["images"].shape == (4, 16, 16, 3)


def test_a_bad_image_stops_by_default():
    with pytest.raises(UsageError) as error:
        images(photographs(bad={5}), [4, 5, 6], workers=2)
    text = "image 5.jpg cannot be read: it is no image that Pillow knows; data.bad_images='replace' takes another"
    assert text in str(error.value)


def test_a_bad_image_is_replaced_by_the_next_good_one_and_counted(capsys):
    found, bad = images(photographs(bad={5, 6, N - 1}), [4, 5, 5, N - 1], bad_images="replace", workers=2)
    expected, _ = images(photographs(), [4, 7, 7, 0])
    for name in ("images", "labels"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert bad == 3
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line[:22] for line in lines) == ["warning: image 23.jpg ", "warning: image 5.jpg c", "warning: image 6.jpg c"]
    with pytest.raises(UsageError, match=r"none of the 24 images can be read; the first: image 0\.jpg"):
        images(photographs(bad=set(range(N))), [3], bad_images="replace")
    with pytest.raises(UsageError, match=r"unknown data\.bad_images 'ignore'"):
        images(photographs(), [3], bad_images="ignore")


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_in_a_thread_ends_the_run(ahead):
    """Whatever it is: nothing waits for a batch that does not come."""

    def crop(picture, index, row):
        if index == 11:
            raise RuntimeError("of index 11")
        return centre(picture, index, row)

    with contextlib.closing(Reader(photographs(), channels=3, workers=2)) as reader:
        made = Ahead(lambda number: reader.images(np.arange(number * 8, number * 8 + 8), crop, shape=(16, 16, 3)), ahead)
        with contextlib.closing(made):
            assert made(0)["images"].any()
            with pytest.raises(RuntimeError, match="of index 11"):
                made(1)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_values_made_ahead_are_the_functions(ahead):
    calls = []

    def make(number):
        calls.append(number)
        if number == 7:
            raise UsageError("seven")
        return number**2

    values = Ahead(make, ahead)
    assert [values(number) for number in (0, 1, 2, 2, 3)] == [0, 1, 4, 4, 9]
    assert values(20) == 400, "another place"
    assert len(values._futures) <= ahead + 1, "what nobody will ask for is forgotten"
    assert values(6) == 36
    with pytest.raises(UsageError, match="seven"):
        values(7)
    values.close()
    if ahead:
        assert calls.count(2) == 1, "the compiler and the first step ask for the same"


def test_the_next_value_is_made_while_one_is_used():
    made = threading.Event()
    values = Ahead(lambda number: made.set() if number == 1 else None, 1)
    values(0)
    assert made.wait(timeout=60)
    values.close()


# The feeds


def config_for(**overrides):
    fields = {"data.fit": "crop", "batch_size": 8, "evaluate.batch_size": 10, "model.in_channels": 3, "data.resolution": 32}
    return configs.load_config("configs/lenet5_digits.py", fields | overrides)


def data():
    split = photographs()
    return sources.Dataset("photographs", split, split, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, "0")


def batches_of(config, devices, steps=range(4, 7)):
    with contextlib.closing(feed.TrainFeed(data(), config, mesh_of(devices))) as ours:
        return [jax.device_get(ours.batch(step)) for step in steps]


def flat(batch):
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


def test_training_crops_are_a_function_of_seed_epoch_and_index():
    batches, crop = batches_of(config_for(seed=3), 1), TrainCrop(32)
    for step, batch in zip(range(4, 7), map(flat, batches), strict=True):
        for index, label, pixels in zip(batch["index"], batch["labels"], batch["images"], strict=True):
            rng = np.random.default_rng((3, step // 3, index, 2))
            np.testing.assert_array_equal(pixels, crop(decode(FILES[index]), rng))
            assert label == index % 3


@pytest.mark.parametrize(
    ("workers", "prefetch", "devices", "micro_batches"), [(0, 0, 1, 1), (1, 1, 2, 1), (2, 4, 4, 2), (8, 2, 1, 4)]
)
def test_batches_are_the_same_for_any_number_of_workers_and_devices(workers, prefetch, devices, micro_batches):
    expected = batches_of(config_for(), 1)
    fields = {"data.workers": workers, "data.prefetch": prefetch, "accumulate_steps": micro_batches}
    found = batches_of(config_for(**fields), devices)
    for one, other in zip(map(flat, expected), map(flat, found), strict=True):
        for name in ("images", "labels", "index", "position"):
            np.testing.assert_array_equal(one[name], other[name])


def test_every_test_photograph_is_seen_once():
    test = feed.TestFeed(data(), config_for(**{"evaluate.batch_size": 15}), mesh_of(4))
    batches = [jax.device_get(batch) for batch in test.batches()]
    test.close()
    assert [batch["images"].shape for batch in batches] == [(16, 32, 32, 3)] * 2
    index = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert index.tolist() == list(range(N))
    assert not any(batch["images"][~batch["mask"]].any() for batch in batches), "padding is not decoded"
    pixels = np.concatenate([batch["images"][batch["mask"]] for batch in batches])
    for i in (0, 13, N - 1):
        np.testing.assert_array_equal(pixels[i], CentreCrop(32)(decode(FILES[i])))


# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes that differ in colour, in `train` and `val`."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 24), ("val", 9)):
        for i in range(count):
            rng = np.random.default_rng((count, i))
            pixels = rng.integers(0, 100, (36 + i % 5, 50 - i % 7, 3)) + np.array([120 * (i % 3 == c) for c in range(3)])
            place = root / split / "abc"[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:02d}.jpg")
    return root


def training_config(source, **overrides):
    fields = {
        "data.source": str(source),
        "model.num_classes": 3,
        "total_epochs": 4.0,
        "evaluate.every_epochs": 2.0,
        "log.every_steps": 3,
        "checkpoint.every_steps": 5,
        "data.workers": 2,
    }
    return config_for(**fields | overrides)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, train.run_training(training_config(f"folder:{folder}"), workdir, quiet=True)


def assert_equal_runs(one, two):
    assert lines_without_timing(one) == lines_without_timing(two)
    assert_equal_states(final_state(one), final_state(two))


def test_a_folder_trains(trained):
    workdir, result = trained
    assert (result.step, result.metrics["test_examples"]) == (12, 9)
    data = runlog.read_manifest(workdir)["data"]
    assert (data["train_examples"], data["test_examples"], data["class_names"]) == (24, 9, ["a", "b", "c"])
    assert all(0.1 < value < 0.9 for value in (*data["mean"], *data["std"])), "measured"
    rows = [row for row in runlog.read_metrics(workdir) if "train_loss" in row]
    assert [0 <= row["timing"]["data_share"] <= 1 for row in rows] == [True] * 4
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_same_images_from_tfds_give_the_same_bits(folder, trained, tmp_path):
    kinds = tensorflow_datasets.features

    class SameAsFolder(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            features = kinds.FeaturesDict({"image": kinds.Image(), "label": kinds.ClassLabel(names=["a", "b", "c"])})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "validation": self._generate_examples("val")}

        def _generate_examples(self, split):
            for i, path in enumerate(sorted((folder / split).rglob("*.jpg"))):
                yield i, {"image": path, "label": path.parent.name}

    SameAsFolder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    config = training_config("tfds:same_as_folder", **{"data.dir": str(tmp_path), "data.workers": 2})
    train.run_training(config, tmp_path / "run", quiet=True)
    assert_equal_runs(tmp_path / "run", trained[0])


@pytest.mark.full
def test_a_run_that_was_stopped_ends_with_the_same_bits(folder, trained, tmp_path, monkeypatch):
    workdir, original, config = tmp_path / "run", feed.TrainFeed.make_batch, training_config(f"folder:{folder}")

    def make_batch(self, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as context, pytest.raises(errors.Stopped):
        context.setattr(feed.TrainFeed, "make_batch", make_batch)
        train.run_training(config, workdir, quiet=True)
    assert 0 < checkpoint.newest_step(workdir / "checkpoints") < 12
    train.run_training(config, workdir, quiet=True)
    assert_equal_runs(workdir, trained[0])


def test_a_set_that_has_changed_is_refused(folder, tmp_path):
    copy, workdir = tmp_path / "photographs", tmp_path / "run"
    shutil.copytree(folder, copy)
    config = training_config(f"folder:{copy}")
    runlog.claim(workdir, config)
    runlog.write_manifest(workdir, config=config, data=feed.load_data(config), total_steps=12, first_step=0)
    (copy / "train/a/00.jpg").rename(copy / "train/a/00b.jpg")
    with pytest.raises(UsageError, match="data set photographs has changed since this run began"):
        train.run_training(config, workdir, quiet=True)


def test_a_bad_photograph_stops_or_is_counted(folder, tmp_path, capsys):
    copy = tmp_path / "photographs"
    shutil.copytree(folder, copy)
    (copy / "train/b/04.jpg").write_bytes((copy / "train/b/04.jpg").read_bytes()[:-200])
    fields = {"data.mean": (0.4,) * 3, "data.std": (0.2,) * 3, "total_epochs": 1.0, "optim.warmup_epochs": 0.0}
    with pytest.raises(UsageError, match=r"train/b/04\.jpg cannot be read: Premature end of JPEG file"):
        train.run_training(training_config(f"folder:{copy}", **fields), tmp_path / "run", quiet=True)
    fields["data.bad_images"] = "replace"
    (copy / "val/a/00.jpg").write_bytes(b"")
    train.run_training(training_config(f"folder:{copy}", **fields), tmp_path / "run", quiet=True)
    lines = runlog.read_metrics(tmp_path / "run")
    assert [row["timing"]["bad_images"] for row in lines if "timing" in row] == [1]
    assert [(row["test_bad_images"], row["test_examples"]) for row in lines if "test_loss" in row] == [(1, 9)]
    assert capsys.readouterr().err.count("train/b/04.jpg") == 1
    (copy / "val/a/00.jpg").unlink()
    with pytest.raises(UsageError, match="data set photographs has changed since this run began"):
        evaluate.evaluate_run(tmp_path / "run")
    fields |= {"data.fit": "resize"}
    capsys.readouterr()
    feed.load_data(training_config(f"folder:{copy}", **fields))
    assert "warning: 1 of 24 images were replaced" in capsys.readouterr().err


def test_a_folder_of_small_images_is_kept_in_memory(folder):
    data = feed.load_data(training_config(f"folder:{folder}", **{"data.fit": "resize"}))
    assert data.train.images.shape == (24, 32, 32, 3)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    file = folder / "train/b/04.jpg"
    expected = np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.train.images[8 + 1], expected)


def test_a_trained_network_sees_a_photograph_as_its_evaluation_did(folder, trained, monkeypatch):
    """Whole images through `predict`, whose crops must be those of `TestFeed`."""
    network, variables, config = evaluate.load_run(trained[0])
    test = feed.TestFeed(feed.load_data(config), config, mesh_of(1))
    batch = next(test.batches())
    test.close()
    expected = np.asarray(jax.nn.softmax(network.apply(variables, test.view(batch["images"], test.store))))
    rows = predict.predict_images(trained[0], sorted((folder / "val").rglob("*.jpg")), top=3)
    for row, probabilities in zip(rows, expected, strict=False):
        assert dict(row) == pytest.approx(dict(zip("abc", probabilities, strict=True)), abs=1e-5)
