"""Are two equal runs equal to the bit, and what does that cost? `python experiments/speed/determinism.py [--models=NAME,...]`.

The product's training step (`side.py`), with XLA's flags as they are and with those that make its operations deterministic.
Each of these runs twice, in processes of their own that get ready at once, each compiling anew; then all are asked in turn for
bursts of as many steps, which gives their times, and at the end for the digest of every bit of their state: parameters, batch
statistics and momentum. Writes a JSON file, with which the same command goes on after a stop, and a table beside it.

On a CPU the flags are accepted and change nothing.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

import compare

from cnnfamily import disk

FLAGS = {
    "as it is": "",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    # Leaves out what is not deterministic and still measures which of the rest is fastest, so two compilations may differ.
    "no nondeterministic": "--xla_gpu_exclude_nondeterministic_ops=true",
}
MODELS, DTYPES = ["resnet50", "efficientnet_b0"], ("float32", "bfloat16")


def job_of(job: dict, form: str) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[form]}".strip()
    # A program from a cache of compiled ones would hide that a second compilation chooses other algorithms.
    environment = {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return job | {"side": "ours", "environment": environment}


def measure(job: dict, forms: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """By form: whether two runs have the same bits, and milliseconds a step of both in each round; or why there are none."""
    with contextlib.ExitStack() as stack:
        workers, failed = {}, {}
        for form in forms:
            for run in (1, 2):
                workers[form, run] = compare.Worker(job_of(job, form), sys.executable)
                stack.callback(workers[form, run].stop)
        milliseconds = {which: [] for which in workers}
        digests, peaks = {}, {}

        def ask(which: tuple[str, int], question) -> dict | None:
            if which[0] in failed:
                return None
            try:
                return question(workers[which])
            except compare.Gone as gone:
                failed[which[0]] = gone.cell
                for run in (1, 2):
                    workers[which[0], run].stop()
                return None

        for which in workers:
            ask(which, lambda worker: worker.answer(arguments.start_timeout))
        for _ in range(arguments.rounds):
            for which in workers:
                if answer := ask(which, lambda worker: worker.burst(arguments.steps, arguments.start_timeout)):
                    milliseconds[which].append(1e3 * answer["seconds"] / arguments.steps)
        for which in workers:
            if answer := ask(which, lambda worker: worker.burst(1, arguments.start_timeout, digest=True)):
                digests[which], peaks[which] = answer["digest"], answer.get("peak_bytes")
    found = {}
    for form in forms:
        runs = [(form, run) for run in (1, 2)]
        found[form] = failed.get(form) or {
            "same_bits": digests[runs[0]] == digests[runs[1]],
            "digests": [digests[which][:16] for which in runs],
            "milliseconds": [[round(one, 3) for one in milliseconds[which]] for which in runs],
            "peak_bytes": peaks[runs[0]],
        }
    return found


def all_of(cell: dict) -> list[float]:
    """Milliseconds of both runs."""
    return [one for run in cell["milliseconds"] for one in run]


def table(study: dict) -> str:
    lines = [["network", "dtype", "batch x pixels", "flags", "two runs equal", "ms a step", "of as it is", "peak memory, GiB"]]
    lines.append(["---"] * len(lines[0]))
    for row in study["rows"]:
        base = row["forms"]["as it is"]
        for form, cell in row["forms"].items():
            line = [row["model"], row["dtype"], f"{row['batch']} x {row['resolution']}", form]
            if "milliseconds" not in cell:
                lines.append([*line, compare.rate(cell), "", "", ""])
                continue
            times = sorted(all_of(cell))
            line += ["yes" if cell["same_bits"] else "no"]
            line += [f"{statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f})", ""]
            if "milliseconds" in base:  # round by round and run by run
                ratios = sorted(one / other for one, other in zip(all_of(cell), all_of(base), strict=True))
                line[-1] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append([*line, f"{cell['peak_bytes'] / 2**30:.2f}" if cell["peak_bytes"] else ""])
    machine, versions = study["machine"], ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    steps = sorted({row["rounds"] * (row["steps"] + 1) + 3 for row in study["rows"]})  # with those that are not timed
    rounds = sorted({row["rounds"] for row in study["rows"]})
    head = f"Device {machine['device']}; {machine['processor']}, {machine['cores']} cores; {versions}; "
    head += f"two runs of {' or '.join(map(str, steps))} steps, {' or '.join(map(str, rounds))} "
    head += f"bursts in turn; {'; '.join(f'{form}: {flags}' for form, flags in FLAGS.items() if flags)}.\n"
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, type=lambda text: compare.listed(text, ()))
    parser.add_argument("--dtypes", default=list(DTYPES), type=lambda text: compare.listed(text, DTYPES))
    parser.add_argument("--forms", default=list(FLAGS), type=lambda text: compare.listed(text, tuple(FLAGS)))
    parser.add_argument("--batch", type=int, default=0, help="default: 8 on a CPU, 64 elsewhere")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a burst")
    parser.add_argument("--start-timeout", type=float, default=400.0, help="seconds to compile, and for a burst")
    parser.add_argument("--out", type=Path, help="default: results/determinism-cpu.json or -gpu.json; a table beside it")
    arguments = parser.parse_args()
    where = compare.describe(["ours"], {"ours": sys.executable})
    gpu = where["machine"]["device"] != "cpu"
    path = arguments.out or compare.HERE / "results" / f"determinism-{'gpu' if gpu else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    study = compare.load(path, where)
    forms = ["as it is", *(form for form in arguments.forms if form != "as it is")]
    for dtype in arguments.dtypes:
        for model in arguments.models:
            job = {"model": model, "dtype": dtype, "mode": "train", "batch": arguments.batch or (64 if gpu else 8)}
            job["resolution"] = arguments.resolution
            others = [row for row in study["rows"] if any(row[key] != job[key] for key in compare.KEY)]
            if any(set(forms) <= set(row["forms"]) for row in study["rows"] if row not in others):
                continue
            found, study["rows"] = measure(job, forms, arguments), others
            head = {"rounds": arguments.rounds, "steps": arguments.steps, "commit": compare.commit()}
            study["rows"].append(job | head | {"forms": found})
            disk.write_whole(path, json.dumps(study, indent=1) + "\n")
            disk.write_whole(path.with_suffix(".md"), table(study))
            bits = "; ".join(f"{form}: {cell.get('same_bits', cell)}" for form, cell in found.items())
            print(f"{model} {dtype}, two runs equal: {bits}", flush=True)


if __name__ == "__main__":
    main()
