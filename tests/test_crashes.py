"""A run that is killed again and again, in real processes and at awkward moments, ends as the one that never was."""

import signal
import sys
from pathlib import Path

import pytest
import soak
from conftest import QUICK

from cnnfamily import checkpoint, runlog

KILLED = Path(__file__).with_name("killed.py")
# Where each process dies, and which checkpoint may then be the newest: a save is awaited by the next one, so that of the two
# last either. Saves are due every 4 steps and at evaluations (11, 22).
MARKS = [
    ("start", (None,)),
    ("compile", (None,)),
    ("save:4", (None, 4)),  # its files are being written
    ("line:10", (4, 8)),  # in the middle of an epoch and of a line
    ("saved:11", (11,)),  # the evaluation is in the log and in the checkpoint, and nothing after that is done
    ("never", (30,)),
]
FEW = [mark for mark in MARKS if mark[0] in ("line:10", "never")]


SMALLER = ["--config.model.stages=((1,16,1,1,3),)", "--config.model.se_ratio=0.0"]  # no choice less, and it starts sooner
# In half the time: what is drawn in a step is not kept, so that a start could lose it, and is on where all marks are.
DRAWN = ("--config.model.", "--config.augment.mix", "--config.accumulate_steps")
LENET = ["--config=configs/lenet5_digits.py", *(each for each in soak.ARGUMENTS[1:] if not each.startswith(DRAWN))]


@pytest.mark.parametrize(
    ("marks", "arguments"),
    [(FEW, LENET), pytest.param(MARKS, [*soak.ARGUMENTS, *SMALLER], marks=pytest.mark.full)],
    ids=["few", "all"],
)
def test_killed_at_awkward_moments(marks, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "ARGUMENTS", arguments)
    monkeypatch.setattr(soak, "DEVICES", f"{soak.DEVICES} {QUICK}")
    _, errors = soak.start(tmp_path / "reference").communicate(timeout=300)  # first: the others load what it compiles
    assert errors == ""
    workdir, previous = tmp_path / "run", 0
    for i, (mark, possible) in enumerate(marks):
        taken = tmp_path / f"steps{i}"
        monkeypatch.setenv("KILLED_STEPS", str(taken))
        process = soak.start(workdir, sys.executable, str(KILLED), mark)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == (0 if mark == "never" else -signal.SIGKILL), (mark, errors)
        if mark not in ("start", "compile"):  # it went on from the last checkpoint, to its mark
            steps = [int(line) for line in taken.read_text().split()]
            last = 30 if mark == "never" else int(mark.split(":")[1])
            assert steps == list(range(previous + 1, last + 1)), mark
        saved = checkpoint.newest_step(workdir / "checkpoints") if workdir.exists() else None
        assert saved in possible, mark
        first, previous = previous, saved or 0
    assert runlog.read_manifest(workdir)["sessions"][-1]["first_step"] == first > 0
    (expected, size), (found, _) = soak.outcome(tmp_path / "reference"), soak.outcome(workdir)
    assert size > 30_000
    assert soak.differences(expected, found) == []
    steps = [row["step"] for row in runlog.read_metrics(workdir) if "train_loss" in row]
    assert steps == sorted(set(steps)), "each step once"
