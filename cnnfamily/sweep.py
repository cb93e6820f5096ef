"""Ablation sweeps: `python -m cnnfamily.sweep --sweep=experiments/STUDY/sweep.py` runs the rows that `results.jsonl` lacks.

A sweep file has `BASE`, a config as `--config` takes it, and `sweep()`, a generator of flat overrides:

    BASE = "configs/lenet5_digits.py"

    def sweep():
        for width in (0.5, 1.0, 2.0):
            for seed in range(3):
                yield {"model.width": width, "seed": seed}

`BASE` may be a dictionary of configs by name: `--sweep=FILE.py:NAME` takes that of a name, the first without, a `sweep(name)`
is told which, and the rows go to `results-NAME.jsonl`. `--config.KEY=VALUE` holds for all rows.

Every row is checked before the first runs; each runs in a process of its own, in `runs/STUDY/HASH`, and is known by the hash of
its whole config. Started again, the command goes on with what is missing, several at once share the rows, and `--retry` runs
failed ones again. `python -m cnnfamily.report experiments/STUDY` makes table and figures.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cnnfamily import config as configs
from cnnfamily import errors
from cnnfamily.errors import UsageError
from cnnfamily.study import Row, Study, append_result, describe_run, load_study, read_results
from cnnfamily.sweep_view import View


class Runner:
    """Runs rows of a study, `jobs` at once, each in a process of its own, and writes down what became of them."""

    def __init__(self, study: Study, workdir: Path, *, jobs: int, retry: bool):
        self.study, self.workdir, self.jobs, self.retry = study, workdir, jobs, retry
        self.running: dict[str, tuple[Row, float]] = {}
        self.elsewhere: list[Row] = []
        self._children: dict[str, subprocess.Popen] = {}
        self._lock, self.stopping = threading.Lock(), False
        workdir.mkdir(parents=True, exist_ok=True)

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
            if self.stopping or row.hash in self.study.ended(retry=self.retry):
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
        environment, cores = device_of(slot, self.jobs)
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
                        env=environment,
                    )
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(child.pid, cores)  # its threads, which are still to come, inherit it
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
            why = "as the system does when memory runs out" if -status == signal.SIGKILL else f"see {log.name} beside its run"
            kind, error = "killed", f"killed twice by {signal.Signals(-status).name}: {why}"
        failed = {"row": row.number, "hash": row.hash, "status": kind, "overrides": row.overrides, "seed": row.config.seed}
        return failed | {"error": errors.one_line(error)[:500]}


def device_of(slot: int, jobs: int) -> tuple[dict[str, str], list[int]]:
    """The environment that gives a run a GPU of its own, and the cores it may use: a share where there is no GPU."""
    gpus, cores = gpu_names(), sorted(os.sched_getaffinity(0))
    if gpus:
        return os.environ | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}, cores
    return dict(os.environ), cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] or cores


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
    jobs = jobs or max(1, len(gpu_names()))
    runner = Runner(study, workdir, jobs=jobs, retry=retry)
    rows, done = study.select(only), study.ended(retry=retry)
    waiting = [row for row in rows if row.hash not in done]
    failures, lock, received = [], threading.Lock(), []

    def work(slot: int) -> None:
        while not runner.stopping:
            with lock:
                if not waiting:
                    return
                row = waiting.pop(0)
            start = time.monotonic()
            try:
                result = runner.run(row, slot)
            except Exception as error:  # of the runner itself, such as a full disk: the others are stopped, and it is raised
                failures.append(error)
                runner.stop()
                return
            if result:
                view.ended(row, result, time.monotonic() - start)

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
    arguments, rest = parser.parse_known_args(argv)
    if arguments.jobs < 0:
        raise UsageError(f"--jobs={arguments.jobs}: expected 0 (one a GPU) or more")
    jax.config.update("jax_platforms", "cpu")  # the runner counts and compares: the GPUs are for its runs
    study = load_study(arguments.sweep, configs.read_overrides(rest, "--sweep=, --workdir=, --launcher=, --jobs=, --only="))
    workdir = arguments.workdir or Path("runs") / study.name
    if arguments.dry_run:
        ended = {row["hash"]: row["status"] for row in read_results(study.results)}
        for row in study.rows:
            print(f"{row.hash}  {ended.get(row.hash, 'missing'):8}  {row.label}")
        return
    if arguments.launcher == "slurm":
        from cnnfamily import slurm

        slurm.submit(study, workdir, [arguments.sweep, *rest], only=arguments.only, retry=arguments.retry)
        return
    run_study(study, workdir, jobs=arguments.jobs, only=arguments.only, retry=arguments.retry)


if __name__ == "__main__":
    errors.run_command(main)
