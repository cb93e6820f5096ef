"""Runs studies anew and holds them against their committed results: `python experiments/reproduce.py STUDY [STUDY ...]`.

A setting is reproduced if its mean accuracy lies in the 95 % interval (Student's t over the seeds) of the committed one.
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scipy import stats

from cnnfamily import report

HERE = Path(__file__).parent


def compare(committed: Path, anew: Path) -> str:
    before, after = (report.load(file)[0] for file in (committed, anew))
    found = {str(group.overrides): group for group in after}
    inside = same = 0
    for group in before:
        old, new = group.values("top1"), found[str(group.overrides)].values("top1")
        half = stats.t.ppf(0.975, len(old) - 1) * statistics.stdev(old) / math.sqrt(len(old))
        distance = abs(statistics.mean(new) - statistics.mean(old))
        inside += distance <= half
        same += new == old and group.values("loss") == found[str(group.overrides)].values("loss")
        if distance > half:
            print(f"{group.label}: {statistics.mean(new):.2%}, committed {statistics.mean(old):.2%} ± {half:.2%}")
    return f"{inside} of {len(before)} settings within their intervals, {same} with the same bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    for name in arguments.studies:
        with tempfile.TemporaryDirectory() as place:
            study, start = Path(place) / name, time.monotonic()
            study.mkdir()
            shutil.copy(HERE / name / "sweep.py", study)
            options = [f"--sweep={study}/sweep.py", f"--workdir={place}/runs", f"--jobs={arguments.jobs}"]
            log = subprocess.run([sys.executable, "-m", "cnnfamily.sweep", *options], capture_output=True, text=True)
            if log.returncode:
                raise SystemExit(f"{name}: {log.stderr}")
            result = compare(HERE / name / "results.jsonl", study / "results.jsonl")
            print(f"{name}: {result}; {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
