"""Trains networks on a folder of photographs, and shows what has to hold of it.

    python experiments/flowers/run.py FOLDER [NETWORK ...]       # EfficientNet-B0 and ResNet-18; NETWORK.jsonl and curves.png
    python experiments/flowers/run.py FOLDER --tfds [NETWORK]    # the same images from TFDS: tfds_NETWORK.json
    python experiments/flowers/run.py FOLDER --memory            # 20 epochs of a small network: memory.json

FOLDER is `flowers` with a folder for each of its five classes (4,317 photographs of 128 x 128 pixels). Started again, training
goes on with what is missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cnnfamily import config as configs
from cnnfamily import runlog, train

HERE = Path(__file__).parent
CONFIG = HERE.relative_to(configs.REPOSITORY) / "config.py"
NETWORKS = ("efficientnet_b0", "resnet18")


def run_networks(folder: Path, networks: list[str]) -> None:
    for name in networks:
        config = configs.load_config(f"{CONFIG}:{name}", {"data.source": f"folder:{folder}"})
        workdir = Path("runs") / f"flowers-{name}"
        train.run_training(config, workdir)
        session = runlog.read_manifest(workdir)["sessions"][0]
        head = {"network": name, "commit": session["commit"], "versions": session["versions"]}
        lines = [head, *runlog.read_metrics(workdir)]
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw()


def draw() -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for i, file in enumerate(sorted(HERE.glob("*.jsonl"))):
        head, *rows = map(json.loads, file.read_text().splitlines())
        tested = [row for row in rows if "test_loss" in row]
        style = {"color": f"C{i}", "linestyle": "-"}
        trained = [row for row in rows if "train_loss" in row]
        loss.plot([r["epoch"] for r in trained], [r["train_loss"] for r in trained], **style, alpha=0.4, linewidth=0.8)
        loss.plot([r["epoch"] for r in tested], [r["test_loss"] for r in tested], **style, marker="osv^"[i % 4], markersize=4)
        percent = [100 * (1 - row["test_top1"]) for row in tested]
        error.plot([r["epoch"] for r in tested], percent, **style, marker="osv^"[i % 4], markersize=4, label=head["network"])
    loss.set(xlabel="epoch", ylabel="loss: training (pale), test (markers)", yscale="log")
    error.set(xlabel="epoch", ylabel="test error [%]", ylim=(0, None))
    error.legend()
    for axes in (loss, error):
        axes.grid(alpha=0.3)
    figure.suptitle("Flowers, 5 classes, 128 px: 3,454 training and 863 test photographs", fontsize="medium")
    figure.savefig(HERE / "curves.png", dpi=120)


def compare_with_tfds(folder: Path, networks: list[str]) -> None:
    """The first 20 steps and the evaluation after them through both sources."""
    import tensorflow_datasets as library

    paths = sorted(path for path in folder.rglob("*.jpg"))
    classes = sorted({path.parent.name for path in paths})

    class Flowers(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            kinds = library.features
            features = kinds.FeaturesDict({"image": kinds.Image(), "label": kinds.ClassLabel(names=classes)})
            return library.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, path in enumerate(paths):
                yield i, {"image": path, "label": path.parent.name}

    with tempfile.TemporaryDirectory() as place:
        Flowers(data_dir=place, file_format="array_record").download_and_prepare()
        short = {"total_epochs": 0.0, "total_steps": 20, "log.every_steps": 5, "optim.warmup_epochs": 0.0}
        for name in networks:
            logs = []
            for i, source in enumerate((f"folder:{folder}", "tfds:flowers")):
                fields = {"data.source": source, "data.dir": "" if i == 0 else place, "data.workers": (2, 0)[i], **short}
                config = configs.load_config(f"{CONFIG}:{name}", fields)
                workdir = Path(place) / f"{name}-{i}"
                train.run_training(config, workdir, quiet=True)
                logs.append([{k: v for k, v in row.items() if k != "timing"} for row in runlog.read_metrics(workdir)])
            session = runlog.read_manifest(workdir)["sessions"][0]
            found = {"network": name, "commit": session["commit"], "versions": session["versions"], "lines": len(logs[0])}
            found |= {"same_bits": logs[0] == logs[1], "folder": logs[0][-1], "tfds": logs[1][-1]}
            print(json.dumps(found))
            (HERE / f"tfds_{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def watch_memory(folder: Path) -> None:
    """Resident memory of a training run of 20 epochs, at the end of each."""
    with tempfile.TemporaryDirectory() as place:
        fields = ["--config.data.resolution=32", "--config.data.resize=32", "--config.total_epochs=20"]
        command = [sys.executable, "-m", "cnnfamily.train", f"--config={CONFIG}:resnet20_cifar", f"--workdir={place}/run"]
        command += [*fields, f"--config.data.source=folder:{folder}"]
        process = subprocess.Popen(command, cwd=configs.REPOSITORY, stdout=subprocess.DEVNULL)
        megabytes = []
        while process.poll() is None:
            time.sleep(0.2)
            evaluated = sum("test_loss" in row for row in runlog.read_metrics(Path(place) / "run"))
            status = Path(f"/proc/{process.pid}/status").read_text()
            if evaluated > len(megabytes) and "VmRSS" in status:
                megabytes.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
                print(f"epoch {len(megabytes)}: {megabytes[-1]} MiB", flush=True)
        if process.returncode:
            raise SystemExit(f"training ended with status {process.returncode}")
    (HERE / "memory.json").write_text(json.dumps({"megabytes_after_each_epoch": megabytes}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--tfds", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder.resolve()
    if arguments.tfds:
        compare_with_tfds(folder, arguments.networks)
    elif arguments.memory:
        watch_memory(folder)
    else:
        run_networks(folder, arguments.networks)


if __name__ == "__main__":
    main()
