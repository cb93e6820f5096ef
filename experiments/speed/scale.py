"""How the time of a step grows with batch, resolution, width and depth: `python experiments/speed/scale.py [MODEL] ...`.

Each is changed alone, from a base that all four share; every program is measured by itself, and the base again at the beginning
of each line, which shows how steady the machine was. Writes `scale_DEVICE.json`, which the same command goes on with after a
stop, a table, and one plot: multiply-adds a second against multiply-adds of a step.

On a GPU, or with `--largest-batch=N`, the batch goes on doubling until memory is full (or N), and the file says where it ended.
"""

import argparse
import gc
import itertools
import json
import os
from pathlib import Path

import compare
import jax
import matplotlib.pyplot as plt
import numpy as np

from cnnfamily import benchmark, create_model, disk, memory
from cnnfamily.ceilings import durations
from cnnfamily.summary import summarize

LINES = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "resolution": (96, 128, 160, 192, 224, 260, 300, 380),
    "width": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "depth": (1.0, 1.5, 2.0, 3.0, 4.0),
}


def measure(point: dict, mode: str, seconds: float) -> dict:
    network = create_model(point["model"], width=point["width"], depth=point["depth"], dtype=point["dtype"])
    prepare = benchmark.training if mode == "train" else benchmark.inference
    program = prepare(network, point["batch"], resolution=point["resolution"])
    program.compile()
    times = durations(program.step, seconds=seconds)
    low, middle, high = (float(value) for value in np.quantile(times, (0, 0.5, 1)))
    macs = summarize(network, resolution=point["resolution"]).macs * point["batch"]
    held = program.compiled.memory_analysis()
    return {"macs": macs, "seconds": [middle, low, high], "steps": len(times), "temporary_bytes": held.temp_size_in_bytes}


def values_of(line: str, smallest_batch: int, largest_batch: int) -> tuple[float, ...]:
    """Those of the table; the batch goes on doubling, to `largest_batch` at most."""
    if line != "batch":
        return LINES[line]
    doubled = (2 * LINES["batch"][-1] << i for i in itertools.count())
    found = itertools.takewhile(lambda batch: batch <= largest_batch, itertools.chain(LINES["batch"], doubled))
    return tuple(batch for batch in found if batch >= smallest_batch)


def draw(study: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    labels = {"batch": (4, -10), "resolution": (4, -10), "width": (-4, 7), "depth": (-6, 9)}  # the lines cross at the base
    for line, marker in zip(LINES, "osD^", strict=True):
        rows = [row for row in study["rows"] if row["line"] == line]
        if not rows:
            continue
        macs = [row["macs"] / 1e9 for row in rows]
        middle, low, high = (np.array([row["macs"] / row["seconds"][i] / 1e9 for row in rows]) for i in (0, 2, 1))
        bars = axes.errorbar(macs, middle, (middle - low, high - middle), marker=marker, capsize=2, label=line)
        for row, x, y in zip(rows, macs, middle, strict=True):
            offset = {"xytext": labels[line], "textcoords": "offset points"}
            axes.annotate(f"{row[line]:g}", (x, y), fontsize=7, color=bars[0].get_color(), **offset)
    axes.set(xscale="log", ylim=(0, None), xlabel="multiply-adds of the forward pass of a step, $10^9$")
    axes.set(ylabel="of which a second, $10^9$", title=title(study))
    axes.legend(title="changed alone")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def title(study: dict) -> str:
    base, machine = study["base"], study["machine"]
    what = f"{base['model']}, {study['mode']}, {base['dtype']}, {base['batch']} x {base['resolution']} px"
    return f"{what}; {machine['processor']}"


def table(study: dict) -> str:
    lines = ["| line | value | multiply-adds, G | ms a step | images/s | G multiply-adds/s | temporary MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in study["rows"]:
        middle, low, high = (1e3 * seconds for seconds in row["seconds"])
        digits = 0 if middle >= 20 else 2  # a GPU's steps take a few
        times = f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
        rates = f"{1e3 * row['batch'] / middle:,.1f} | {row['macs'] / middle / 1e6:,.1f}"
        cells = [row["line"], f"{row[row['line']]:g}", f"{row['macs'] / 1e9:.2f}", times, rates]
        lines.append(f"| {' | '.join(cells)} | {row['temporary_bytes'] / 2**20:,.0f} |")
    if "batch_ended" in study:
        lines.append("\nThe batch ended before {batch:,}: {why}".format(**study["batch_ended"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="efficientnet_b0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", default="train", choices=benchmark.MODES)
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each program")
    parser.add_argument("--lines", default=list(LINES), type=lambda text: compare.listed(text, tuple(LINES)))
    parser.add_argument("--smallest-batch", type=int, default=1)
    parser.add_argument("--largest-batch", type=int, help="default: 256 on a CPU, any on a GPU")
    parser.add_argument("--out", type=Path, help="the JSON file; table and plot stand beside it")
    arguments = parser.parse_args()
    base = {"model": arguments.model, "batch": arguments.batch, "resolution": arguments.resolution}
    base |= {"width": 1.0, "depth": 1.0, "dtype": arguments.dtype}
    kind = jax.local_devices()[0].device_kind
    where = {"processor": compare.processor() if kind == "cpu" else kind, "cores": os.cpu_count()}
    largest = arguments.largest_batch or (256 if jax.default_backend() == "cpu" else 2**20)
    study = {"base": base, "mode": arguments.mode, "machine": where, "versions": {"jax": jax.__version__}, "rows": []}
    path = arguments.out or compare.HERE / "results" / f"scale_{kind.replace(' ', '_').lower()}.json"
    if path.exists():
        old = json.loads(path.read_text())
        if {key: old[key] for key in study} | {"rows": []} != study:
            raise SystemExit(f"{path.name} is of another base, machine or version: take another --out")
        study = old
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in arguments.lines:
        for value in values_of(line, arguments.smallest_batch, largest):
            ended = line == "batch" and value >= study.get("batch_ended", {"batch": value + 1})["batch"]
            if ended or any(row["line"] == line and row[line] == value for row in study["rows"]):
                continue
            point = {**base, line: value}
            try:
                row = {"line": line, **point, **measure(point, arguments.mode, arguments.seconds)}
            except jax.errors.JaxRuntimeError as error:  # out of memory
                why = str(error).splitlines()[0][:120]
                print(f"{line} {value:g}: {why}", flush=True)
                if line == "batch":
                    study["batch_ended"] = {"batch": value, "why": why}
                    disk.write_whole(path, json.dumps(study, indent=1))
                continue
            study["rows"].append(row)
            disk.write_whole(path, json.dumps(study, indent=1))
            print(f"{line} {value:g}: {row['seconds'][0]:.3f} s a step, n = {row['steps']}", flush=True)
            jax.clear_caches()
            gc.collect()
    draw(study, path.with_suffix(".png"))
    text = f"{title(study)}; JAX {study['versions']['jax']}; medians (smallest to largest)\n\n{table(study)}\n"
    disk.write_whole(path.with_suffix(".md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    memory.tune_malloc()
    main()
