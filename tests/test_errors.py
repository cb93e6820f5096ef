"""How a command ends."""

import sys

import pytest

from cnnfamily import errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError("found a,\n  expected b"), 2),
        (errors.NonFiniteLoss("nan"), 3),
        (errors.Stopped("stopped", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_status_and_one_line(error, status, monkeypatch, capsys):
    def main(argv):
        assert argv == ["--a"]
        raise error

    monkeypatch.setattr(sys, "argv", ["x", "--a", "--debug"] if status == 2 else ["x", "--a"])
    with pytest.raises(SystemExit) as end:
        errors.run_command(main)
    assert end.value.code == status
    lines = capsys.readouterr().err.splitlines()
    if status == 2:
        assert lines[0].startswith("Traceback")
        assert lines[-1] == "UsageError: found a, expected b"
    else:
        assert len(lines) == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        errors.run_command(lambda argv: 1 / 0)


def test_a_path_too_long_for_the_system_is_one_line(monkeypatch, capsys, tmp_path):
    """`Path.is_dir` raises for it, and a path can come in anywhere."""
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as end:
        errors.run_command(lambda argv: (tmp_path / ("a" * 4000)).stat())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("UsageError: File name too long: '")
    assert len(line) < 300
    with pytest.raises(FileNotFoundError):
        errors.run_command(lambda argv: (tmp_path / "none").stat())


def test_unknown_names_the_nearest_and_all():
    error = errors.unknown("model", "resnt50", ["lenet5", "resnet50"])
    assert str(error) == "unknown model 'resnt50'; did you mean 'resnet50'? known: lenet5, resnet50"
    assert "did you mean" not in str(errors.unknown("model", "zzz", ["lenet5"]))


def test_a_word_without_end_is_cut_in_the_middle():
    text = errors.one_line("found\n'" + "a" * 5000 + "z',  expected b")
    assert text.startswith("found 'aaaa")
    assert text.endswith("aaz', expected b")
    assert len(text) < 200
