"""Seconds from the start of the command to its first step, with and without programs of an earlier start; and of `import`.

    python experiments/speed/startup.py [--rounds=5] [--config=configs/efficientnet_b0.py:digits]

In turn: the training command with `keep_programs=False`, with a folder of programs that is empty, and once more with what that
start left; then an interpreter that does nothing, `import cnnfamily`, and `create_model` after it. A process ends when
`metrics.jsonl` has its first line, written after step 1. Prints a Markdown table of medians (smallest to largest): seconds of
the wall, and of the processor, which other work on the machine changes less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = {
    "an interpreter that does nothing": "",
    "`import cnnfamily`": "import cnnfamily",
    "`cnnfamily.create_model('efficientnet_b0')`": "import cnnfamily; cnnfamily.create_model('efficientnet_b0')",
}


def seconds(command: list[str], cache: Path, first_line: Path | None = None) -> tuple[float, float]:
    """Wall and processor seconds of a process, which is ended when the file `first_line` has one."""
    # Settings of a user's for JAX would take the place of what is measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment | {"XDG_CACHE_HOME": str(cache)})
    if first_line:
        while not (first_line.exists() and first_line.stat().st_size):
            if child.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with status {child.returncode} before its first step")
            time.sleep(0.01)
        wall = time.monotonic() - start
        child.kill()
    _, _, usage = os.wait4(child.pid, 0)
    child.returncode = 0  # awaited here
    return wall if first_line else time.monotonic() - start, usage.ru_utime + usage.ru_stime


def start_training(config: str, cache: Path, *options: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "cnnfamily.train", f"--config={config}", f"--workdir={run}/run"]
        return seconds([*command, "--config.log.every_steps=1", *options], cache, Path(run) / "run/metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/efficientnet_b0.py:digits")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            measured = {
                "first step, `keep_programs=False`": start_training(arguments.config, cache, "--config.keep_programs=False"),
                "first step, first start": start_training(arguments.config, cache),
                "first step, second start": start_training(arguments.config, cache),
            }
            measured |= {name: seconds([sys.executable, "-c", code], cache) for name, code in CODE.items()}
        for name, pair in measured.items():
            found.setdefault(name, []).append(pair)
    print(f"n = {arguments.rounds}\n\n| what | seconds | of the processor |\n|---|---|---|")
    for name, pairs in found.items():
        cells = (f"{statistics.median(side):.2f} ({min(side):.2f} to {max(side):.2f})" for side in zip(*pairs, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
