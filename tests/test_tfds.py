"""Sets that TensorFlow Datasets has prepared, without TensorFlow: a builder of our own with JPEGs in ImageNet's shape."""

import io
import json
import shutil
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from cnnfamily.data import tfds
from cnnfamily.data.decoding import BadImageError
from cnnfamily.data.preprocessing import imagenet_classes
from cnnfamily.errors import UsageError

LABELS = {"train": [int(label) for label in np.random.default_rng(0).integers(0, 1000, 24)], "validation": [999, 0, 5, 7]}


def jpeg(split, index):
    rng = np.random.default_rng((len(split), index))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40 + index, 50, 3), np.uint8)).save(file, "jpeg")
    return file.getvalue()


class TinyImagenet(tensorflow_datasets.core.GeneratorBasedBuilder):
    """The features of its `imagenet2012`; in the order in which they come, so that an index is known."""

    VERSION = tensorflow_datasets.core.Version("5.1.0")
    SPLITS = ("train", "validation")

    def _info(self):
        kinds = tensorflow_datasets.features
        features = {
            "image": kinds.Image(encoding_format="jpeg"),
            "label": kinds.ClassLabel(names=imagenet_classes()),
            "file_name": kinds.Text(),
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=kinds.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for index, label in enumerate(LABELS[split]):
            yield index, {"image": io.BytesIO(jpeg(split, index)), "label": label, "file_name": f"{index}.JPEG"}


class TrainOnly(TinyImagenet):
    SPLITS = ("train",)


def prepare(kind, directory):
    kind(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(TinyImagenet, tmp_path_factory.mktemp("tfds"))


def read(directory, source="tiny_imagenet", **fields):
    return tfds.read(source, **{"directory": str(directory), "test_share": 0.25, "split_seed": 0, **fields})


def assert_is_the_set(train, test):
    for split, found in (("train", train), ("validation", test)):
        assert len(found) == len(LABELS[split])
        for index in np.random.default_rng(1).permutation(len(found)):
            assert found.read(index) == (jpeg(split, index), LABELS[split][index])


def test_encoded_images_and_labels_by_number(prepared):
    name, train, test, classes, fingerprint = read(prepared)
    assert (name, classes) == ("tiny_imagenet/5.1.0", imagenet_classes())
    assert_is_the_set(train, test)
    assert train.name(3).startswith("3 of split train in ")
    assert read(prepared)[4] == fingerprint
    assert "tensorflow" not in sys.modules


def test_a_class_that_is_none_is_a_bad_image(tmp_path):
    class Unlabelled(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            kinds = tensorflow_datasets.features
            features = kinds.FeaturesDict({"image": kinds.Image(), "label": kinds.ClassLabel(num_classes=2)})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, label in enumerate((0, 1, -1, 1)):
                yield i, {"image": io.BytesIO(jpeg("train", i)), "label": label}

    _, train, test, *_ = read(prepare(Unlabelled, tmp_path), "unlabelled")
    found = []
    for split in (train, test):
        for i in range(len(split)):
            try:
                found.append(str(split.read(i)[1]))
            except BadImageError as error:
                found.append(str(error))
    assert sorted(found) == ["0", "1", "1", "its class is -1; expected 0 to 1"]


def as_tfrecords(prepared, directory):
    """The same records in the other format, which only TensorFlow writes."""
    folder = directory / "tiny_imagenet/5.1.0"
    shutil.copytree(prepared / "tiny_imagenet/5.1.0", folder)
    for split in LABELS:
        (file,) = folder.glob(f"*-{split}.array_record*")
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(file))
        records = [reader.read([i])[0] for i in range(reader.num_records())]
        reader.close()
        blocks = [struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records]
        stem = file.name.replace("array_record", "tfrecord").removesuffix("-00000-of-00001")
        for shard, part in enumerate((blocks[:1], blocks[1:])):
            (folder / f"{stem}-0000{shard}-of-00002").write_bytes(b"".join(part))
        file.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["shardLengths"] = ["1", str(int(split["shardLengths"][0]) - 1)]
    text = json.dumps(info | {"fileFormat": "tfrecord"}).replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(text)
    return directory


def test_tfrecords_are_read_by_number_too(prepared, tmp_path):
    _, train, test, classes, fingerprint = read(as_tfrecords(prepared, tmp_path))
    assert_is_the_set(train, test)
    assert classes == imagenet_classes()
    assert fingerprint != read(prepared)[4], "in two files instead of one"
    assert "tensorflow" not in sys.modules


def test_damaged_tfrecords_are_named(prepared, tmp_path):
    as_tfrecords(prepared, tmp_path)
    file = sorted(tmp_path.rglob("*-train.tfrecord*"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(UsageError, match=r"train\.tfrecord.* is truncated or damaged: 23 records in \d+ bytes; expected 23 by"):
        read(tmp_path)[1].read(1)
    file.write_bytes(whole[:12] + b"\xff" * 40 + whole[52:])
    _, train, *_ = read(tmp_path)
    with pytest.raises(BadImageError):
        train.read(1)
    assert train.read(2) == (jpeg("train", 2), LABELS["train"][2])


def test_a_damaged_array_record_is_one_bad_image(prepared, tmp_path):
    """Its chunks have checksums; the others are read as before."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("*-train.array_record*")
    content = bytearray(file.read_bytes())
    place = content.index(jpeg("train", 7)[-60:-20])
    content[place] ^= 1
    file.write_bytes(content)
    _, train, *_ = read(tmp_path)
    with pytest.raises(BadImageError, match="hash mismatch"):
        train.read(7)
    for index in (0, 6, 8, 23):
        assert train.read(index) == (jpeg("train", index), LABELS["train"][index])


def test_a_set_without_a_test_split_is_cut(tmp_path):
    _, train, test, _, fingerprint = read(prepare(TrainOnly, tmp_path), "train_only")
    assert (len(train), len(test)) == (18, 6)
    found = [split.read(i)[0] for split in (train, test) for i in range(len(split))]
    assert sorted(found) == sorted(jpeg("train", i) for i in range(24))
    assert read(tmp_path, "train_only", test_share=0.5)[4] != fingerprint


def test_what_is_not_prepared_says_where_it_was_looked_for(prepared, tmp_path, monkeypatch):
    def message(source, directory=prepared):
        with pytest.raises(UsageError) as error:
            read(directory, source)
        return str(error.value)

    text = message("imagenet2012")
    assert text.startswith(
        f"tfds:imagenet2012 is not prepared: looked for {prepared / 'imagenet2012'} (data.dir or TFDS_DATA_DIR)"
    )
    assert "there: " in text
    assert "tiny_imagenet" in text
    assert "`python -m cnnfamily.data.prepare imagenet2012` prepares it once; `--config=...:digits` trains now" in text
    assert message("tiny_imagenet:1.0.0").endswith("tiny_imagenet has no version 1.0.0; it has: 5.1.0")
    assert "which does not exist" in message("mnist", tmp_path / "none")
    assert "nothing is there" in message("mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    assert f"looked for {tmp_path / 'elsewhere' / 'mnist'}" in message("mnist", "")
    (tmp_path / "sets/64px/1.0.0").mkdir(parents=True)
    assert message("sets", tmp_path).endswith("holds no version of its own but 64px; expected tfds:sets/CONFIG")


def test_the_newest_version_is_taken(prepared, tmp_path):
    for version in ("5.1.0", "10.0.0", "9.9.9"):
        shutil.copytree(prepared / "tiny_imagenet/5.1.0", tmp_path / "tiny_imagenet" / version)
    assert tfds.find("tiny_imagenet", str(tmp_path)).name == "10.0.0"
    assert tfds.find("tiny_imagenet:9.9.9", str(tmp_path)).name == "9.9.9"


def test_a_damaged_description_is_one_line(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tiny_imagenet/5.1.0/dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match=r"5\.1\.0 cannot be read as a prepared data set: "):
        read(tmp_path)
