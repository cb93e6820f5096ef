"""Sweeps on a cluster: one array job of Slurm, a task a row. A task that is pre-empted is requeued, and its run continues.

The sweep file's `SLURM` holds options of sbatch by their long names, for example
`SLURM = {"time": "02:00:00", "mem": "32G", "gpus-per-task": 1, "cpus-per-task": 8, "partition": "gpu"}`. Slurm does the rest:
`squeue` and `scancel` show and end the tasks, `--requeue` is on unless `SLURM` says `"requeue": False`.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cnnfamily import config as configs
from cnnfamily import disk
from cnnfamily.errors import UsageError
from cnnfamily.study import Row, Study


def script(study: Study, rows: list[Row], workdir: Path, arguments: list[str], retry: bool) -> str:
    """The batch script of an array with a task for each of `rows`; `arguments` are the sweep file and overrides for all."""
    options = {"job-name": study.name, "array": f"0-{len(rows) - 1}", "output": f"{workdir.resolve()}/slurm-%A_%a.out"}
    options |= {"open-mode": "append", "requeue": True, **study.slurm}
    lines = ["#!/bin/bash"]
    for name, value in options.items():
        if value is not False:
            lines.append(f"#SBATCH --{name}" + ("" if value is True else f"={value}"))
    sweep_file, *overrides = arguments
    command = [sys.executable, "-m", "cnnfamily.sweep", f"--sweep={sweep_file}", *overrides]
    command += [f"--workdir={workdir.resolve()}", "--jobs=1"]
    lines += [
        f"cd {shlex.quote(str(configs.REPOSITORY))}",
        f"rows=({' '.join(row.hash for row in rows)})",
        # exec: the signal with which Slurm pre-empts is for the runner, which passes it on and waits for the run to be saved.
        "exec " + shlex.join([*command, *["--retry"] * retry]) + ' --only="${rows[$SLURM_ARRAY_TASK_ID]}"',
    ]
    return "\n".join(lines) + "\n"


def submit(study: Study, workdir: Path, arguments: list[str], *, only: str = "", retry: bool = False) -> None:
    """Submits what is missing of a study.

    Raises:
      UsageError: there is no sbatch, or it refuses.
    """
    if not shutil.which("sbatch"):
        raise UsageError(
            "--launcher=slurm: there is no sbatch here; expected a machine that submits to Slurm, or --launcher=local"
        )
    _, colon, name = arguments[0].partition(":")
    arguments = [f"{study.file}{colon}{name}", *arguments[1:]]
    workdir.mkdir(parents=True, exist_ok=True)
    done = study.ended(retry=retry)
    rows = [row for row in study.select(only) if row.hash not in done]
    if not rows:
        print(f"nothing to submit: {len(done)} of {len(study.rows)} rows have ended")
        return
    disk.write_whole(workdir / "slurm.sh", script(study, rows, workdir, arguments, retry))
    sent = subprocess.run(["sbatch", "--parsable", str(workdir / "slurm.sh")], capture_output=True, text=True)
    if sent.returncode:
        raise UsageError(f"sbatch refuses {workdir / 'slurm.sh'}: {sent.stderr.strip()}")
    print(f"array {sent.stdout.strip()} of {len(rows)} rows; outputs in {workdir}; the results go to {study.results}")
