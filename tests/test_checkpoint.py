"""Newest and best stay; a NaN is never the best; the newest is never deleted by the best."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily import checkpoint
from cnnfamily.errors import UsageError
from cnnfamily.step import TrainState


def state_at(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.full(3, float(step))}, {}, (), {})


@pytest.mark.parametrize(
    ("ranks", "best"),
    [
        ((0.5, 0.9, 0.1, 0.15, 0.2), 2),
        ((0.9, 0.1, float("nan"), 0.2, 0.3), 1),
        ((0.1, float("inf"), 0.3, 0.2, float("nan")), 3),
        ((0.1, 0.2, 0.3, 0.4, 0.5), 5),
        ((0.5, 0.5, 0.2, float("nan"), float("nan")), 2),
    ],
)
def test_newest_and_best_are_kept(ranks, best, tmp_path):
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, rank in enumerate(ranks, start=1):
            checkpoints.save(state_at(step), [], rank)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.newest, checkpoints.best) == (5, best)
        for step in {4, 5, best}:
            restored, _ = checkpoints.restore(step, state_at(0))
            assert int(restored.step) == step
            np.testing.assert_array_equal(restored.params["w"], np.full(3, float(step)))
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {4, 5, best}


def test_pending_metrics_come_back_exactly(tmp_path):
    pending = [{"loss": 0.1 + 0.2, "top1": float(np.float32(1 / 3))}, {"loss": 1e-300, "top1": 0.0}]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), pending, 0.0)
        assert checkpoints.restore(3, state_at(0))[1] == pending


def test_saving_a_step_again_changes_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), [], 0.5)
        checkpoints.save(state_at(3), [{"loss": 1.0}], 0.9)
        assert checkpoints.restore(3, state_at(0))[1] == []


def test_missing_checkpoints_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="no checkpoints in"):
        checkpoint.restore_state(tmp_path / "checkpoints", state_at(0), which="newest")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="the run stopped before its first"):
        checkpoint.restore_state(tmp_path / "checkpoints", state_at(0), which="newest")
    assert checkpoint.newest_step(tmp_path / "none") is None
