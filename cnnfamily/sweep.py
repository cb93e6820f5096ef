"""Ablation sweeps: `python -m cnnfamily.sweep --sweep=experiments/STUDY/sweep.py` runs the rows that `results.jsonl` lacks.

A sweep file has `BASE`, a config as `--config` takes it, and `sweep()`, a generator of flat overrides:

    BASE = "configs/lenet5_digits.py"

    def sweep():
        for width in (0.5, 1.0, 2.0):
            for seed in range(3):
                yield {"model.width": width, "seed": seed}

`BASE` may be a dictionary of configs by name; `--sweep=FILE.py:NAME` takes that of a name, the first without, and its rows go
to `results-NAME.jsonl`. Every row is checked before the first runs; each runs in a process of its own, in `runs/STUDY/HASH`,
and is known by the hash of its whole config. Started again, the command goes on with what is missing, several at once share the
rows, and `--retry` runs failed ones again. `python -m cnnfamily.report experiments/STUDY` makes table and figures.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily import disk, errors, runlog
from cnnfamily.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study: what it overrides, the whole config, and the hash of that, which is the row's identity."""

    number: int  # from 1, in the order of the sweep
    overrides: dict[str, Any]
    config: ConfigDict
    hash: str

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "base"


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


def load_study(path: str) -> Study:
    """The study of `"FILE.py[:NAME]"`, every row of it checked against its config and its network.

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
        base, expanded = module.BASE, [dict(row) for row in module.sweep()]
    except UsageError:
        raise
    except Exception as error:  # whatever a user's file may do; `--debug` shows where
        raise UsageError(f"sweep file {file}: {type(error).__name__}: {error}; expected BASE and sweep()") from error
    if isinstance(base, dict):
        if argument and argument not in base:
            raise unknown(f"name in BASE of {file}", argument, base)
        first = next(iter(base))
        argument, base = "" if argument == first else argument, base[argument or first]
    elif argument:
        raise UsageError(f"sweep file {file}: BASE is {base!r} and has no name {argument!r}; expected a dictionary of configs")
    rows = [_row(base, number, overrides, file) for number, overrides in enumerate(expanded, start=1)]
    numbers = {}
    for number, row in enumerate(rows, start=1):
        if row.hash in numbers:
            raise UsageError(f"rows {numbers[row.hash]} and {number} of {file} are the same run: {row.label}")
        numbers[row.hash] = number
    if not rows:
        raise UsageError(f"sweep() of {file} yields no rows")
    results = file.resolve().parent / (f"results-{argument}.jsonl" if argument else "results.jsonl")
    return Study(file.resolve(), base, rows, results, dict(getattr(module, "SLURM", {})))


def _row(base: str, number: int, overrides: dict[str, Any], file: Path) -> Row:
    from cnnfamily import models, optim

    try:
        config = configs.load_config(base, overrides)
        configs.check(config)
        models.build(config.model)
        optim.learning_rate_schedule(config.optim, total_steps=10**6, steps_per_epoch=1000, batch_size=config.batch_size)
    except UsageError as error:
        raise UsageError(f"row {number} of {file} {overrides}: {error}") from error
    flat = json.dumps(configs.flatten(config), sort_keys=True)
    return Row(number, overrides, config, disk.digest(flat)[:12])


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
    from cnnfamily import models, summary

    metrics, manifest = runlog.read_metrics(run), runlog.read_manifest(run)
    session = manifest["sessions"][-1]
    config = row.config
    counts = summary.summarize(models.build(config.model), resolution=config.data.resolution or config.model.resolution)
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


class Runner:
    """Runs rows of a study, `jobs` at once, each in a process of its own, and writes down what became of them."""

    def __init__(self, study: Study, workdir: Path, *, jobs: int, retry: bool):
        self.study, self.workdir, self.jobs, self.retry = study, workdir, jobs, retry
        self.running: dict[str, tuple[Row, float]] = {}
        self.elsewhere: list[Row] = []
        self._children: dict[str, subprocess.Popen] = {}
        self._lock, self.stopping = threading.Lock(), False
        workdir.mkdir(parents=True, exist_ok=True)

    def finished(self) -> dict[str, dict[str, Any]]:
        """What needs no run any more, by hash; a run that was killed is tried again by the next start."""
        rows = {row["hash"]: row for row in read_results(self.study.results)}
        ends = ("done",) if self.retry else ("done", "failed")
        return {name: row for name, row in rows.items() if row["status"] in ends}

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Asks the runs under way to save and end."""
        with self._lock:
            self.stopping = True
            for child in self._children.values():
                child.send_signal(signum)

    def run(self, row: Row, slot: int) -> dict[str, Any] | None:
        """The result of a row, which has been written down; None if another process has it, or it was stopped."""
        with (self.workdir / f"{row.hash}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.elsewhere.append(row)
                return None
            if self.stopping or (row.hash in self.finished()):
                return None
            self.running[row.hash] = row, time.monotonic()
            try:
                result = self._run(row, slot, lock)
            finally:
                del self.running[row.hash]
            if result:
                append_result(self.study.results, result)
            return result

    def command(self, row: Row, run: Path) -> list[str]:
        """What trains a row in the directory `run`."""
        command = [sys.executable, "-m", "cnnfamily.train", f"--config={self.study.base}", f"--workdir={run}"]
        return command + [f"--config.{key}={value}" for key, value in row.overrides.items()]

    def _run(self, row: Row, slot: int, lock) -> dict[str, Any] | None:
        run, log = self.workdir / row.hash, self.workdir / f"{row.hash}.log"
        for attempt in (1, 2):
            with log.open("w") as output:
                with self._lock:
                    if self.stopping:
                        return None
                    child = self._children[row.hash] = subprocess.Popen(
                        self.command(row, run),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for the runner, which passes it on
                        pass_fds=(lock.fileno(),),  # the row stays taken if the runner dies and the run does not
                        **_device(slot, self.jobs),
                    )
                status = child.wait()
                del self._children[row.hash]
            if status == 0:
                return describe_run(row, run)
            if self.stopping or status in (130, 143):
                return None
            if status > 0 or attempt == 2:
                break
        said = log.read_text(errors="replace").strip().splitlines()
        error = said[-1] if said else f"status {status}"
        kind = "failed"
        if status < 0:
            kind, error = "killed", f"killed twice by signal {-status}, as the system does when memory runs out"
        failed = {"row": row.number, "hash": row.hash, "status": kind, "overrides": row.overrides, "seed": row.config.seed}
        return failed | {"error": errors.one_line(error)[:500]}


def _device(slot: int, jobs: int) -> dict[str, Any]:
    """Arguments of `Popen` that give a run its own GPU or, where there is none, its own share of the cores."""
    environment = dict(os.environ)
    gpus = gpu_names()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return {"env": environment}
    cores = sorted(os.sched_getaffinity(0))
    share = cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] or cores
    return {"env": environment, "preexec_fn": lambda: os.sched_setaffinity(0, share)} if jobs > 1 else {"env": environment}


