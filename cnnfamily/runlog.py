"""The run directory: what ran (`config.json`, `manifest.json`), what it measured (`metrics.jsonl`), how that looks
(`curves.png`).
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the new one, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def check(workdir: Path, config: ConfigDict) -> None:
    """Refuses a directory that holds a run with another config, naming the keys that differ (`UsageError`)."""
    if not (workdir / "config.json").exists():
        return
    ours, theirs = configs.flatten(config), configs.flatten(read_config(workdir))
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
            write_whole(workdir / "config.json", configs.to_json(config))
    except OSError as error:
        raise UsageError(f"workdir {workdir}: {error.strerror or error}; expected a folder that can be written") from error


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds a run directory for this process; a second one there is refused (`UsageError`). Ends with the process."""
    if jax.process_index() != 0 or fcntl is None:
        yield
        return
    with (workdir / ".lock").open("w") as lock:
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
        return configs.from_json(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{workdir} is no run directory: expected a config.json, as cnnfamily.train writes it") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def read_manifest(workdir: Path) -> dict[str, Any]:
    """The run's `manifest.json`."""
    try:
        return json.loads((workdir / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{workdir / 'manifest.json'} cannot be read: {error}") from error


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
        "train_examples": len(data.train.labels),
        "test_examples": len(data.test.labels),
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    manifest = {"seed": config.seed, "total_steps": total_steps, "data": record, "sessions": []}
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
        text = json.dumps(manifest | {"sessions": [*manifest["sessions"], session]}, indent=1)
        write_whole(workdir / "manifest.json", text)


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=configs.REPOSITORY, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a crash left unfinished is no line."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class RunLog:
    """Appends to `metrics.jsonl` and, if tensorboardX is installed and `tensorboard` is true, to TensorBoard files.

    A run that goes on from step s first drops what a crashed one had written after s: those steps come again.
    """

    def __init__(self, workdir: Path, *, from_step: int, tensorboard: bool):
        self.workdir = workdir
        self._active = jax.process_index() == 0
        self._board = None
        if not self._active:
            return
        kept = [row for row in read_metrics(workdir) if row["step"] <= from_step]
        write_whole(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._file = (workdir / "metrics.jsonl").open("a")
        if tensorboard and importlib.util.find_spec("tensorboardX"):
            import tensorboardX  # optional, and slow to import

            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, epoch: float, values: dict[str, float], timing: dict[str, float] | None = None) -> None:
        """One line; what depends on the clock goes into `timing`, which a comparison of two runs leaves out."""
        if not self._active:
            return
        row = {"step": step, "epoch": round(epoch, 6), **values}
        self._file.write(json.dumps(row | ({"timing": timing} if timing else {})) + "\n")
        self._file.flush()
        if self._board:
            for name, value in (values | (timing or {})).items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        if self._active:
            self._file.close()
            if self._board:
                self._board.close()


def draw_curves(workdir: Path) -> None:
    """Draws loss and error against the epoch from `metrics.jsonl` into `curves.png`, in the first process."""
    if jax.process_index() != 0:
        return
    import matplotlib.figure  # slow to import, and pyplot would look for a display

    rows = read_metrics(workdir)
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    loss, error = figure.subplots(1, 2)
    curves = [("train", "0.6", "-"), ("test", "tab:blue", "-"), ("ema_test", "tab:orange", "--")]
    for name, color, style in curves:
        points = [(row["epoch"], row[f"{name}_loss"], 100 * (1 - row[f"{name}_top1"])) for row in rows if f"{name}_loss" in row]
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
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(workdir.resolve().name, fontsize="medium")
    figure.savefig(workdir / "curves.png.partial", dpi=110, format="png")
    os.replace(workdir / "curves.png.partial", workdir / "curves.png")
