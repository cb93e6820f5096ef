"""What a run shows while it runs: one live line on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that went away (`| head`) must not end a training run: from now on, silence."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


class Report:
    """The live line (step, epoch, loss, accuracy, images a second, time left) and the lines that stay.

    Only the first process speaks. `quiet` leaves nothing but what is returned.
    """

    def __init__(self, *, quiet: bool = False):
        self._speaks = not quiet and jax.process_index() == 0
        self._console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._speaks:
            self._console.print(text, markup=False)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Says what takes long while it does: a turning sign on a terminal, a line before and after elsewhere."""
        if not self._speaks:
            yield
            return
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            if self._console.is_terminal:
                stack.enter_context(self._console.status(f"{text} ..."))
            else:
                self.say(f"{text} ...")
            yield
        self.say(f"{text}: {time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def live(self, *, first_step: int, total_steps: int) -> Iterator[None]:
        """Keeps the live line on a terminal for as long as the context lasts."""
        if not (self._speaks and self._console.is_terminal):
            yield
            return
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._console, transient=True, refresh_per_second=4) as self._live:
            self._task = self._live.add_task("", total=total_steps, completed=first_step)
            yield
        self._live = None

    def update(self, step: int, epoch: float, loss: float, top1: float, images_per_second: float) -> None:
        """Renews the live line."""
        if self._live:
            text = f"epoch {epoch:.1f}  loss {loss:.4f}  top-1 {top1:.1%}  {images_per_second:,.0f} images/s"
            self._live.update(self._task, completed=step, description=text)


class Clock:
    """Time since the last restart: how fast the steps were, and how much of it went into waiting for data."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def count_step(self) -> None:
        """One more step is done."""
        self._steps += 1

    @property
    def images_per_second(self) -> float:
        return self._steps * self._batch_size / (time.monotonic() - self._start)

    def restart(self) -> dict[str, float]:
        """The time until now as a training line's `timing` holds it; it then begins anew."""
        seconds = time.monotonic() - self._start
        timing = {
            "images_per_second": self.images_per_second,
            "data_share": self._waited / seconds,
            "seconds": seconds,
        }
        self.__init__(self._batch_size)
        return timing
