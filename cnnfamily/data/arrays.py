"""Sources that are arrays in memory: the embedded digits, NumPy archives, MNIST's file format, fake images."""

import dataclasses
import difflib
import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from cnnfamily.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    images: np.ndarray  # uint8 [n, height, width, channels]
    labels: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: np.ndarray) -> "Split":
        """Some of them, in the order given."""
        return Split(self.images[indices], self.labels[indices])


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def read(kind: str, rest: str, source: str) -> tuple[str, Split, Split, tuple[str, ...], str]:
    """Name, training and test images, names of the classes, and a fingerprint of the arrays; `kind` is one of `READERS`.

    Raises:
      UsageError: a file or an array that cannot be used, named in one line with what was expected.
    """
    name, arrays = READERS[kind](rest)
    train, test, class_names = _checked(arrays, source)
    return name, train, test, class_names, _fingerprint(train, test)


def _read_digits(rest: str) -> tuple[str, dict]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    # A contract: results on `digits` compare only on this split.
    order = np.random.default_rng(0).permutation(1797)
    images = np.round(images[order] * (255 / 16)).astype(np.uint8)
    labels = labels[order]
    return "digits", _split(images, labels, 1437)


def _read_npz(rest: str) -> tuple[str, dict]:
    path = Path(rest).expanduser()
    if not path.is_file():
        raise _missing(path)
    try:
        # Opened here, because np.load leaves the file open when the archive is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            is_archive = isinstance(archive, np.lib.npyio.NpzFile)
            expect(is_archive, f"{path} holds one array", f"an .npz archive of {', '.join(ARRAYS)}")
            for key in ARRAYS:
                expect(key in archive, f"{path} has no {key!r} but {', '.join(archive)}", ", ".join(ARRAYS))
            return path.stem, {key: archive[key] for key in (*ARRAYS, "class_names") if key in archive}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as an .npz archive of plain arrays: {error}") from error


def _read_idx(rest: str) -> tuple[str, dict]:
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise _missing(folder)
    arrays = {
        f"{split}_{kind}": _read_idx_file(folder, f"{prefix}-{kind}-idx{rank}-ubyte", rank)
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for kind, rank in (("images", 3), ("labels", 1))
    }
    return folder.resolve().name, arrays


def _read_idx_file(folder: Path, name: str, rank: int) -> np.ndarray:
    """One file: two zero bytes, the type (8 is ubyte), the rank, one big-endian uint32 a dimension, the values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        exists = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UsageError(f"{folder} has no {name} or {name}.gz; it holds: {exists}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be decompressed: {error}") from error
    header_size = 4 + 4 * rank
    magic = bytes([0, 0, 8, rank])
    expect(content[:4] == magic, f"{path} starts with bytes {content[:4].hex() or 'none'}", magic.hex())
    expect(len(content) >= header_size, f"{path} is truncated: {len(content)} bytes", f"a header of {header_size}")
    shape = struct.unpack(f">{rank}I", content[4:header_size])
    size = header_size + math.prod(shape)
    expect(len(content) == size, f"{path} is truncated or damaged: {len(content)} bytes", f"{size} by its header")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _read_fake(rest: str) -> tuple[str, dict]:
    """A coarse pattern per class under noise as strong; a quarter as many test images, of the same classes."""
    spec = {"n": 512, "size": 32, "channels": 3, "classes": 10}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in spec:
            raise unknown("key of data source fake", key, spec)
        is_count = value.isdecimal() and int(value) > 0
        expect(is_count, f"data source 'fake:{rest}' has {item!r}", f"{key}=INTEGER from 1")
        spec[key] = int(value)
    rng = np.random.default_rng(0)  # not the run's seed: a sweep over seeds compares on the same images
    n_total, size, classes = spec["n"] + max(spec["n"] // 4, 1), spec["size"], spec["classes"]
    patterns = rng.integers(0, 128, (classes, 4, 4, spec["channels"]), dtype=np.uint8)
    # Coarse, so that neither pooling nor a resize averages the class away.
    place = np.arange(size) * 4 // size
    patterns = patterns[:, place][:, :, place]
    labels = (np.arange(n_total) % classes).astype(np.int32)
    noise = rng.integers(0, 128, (n_total, *patterns.shape[1:]), dtype=np.uint8)
    images = patterns[labels] + noise
    return "fake", {**_split(images, labels, spec["n"]), "class_names": np.arange(classes).astype(str)}


READERS = {"digits": _read_digits, "npz": _read_npz, "idx": _read_idx, "fake": _read_fake}


def _split(images: np.ndarray, labels: np.ndarray, n: int) -> dict[str, np.ndarray]:
    return dict(zip(ARRAYS, (images[:n], labels[:n], images[n:], labels[n:]), strict=True))


def _missing(path: Path) -> UsageError:
    expected = "expected data.source=npz:FILE or idx:DIRECTORY that exists, or digits or fake, which need none"
    if not path.parent.is_dir():
        return UsageError(f"{path} does not exist, nor does its folder; {expected}")
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    kind = "is not a file" if path.is_dir() else "does not exist"
    return UsageError(f"{path} {kind}; " + (f"did you mean {near[0]!r} in that folder? " if near else "") + expected)


def expect(ok: bool, found: str, expected: str) -> None:
    if not ok:
        raise UsageError(f"{found}; expected {expected}")


def _checked(arrays: dict, source: str) -> tuple[Split, Split, tuple[str, ...]]:
    """The two splits with images of rank 4 and int32 labels, and the class names, or one line on what is wrong."""

    def describe(key: str) -> str:
        return f"{source}: {key} is {arrays[key].dtype} {list(arrays[key].shape)}"

    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        is_images = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
        expect(is_images, describe(f"{split}_images"), "uint8 [n, height, width] or [n, height, width, 1 or 3]")
        expect(images.size > 0, describe(f"{split}_images"), "at least one image")
        is_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        expect(is_labels, describe(f"{split}_labels"), f"integers [{len(images)}], one an image")
    if "class_names" in arrays:
        class_names, origin = arrays["class_names"], "class_names"
        expect(class_names.dtype.kind == "U" and class_names.ndim == 1, describe("class_names"), "strings [classes]")
    else:
        # At most 65,536: a stray label such as 2**32 - 1 must not make as many classes.
        classes = min(max(int(arrays["train_labels"].max()) + 1, 1), 2**16)
        class_names, origin = np.arange(classes).astype(str), "train_labels"
    for split in ("train", "test"):
        low, high = int(arrays[f"{split}_labels"].min()), int(arrays[f"{split}_labels"].max())
        in_range = low >= 0 and high < len(class_names)
        found = f"{source}: {split}_labels run from {low} to {high}"
        expect(in_range, found, f"0 to {len(class_names) - 1}, the {len(class_names)} classes of {origin}")
    train, test = (
        Split(images.reshape(*images.shape[:3], -1), labels.astype(np.int32))
        for images, labels in ((arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    )
    return train, test, tuple(map(str, class_names))


def _fingerprint(train: Split, test: Split) -> str:
    digest = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
