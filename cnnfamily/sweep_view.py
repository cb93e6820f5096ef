"""What a sweep shows: a live table of its rows on a terminal, a line for each that ends elsewhere."""

import statistics
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

SHOWN = 12  # rows that have ended, the newest


class View:
    """Rows done, running, failed and left, and the time left from those that this process has seen end."""

    def __init__(self, runner, rows: list, waiting: list, done: dict[str, dict[str, Any]]):
        self._runner, self._rows, self._waiting = runner, rows, waiting
        self._ended = [(row, done[row.hash], None) for row in rows if row.hash in done]
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False) if self._console.is_terminal else None

    def __enter__(self) -> "View":
        self._console.print(self._summary(), markup=False)
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self.refresh()
            self._live.__exit__(*exception)

    def ended(self, row, result: dict[str, Any], seconds: float) -> None:
        """A row of this process has ended with a result, after so many seconds."""
        self._ended.append((row, result, seconds))
        if not self._live:
            self._console.print(f"{self._summary()}  {row.label}: {self._describe(result)}", markup=False)

    def refresh(self) -> None:
        """Renews the table."""
        if self._live:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table(title=self._summary(), title_justify="left", box=None, pad_edge=False)
        for name in ("state", "row", "result"):
            table.add_column(name)
        for row, result, _ in self._ended[-SHOWN:]:
            table.add_row(result["status"], row.label, self._describe(result))
        for row, start in list(self._runner.running.values()):
            table.add_row("running", row.label, f"{time.monotonic() - start:.0f} s")
        return table

    @staticmethod
    def _describe(result: dict[str, Any]) -> str:
        if result["status"] != "done":
            return f"{result['status']}: {result['error']}"
        return f"{result['top1']:.2%}, {result['seconds']:.0f} s, {result['images_per_second']:,.0f} images/s"

    def _summary(self) -> str:
        failed = sum(result["status"] != "done" for _, result, _ in self._ended)
        left = len(self._waiting)
        text = f"{len(self._ended) - failed} of {len(self._rows)} done, {len(self._runner.running)} running, "
        text += f"{failed} failed, {left} waiting"
        seconds = [taken for _, _, taken in self._ended if taken]
        if seconds and (left or self._runner.running):
            minutes = statistics.mean(seconds) * (left + len(self._runner.running) / 2) / self._runner.jobs / 60
            text += f", about {minutes:.0f} min left"
        return text
