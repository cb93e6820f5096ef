"""The run directory: what ran (`config.json`, `manifest.json`), what it measured (`metrics.jsonl`), how that looks
(`curves.png`).
"""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily import disk
from cnnfamily.boards import Board
from cnnfamily.errors import NonFiniteLoss, Stopped, UsageError, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_REMEDY = "delete it, and the same training command writes it again"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check(workdir: Path, config: ConfigDict) -> None:
    """Refuses a directory that holds a run with another config, naming the keys that differ (`UsageError`)."""
    if not (workdir / "config.json").exists():
        if (workdir / "manifest.json").exists() and disk.digest(configs.to_json(config)) != read_manifest(workdir)["config"]:
            raise UsageError(f"workdir {workdir} holds a run with another config, and no config.json; take another --workdir")
        return
    ours, theirs = (configs.LATER | configs.identity(one) for one in (config, read_config(workdir)))
    missing = object()
    differ = [key for key in sorted(ours | theirs) if ours.get(key, missing) != theirs.get(key, missing)]
    if differ:
        shown = ", ".join(f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)" for key in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UsageError(f"workdir {workdir} holds a run with another config: {shown}{more}; take another --workdir")


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` the directory of a run with this config, if it is not that already.

    Raises:
      UsageError: it cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "config.json").exists():
            disk.write_whole(workdir / "config.json", configs.to_json(config))
    except OSError as error:
        raise UsageError(f"workdir {workdir}: {error.strerror or error}; expected a folder that can be written") from error


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds a run directory for this process; a second one there is refused (`UsageError`). Ends with the process."""
    if jax.process_index() != 0 or fcntl is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with disk.writing(workdir / ".lock"):
            lock = stack.enter_context((workdir / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"workdir {workdir} is in use by another training process") from None
        except OSError:  # a file system without locks
            pass
        yield


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run, locked."""
    path = workdir / "config.json"
    try:
        text = path.read_text()
        config = configs.from_json(text)
    except FileNotFoundError:
        raise UsageError(f"{workdir} is no run directory: expected a config.json, as cnnfamily.train writes it") from None
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}; {_REMEDY}") from error
    if (workdir / "manifest.json").exists() and disk.digest(text) != read_manifest(workdir)["config"]:
        raise UsageError(f"{path} has changed since the run began; {_REMEDY}")
    return config


def read_manifest(workdir: Path) -> dict[str, Any]:
    """The run's `manifest.json`, whose last entry is a digest of the others."""
    path = workdir / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        intact = manifest.pop("digest") == disk.digest(json.dumps(manifest))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {disk.reason(error)}; put a copy back") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise UsageError(f"{path} is damaged: it is not as cnnfamily.train wrote it; put a copy back")
    return manifest


def check_data(workdir: Path, data) -> None:
    """Refuses to go on with another data set than the run began with (`UsageError`)."""
    if (workdir / "manifest.json").exists():
        before = read_manifest(workdir)["data"]["fingerprint"]
        if before != data.fingerprint:
            raise UsageError(
                f"data set {data.name} has changed since this run began: fingerprint {data.fingerprint}, expected {before}"
            )


def write_manifest(workdir: Path, *, config: ConfigDict, data, total_steps: int, first_step: int) -> None:
    """Records what the run's figures depend on besides its config, and each session that worked on it."""
    devices = jax.devices()
    record = {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "train_examples": len(data.train),
        "test_examples": len(data.test),
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    config_digest = disk.digest((workdir / "config.json").read_text())
    manifest = {"seed": config.seed, "config": config_digest, "total_steps": total_steps, "data": record, "sessions": []}
    if (workdir / "manifest.json").exists():
        manifest = read_manifest(workdir)
    session = {
        "first_step": first_step,
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "processes": jax.process_count()},
        "batch_size": {"global": config.batch_size, "device": config.batch_size // len(devices)},
        "commit": _commit(),
    }
    if jax.process_index() == 0:
        manifest = manifest | {"sessions": [*manifest["sessions"], session]}
        text = json.dumps(manifest | {"digest": disk.digest(json.dumps(manifest))}, indent=1)
        with disk.writing(workdir / "manifest.json"):
            disk.write_whole(workdir / "manifest.json", text)


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=configs.REPOSITORY, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return os.environ.get("CNNFAMILY_COMMIT", "")  # of a copy without its history, who copied it knows


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`. What a crash left at its end is no line; one that is damaged before that is named."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {disk.reason(error)}") from error
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("epoch"), int | float):
                rows.append(row)
                for before in damaged:
                    warn(f"line {before} of {path} is damaged and left out")
                damaged = []
                continue
        damaged.append(number)
    return rows


