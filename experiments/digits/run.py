"""Trains the networks on the embedded digits: the rows that `results.jsonl` lacks, and the table and the figure of all.

    python experiments/digits/run.py [NETWORK ...]      # default: fifteen networks with three seeds, then the others with one
    python experiments/digits/run.py --times            # two epochs of each network that has no time yet

Each row is a process of its own, `python -m cnnfamily.train --config=experiments/digits/config.py:NETWORK --config.seed=SEED`;
started again it goes on with the rows that are missing. Timings mean something only if nothing else runs: a row that was
measured beside other work has `"idle": false`, added by hand, and no time in the table. `--times` trains those for two epochs
more on an idle machine, takes the time from there, and notes the commit as `timed_commit`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cnnfamily import config as configs
from cnnfamily import errors, models, runlog
from cnnfamily.models import build, list_models
from cnnfamily.summary import summarize

HERE = Path(__file__).parent
RESULTS, TABLE, FIGURE = HERE / "results.jsonl", HERE / "table.md", HERE / "accuracy.png"
SEEDS = (0, 1, 2)
FIFTEEN = (
    *("lenet5", "lenet5_1998", "alexnet", "vgg11", "vgg11_bn", "googlenet"),
    *("resnet20_cifar", "resnet18", "se_resnet18", "resnet50"),
    *("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
)
# In the figure; the others' names stand on the right and above.
LABELS_LEFT = ("mobilenet_v3_small", "mobilenet_v3_large", "googlenet", "resnet18", "se_resnet18", "vgg11", "vgg11_bn")
LABELS_BELOW = ("mobilenet_v3_small", "mobilenet_v3_large", "se_resnet18", "resnet20_cifar")
TOO_LARGE = ("resnet1202_cifar",)  # its step alone compiles for an hour


def train(name: str, seed: int, folder: Path, *overrides: str) -> dict:
    """The figures of one run, from the command and its log."""
    config = HERE.relative_to(configs.REPOSITORY) / f"config.py:{name}"
    command = [sys.executable, "-m", "cnnfamily.train", f"--config={config}", f"--config.seed={seed}", *overrides]
    start = time.monotonic()
    subprocess.run([*command, f"--workdir={folder}"], check=True, cwd=configs.REPOSITORY, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    rows = runlog.read_metrics(folder)
    session = runlog.read_manifest(folder)["sessions"][0]
    rates = [row["timing"]["images_per_second"] for row in rows if "train_loss" in row][1:]
    loaded = runlog.read_config(folder)
    counts = summarize(build(loaded.model), resolution=loaded.data.resolution)
    return {
        "network": name,
        "seed": seed,
        "test_top1": [row["test_top1"] for row in rows if "test_top1" in row][-1],
        "test_loss": [row["test_loss"] for row in rows if "test_loss" in row][-1],
        "params": counts.params,
        "macs": counts.macs,
        "resolution": counts.resolution,
        "epochs": loaded.total_epochs,
        "epoch_seconds": round(1408 / statistics.median(rates), 2),
        "seconds": round(seconds, 1),
        "versions": {package: session["versions"][package] for package in ("jax", "flax")},
        "commit": session["commit"],
    }


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def add_times() -> None:
    """Measures the seconds of an epoch of the rows that were made beside other work."""
    for row in [row for row in read() if not row.get("idle", True)]:
        with tempfile.TemporaryDirectory() as folder:
            short = ("--config.total_epochs=2", "--config.optim.warmup_epochs=0", "--config.log.every_steps=4")
            timed = train(row["network"], row["seed"], Path(folder) / "run", *short)
        print(f"{row['network']} {row['seed']}: {timed['epoch_seconds']} s an epoch, was {row['epoch_seconds']}", flush=True)
        rows = read()
        found = rows[[(other["network"], other["seed"]) for other in rows].index((row["network"], row["seed"]))]
        del found["idle"]
        found |= {"epoch_seconds": timed["epoch_seconds"], "timed_commit": timed["commit"]}
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_network(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Rows of each network, by multiply-adds."""
    found = {}
    for row in rows:
        found.setdefault(row["network"], []).append(row)
    return sorted(found.items(), key=lambda item: item[1][0]["macs"])


def write_table(rows: list[dict]) -> None:
    lines = [
        "| network | n | test top-1 [%] | spread | parameters | multiply-adds | epoch [s] |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_network(rows):
        accuracies = [100 * run["test_top1"] for run in runs]
        spread = f"{min(accuracies):.1f} to {max(accuracies):.1f}" if len(runs) > 1 else ""
        seconds = [run["epoch_seconds"] for run in runs if run.get("idle", True)]  # measured with nothing else running
        epoch = f"{statistics.median(seconds):.1f}" if seconds else "-"
        size = f"{runs[0]['params']:,} | {runs[0]['macs']:,}"
        lines.append(f"| {name} | {len(runs)} | {statistics.mean(accuracies):.2f} | {spread} | {size} | {epoch} |")
    TABLE.write_text("\n".join(lines) + "\n")


def draw(rows: list[dict]) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(("lenet", "alexnet", "vgg", "googlenet", "resnet", "mobilenet", "efficientnet"), "osv^DPX", strict=True))
    named = set()
    for name, runs in by_network(rows):
        # The longest, for "lenet" is in "mobilenet"; ResNeXt and the plain networks are ResNets.
        family = max((key for key in markers if key in name), key=len, default="resnet")
        errors_ = [100 * max(1 - run["test_top1"], 0.5 / 360) for run in runs]  # none is drawn as half a digit
        middle = statistics.mean(errors_)
        bars = [[middle - min(errors_)], [max(errors_) - middle]]
        label = family if family not in named else None
        named.add(family)
        style = {"marker": markers[family], "color": f"C{list(markers).index(family)}", "markersize": 6, "capsize": 2}
        axes.errorbar(runs[0]["macs"], middle, yerr=bars, linestyle="", label=label, **style)
        if name in FIFTEEN:
            right, above = name not in LABELS_LEFT, name not in LABELS_BELOW
            place = {"ha": "left" if right else "right", "va": "bottom" if above else "top"}
            place["xytext"] = (4 if right else -4, 3 if above else -3)
            axes.annotate(name, (runs[0]["macs"], middle), fontsize=7, textcoords="offset points", **place)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds of one image", ylabel="test error [%], mean and range of seeds")
    axes.set_title("One recipe, 8 epochs of the embedded digits: 360 test images, one is 0.28 %", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(markers), fontsize="small")
    figure.savefig(FIGURE, dpi=120)


def main(argv: list[str]) -> None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="cnnfamily_digits_"))  # seeds share programs
    if argv == ["--times"]:
        add_times()
        write_table(read())
        return
    for name in argv:
        models.model_config(name)
    others = [name for name in list_models() if name not in (*FIFTEEN, *TOO_LARGE)]
    wanted = [(name, seed) for seed in SEEDS for name in FIFTEEN] + [(name, 0) for name in others]
    if argv:
        wanted = [(name, seed) for name, seed in wanted if name in argv]
    done = {(row["network"], row["seed"]) for row in read()}
    for name, seed in wanted:
        if (name, seed) not in done:
            with tempfile.TemporaryDirectory() as folder:
                row = train(name, seed, Path(folder) / "run")
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name} {seed}: {row['test_top1']:.2%}, {row['epoch_seconds']} s an epoch, {row['seconds']} s", flush=True)
            write_table(read())
            draw(read())


if __name__ == "__main__":
    errors.run_command(main)
