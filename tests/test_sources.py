"""What each source yields, and one clear line for each way in which it can be unusable."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnfamily.data import sources
from cnnfamily.errors import UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def small_set(shape=(3, 4, 4), n_train=6, n_test=3):
    rng = np.random.default_rng(1)
    return {
        "train_images": rng.integers(0, 256, (n_train, *shape[1:]), dtype=np.uint8),
        "train_labels": np.arange(n_train) % 3,
        "test_images": rng.integers(0, 256, (n_test, *shape[1:]), dtype=np.uint8),
        "test_labels": np.arange(n_test) % 3,
    }


def load_npz(folder, arrays, **options):
    np.savez(folder / "set.npz", **arrays)
    return sources.load(f"npz:{folder / 'set.npz'}", **{"resolution": 4, "channels": 1, **options})


def write_idx(folder, arrays, compress=False):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, rank in (("images", 3), ("labels", 1)):
            array = arrays[f"{split}_{kind}"].astype(np.uint8)
            content = struct.pack(f">I{rank}I", 0x800 + rank, *array.shape) + array.tobytes()
            name = f"{prefix}-{kind}-idx{rank}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def message(source, **options):
    with pytest.raises(UsageError) as caught:
        sources.load(source, **{"resolution": 4, "channels": 1, **options})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_digits_file_is_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    expected = datasets.load_digits()
    with np.load(Path(sources.__file__).with_name("digits.npz")) as archive:
        assert archive["images"].dtype == np.uint8
        np.testing.assert_array_equal(archive["images"], expected.images)
        np.testing.assert_array_equal(archive["labels"], expected.target)


def test_digits_split_and_scale():
    with np.load(Path(sources.__file__).with_name("digits.npz")) as archive:
        images, labels = archive["images"], archive["labels"]
    order = np.random.default_rng(0).permutation(1797)
    dataset = sources.load("digits", resolution=8, channels=1)
    assert (dataset.name, dataset.num_classes, dataset.class_names[9]) == ("digits", 10, "9")
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train.labels, labels[order[:1437]])
    np.testing.assert_array_equal(dataset.test.labels, labels[order[1437:]])
    # 255 v / 16 rounded, by hand for some v; 8 is 127.5, which rounds to the even 128.
    scaled = {0: 0, 1: 16, 5: 80, 8: 128, 15: 239, 16: 255}
    raw = images[order[1437:]]
    for value, pixel in scaled.items():
        assert set(dataset.test.images[..., 0][raw == value].tolist()) == {pixel}


def test_digits_fingerprint_is_known():
    # Results quoted for `digits` are comparable only while this holds, at any resolution.
    small, large = (sources.load("digits", resolution=size, channels=1) for size in (8, 16))
    assert small.fingerprint == large.fingerprint == "b3e6dc06ea2ffe5d"


def test_fingerprint_sees_one_pixel_one_label_and_the_split(tmp_path):
    original = small_set()
    seen = {load_npz(tmp_path, original).fingerprint}
    for key, place in (("train_images", (0, 0, 0)), ("test_images", (2, 3, 3)), ("test_labels", 0)):
        changed = {name: array.copy() for name, array in original.items()}
        changed[key][place] = (int(changed[key][place]) + 1) % 3
        seen.add(load_npz(tmp_path, changed).fingerprint)
    assert len(seen) == 4
    assert load_npz(tmp_path, original | {"train_labels": original["train_labels"].astype(np.uint8)}).fingerprint in seen


def test_npz_keeps_bytes_order_and_names(tmp_path):
    arrays = small_set((0, 4, 4, 3))
    dataset = load_npz(tmp_path, arrays | {"class_names": np.array(["ant", "bee", "cow", "dog"])}, channels=3)
    np.testing.assert_array_equal(dataset.train.images, arrays["train_images"])
    np.testing.assert_array_equal(dataset.test.images, arrays["test_images"])
    np.testing.assert_array_equal(dataset.train.labels, arrays["train_labels"])
    assert dataset.name == "set"
    assert dataset.class_names == ("ant", "bee", "cow", "dog")
    assert type(dataset.class_names[0]) is str


def test_npz_ignores_what_it_does_not_need(tmp_path):
    assert load_npz(tmp_path, small_set() | {"notes": np.array([{}], object)}).num_classes == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"test_labels": None}, ["has no 'test_labels'", "train_images, train_labels, test_images"]),
        ({"train_images": np.zeros((6, 4, 4), np.float32)}, ["train_images is float32 [6, 4, 4]", "uint8"]),
        ({"train_images": np.zeros((6, 16), np.uint8)}, ["train_images is uint8 [6, 16]", "[n, height, width]"]),
        ({"train_labels": np.zeros(6)}, ["train_labels is float64 [6]", "integers"]),
        ({"train_labels": np.zeros((6, 1), int)}, ["train_labels is int64 [6, 1]", "integers [6]"]),
        ({"test_labels": np.zeros(5, int)}, ["test_labels is int64 [5]", "integers [3], one an image"]),
        ({"train_labels": np.arange(6) - 1}, ["train_labels run from -1 to 4", "expected 0 to 4"]),
        ({"test_labels": np.array([0, 1, 3])}, ["test_labels run from 0 to 3", "0 to 2", "3 classes of train_labels"]),
        ({"class_names": np.array(["a", "b"])}, ["train_labels run from 0 to 2", "0 to 1", "2 classes of class_names"]),
        ({"class_names": np.arange(3)}, ["class_names is int64 [3]", "strings"]),
        ({"train_labels": np.full(6, 2**32 - 1)}, ["4294967295", "0 to 65535"]),
        ({"test_images": np.zeros((0, 4, 4), np.uint8)}, ["test_images is uint8 [0, 4, 4]", "at least one image"]),
        ({"train_images": np.zeros((6, 4, 4, 2), np.uint8)}, ["is uint8 [6, 4, 4, 2]", "[n, height, width, 1 or 3]"]),
        ({"train_images": np.array([None] * 6, object)}, ["set.npz cannot be read", "plain arrays"]),
    ],
)
def test_npz_with_unusable_arrays(tmp_path, change, expected):
    arrays = {key: array for key, array in (small_set() | change).items() if array is not None}
    np.savez(tmp_path / "set.npz", **arrays)
    text = message(f"npz:{tmp_path / 'set.npz'}")
    assert str(tmp_path / "set.npz") in text
    for part in expected:
        assert part in text


def test_npz_file_missing_suggests_the_nearest(tmp_path):
    np.savez(tmp_path / "flowers.npz", **small_set())
    assert "flower.npz does not exist; did you mean 'flowers.npz' in that folder? expected data.source=" in message(
        f"npz:{tmp_path / 'flower.npz'}"
    )
    assert "did you mean" not in message(f"npz:{tmp_path / 'other'}"), "only what is like it is suggested"
    assert "unlike.h5 does not exist; expected data.source=npz:FILE" in message(f"npz:{tmp_path / 'unlike.h5'}")
    assert "a.npz does not exist, nor does its folder; expected data.source" in message(f"npz:{tmp_path / 'no' / 'a.npz'}")
    assert message(f"npz:{tmp_path}").startswith(f"{tmp_path} is not a file")


def test_files_that_are_not_npz(tmp_path):
    np.savez(tmp_path / "good.npz", **small_set())
    content = (tmp_path / "good.npz").read_bytes()
    bad = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"image,label\n",
        "pickle": pickle.dumps([1]),
    }
    for name, wrong in bad.items():
        (tmp_path / name).write_bytes(wrong)
        assert f"{name} cannot be read as an .npz archive" in message(f"npz:{tmp_path / name}")
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "one.npy holds one array; expected an .npz archive" in message(f"npz:{tmp_path / 'one.npy'}")


@pytest.mark.parametrize("compress", [False, True])
def test_idx_holds_what_was_written(tmp_path, compress):
    arrays = small_set((0, 4, 5))
    write_idx(tmp_path, arrays, compress)
    dataset = sources.load(f"idx:{tmp_path}", resolution=5, channels=1, fit="pad")
    # Four rows in five: none above, one below.
    np.testing.assert_array_equal(dataset.train.images[:, :4, :, 0], arrays["train_images"])
    assert not dataset.train.images[:, 4].any()
    np.testing.assert_array_equal(dataset.test.labels, arrays["test_labels"])
    assert dataset.name == tmp_path.name
    assert dataset.fingerprint == load_npz(tmp_path, arrays, resolution=5).fingerprint


def test_idx_files_that_are_damaged(tmp_path):
    write_idx(tmp_path, small_set())
    path = tmp_path / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    assert len(content) == 16 + 3 * 16
    for wrong, expected in (
        (content[:-1], "truncated or damaged: 63 bytes; expected 64"),
        (content + b"\0", "truncated or damaged: 65 bytes; expected 64"),
        (content[:10], "truncated: 10 bytes; expected a header of 16"),
        (b"", "starts with bytes none; expected 00000803"),
        (content[:3] + b"\1" + content[4:], "starts with bytes 00000801; expected 00000803"),
    ):
        path.write_bytes(wrong)
        text = message(f"idx:{tmp_path}")
        assert str(path) in text
        assert expected in text
    path.unlink()
    text = message(f"idx:{tmp_path}")
    assert "has no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz; it holds: t10k-labels-idx1-ubyte" in text
    for wrong in (gzip.compress(content)[:-9], content):
        path.with_name(f"{path.name}.gz").write_bytes(wrong)
        assert f"{path}.gz cannot be decompressed" in message(f"idx:{tmp_path}")
    assert f"did you mean {tmp_path.name!r}" in message(f"idx:{tmp_path}x")


def test_real_mnist():
    folder = SHARED / "mnist"
    if not folder.is_dir():
        pytest.skip("MNIST is not beside this repository")
    dataset = sources.load(f"idx:{folder}", resolution=28, channels=1)
    assert dataset.train.images.shape == (60000, 28, 28, 1)
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(dataset.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # The constants of many published MNIST recipes.
    assert dataset.mean == pytest.approx((0.1307,), abs=5e-5)
    assert dataset.std == pytest.approx((0.3081,), abs=5e-5)


def test_fake_is_repeatable_and_has_a_learnable_class():
    first, again = (sources.load("fake", resolution=32, channels=3) for _ in range(2))
    other = sources.load("fake:n=513", resolution=32, channels=3)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.train.images.shape == (512, 32, 32, 3)
    assert first.test.images.shape == (128, 32, 32, 3)
    centres = np.stack([first.train.images[first.train.labels == label].mean(axis=0) for label in range(10)])
    distances = np.square(first.test.images[:, None] - centres).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == first.test.labels).all()


def test_fake_spec():
    dataset = sources.load("fake:n=6,size=5,channels=1,classes=4", resolution=5, channels=1)
    assert dataset.train.images.shape == (6, 5, 5, 1)
    assert dataset.num_classes == 4
    assert "unknown key of data source fake 'sise'; did you mean 'size'?" in message("fake:sise=3")
    assert "'n=0'; expected n=INTEGER from 1" in message("fake:n=0")
    assert "'n=many'" in message("fake:n=many")


def test_sources_that_do_not_exist():
    assert "unknown data source 'digit'; did you mean 'digits'? known: digits, npz, idx, tfds, folder, fake" in message("digit")
    assert message("tfds:") == "data source is 'tfds:'; expected tfds:NAME"
    assert message("npz") == "data source is 'npz'; expected npz:PATH"
    assert message("idx:") == "data source is 'idx:'; expected idx:DIR"
    assert message("digits:8") == "data source is 'digits:8'; expected digits"


def test_resize_is_pillows_bilinear_on_real_images():
    images = sources.load("digits", resolution=8, channels=1).test.images[:20, ..., 0]
    colour = np.stack([images, images.transpose(0, 2, 1), 255 - images], axis=-1)
    for resolution in (5, 8, 32):
        fitted = sources.fit_images(colour, resolution=resolution, channels=3)
        for before, after in zip(colour, fitted, strict=True):
            picture = Image.fromarray(before).resize((resolution, resolution), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(after, np.asarray(picture))


def test_resize_by_hand():
    # Two pixels to four: the new centres lie at -1/4, 1/4, 3/4 and 5/4 of the way from the first to the second.
    rows = np.array([[0, 100], [0, 100]], np.uint8)[None, ..., None]
    assert sources.fit_images(rows, resolution=4, channels=1)[0, 0, :, 0].tolist() == [0, 25, 75, 100]
    # Four to two: the triangle is twice as wide, so three pixels weigh 3, 3, 1 of 7, and the fourth is out of reach.
    rows = np.array([[0, 70, 140, 210]] * 4, np.uint8)[None, ..., None]
    assert sources.fit_images(rows, resolution=2, channels=1)[0, 0, :, 0].tolist() == [50, 160]


def test_resize_makes_wide_images_square():
    wide = np.zeros((2, 4, 8, 1), np.uint8)
    wide[:, :, 4:] = 200
    fitted = sources.fit_images(wide, resolution=4, channels=1)
    assert fitted.shape == (2, 4, 4, 1)
    assert (fitted[:, :, 0] == 0).all()
    assert (fitted[:, :, 3] == 200).all()


def test_pad_centres_in_zeros():
    images = np.random.default_rng(0).integers(1, 256, (3, 28, 28, 1), dtype=np.uint8)
    fitted = sources.fit_images(images, resolution=32, channels=1, fit="pad")
    np.testing.assert_array_equal(fitted[:, 2:30, 2:30], images)
    assert np.count_nonzero(fitted) == images.size


def test_equal_resolution_keeps_bytes():
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    for fit in ("resize", "pad"):
        np.testing.assert_array_equal(sources.fit_images(images, resolution=9, channels=3, fit=fit), images)


@pytest.mark.parametrize("resolution", [2, 5])
def test_channels(resolution):
    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)[None]
    # 0.299 R + 0.587 G + 0.114 B.
    grey = sources.fit_images(pixels, resolution=2, channels=1)
    assert grey[0, ..., 0].tolist() == [[76, 150], [29, 18]]
    colour = sources.fit_images(grey, resolution=resolution, channels=3)
    for channel in range(3):
        expected = sources.fit_images(grey, resolution=resolution, channels=1)
        np.testing.assert_array_equal(colour[..., channel : channel + 1], expected)


def test_fits_that_are_refused():
    assert "images of 8x8 pixels cannot be padded to data.resolution=6" in message("digits", resolution=6, fit="pad")
    assert "unknown data.fit 'crp'; did you mean 'crop'?" in message("digits", fit="crp")
    assert "data.fit is 'crop' and data.source 'digits'; expected 'resize' or 'pad'" in message("digits", fit="crop")
    assert "model.in_channels is 2; expected 1 (grey) or 3 (RGB)" in message("digits", channels=2)
    assert "data.resolution is 0; expected at least 1" in message("digits", resolution=0)


def test_mean_and_std_are_those_of_the_fitted_training_images(tmp_path):
    arrays = small_set((0, 4, 4, 3))
    arrays["train_images"][..., 2] //= 4
    dataset = load_npz(tmp_path, arrays, resolution=7, channels=3)
    pixels = dataset.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_mean_by_hand_over_several_chunks():
    images = np.zeros((3000, 1, 1, 2), np.uint8)
    images[:1500, ..., 0] = 255
    images[:, ..., 1] = 51
    mean, std = sources.measure(images)
    assert mean == (0.5, 0.2)
    # The second channel is constant, and 0 would make NaN.
    assert std == (0.5, 1.0)


def test_mean_and_std_given():
    dataset = sources.load("digits", resolution=8, channels=3, mean=(0.1, 0.2, 0.3))
    assert dataset.mean == (0.1, 0.2, 0.3)
    assert dataset.std == sources.load("digits", resolution=8, channels=3).std
    assert "data.mean is (0.5,); expected 3 values" in message("digits", channels=3, mean=(0.5,))
    assert "data.std is (0.0,); expected values above 0" in message("digits", std=(0.0,))
