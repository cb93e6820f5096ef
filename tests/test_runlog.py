"""The run directory after crashes and under other hands."""

import contextlib
import json
import types

import pytest

from cnnfamily import config as configs
from cnnfamily import disk, errors, runlog
from cnnfamily.errors import UsageError

LENET = "configs/lenet5_digits.py"


def test_going_on_drops_what_comes_again(tmp_path):
    """Lines after the checkpoint, and a last line that a crash cut in half."""
    lines = [json.dumps({"step": step, "epoch": step / 10, "train_loss": 1.0}) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 35, "epo')
    with runlog.RunLog(tmp_path, from_step=20) as log:
        log.write(25, 2.5, {"train_loss": 0.5}, {"seconds": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [10, 20, 25]
    assert json.loads(text.splitlines()[-1])["timing"] == {"seconds": 1.0}


def test_a_config_of_another_run_is_named_key_by_key(tmp_path):
    runlog.claim(tmp_path, configs.load_config(LENET))
    runlog.check(tmp_path, configs.load_config(LENET))
    with pytest.raises(UsageError, match=r"optim\.learning_rate \(0\.002 there, 0\.1 here\), seed \(0 there, 1 here\); take"):
        runlog.check(tmp_path, configs.load_config(LENET, {"seed": 1, "optim.learning_rate": 0.1}))


def test_another_network_in_the_directory_is_refused(tmp_path):
    runlog.claim(tmp_path, configs.load_config(LENET))
    with pytest.raises(UsageError, match="more; take another --workdir"):
        runlog.check(tmp_path, configs.load_config("configs/efficientnet_b0.py:digits"))


@pytest.mark.parametrize(("content", "message"), [(None, "is no run directory"), ("{", "cannot be read")])
def test_a_directory_that_is_no_run_is_one_line(content, message, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        runlog.read_config(tmp_path)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a folder that can be written"):
        runlog.claim(tmp_path / "file" / "run", configs.load_config(LENET))


def test_a_write_is_whole_or_not_there(tmp_path, monkeypatch):
    disk.write_whole(tmp_path / "a", "old")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        disk.write_whole(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_curves_are_drawn_at_the_end_and_meanwhile_now_and_then(tmp_path, monkeypatch):
    drawn, clock = [], [0.0]
    monkeypatch.setattr(runlog, "draw_curves", drawn.append)
    monkeypatch.setattr(runlog, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with runlog.Curves(tmp_path, seconds=30.0) as curves:
        counts = []
        for clock[0] in (10.0, 29.0, 31.0, 60.0, 62.0):
            curves.changed()
            counts.append(len(drawn))
        assert counts == [0, 0, 1, 1, 2]
    assert len(drawn) == 2, "nothing has changed since"
    for kind, expected in ((errors.Stopped, 1), (errors.NonFiniteLoss, 1), (errors.UsageError, 0), (KeyboardInterrupt, 0)):
        drawn.clear()
        with contextlib.suppress(kind), runlog.Curves(tmp_path) as curves:
            curves.changed()
            raise kind("x", 2) if kind is errors.Stopped else kind("x")
        assert len(drawn) == expected, kind


def test_a_picture_that_fails_does_not_hide_why_the_run_ends(tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(errors.NonFiniteLoss, match="first in the stem"), runlog.Curves(tmp_path) as curves:
        curves.changed()
        raise errors.NonFiniteLoss("first in the stem")
    assert capsys.readouterr().err.startswith("warning: the curves are not drawn: ")
    with pytest.raises(disk.DiskError), runlog.Curves(tmp_path) as curves:
        curves.changed()


def test_a_copy_without_its_history_is_of_the_commit_that_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(runlog.configs, "REPOSITORY", tmp_path)
    monkeypatch.setenv("CNNFAMILY_COMMIT", "abc")
    assert runlog._commit() == "abc"
    monkeypatch.delenv("CNNFAMILY_COMMIT")
    assert runlog._commit() == ""
