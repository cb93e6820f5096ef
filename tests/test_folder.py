"""Folders of photographs: which images, in which order, and what is wrong with a folder."""

import contextlib
import os

import numpy as np
import pytest
from PIL import Image

from cnnfamily.data import folder
from cnnfamily.data.photographs import Reader
from cnnfamily.errors import UsageError


def make(root, files):
    """Small images of different sizes at the given paths."""
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(path, "png")
    return root


def read(root, **fields):
    return folder.read(str(root), **{"test_share": 0.25, "split_seed": 0, **fields})


def small(picture, index, row):
    return np.asarray(picture.resize((8, 8)))


def names(split, root):
    return [os.path.relpath(split.name(i), root) for i in range(len(split))]


FILES = ("train/b/2.JPG", "train/a/10.png", "train/a/9.png", "train/b/deep/1.jpeg", "val/a/0.webp", "val/b/0.gif")


def test_train_and_val_in_the_order_of_their_paths(tmp_path):
    root = make(tmp_path / "photos", FILES)
    for ignored in ("train/a/notes.txt", "train/a/.hidden.png", "train/readme.md"):
        (root / ignored).write_text("x")
    (root / "train" / ".cache").mkdir()
    name, train, test, classes, _ = read(root)
    assert (name, classes) == ("photos", ("a", "b"))
    assert names(train, root) == ["train/a/10.png", "train/a/9.png", "train/b/2.JPG", "train/b/deep/1.jpeg"]
    assert names(test, root) == ["val/a/0.webp", "val/b/0.gif"]
    assert [train.read(i)[1] for i in range(4)] == [0, 0, 1, 1]
    assert train.read(2)[0] == (root / "train/b/2.JPG").read_bytes()


def test_a_link_to_a_folder_that_holds_it_is_refused(tmp_path):
    """Walked, it would give the images of all classes to this one, forty times over."""
    root = make(tmp_path / "photos", ["a/1.png", "b/1.png", "b/2.png"])
    make(tmp_path / "more", ["3.png"])
    (root / "a/elsewhere").symlink_to(tmp_path / "more")
    assert sum(len(split) for split in read(root)[1:3]) == 4
    for target in ("..", "../a", "."):
        (root / "a/loop").symlink_to(target)
        with pytest.raises(UsageError, match="a/loop is a link to a folder that holds it"):
            read(root)
        (root / "a/loop").unlink()


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path):
    root = make(tmp_path, FILES)
    (root / "train/a/10.png").unlink()
    (root / "train/a/10.png").symlink_to("nowhere")
    _, train, *_ = read(root)
    with pytest.raises(FileNotFoundError):
        train.read(0)
    with contextlib.closing(Reader(train, channels=3, bad_images="replace")) as reader:
        found = reader.images(np.arange(4), small, shape=(8, 8, 3))
    assert reader.bad_images == 1
    assert found["labels"].tolist() == [0, 0, 1, 1]


def test_formats_are_told_by_content_whatever_the_name(tmp_path):
    """`make` writes PNG files under all of these names."""
    _, train, test, *_ = read(make(tmp_path, FILES))
    for split in (train, test):
        assert all(split.read(i)[0].startswith(b"\x89PNG") for i in range(len(split)))
        with contextlib.closing(Reader(split, channels=3)) as reader:
            pixels = reader.images(np.arange(len(split)), small, shape=(8, 8, 3))["images"]
        reds = [FILES.index(name) for name in names(split, tmp_path)]
        assert pixels[:, 0, 0].tolist() == [[red, 0, 0] for red in reds]


def test_one_tree_is_split_by_its_seed(tmp_path):
    root = make(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(10)])
    splits = {seed: read(root, split_seed=seed) for seed in (0, 1)}
    for _, train, test, classes, _ in splits.values():
        assert (len(train), len(test), classes) == (15, 5, ("a", "b"))
        both = names(train, root) + names(test, root)
        assert sorted(both) == sorted(f"{c}/{i}.png" for c in "ab" for i in range(10))
        assert names(train, root) == sorted(names(train, root))
        assert [name[0] for name in both] == ["ab"[split.read(i)[1]] for split in (train, test) for i in range(len(split))]
    assert names(splits[0][2], root) != names(splits[1][2], root)
    assert names(splits[0][2], root) == names(read(root)[2], root)
    # A stored run goes on with the split it began with.
    assert names(splits[0][2], root) == ["a/2.png", "a/4.png", "a/6.png", "b/3.png", "b/9.png"]


def test_the_fingerprint_is_of_paths_sizes_and_splits(tmp_path):
    root = make(tmp_path, FILES)
    prints = [read(root)[4]]
    assert read(root)[4] == prints[0]
    os.utime(root / "train/b/2.JPG", (1, 1))  # a copy has another time
    assert read(root)[4] == prints[0]
    (root / "train/b/2.JPG").write_bytes(b"more" + (root / "train/b/2.JPG").read_bytes())
    prints.append(read(root)[4])
    (root / "train/b/2.JPG").rename(root / "train/b/3.JPG")
    prints.append(read(root)[4])
    (root / "train/b/3.JPG").rename(root / "train/a/3.JPG")
    prints.append(read(root)[4])
    (root / "val").rename(root / "test")
    prints.append(read(root)[4])
    (root / "train/a/9.png").unlink()
    prints.append(read(root)[4])
    assert len(set(prints)) == len(prints) == 6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), "has no folders of classes; expected x/CLASS/*.jpg; it holds: nothing"),
        (("lone.png",), "has no folders of classes; expected x/CLASS/*.jpg; it holds: lone.png"),
        (("train/a/1.png",), "has train but none of val, validation, test; it holds: train"),
        (("train/a/1.png", "val/b/1.png"), "the classes of train and val differ; only in train: a; only in val: b"),
        (("train/a/1.png", "train/b/1.txt", "val/a/1.png"), "x/train/b has no images; expected files ending in .jpg, .jpeg"),
        (("a/1.png",), "has 1 images: data.test_share=0.25 leaves a split without any"),
    ],
)
def test_folders_that_cannot_be_used(files, expected, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError) as error:
        read(make(tmp_path / "x", files))
    assert expected in str(error.value)


def test_what_is_no_folder(tmp_path):
    with pytest.raises(UsageError, match=r"none is not a folder; expected PATH/train/CLASS/\*.jpg and PATH/val, or"):
        read(tmp_path / "none")
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match=f"data.test_share={share}: expected more than 0 and less than 1"):
            read(make(tmp_path, ["a/1.png"]), test_share=share)
