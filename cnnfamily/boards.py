"""Where a run's metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases, each with a package of its own.

A board is made with the run's directory and the step from which the run goes on, told each line's step and values, and closed.
"""

import importlib.util
import os
import platform
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily import disk
from cnnfamily.errors import UsageError


class Board(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def chosen(config: ConfigDict) -> list[Callable[[Path, int], Board]]:
    """What makes the boards of `config.log`.

    Raises:
      UsageError: the package of one is not installed.
    """
    found = []
    for name, package, make in (
        ("tensorboard", "tensorboardX", TensorBoard),
        ("wandb", "wandb", lambda workdir, from_step: WeightsAndBiases(workdir, config)),
    ):
        if config.log[name]:
            if not importlib.util.find_spec(package):
                raise UsageError(f"config.log.{name}=True needs {package}: pip install 'cnnfamily[{name}]'")
            found.append(make)
    return found


class TensorBoard:
    """TensorBoard's event files, written here and now: the thread of tensorboardX's SummaryWriter dies of a full disk, and the
    training loop then waits for it forever.
    """

    def __init__(self, workdir: Path, from_step: int):
        from tensorboardX import record_writer, summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory = workdir / "tensorboard"
        self._directory, self._event, self._scalar = directory, Event, summary.scalar
        with disk.writing(directory):
            directory.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{from_step}"
            self._writer = record_writer.RecordWriter(str(directory / name))
        start = SessionLog(status=SessionLog.START)  # TensorBoard hides what was there from this step on
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=from_step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        with disk.writing(self._directory):
            self._writer.flush()

    def _add(self, event) -> None:
        with disk.writing(self._directory):
            self._writer.write(event.SerializeToString())

    def close(self) -> None:
        with disk.writing(self._directory):
            self._writer.close()


class WeightsAndBiases:
    """One run there for each run directory, which goes on with it; the project is `cnnfamily`, WANDB_PROJECT another.

    Steps are a metric like others: its own may not go back, as those of a run that was killed do.
    """

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb

        name = workdir / "wandb_run"  # its identity there
        if not name.exists():
            with disk.writing(name):
                disk.write_whole(name, secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True, init_timeout=30)
        fields = {"id": name.read_text(), "resume": "allow", "dir": str(workdir), "name": workdir.name, "settings": settings}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "cnnfamily"), config=configs.flatten(config), **fields
            )
        except wandb.errors.Error as error:  # no account, no network
            raise UsageError(f"config.log.wandb=True: {error}; WANDB_MODE=offline keeps the metrics here") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
