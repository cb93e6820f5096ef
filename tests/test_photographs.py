"""Decoding in threads and ahead of the step: the same for any number of them, and bad images by the stated rule."""

import io
import threading

import jax
import numpy as np
import pytest
from conftest import mesh_of
from PIL import Image

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
        return b"no image" if index in bad else FILES[index]

    return Photographs(labels=np.arange(N, dtype=np.int32) % 3, read=read, name=lambda index: f"{index}.jpg")


def centre(picture, index):
    return CentreCrop(16)(picture)


def images(split, index, here=None, **fields):
    reader = Reader(split, resolution=16, channels=3, **{"workers": 0, **fields})
    try:
        index = np.asarray(index)
        return reader.images(index, centre, here=np.ones(len(index), bool) if here is None else here), reader.bad_images
    finally:
        reader.close()


@pytest.mark.parametrize("workers", [-1, 0, 1, 2, 8])
def test_images_are_in_the_order_asked_for_with_any_number_of_workers(workers):
    index = np.random.default_rng(0).permutation(N)
    found, bad = images(photographs(), index, workers=workers)
    for i, pixels, label in zip(index, found["images"], found["labels"], strict=True):
        np.testing.assert_array_equal(pixels, centre(decode(FILES[i]), i))
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
    train = feed.TrainFeed(data(), config, mesh_of(devices))
    found = [jax.device_get(train.batch(step)) for step in steps]
    train.close()
    return found


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
    test = feed.TestFeed(data(), config_for(), mesh_of(4))
    batches = [jax.device_get(batch) for batch in test.batches()]
    test.close()
    assert [batch["images"].shape for batch in batches] == [(12, 32, 32, 3)] * 2
    index = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert index.tolist() == list(range(N))
    pixels = np.concatenate([batch["images"][batch["mask"]] for batch in batches])
    for i in (0, 13, N - 1):
        np.testing.assert_array_equal(pixels[i], CentreCrop(32)(decode(FILES[i])))
