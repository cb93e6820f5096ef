"""The command that prepares a set once: what it refuses, in one line each; nothing here reaches for the network."""

import importlib.util
import socket

import pytest
from test_tfds import TinyImagenet
from test_tfds import prepare as prepare_by_hand

from cnnfamily.data import prepare
from cnnfamily.errors import UsageError


def refused(name, monkeypatch, *, has_tensorflow=True, **fields):
    """The message, on a machine without a network."""
    found = importlib.util.find_spec

    def find_spec(name, *arguments):
        return (object() if has_tensorflow else None) if name == "tensorflow" else found(name, *arguments)

    def unreachable(address, timeout):
        raise OSError(f"no way to {address[0]} in {timeout} s")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(UsageError) as error:
        prepare.prepare(name, **fields)
    return str(error.value)


def test_a_typo_names_the_nearest(monkeypatch):
    text = refused("minst", monkeypatch)
    assert text.startswith("unknown data set 'minst'; TensorFlow Datasets has ")
    assert "the nearest: mnist" in text
    assert len(text) < 200, "it has hundreds of names"


def test_what_is_missing_is_said_at_once(monkeypatch, tmp_path):
    text = refused("tiny_imagenet", monkeypatch, data_dir=tmp_path, has_tensorflow=False)
    assert text == "preparing tiny_imagenet needs tensorflow: pip install 'cnnfamily[prepare]'"
    text = refused("tiny_imagenet", monkeypatch, data_dir=tmp_path)
    assert text.startswith("tiny_imagenet is to be downloaded, but storage.googleapis.com cannot be reached (no way to ")
    text = refused("tiny_imagenet", monkeypatch, data_dir=tmp_path, manual_dir=tmp_path / "none")
    assert "none is not a folder; expected one that holds the set's own files" in text


def test_a_builder_that_fails_is_one_line(monkeypatch, tmp_path):
    def fail(self, dl_manager):
        raise AssertionError(f"{dl_manager.manual_dir} should contain a file")

    monkeypatch.setattr(TinyImagenet, "_split_generators", fail)
    monkeypatch.setattr(TinyImagenet, "MANUAL_DOWNLOAD_INSTRUCTIONS", "by hand")
    text = refused("tiny_imagenet", monkeypatch, data_dir=tmp_path, manual_dir=tmp_path)
    assert text == f"tiny_imagenet cannot be prepared: AssertionError: {tmp_path} should contain a file"


def test_what_is_prepared_is_left_alone(monkeypatch, tmp_path, capsys):
    prepare_by_hand(TinyImagenet, tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(socket, "create_connection", None)
    prepare.main(["tiny_imagenet", f"--data_dir={tmp_path}"])
    expected = f"{tmp_path / 'tiny_imagenet/5.1.0'} is prepared: --config.data.source=tfds:tiny_imagenet\n"
    assert capsys.readouterr().out == expected


def test_files_fetched_by_hand_are_prepared(monkeypatch, tmp_path):
    (tmp_path / "manual").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    folder = prepare.prepare("tiny_imagenet", data_dir=tmp_path, manual_dir=tmp_path / "manual")
    assert folder == tmp_path / "tiny_imagenet/5.1.0"
    assert (folder / "dataset_info.json").is_file()
