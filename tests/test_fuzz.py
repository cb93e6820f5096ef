"""Fifty cases of `fuzz.py`, and that it finds what it looks for."""

import sys
import time

import fuzz
import pytest
from conftest import mesh_of

from cnnfamily import errors, parallel


def test_bad_input_at_large(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(1))  # as by hand, and quicker than on eight
    ends, wrong = fuzz.fuzz(seed=2, numbers=range(50), folder=tmp_path)
    assert not wrong, "\n".join(wrong)
    kinds = {kind for kind, _ in ends}
    assert kinds == {"overrides", "command line", "config file", "damaged run", "summary", "predict", "evaluate"}
    # Some of both. Not a number to be met closely: a damaged run's status depends on the bytes hit, and no two checkpoints have
    # the same (times are in them); of 12 here 4 differed between two commits that do not touch them, and 10 or 11 ended with 0.
    assert min(sum(count for (_, status), count in ends.items() if status == wanted) for wanted in (0, 2)) > 5


def silently(argv):
    sys.exit(2)


def wrongly(argv):
    raise errors.NonFiniteLoss("x" * 3000 + " y" * 3000)


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        (lambda argv: 1 / 0, "status Traceback"),
        (lambda argv: None, "status 0, but not done"),
        (lambda argv: time.sleep(5), "status too long"),
        (silently, "no line that says why"),
        (wrongly, "a line of"),
        (lambda argv: sys.exit(7), "status 7"),
    ],
)
def test_the_verdict(main, fault):
    case = fuzz.Case("kind", main, [], bool)
    assert fuzz.verdict(case, *fuzz.run(case, limit=1)).startswith(fault)
