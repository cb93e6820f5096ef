"""Sweeps on Slurm: the batch script, and one array from end to end on a real Slurm of one node (`-m full`, if it is there)."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnfamily import runlog, slurm
from cnnfamily import study as study_file
from cnnfamily.errors import UsageError

NODE = Path(__file__).with_name("slurm_node.sh")
SWEEP = """
BASE = "configs/lenet5_digits.py"
SLURM = {"time": "00:10:00", "cpus-per-task": 1, "exclusive": False}
SHORT = {"total_epochs": 1.0, "optim.warmup_epochs": 0.0}


def sweep():
    yield {"seed": 0, **SHORT}
    yield {"seed": 0, "optim.learning_rate": 1e30, "optim.clip_norm": 0.0, **SHORT}
    yield {"seed": 1, "total_epochs": 100.0, "checkpoint.every_steps": 100}
"""


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "study" / "sweep.py"
    file.parent.mkdir()
    file.write_text(SWEEP)
    return study_file.load_study(str(file))


def test_the_script_is_an_array_with_the_options_of_the_study(study, tmp_path):
    text = slurm.script(study, study.rows, tmp_path, ["x/sweep.py", "--config.total_epochs=2"], retry=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --array=0-2", "#SBATCH --time=00:10:00", "#SBATCH --cpus-per-task=1", "#SBATCH --requeue"} <= set(lines)
    assert not any("exclusive" in line for line in lines)
    assert f"rows=({' '.join(row.hash for row in study.rows)})" in lines
    assert "--sweep=x/sweep.py --config.total_epochs=2 --workdir=" in lines[-1]
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith('--retry --only="${rows[$SLURM_ARRAY_TASK_ID]}"')


def test_without_slurm_one_line_says_so(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="there is no sbatch here; expected a machine that submits to Slurm"):
        slurm.submit(study, tmp_path, ["x/sweep.py"])


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.2)


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="no Slurm here (Debian: slurmctld slurmd munge)")
def test_an_array_of_which_one_fails_and_one_is_requeued(study, tmp_path):
    node, runs = tmp_path / "slurm", tmp_path / "runs"
    subprocess.run([NODE, "start", node], check=True)
    # The suite's eight virtual devices would be eight threads on one core.
    environment = os.environ | {"SLURM_CONF": str(node / "slurm.conf"), "XLA_FLAGS": ""}
    try:
        command = [sys.executable, "-m", "cnnfamily.sweep", f"--sweep={study.file}", f"--workdir={runs}", "--launcher=slurm"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        job = re.fullmatch(r"array (\d+) of 3 rows; .*\n", said)[1]
        long = runs / study.rows[2].hash
        wait_for(lambda: (long / "checkpoints" / "100").exists())
        subprocess.run(["scontrol", "requeue", f"{job}_2"], check=True, env=environment)
        wait_for(lambda: len(study_file.read_results(study.results)) == 3)
        rows = sorted(study_file.read_results(study.results), key=lambda row: row["row"])
        assert [row["status"] for row in rows] == ["done", "failed", "done"]
        assert rows[1]["error"].startswith("NonFiniteLoss: loss is nan at step 2")
        sessions = runlog.read_manifest(long)["sessions"]
        assert len(sessions) == 2
        assert sessions[1]["first_step"] >= 100, "saved when Slurm asked it to end, and gone on with"
        again = subprocess.run(
            [*command, "--retry", "--only=seed=1"], check=True, capture_output=True, text=True, env=environment
        )
        assert again.stdout == "nothing to submit: 2 of 3 rows have ended\n"
    finally:
        subprocess.run([NODE, "stop", node])
