"""A study: the rows that a sweep file describes, checked, and the results file with what became of them (see `sweep.py`)."""

import contextlib
import dataclasses
import fcntl
import importlib.util
import inspect
import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily import disk, models, optim, runlog, summary
from cnnfamily.data import feed
from cnnfamily.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study: what it overrides, the whole config, and the hash of that, which is the row's identity."""

    number: int  # from 1, in the order of the sweep
    overrides: dict[str, Any]
    config: ConfigDict
    hash: str
    label: str  # what tells it from the others: overrides that are not the same in all rows


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep file, expanded."""

    file: Path
    base: str  # as `--config` takes it
    rows: list[Row]
    results: Path
    slurm: dict[str, Any]  # options of sbatch, from the file's `SLURM`

    @property
    def name(self) -> str:
        return self.file.parent.name + self.results.stem.removeprefix("results")

    def select(self, only: str) -> list[Row]:
        """The rows whose overrides have the text `only`, or whose hash it is.

        Raises:
          UsageError: there is none.
        """
        rows = [row for row in self.rows if only in _text(row.overrides) or only == row.hash]
        if not rows:
            raise UsageError(
                f"--only={only}: no row of {self.file} has that in {', '.join(_text(row.overrides) for row in self.rows[:5])}"
            )
        return rows

    def ended(self, *, retry: bool) -> dict[str, dict[str, Any]]:
        """Results that need no run any more, by hash: those of failed rows too unless `retry`, of killed ones never."""
        statuses = ("done",) if retry else ("done", "failed")
        return {row["hash"]: row for row in read_results(self.results) if row["status"] in statuses}


def load_study(path: str, common: Mapping[str, Any] | None = None) -> Study:
    """The study of `"FILE.py[:NAME]"`, each row checked against its config and its network; `common` overrides hold for all.

    Raises:
      UsageError: no such file or name, or rows that cannot run or are the same, by their number and overrides.
    """
    name, _, argument = path.partition(":")
    file = next((found for found in (Path(name), configs.REPOSITORY / name) if found.is_file()), None)
    if file is None:
        known = [f"experiments/{found.parent.name}/sweep.py" for found in configs.REPOSITORY.glob("experiments/*/sweep.py")]
        raise unknown("sweep file", name, sorted(known))
    spec = importlib.util.spec_from_file_location("cnnfamily_sweep", file.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"sweep file {file}: expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        base = module.BASE
        if isinstance(base, dict) and argument and argument not in base:
            raise unknown(f"name in BASE of {file}", argument, base)
        chosen = (argument or next(iter(base)),) if inspect.signature(module.sweep).parameters else ()
        expanded = [{**(common or {}), **row} for row in module.sweep(*chosen)]
    except UsageError:
        raise
    except Exception as error:  # whatever a user's file may do; `--debug` shows where
        raise UsageError(f"sweep file {file}: {type(error).__name__}: {error}; expected BASE and sweep()") from error
    if isinstance(base, dict):
        first = next(iter(base))
        argument, base = "" if argument == first else argument, base[argument or first]
    elif argument:
        raise UsageError(f"sweep file {file}: BASE is {base!r} and has no name {argument!r}; expected a dictionary of configs")
    same = {key for key in expanded[0] if all(row.get(key) == expanded[0][key] for row in expanded)} if expanded[1:] else set()
    rows = [_row(base, number, overrides, file, same) for number, overrides in enumerate(expanded, start=1)]
    numbers = {}
    for number, row in enumerate(rows, start=1):
        if row.hash in numbers:
            raise UsageError(f"rows {numbers[row.hash]} and {number} of {file} are the same run: {_text(row.overrides)}")
        numbers[row.hash] = number
    if not rows:
        raise UsageError(f"sweep() of {file} yields no rows")
    results = file.resolve().parent / (f"results-{argument}.jsonl" if argument else "results.jsonl")
    return Study(file.resolve(), base, rows, results, dict(getattr(module, "SLURM", {})))


def _text(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _row(base: str, number: int, overrides: dict[str, Any], file: Path, same: set[str]) -> Row:
    try:
        config = configs.load_config(base, overrides)
        configs.check(config)
        models.build(config.model)
        optim.learning_rate_schedule(config.optim, total_steps=10**6, steps_per_epoch=1000, batch_size=config.batch_size)
    except UsageError as error:
        raise UsageError(f"row {number} of {file} {overrides}: {error}") from error
    flat = json.dumps(configs.identity(config), sort_keys=True)
    label = _text({key: value for key, value in overrides.items() if key not in same}) or "base"
    return Row(number, overrides, config, disk.digest(flat)[:12], label)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, the newest of each run; a line that a full disk cut short is none."""
    rows = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "hash" in row:
                    rows[row["hash"]] = row
    return list(rows.values())


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Adds a line, whole and on the disk itself, whoever else adds one.

    Raises:
      DiskError: it cannot be written; the file is as before.
    """
    with disk.writing(path), path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        begun = end and not path.read_bytes().endswith(b"\n")
        try:
            file.write("\n" * bool(begun) + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, end)
            raise


def describe_run(row: Row, run: Path) -> dict[str, Any]:
    """The line in `results.jsonl` of a finished run; where it averages weights, accuracy and loss are those of the averages."""
    metrics, manifest = runlog.read_metrics(run), runlog.read_manifest(run)
    session = manifest["sessions"][-1]
    config = row.config
    counts = summary.summarize(models.build(config.model), resolution=feed.resolution_of(config))
    prefix = "ema_test_" if config.ema.decay else "test_"
    evaluated = [line for line in metrics if f"{prefix}top1" in line]
    timing = [line["timing"] for line in metrics if "timing" in line]
    # The first interval holds what is slow only once.
    rates = [part["images_per_second"] for part in (timing[1:] or timing)]
    return {
        "row": row.number,
        "hash": row.hash,
        "status": "done",
        "overrides": row.overrides,
        "seed": config.seed,
        "commit": session["commit"],
        "device": f"{session['devices']['count']} {session['devices']['kind']}",
        "versions": session["versions"] | {"python": session["python"]},
        "params": counts.params,
        "macs": counts.macs,
        "top1": evaluated[-1][f"{prefix}top1"],
        "loss": evaluated[-1][f"{prefix}loss"],
        "seconds": round(math.fsum(part["seconds"] for part in timing), 2),
        "images_per_second": round(statistics.median(rates), 1),
        "curve": [[line["epoch"], line[f"{prefix}top1"]] for line in evaluated],
    }