def gpu_names() -> list[str]:
    """The GPUs that runs may use, without taking memory on any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 else []


def run_study(study: Study, workdir: Path, *, jobs: int = 0, only: str = "", retry: bool = False) -> None:
    """Runs what is missing of a study and says so as it goes; what the command does.

    Raises:
      Stopped: SIGINT or SIGTERM arrived; runs under way are saved.
      UsageError: rows failed; the others are done.
    """
    from cnnfamily.sweep_view import View

    jobs = jobs or max(1, len(gpu_names()))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((workdir / "cache").resolve()))  # rows share programs
    runner = Runner(study, workdir, jobs=jobs, retry=retry)
    rows = [row for row in study.rows if only in row.label or only == row.hash]
    if not rows:
        raise UsageError(f"--only={only}: no row of {study.file} has that in {', '.join(row.label for row in study.rows[:5])}")
    done = runner.finished()
    waiting = [row for row in rows if row.hash not in done]
    failures, lock, received = [], threading.Lock(), []

    def work(slot: int) -> None:
        while not runner.stopping:
            with lock:
                if not waiting:
                    return
                row = waiting.pop(0)
            try:
                result = runner.run(row, slot)
            except Exception as error:  # of the runner itself, such as a full disk: the others are stopped, and it is raised
                failures.append(error)
                runner.stop()
                return
            if result:
                view.ended(row, result)

    def receive(signum: int, frame) -> None:
        runner.stop(signal.SIGKILL if received else signal.SIGTERM)
        received.append(signum)

    with _signals(receive), View(runner, rows, waiting, done) as view:
        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(jobs)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            view.refresh()
    if failures:
        raise failures[0]
    results = {row["hash"]: row for row in read_results(study.results)}
    ended = [results[row.hash]["status"] for row in rows if row.hash in results]
    if received:
        raise errors.Stopped(
            f"stopped with {ended.count('done')} of {len(rows)} rows done; the same command goes on", received[0]
        )
    if bad := len(ended) - ended.count("done"):
        raise UsageError(f"{bad} of {len(rows)} rows failed, the others are done: see {study.results}; --retry runs them again")
    if runner.elsewhere:
        print(f"{len(runner.elsewhere)} rows are being run by another process")


@contextlib.contextmanager
def _signals(receive) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.sweep", __doc__)
    parser.add_argument("--sweep", required=True, metavar="FILE.py[:NAME]")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="of the runs; default: runs/STUDY")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="rows at once; default: one a GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="checks and lists the rows")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose overrides or hash have it")
    parser.add_argument("--retry", action="store_true", help="runs failed rows again")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 0:
        raise UsageError(f"--jobs={arguments.jobs}: expected 0 (one a GPU) or more")
    study = load_study(arguments.sweep)
    workdir = arguments.workdir or Path("runs") / study.name
    if arguments.dry_run:
        ended = {row["hash"]: row["status"] for row in read_results(study.results)}
        for row in study.rows:
            print(f"{row.hash}  {ended.get(row.hash, 'missing'):8}  {row.label}")
        return
    if arguments.launcher == "slurm":
        from cnnfamily import slurm

        slurm.submit(study, workdir, arguments.sweep, only=arguments.only, retry=arguments.retry)
        return
    run_study(study, workdir, jobs=arguments.jobs, only=arguments.only, retry=arguments.retry)


if __name__ == "__main__":
    errors.run_command(main)
