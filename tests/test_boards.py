"""Loggers beside the log: off by default, and told what it is told."""

import importlib.util
import sys
import types

import pytest
from conftest import short_config
from tensorboardX.proto.event_pb2 import Event

from cnnfamily import boards, runlog
from cnnfamily.errors import UsageError


def test_both_are_off_by_default():
    assert boards.chosen(short_config()) == []


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        with pytest.raises(UsageError) as error:
            boards.chosen(short_config(**{f"log__{name}": True}))
        assert str(error.value) == f"config.log.{name}=True needs {package}: pip install 'cnnfamily[{name}]'"


def test_tensorboard_has_every_line(tmp_path):
    makers = boards.chosen(short_config(log__tensorboard=True))
    with runlog.RunLog(tmp_path, from_step=0, boards=makers) as log:
        log.write(5, 0.5, {"train_loss": 2.0}, {"seconds": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, place, found = file.read_bytes(), 0, {}
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        place += 16 + size
    assert found == {(5, "train_loss"): 2.0, (5, "seconds"): 1.0}


class FakeRun:
    def __init__(self):
        self.lines, self.metrics, self.finished = [], [], False

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, line):
        self.lines.append(line)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name, which keeps what it is told."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.errors = types.SimpleNamespace(Error=ConnectionError)
    module.Settings = lambda **fields: fields

    def init(**fields):
        module.runs.append((fields, FakeRun()))
        return module.runs[-1][1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module)
    return module


def test_weights_and_biases_has_every_line_and_one_run_for_a_directory(wandb, tmp_path):
    config = short_config(log__wandb=True)
    for step in (5, 3):  # the second time after a crash
        with runlog.RunLog(tmp_path, from_step=step - 1, boards=boards.chosen(config)) as log:
            log.write(step, 0.5, {"train_loss": 2.0}, {"seconds": 1.0})
    (first, run), (second, again) = wandb.runs
    assert first["id"] == second["id"]
    assert len(first["id"]) == 8
    assert (first["resume"], first["project"], first["dir"]) == ("allow", "cnnfamily", str(tmp_path))
    assert first["config"]["model.name"] == "lenet5"
    assert run.lines == [{"step": 5, "train_loss": 2.0, "seconds": 1.0}]
    assert again.lines[0]["step"] == 3
    assert run.metrics == [("*", "step")], "its own steps may not go back"
    assert run.finished
    assert again.finished


def test_no_network_is_one_line(wandb, tmp_path):
    def init(**fields):
        raise ConnectionError("no way to it")

    wandb.init = init
    with pytest.raises(UsageError, match=r"config\.log\.wandb=True: no way to it; WANDB_MODE=offline keeps the metrics here"):
        runlog.RunLog(tmp_path, from_step=0, boards=boards.chosen(short_config(log__wandb=True)))