class RunLog:
    """Appends to `metrics.jsonl`, and tells `boards` (see `boards.py`) the same.

    A run that goes on from step s first drops what a crashed one had written after s: those steps come again.

    Raises:
      DiskError: one of them cannot be written, or the directory is no longer there.
    """

    def __init__(self, workdir: Path, *, from_step: int, boards: Sequence[Callable[[Path, int], Board]] = ()):
        self.workdir = workdir
        self._path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._boards = []
        if not self._active:
            return
        kept = [row for row in read_metrics(workdir) if row["step"] <= from_step]
        with disk.writing(self._path):
            disk.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._boards = [start(workdir, from_step) for start in boards]
        with disk.writing(self._path):
            self._file = self._path.open("a")

    def write(self, step: int, epoch: float, values: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """One line; what depends on the clock goes into `timing`, which a comparison of two runs leaves out."""
        if not self._active:
            return
        row = {"step": step, "epoch": round(epoch, 6), **values}
        with disk.writing(self._path):
            # A file that was deleted or moved can still be written to, and nobody would find the line.
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._file.write(json.dumps(row | ({"timing": timing} if timing else {})) + "\n")
            self._file.flush()
        for board in self._boards:
            board.write(step, values | (timing or {}))

    def sync(self) -> None:
        """Brings the lines to the disk itself: after a power cut there must be no checkpoint whose lines are missing."""
        if self._active:
            with disk.writing(self._path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        if self._active:
            with contextlib.ExitStack() as stack:
                stack.enter_context(disk.writing(self._path))
                stack.callback(self._file.close)
                for board in self._boards:
                    stack.callback(board.close)


class Curves:
    """Draws `curves.png` when a run ends, stops or fails in a number, and before that after some of its evaluations.

    A drawing takes 0.1 s, the first one 0.4 with the import of matplotlib: as much as some epochs of a small network.
    """

    def __init__(self, workdir: Path, seconds: float = 30.0):
        self._workdir, self._seconds = workdir, seconds
        self._drawn, self._changed = time.monotonic(), False

    def changed(self) -> None:
        """There is an evaluation more: draws if the last drawing is `seconds` old."""
        self._changed = True
        if time.monotonic() - self._drawn >= self._seconds:
            self._draw()

    def _draw(self) -> None:
        draw_curves(self._workdir)
        self._drawn, self._changed = time.monotonic(), False

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._changed and kind is None:
            self._draw()
        elif self._changed and issubclass(kind, Stopped | NonFiniteLoss):
            try:
                self._draw()
            except Exception as error:  # the reason why the run ends is more than a picture
                warn(f"warning: the curves are not drawn: {error}")


def draw_curves(workdir: Path) -> None:
    """Draws loss and error against the epoch from `metrics.jsonl` into `curves.png`, in the first process."""
    if jax.process_index() != 0:
        return
    import matplotlib.figure  # slow to import, and pyplot would look for a display

    rows = read_metrics(workdir)
    figure = matplotlib.figure.Figure(figsize=(9, 3.6))  # margins by hand: a constrained layout draws everything twice
    loss, error = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.99, "bottom": 0.13, "top": 0.84, "wspace": 0.18})
    curves = [("train", "0.6", "-"), ("test", "tab:blue", "-"), ("ema_test", "tab:orange", "--")]
    for name, color, style in curves:
        keys = ("epoch", f"{name}_loss", f"{name}_top1")
        points = [(row[keys[0]], row[keys[1]], 100 * (1 - row[keys[2]])) for row in rows if row.keys() >= set(keys)]
        if points:
            epochs, losses, errors = zip(*points, strict=True)
            marker = "." if len(points) < 60 else ""
            label = {"train": "training", "test": "test", "ema_test": "test, averaged weights"}[name]
            loss.plot(epochs, losses, color=color, linestyle=style, marker=marker, label=label)
            error.plot(epochs, errors, color=color, linestyle=style, marker=marker, label=f"{label} {errors[-1]:.2f}")
    for axes, title in ((loss, "cross-entropy [nats]"), (error, "top-1 error [%]")):
        axes.set(xlabel="epoch", title=title)
        if axes.lines and min(min(line.get_ydata()) for line in axes.lines) > 0:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(workdir.resolve().name, fontsize="medium")
    with disk.writing(workdir / "curves.png"), disk.replacing(workdir / "curves.png") as partial:
        figure.savefig(partial, dpi=110, format="png")
