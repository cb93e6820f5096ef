"""Photographs in folders: `PATH/train/CLASS/*.jpg` and `PATH/val/CLASS/*.jpg` (or `validation`, `test`), or `PATH/CLASS/*.jpg`.

Classes are the sorted names of the folders, and images are sorted by path, so that an index means the same image on every
machine.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cnnfamily.data.photographs import Photographs, shuffle_split
from cnnfamily.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
TEST_NAMES = ("val", "validation", "test")


def read(
    path: str, *, directory: str = "", test_share: float, split_seed: int
) -> tuple[str, Photographs, Photographs, tuple[str, ...], str]:
    """Name, training and test photographs, names of the classes, and a fingerprint of paths, sizes and classes.

    A relative path is looked for under `directory`, if there is one.

    Raises:
      UsageError: no such folder, no images, a class without any, or classes that differ between training and test.
    """
    root = Path(directory, path).expanduser()
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; expected PATH/train/CLASS/*.jpg and PATH/val, or PATH/CLASS/*.jpg")
    if (root / "train").is_dir():
        test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if test is None:
            names = ", ".join(sorted(entry.name for entry in root.iterdir()))
            raise UsageError(f"{root} has train but none of {', '.join(TEST_NAMES)}; it holds: {names}")
        listings = [_list(root / "train"), _list(test)]
        classes = sorted(listings[0])
        if classes != sorted(listings[1]):
            only = [sorted(set(one) - set(other))[:3] for one, other in (listings, listings[::-1])]
            raise UsageError(
                f"{root}: the classes of train and {test.name} differ; only in train: {', '.join(only[0]) or 'none'}; "
                f"only in {test.name}: {', '.join(only[1]) or 'none'}"
            )
        files = [_flatten(listing, classes) for listing in listings]
        splits = map(_photographs, files)
    else:
        listing = _list(root)
        classes = sorted(listing)
        files = [_flatten(listing, classes)]
        splits = shuffle_split(_photographs(files[0]), test_share, split_seed, root)
    train, test = splits
    digest = hashlib.sha256(f"{split_seed} {len(test)}\n".encode() if len(files) == 1 else b"")
    for part in files:
        for path, size, label in part:
            digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return root.resolve().name, train, test, tuple(classes), digest.hexdigest()[:16]


def _photographs(files: list[tuple[Path, int, int]]) -> Photographs:
    paths, labels = [str(path) for path, _, _ in files], [label for _, _, label in files]

    def read(index: int) -> tuple[bytes, int]:
        return Path(paths[index]).read_bytes(), labels[index]

    return Photographs(len(files), read, paths.__getitem__)


def _list(folder: Path) -> dict[str, list[tuple[Path, int]]]:
    """Class name -> its image files with their sizes, sorted."""
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = sorted(_walk(entry))
            if not found[entry.name]:
                raise UsageError(f"folder {entry} has no images; expected files ending in {', '.join(SUFFIXES)}")
    if not found:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UsageError(f"{folder} has no folders of classes; expected {folder.name}/CLASS/*.jpg; it holds: {names}")
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, int]]:
    for place, folders, names in os.walk(folder, followlinks=True):
        for name in folders:
            target = os.path.realpath(os.path.join(place, name))
            if (os.path.realpath(place) + os.sep).startswith(target + os.sep):  # it would be walked round and round
                raise UsageError(f"{os.path.join(place, name)} is a link to a folder that holds it; expected a link elsewhere")
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(place, name)
                try:
                    size = path.stat().st_size
                except FileNotFoundError:  # a link to nothing is a bad image, of which data.bad_images decides
                    size = -1
                yield path, size


def _flatten(listing: dict[str, list[tuple[Path, int]]], classes: list[str]) -> list[tuple[Path, int, int]]:
    return [(path, size, label) for label, name in enumerate(classes) for path, size in listing[name]]
