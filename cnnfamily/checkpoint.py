"""Checkpoints with Orbax: the newest and the best are kept, and a save is either whole or not there."""

import logging
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from cnnfamily.errors import UsageError
from cnnfamily.step import TrainState


def _rank(metrics: dict[str, float] | None) -> float:
    """What makes a checkpoint the best; Orbax would take NaN for the highest number of all."""
    value = (metrics or {}).get("rank", -math.inf)
    return value if math.isfinite(value) else -math.inf


class Checkpoints:
    """The checkpoints of a run, by step. Use as a context manager: leaving it waits for a save that is under way."""

    def __init__(self, directory: Path, *, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save
        # Orbax by itself, with best_fn and max_to_keep, deletes the newest when it is not among the best.
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(1), preservation_policy.BestN(get_metric_fn=_rank, n=1)]
        )
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_rank,
                best_mode="max",
                read_only=read_only,
                cleanup_tmp_directories=not read_only,  # what a killed save left
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest rank."""
        return self._manager.best_step()

    def save(self, state: TrainState, pending: list[dict[str, float]], rank: float) -> None:
        """Saves the state and the metrics of steps that have no line in the log yet; `rank` decides which is the best."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), pending=ocp.args.JsonSave(pending))
        self._manager.save(step, args=items, metrics={"rank": rank})

    def discard(self, step: int) -> None:
        """Deletes a checkpoint: Orbax saves no step twice, and one whose evaluation was stopped has no rank yet."""
        self._manager.delete(step)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, list[dict[str, float]]]:
        """The state saved at `step`, with the shapes, types and placement of `like`, and the pending metrics."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), pending=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.pending


def newest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in a directory, if there is one."""
    steps = ocp.utils.checkpoint_steps(directory.resolve()) if directory.is_dir() else []
    return max(steps, default=None)


def restore_state(directory: Path, like: TrainState, *, which: str) -> TrainState:
    """The state of the "newest" or the "best" checkpoint under `directory`."""
    if not directory.is_dir():
        raise UsageError(f"no checkpoints in {directory.parent}: expected a folder that cnnfamily.train has written")
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.newest if which == "newest" else checkpoints.best
        if step is None:
            raise UsageError(f"no checkpoint in {directory}: the run stopped before its first")
        return checkpoints.restore(step, like)[0]
