"""Checkpoints with Orbax: the newest and the best are kept, a save is either whole or not there, and a checkpoint is read
only after the digest of each of its files has been found right.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from cnnfamily import disk
from cnnfamily.errors import UsageError, warn
from cnnfamily.step import TrainState


def _rank(metrics: dict[str, float] | None) -> float:
    """What makes a checkpoint the best; Orbax would take NaN for the highest number of all."""
    value = (metrics or {}).get("rank", -math.inf)
    return value if math.isfinite(value) else -math.inf


class _SealedFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's folder of a save under way; a step's gets its digests just before the rename that makes it a checkpoint.

    Orbax's own `post_finalization_callback` comes too early: it writes a file after that.
    """

    @classmethod
    def from_final(cls, final_path, *, checkpoint_metadata_store=None, **options):
        folder = super().from_final(final_path, **options)  # with the store it would write a time after the digests
        folder._store = checkpoint_metadata_store
        return folder

    async def create(self):
        path = await super().create()
        self._created = os.stat(path)
        return path

    async def finalize(self):
        if self.get_final().name.isdecimal():  # the parts of a step come by here too
            if self._store:
                self._store.wait_until_finished()  # it has a thread of its own
            # TensorStore makes folders that it misses: of a run directory that vanished it would leave a part.
            if not os.path.samestat(self._created, os.stat(self.get())):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            disk.seal(Path(self.get()))
        await super().finalize()


class Checkpoints:
    """The checkpoints of a run by step, the `keep` newest and the best. A context manager: leaving it waits for the last save.

    Damaged ones are put aside first, into `damaged/` of the run directory, and named on standard error: Orbax saves no step
    that is there or that comes before its newest, and does not say so.

    Raises:
      DiskError: something cannot be written, here, in `save` or on leaving.
      UsageError: there are checkpoints, and all are damaged; they are left where they are.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        for name in ("absl", "asyncio"):  # Orbax tells every step of every save, and each of them an error at length
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._directory = directory.resolve()
        self._saving = None
        self._unraisable = sys.unraisablehook
        _in_first_process(lambda: _put_damaged_aside(directory))
        # Orbax by itself, with best_fn and max_to_keep, deletes the newest when it is not among the best.
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep), preservation_policy.BestN(get_metric_fn=_rank, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_rank,
            best_mode="max",
            temporary_path_class=_SealedFolder,
            # If made in the background, a folder that cannot be made keeps the process waiting for it at its end.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            cleanup_tmp_directories=True,  # what a killed save left
        )
        with disk.writing(directory, Exception):
            self._manager = ocp.CheckpointManager(self._directory, options=options)
            os.listdir(self._directory)  # Orbax takes a file for a folder until it saves
            self._opened = os.stat(self._directory)

    def __enter__(self) -> "Checkpoints":
        sys.unraisablehook = self._without_closed_loops
        return self

    def _without_closed_loops(self, unraisable) -> None:
        """After a write that failed each of the others that were under way would print a traceback."""
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            self._unraisable(unraisable)

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._wait()
            sys.unraisablehook = self._unraisable  # left as it is after an error: they come late
        except disk.DiskError:
            if not isinstance(error, disk.DiskError):  # the first one tells more
                raise
        finally:
            self._manager.close()
            self._remove_traces()

    def _remove_traces(self) -> None:
        """Of a save into a run directory that was moved away meanwhile: moved back, it would end up inside."""
        if self._vanished():
            with contextlib.suppress(OSError):
                for part in self._directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(part)
                self._directory.rmdir()
                self._directory.parent.rmdir()

    def _vanished(self) -> bool:
        try:
            return not os.path.samestat(self._opened, os.stat(self._directory))
        except OSError:
            return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with disk.writing(f"checkpoint {self._saving} in {self._directory}", Exception):
                yield
        except disk.DiskError as error:
            if self._vanished():  # what Orbax makes of that depends on where it was
                raise disk.DiskError(f"checkpoint {self._saving} cannot be written: {self._directory} has vanished") from error
            raise

    def _wait(self) -> None:
        """Until the save under way has ended; it is here that its error comes up."""
        with self._writing():
            self._manager.wait_until_finished()

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
        self._wait()
        # A copy here, which the next step cannot overwrite: of arrays on several devices Orbax would save a slice from each,
        # which compiles a program for every shape.
        state = jax.tree.map(np.array, jax.device_get(state))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), pending=ocp.args.JsonSave(pending))
        self._saving = step
        with self._writing():
            if self._vanished():
                raise FileNotFoundError  # Orbax would make it anew
            saved = self._manager.save(step, args=items, metrics={"rank": rank})
        assert saved, f"Orbax refuses to save step {step}, the newest is {self.newest}"

    def discard(self, step: int) -> None:
        """Deletes a checkpoint: Orbax saves no step twice, and one whose evaluation was stopped has no rank yet."""
        self._wait()
        self._manager.delete(step)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, list[dict[str, float]]]:
        """The state saved at `step`, with the shapes, types and placement of `like`, and the pending metrics."""
        self._wait()
        return _read(self._directory / str(step), like)


def newest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in a directory that is not damaged, if there is one.

    Raises:
      UsageError: there are checkpoints, and all are damaged.
    """
    return _in_first_process(lambda: _newest_good(directory))


