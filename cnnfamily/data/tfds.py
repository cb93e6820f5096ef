"""Data sets that TensorFlow Datasets has prepared: read by random access, without TensorFlow and without the network.

`tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION` is looked for under `data.dir`, `TFDS_DATA_DIR` or ~/tensorflow_datasets.
Any of its file formats will do: ArrayRecord and Parquet through the library, TFRecord, which it reads with TensorFlow alone, by
an index that is made here of each file when it is first used. Images stay encoded until they are needed.
"""

import bisect
import hashlib
import itertools
import mmap
import os
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnfamily.data.decoding import BadImageError
from cnnfamily.data.photographs import Photographs, shuffle_split
from cnnfamily.errors import UsageError

TEST_SPLITS = ("validation", "test")
PREPARE = "`python -m cnnfamily.data.prepare {}` prepares it once; `--config=...:digits` trains now"


def read(
    source: str, *, directory: str, test_share: float, split_seed: int
) -> tuple[str, Photographs, Photographs, tuple[str, ...], str]:
    """Name, training and test images, names of the classes, and a fingerprint of the name, version and shards.

    Raises:
      UsageError: not prepared there, no training split, or features that are not one image and one class.
    """
    folder = find(source, directory)
    try:
        import tensorflow_datasets as library
    except ImportError as error:
        raise UsageError(
            f"data source tfds:{source} needs tensorflow-datasets ({error}): pip install 'cnnfamily[tfds]'"
        ) from error
    try:
        builder = library.builder_from_directory(folder)
        info = builder.info
        splits = dict(info.splits)
    except Exception as error:  # of damaged files: it raises what its parsers do
        raise UsageError(f"{folder} cannot be read as a prepared data set: {type(error).__name__}: {error}") from error
    image, label = _features(library, info, folder)
    found = {name: _records(library, builder, name, image, label) for name in ("train", *TEST_SPLITS) if name in splits}
    test = next((name for name in TEST_SPLITS if name in found), None)
    if "train" not in found:
        raise UsageError(f"{folder} has no split 'train'; it has: {', '.join(splits) or 'none'}")
    if test:
        parts = found["train"], found[test]
    else:
        parts = shuffle_split(found["train"], test_share, split_seed, folder)
    shards = [(name, *splits[name].shard_lengths, splits[name].num_bytes) for name in found]
    fingerprint = hashlib.sha256(f"{info.full_name} {shards} {len(parts[0])} {len(parts[1])}".encode()).hexdigest()[:16]
    return info.full_name, *parts, tuple(info.features[label].names), fingerprint


def find(source: str, directory: str) -> Path:
    """The directory of the version that is wanted, or of the newest: `DIR/NAME[/CONFIG]/VERSION`."""
    name, _, version = source.partition(":")
    root = Path(directory or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    base = root.joinpath(*name.split("/"))
    hint = PREPARE.format(source)
    if not base.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:8]) if root.is_dir() else ""
        found = f"there: {there}" if there else "nothing is there" if root.is_dir() else "which does not exist"
        raise UsageError(f"tfds:{source} is not prepared: looked for {base} (data.dir or TFDS_DATA_DIR), {found}; {hint}")
    versions = sorted(
        (
            path
            for path in base.iterdir()
            if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
        ),
        key=lambda path: tuple(map(int, path.name.split("."))),
    )
    wanted = [path for path in versions if version in ("", path.name)]
    if wanted:
        return wanted[-1]
    configs = sorted(path.name for path in base.iterdir() if path.is_dir() and path not in versions)
    if versions:
        raise UsageError(f"{base} has no version {version}; it has: {', '.join(path.name for path in versions)}")
    if configs:
        raise UsageError(f"{base} holds no version of its own but {', '.join(configs)}; expected tfds:{name}/CONFIG")
    raise UsageError(f"tfds:{source} is not prepared: {base} is empty; {hint}")


def _features(library, info, folder: Path) -> tuple[str, str]:
    """The names of the image and of its class."""
    features = dict(info.features)
    if isinstance(info.supervised_keys, tuple) and len(info.supervised_keys) == 2:
        image, label = info.supervised_keys
    else:
        kinds = (library.features.Image, library.features.ClassLabel)
        names = [[name for name, feature in features.items() if isinstance(feature, kind)] for kind in kinds]
        image, label = (name[0] if len(name) == 1 else None for name in names)
    of_right_kinds = isinstance(features.get(image), library.features.Image)
    if not of_right_kinds or not isinstance(features.get(label), library.features.ClassLabel):
        raise UsageError(f"{folder} has the features {', '.join(features)}; expected one image and one class label")
    return image, label


def _records(library, builder, split: str, image: str, label: str) -> Photographs:
    info = builder.info
    num_classes = info.features[label].num_classes
    decoders = {image: library.decode.SkipDecoding()}
    if str(info.file_format).endswith("TFRECORD"):
        paths = [Path(path) for path in info.splits[split].filepaths]
        raw = TFRecords(paths, info.splits[split].shard_lengths)

        def example(index: int) -> dict[str, Any]:
            return info.features.deserialize_example_np(raw[index], decoders=decoders)
    else:
        records = builder.as_data_source(split=split, decoders=decoders)
        lock = threading.Lock()  # its readers are opened at their first use, unguarded

        def example(index: int) -> dict[str, Any]:
            with lock:
                return records[index]

    def read(index: int) -> tuple[bytes, int]:
        try:
            found = example(index)
            class_number = int(found[label])
        except UsageError:
            raise
        except Exception as error:  # of a damaged record: it raises what its parsers do
            raise BadImageError(f"{type(error).__name__}: {error}") from error
        if not 0 <= class_number < num_classes:  # -1 stands for none; as a target it would be all zeros
            raise BadImageError(f"its class is {class_number}; expected 0 to {num_classes - 1}")
        return found[image], class_number

    return Photographs(
        size=info.splits[split].num_examples,
        read=read,
        name=lambda index: f"{index} of split {split} in {builder.data_dir}",
    )


class TFRecords(Sequence):
    """The records of TFRecord files by number: each a length of 8 bytes, its checksum of 4, the record, and its checksum of 4.

    The checksums are not looked at: a record that is damaged does not parse, or its image does not decode.
    """

    def __init__(self, paths: list[Path], lengths: list[int]):
        self._paths, self._lengths = paths, lengths
        self._starts = [0, *itertools.accumulate(lengths)]
        self._files: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._starts, index) - 1
        with self._lock:
            if shard not in self._files:
                self._files[shard] = self._open(shard)
        content, places = self._files[shard]
        start, size = places[index - self._starts[shard]]
        return content[start : start + size]

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        path, places, place = self._paths[shard], [], 0
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        while place + 12 <= len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            places.append((place + 12, size))
            place += 12 + size + 4
        if place != len(content) or len(places) != self._lengths[shard]:
            raise UsageError(
                f"{path} is truncated or damaged: {len(places)} records in {len(content)} bytes; "
                f"expected {self._lengths[shard]} by dataset_info.json"
            )
        return content, np.array(places, np.int64)
