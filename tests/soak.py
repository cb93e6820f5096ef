"""Kills real training processes at random moments, again and again, and compares what they end with: bit for bit.

    python tests/soak.py --kills=100 [--seed=0] [--output=FILE.json]

One run is never killed. Then the same command runs in fresh directories and is killed with SIGKILL after a random time, from
before its first import to after its last step, and started again until it ends by itself; after one kill in four a random
bit of a random file of its newest checkpoint is flipped. Each finished run is compared with the one that was never killed:
parameters, batch statistics, optimizer state, averages, the steps and ranks of its checkpoints, and the metrics.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from cnnfamily import checkpoint, evaluate, runlog

# Everything on that a resumed run could get wrong, and saves at and between evaluations; it lasts seconds.
CONFIG = {
    "model.stages": ((6, 16, 1, 1, 3),),
    "model.stem_filters": 16,
    "model.head_filters": 32,
    "model.stochastic_depth": 0.3,
    "model.stochastic_depth_schedule": "l/L",
    "model.norm_group": 8,
    "ema.decay": 0.9,
    "accumulate_steps": 2,
    "augment.mixup": 0.2,
    "augment.mix_group": 4,
    "total_epochs": 0.0,
    "total_steps": 30,
    "optim.warmup_epochs": 0.1,
    "evaluate.every_epochs": 0.5,
    "checkpoint.every_steps": 4,
    "log.every_steps": 5,
}
ARGUMENTS = ["--config=configs/efficientnet_b0.py:digits", *(f"--config.{key}={value}" for key, value in CONFIG.items())]
DEVICES = "--xla_force_host_platform_device_count=2"


def start(workdir: Path, *command: str) -> subprocess.Popen:
    """The training command (or another with its arguments) on two devices, in `workdir`."""
    command = command or (sys.executable, "-m", "cnnfamily.train")
    return subprocess.Popen(
        [*command, *ARGUMENTS, f"--workdir={workdir}"],
        env=os.environ | {"XLA_FLAGS": DEVICES},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(workdir: Path) -> tuple[dict, int]:
    """Everything that must not depend on kills, by name, and its size in bytes."""
    _, state, _ = evaluate.load_state(workdir, which="newest")
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    size = sum(array.nbytes for array in found.values())
    rows = [{key: value for key, value in row.items() if key != "timing"} for row in runlog.read_metrics(workdir)]
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        found["checkpoints"] = (checkpoints.newest, checkpoints.best)
    found["metrics"] = json.dumps(rows)
    return found, size


def differences(one: dict, two: dict) -> list[str]:
    """The names of what is not equal bit for bit."""
    return [name for name in one | two if name not in one or name not in two or not np.array_equal(one[name], two[name])]


def flip_a_bit(rng: random.Random, folder: Path) -> str:
    """Flips one bit of one file under a folder and returns the file's name there."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return str(file.relative_to(folder))


def soak(kills: int, seed: int, folder: Path) -> dict:
    """Kills until there are enough and the last run has ended; the counts."""
    rng, counts = random.Random(seed), collections.Counter()
    began = time.monotonic()
    for name in ("cold", "reference"):  # the first fills the cache of compiled programs
        before = time.monotonic()
        process = start(folder / name)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    whole = time.monotonic() - before
    reference, size = outcome(folder / "reference")
    assert not differences(reference, outcome(folder / "cold")[0]), "two runs that were never killed differ"
    faults, steps = [], []
    while counts["kills"] < kills:
        workdir, damaged = folder / f"run{counts['runs']}", 0
        counts["runs"] += 1
        while True:
            process = start(workdir)
            try:
                _, errors = process.communicate(timeout=rng.uniform(0, whole) if counts["kills"] < kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                _, errors = process.communicate()
            counts["sessions"] += 1
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                faults.append(f"run {counts['runs'] - 1}: status {process.returncode}: {errors}")
                break
            counts["kills"] += 1
            saved = checkpoint.newest_step(workdir / "checkpoints") if (workdir / "checkpoints").is_dir() else None
            steps.append(saved or 0)
            # Only where there is another to fall back to: a run whose every checkpoint is damaged is refused.
            whole_steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdecimal())
            if rng.random() < 0.25 and len(whole_steps) > 1 and saved == whole_steps[-1]:
                flip_a_bit(rng, workdir / "checkpoints" / str(saved))
                counts["bits flipped"] += 1
                damaged += 1
        counts["damaged checkpoints put aside"] += len(list((workdir / "damaged").glob("*"))) if damaged else 0
        if process.returncode == 0:
            found, _ = outcome(workdir)
            counts["runs compared"] += 1
            counts["bytes compared"] += size
            if unequal := differences(reference, found):
                faults.append(f"run {counts['runs'] - 1} differs in {unequal[:5]}")
        print(f"{dict(counts)}, faults: {faults}", flush=True)
    counts["kills after a checkpoint"] = sum(step > 0 for step in steps)
    return {
        **counts,
        "steps of the newest checkpoint when killed": dict(sorted(collections.Counter(steps).items())),
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "faults": faults,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{temporary}/cache"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        summary = soak(options.kills, options.seed, Path(temporary))
    print(json.dumps(summary, indent=1))
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(bool(summary["faults"]))