def restore_state(directory: Path, like: TrainState, *, which: str) -> TrainState:
    """The state of the "newest" or the "best" checkpoint under `directory`, of those that are not damaged.

    Raises:
      UsageError: there is none, or it is of another network.
    """
    if not directory.is_dir():
        raise UsageError(f"no checkpoints in {directory.parent}: expected a folder that cnnfamily.train has written")
    by_rank = {"key": lambda step: (_rank_of(directory / str(step)), step)} if which == "best" else {}

    def choose() -> int | None:
        good, damaged = _first_good(directory, sorted(_steps(directory), reverse=True, **by_rank))
        for step, what in damaged.items():
            warn(f"checkpoint {step} in {directory} is damaged: {what}; taking step {good}")
        return good

    step = _in_first_process(choose)
    if step is None:
        raise UsageError(f"no checkpoint in {directory}: the run stopped before its first")
    return _read(directory.resolve() / str(step), like)[0]


def restore_newest(directory: Path, like: TrainState, count: int) -> list[TrainState]:
    """The states of the `count` newest checkpoints under `directory` that are not damaged, the newest first.

    Raises:
      UsageError: there are fewer.
    """
    good = [step for step in sorted(_steps(directory), reverse=True) if disk.damage(directory / str(step)) is None]
    if not 1 <= count <= len(good):
        raise UsageError(
            f"the mean of {count} checkpoints: {directory} has {len(good)}, expected 1 to so many; "
            f"checkpoint.keep={count} keeps more"
        )
    return [_read(directory.resolve() / str(step), like)[0] for step in good[:count]]


@contextlib.contextmanager
def resumable(workdir: Path) -> Iterator[None]:
    """Makes a `DiskError` inside a `UsageError` that says from where the same command goes on."""
    try:
        yield
    except disk.DiskError as error:
        step = None
        with contextlib.suppress(UsageError, OSError):
            step = _newest_good(workdir / "checkpoints")
        there = f"the last checkpoint is from step {step}, and the same command goes on from there"
        none = f"there is no checkpoint in {workdir}, and the same command begins anew"
        raise UsageError(f"{error}; {none if step is None else there}") from error


def _read(folder: Path, like: TrainState) -> tuple[TrainState, list[dict[str, float]]]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), pending=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, args=items)
    except Exception as error:  # its files are as they were written, so it is of another network or Orbax
        raise UsageError(f"checkpoint {folder} does not fit the network of this config: {disk.reason(error)}") from error
    return restored.state, restored.pending


def _entries(directory: Path) -> dict[int, Path]:
    """What Orbax would take for a step, folder or not."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return {int(path.name): path for path in entries if re.fullmatch(r"0|[1-9]\d*", path.name)}


def _is_empty(path: Path) -> bool:
    return not any(file.is_file() for file in path.rglob("*"))


def _steps(directory: Path) -> list[int]:
    """The steps that have a folder with files, damaged or not."""
    return [step for step, path in _entries(directory).items() if not _is_empty(path)]


def _rank_of(folder: Path) -> float:
    """The rank a checkpoint was saved with; of one so damaged that nobody knows, the highest, so that it is named."""
    try:
        return _rank(json.loads((folder / "metrics" / "metrics").read_text()))
    except (OSError, ValueError, TypeError, AttributeError):
        return math.inf


def _newest_good(directory: Path) -> int | None:
    return _first_good(directory, sorted(_steps(directory), reverse=True))[0]


def _first_good(directory: Path, steps: Iterable[int]) -> tuple[int | None, dict[int, str]]:
    """The first of these steps that is not damaged, and what is wrong with those before it."""
    damaged = {}
    for step in steps:
        what = disk.damage(directory / str(step))
        if what is None:
            return step, damaged
        damaged[step] = what
    if damaged:
        listed = ", ".join(f"{step} ({what})" for step, what in damaged.items())
        raise UsageError(f"all checkpoints in {directory} are damaged: {listed}; put a copy back or take another --workdir")
    return None, damaged


def _put_damaged_aside(directory: Path) -> None:
    newest, _ = _first_good(directory, sorted(_steps(directory), reverse=True))
    for step, path in sorted(_entries(directory).items(), reverse=True):
        what = None if _is_empty(path) else disk.damage(path)
        if what is None and not _is_empty(path):
            continue
        aside = directory.parent / "damaged"
        with disk.writing(aside):
            aside.mkdir(exist_ok=True)
            again = sum(other.name.split(".")[0] == path.name for other in aside.iterdir())
            target = aside / (f"{step}.{again}" if again else str(step))
            shutil.move(path, target)
        if what:
            warn(f"checkpoint {step} is damaged: {what}; moved to {target}, going on from step {newest}")


def _in_first_process(choose: Callable[[], int | None]) -> int | None:
    """What `choose` gives in the first process, in all: the others must not look while it moves folders."""
    found, error = -1, None
    if jax.process_index() == 0:
        try:
            step = choose()
            found = -1 if step is None else step
        except UsageError as caught:
            found, error = -2, caught
        except OSError as caught:
            found, error = -2, UsageError(f"{caught.filename} cannot be read: {disk.reason(caught)}")
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise error or UsageError("the first process cannot use these checkpoints")
    return None if found == -1 else found
