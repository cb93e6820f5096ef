"""Measures on a GPU what `steps.py` lists, unattended: `python experiments/gpu/run.py [--minutes=N] [--data=DIR] [--out=DIR]`.

    --minutes=N       ends by then, what is not done is saved; without it everything is run to its end
    --data=DIR        where cifar10_jpeg75.npz and flowers128.tar lie, at any depth
    --out=DIR         gets at most 8 files of at most 16 MiB, all that has to come back: see README.md
    --resume=DIR      such files of the session before, from which this one goes on
    --only=LABEL,...  these steps alone
    --commit=HASH     what a copy without its history is of
    --small           all steps at a size that tries them on a CPU, in a copy of the repository that is thrown away
    --list            the steps and how far they are

Every step has a share of the time in a first round, in the order of the list; what is left goes to those that are not done,
again in order. A step whose time is up is asked to save and end (SIGTERM) and ended if it does not. What is done, in
`results/steps.json`, is not done again; what failed is tried again by the next session. SIGTERM and Ctrl-C end a session as
its time does. What has to come back is packed after each step, so that a session that is killed leaves what was before.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import uuid
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from steps import STEPS, Step

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "experiments/speed")]
from compare import processor  # noqa: E402

from cnnfamily import disk  # noqa: E402 -- on a bare machine it is not installed

RESULTS, WORK = "experiments/gpu/results", "runs/gpu"
FILES, FILE_BYTES = 8, 16 * 2**20
# Of the 8 files three hold parts of the unfinished runs: with the results 60 MiB together, which is what may come back at once.
PARTS, PART_BYTES = 3, 15 * 2**20
LOG_BYTES = 100_000  # of the end of a step's log
RESERVE = 45  # seconds at the end: 30 for a step to save in, the rest to pack
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
PACKAGES += ("torchvision", "timm", "triton")
MARK = "CNNFAMILY_GPU_STEP"  # in the environment of everything that a step starts
DATA = {  # by what a step needs: the archive, what it becomes under WORK, the command for that
    "cifar": ("cifar10_jpeg75.npz", "cifar10.npz", "python experiments/cifar10_jpeg75_to_npz.py {archive} {target}"),
    "flowers": ("flowers128.tar", "photographs", "python -m tarfile -e {archive} {target}"),
}
WITHIN = {"flowers": "/flowers"}  # the folder in an archive


class Driver:
    """Runs steps in `tree`, a checkout or a copy of one, and leaves in `out` what has to come back."""

    def __init__(
        self,
        steps: list[Step],
        tree: Path,
        out: Path,
        *,
        data: Path,
        seconds: float = 1e9,
        only: Iterable[str] = (),
        small: bool = False,
        commit: str = "",
    ):
        self.steps, self.tree, self.out, self.data, self.small = steps, tree, out, data, small
        self.chosen = [step for step in steps if not only or step.label in only]
        self.end = time.monotonic() + seconds
        self.device, driver = gpu()
        self.versions = versions() | ({"driver": driver} if driver else {})
        self.commit = commit or commit_of(tree)
        self.stopped = 0  # the signal that asked to
        self.state_file = tree / RESULTS / "steps.json"
        self.state = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        self.failed_now: set[str] = set()
        for folder in (self.state_file.parent, tree / WORK / "logs", out):
            folder.mkdir(parents=True, exist_ok=True)
        self.name = self.name_of_machine()

    def name_of_machine(self) -> str:
        """h100; h100-2 for a second machine with another processor or versions, whose numbers stand in files of their own."""
        here = {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "versions": self.versions}
        file = self.tree / RESULTS / "machines.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        names = (self.device + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
        name = next(name for name in names if known.get(name, here) == here)
        disk.write_whole(file, json.dumps(known | {name: here}, indent=1) + "\n")
        return name

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> None:
        for whole in (False, True):
            for step in self.chosen:
                if self.stopped or self.is_done(step.label) or step.label in self.failed_now:
                    continue
                if self.left() < (min(step.least, 5) if self.small else step.least):
                    continue
                if why := self.obstacle(step):
                    if not whole:
                        self.note(step.label, {"status": "waits", "why": why})
                        print(f"{step.label}: waits, {why}", flush=True)
                    continue
                self.run_step(step, self.left() if whole else min(step.seconds, self.left()))
                self.pack()
        self.pack()

    def is_done(self, label: str) -> bool:
        return self.state.get(label, {}).get("status") == "done"

    def obstacle(self, step: Step) -> str:
        """Why a step cannot begin, or nothing."""
        if step.file and not (self.tree / step.file).exists():
            return f"{step.file} does not exist"
        if waits := [label for label in step.after if not self.is_done(label)]:
            return f"after {', '.join(waits)}"
        for name in step.needs:
            archive, target, _ = DATA[name]
            if not (self.tree / WORK / target).exists() and self.archive(name) is None:
                return f"no {archive} in {self.data.name or self.data}"
        return ""

    def archive(self, name: str) -> Path | None:
        return next(iter(sorted(self.data.rglob(DATA[name][0]))), None) if self.data.is_dir() else None

    def prepare(self, name: str, log: Path) -> tuple[int, bool]:
        """Makes the data of a name, if they are not there; as `execute`."""
        _, target, command = DATA[name]
        target = self.tree / WORK / target
        if target.exists():
            return 0, False
        partial = target.with_name(f"partial-{target.name}")
        words = {"archive": shlex.quote(str(self.archive(name))), "target": shlex.quote(str(partial))}
        code, asked = self.execute(command.format(**words), log, {}, limit=self.left(), grace=1)
        if not code:
            os.replace(partial, target)
        return code, asked

    def run_step(self, step: Step, limit: float) -> None:
        """Runs a step for as long as it may, and writes down what became of it."""
        log = self.tree / WORK / "logs" / f"{step.label}.log"
        print(f"{step.label}: {step.what}, for {limit:.0f} s at most", flush=True)
        start = time.monotonic()
        code, asked = 0, False
        for name in step.needs:
            if not code:
                code, asked = self.prepare(name, log)
        if not code:
            limit -= time.monotonic() - start
            code, asked = self.execute(self.command(step), log, step.environment, limit=limit, grace=step.grace)
        status = "unfinished" if asked and code else "failed" if code else "done"
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        session = {"status": status, "seconds": round(time.monotonic() - start, 1), "code": code, "device": self.device}
        session |= {"commit": self.commit, "versions": self.versions, "small": self.small}
        session["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if status == "failed":
            session["why"] = " ".join(said[-1:])[-300:]
            self.failed_now.add(step.label)
        print("\n".join(f"  {line[-200:]}" for line in said[-8 if status == "failed" else -2 :]))
        print(f"{step.label}: {status} with status {code} after {session['seconds']:.0f} s", flush=True)
        if step.run:
            self.keep_run(step)
        self.note(step.label, {"status": status}, session)

    def command(self, step: Step) -> str:
        cores = len(os.sched_getaffinity(0))
        words = {
            "device": self.name,
            "measured": self.measured(),
            "cores": max(1, cores - 2),
            "jobs": 2 if self.small else max(1, min(7, cores // 2)),
        }
        words |= {name: f"{WORK}/{target}{WITHIN.get(name, '')}" for name, (_, target, _) in DATA.items()}
        return (step.small if self.small else step.command).format(**words)

    def measured(self) -> str:
        """The file with what `compare.py` measured on this machine, else the newest of another."""
        folder = self.tree / "experiments/speed/results"
        here = folder / f"gpu_{self.name}.json"
        others = sorted(folder.glob("gpu_*.json"), key=lambda path: path.stat().st_mtime)
        return str((here if here.exists() or not others else others[-1]).relative_to(self.tree))

    def execute(self, command: str, log: Path, environment: dict, *, limit: float, grace: float) -> tuple[int, bool]:
        """The status of a command, and whether it was asked to end; nothing that it started is left."""
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        mark = uuid.uuid4().hex
        path = os.pathsep.join([str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        # The first program of a process would else take most of the GPU's memory, and several share it.
        given = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            "CNNFAMILY_COMMIT": self.commit,
        }
        given |= {"PYTHONPATH": path} | environment | {MARK: mark}
        with log.open("a") as file:
            print(f"$ {command}", file=file, flush=True)
            child = subprocess.Popen(
                words, cwd=self.tree, env=given, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            deadline, asked = time.monotonic() + limit, False
            while child.poll() is None:
                if not asked and (self.stopped or time.monotonic() > deadline):
                    asked, deadline = True, time.monotonic() + grace
                    child.terminate()
                elif asked and time.monotonic() > deadline:
                    child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)
            end_marked(mark)
        return child.returncode, asked

    def keep_run(self, step: Step) -> None:
        target = self.tree / RESULTS / step.label
        for name in ("metrics.jsonl", "manifest.json", "config.json", "curves.png"):
            if (source := self.tree / step.run / name).exists():
                target.mkdir(exist_ok=True)
                shutil.copy(source, target / name)

    def note(self, label: str, found: dict, session: dict | None = None) -> None:
        before = self.state.get(label, {})
        if found["status"] == "waits" and before.get("sessions"):
            return  # how far it is tells more
        sessions = before.get("sessions", []) + ([session] if session else [])
        self.state[label] = found | {"sessions": sessions}
        disk.write_whole(self.state_file, json.dumps(self.state, indent=1) + "\n")

    # What comes back

    def pack(self) -> None:
        """Results as one archive, unfinished runs as one in parts, and beside them how far the steps are."""
        files = [path for pattern in self.result_patterns() for path in sorted(self.tree.glob(pattern)) if path.is_file()]
        files, too_many = fitting(((path.stat().st_size + 1024, path, [path]) for path in dict.fromkeys(files)), PART_BYTES)
        with disk.replacing(self.out / "results.tar.gz") as partial, tarfile.open(partial, "w:gz", compresslevel=6) as archive:
            for path in files:
                archive.add(path, path.relative_to(self.tree))
            for log in sorted((self.tree / WORK / "logs").glob("*.log")):
                add_end(archive, log, f"{WORK}/logs/{log.name}")
        runs, too_large = fitting(unfinished_runs(self.tree / WORK), PARTS * PART_BYTES - 2**20)
        whole = self.tree / WORK / "unfinished.tar"
        with tarfile.open(whole, "w") as archive:
            for path in runs:
                archive.add(path, path.relative_to(self.tree))
        parts = cut(whole, self.out, PART_BYTES) if runs else []
        for path in self.out.glob("unfinished.tar.*"):
            if path not in parts:
                path.unlink()
        whole.unlink()
        left_out = sorted({str(path.relative_to(self.tree)) for path in too_many + too_large})
        text = json.dumps({"left_out": left_out, "steps": self.state}, indent=1) + "\n"
        disk.write_whole(self.out / "steps.json", text)

    def result_patterns(self) -> list[str]:
        return [f"{RESULTS}/**/*", *dict.fromkeys(pattern for step in self.steps for pattern in step.results)]


def fitting(groups: Iterable[tuple[int, Path, list[Path]]], limit: int) -> tuple[list[Path], list[Path]]:
    """Of groups of files, each with bytes and a name: the files of those that fit, small ones first, and the other names."""
    taken, left, total = [], [], 0
    for size, name, files in sorted(groups):
        total += size
        if total <= limit:
            taken += files
        else:
            left.append(name)
    return taken, left


def unfinished_runs(folder: Path) -> Iterable[tuple[int, Path, list[Path]]]:
    """Each run that can go on: what stands beside its checkpoints, and of those the newest whole one."""
    for manifest in folder.rglob("manifest.json"):
        run = manifest.parent
        steps = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal()]
        whole = [step for step in steps if (run / "checkpoints" / str(step) / disk.DIGESTS).exists()]
        if not whole or max(whole) >= json.loads(manifest.read_text())["total_steps"]:
            continue
        files = [path for path in run.iterdir() if path.is_file() and path.suffix in (".json", ".jsonl")]
        files += [path for path in (run / "checkpoints" / str(max(whole))).rglob("*") if path.is_file()]
        yield sum(path.stat().st_size + 1536 for path in files), run, files  # with what an archive adds to each


def add_end(archive: tarfile.TarFile, log: Path, name: str) -> None:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        entry = archive.gettarinfo(log, name)
        entry.size = log.stat().st_size - file.tell()
        archive.addfile(entry, file)


def cut(whole: Path, out: Path, size: int) -> list[Path]:
    parts = []
    with whole.open("rb") as file:
        while piece := file.read(size):
            parts.append(out / f"unfinished.tar.{len(parts)}")
            parts[-1].write_bytes(piece)
    return parts


def unpack(source: Path, tree: Path) -> None:
    """What a session before left, in its place."""
    if not (source / "results.tar.gz").exists():
        raise SystemExit(f"--resume={source}: no results.tar.gz there; expected the files that a session left in --out")
    with tarfile.open(source / "results.tar.gz") as archive:
        archive.extractall(tree, filter="data")
    if parts := sorted(source.glob("unfinished.tar.*"), key=lambda path: int(path.suffix[1:])):
        with tempfile.TemporaryFile() as whole:
            for part in parts:
                whole.write(part.read_bytes())
            whole.seek(0)
            with tarfile.open(fileobj=whole) as archive:
                archive.extractall(tree, filter="data")


# The machine


def end_marked(mark: str) -> None:
    """Kills what a step has left behind: its own processes' processes, some of them in sessions of their own."""
    for _ in range(50):
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.1)


def gpu() -> tuple[str, str]:
    """The GPU in one word, such as h100, and its driver; "cpu" where there is none. JAX would take memory to tell."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout.strip():
            name, _, driver = listed.stdout.strip().splitlines()[0].partition(",")
            return re.sub(r"\W+", "-", name.lower().replace("nvidia ", "").split()[0]), driver.strip()
    return "cpu", ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def missing() -> list[str]:
    """Requirements of pyproject.toml that this Python does not meet, those of the tests in brackets."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {text: text for text in project["dependencies"]}
    wanted |= {text: f"[{text}]" for extra in ("test", "tfds") for text in extras[extra] if not text.startswith("cnnfamily")}
    found = []
    for text, shown in wanted.items():
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(shown)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{shown}, found {version}")
    return found


def commit_of(tree: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def copy_repository(target: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", "*.egg-info")
        shutil.copytree(REPOSITORY, target, ignore=ignored, dirs_exist_ok=True)
        return
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)


def make_small_data(folder: Path) -> None:
    """Archives as the real ones, of a few random images."""
    import io

    import numpy as np
    from PIL import Image

    def jpeg(side: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()

    rng, arrays = np.random.default_rng(0), {"header": np.zeros(0, np.uint8), "class_names": np.array(list("abcdefghij"))}
    for split in ("train", "test"):
        bodies = [jpeg(32) for _ in range(256)]
        arrays[f"{split}_bodies"] = np.frombuffer(b"".join(bodies), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, bodies)])
        arrays[f"{split}_labels"] = np.arange(256) % 10
    folder.mkdir(parents=True)
    np.savez(folder / DATA["cifar"][0], **arrays)
    with tarfile.open(folder / DATA["flowers"][0], "w") as archive:
        for i in range(80):
            entry, image = tarfile.TarInfo(f"flowers/{'vwxyz'[i % 5]}/{i}.jpg"), jpeg(128)
            entry.size = len(image)
            archive.addfile(entry, io.BytesIO(image))


def listing(steps: list[Step], state: dict) -> str:
    lines = ["| step | item | what | first share, s | state |", "|---|---|---|---|---|"]
    for step in steps:
        found = state.get(step.label, {})
        devices = sorted({session["device"] for session in found.get("sessions", [])})
        how = f"{found['status']}{' on ' + ', '.join(devices) if devices else ''}" if found else "not measured"
        how += f": {found['why']}" if "why" in found else ""
        lines.append(f"| {step.label} | {step.item} | {step.what} | {step.seconds} | {how} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=REPOSITORY / WORK / "out")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    start = time.monotonic()
    labels = [label for label in arguments.only.split(",") if label]
    if unknown := set(labels) - {step.label for step in STEPS}:
        known = ", ".join(step.label for step in STEPS)
        raise SystemExit(f"--only={arguments.only}: no step {', '.join(sorted(unknown))}; known: {known}")
    if arguments.list:
        file = REPOSITORY / RESULTS / "steps.json"
        print(listing(STEPS, json.loads(file.read_text()) if file.exists() else {}))
        return
    with contextlib.ExitStack() as stack:
        tree, data, out = REPOSITORY, arguments.data.resolve(), arguments.out.resolve()
        commit = arguments.commit or commit_of(REPOSITORY)
        if arguments.small:
            tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnfamily_gpu_")))
            copy_repository(tree)
            shutil.rmtree(tree / RESULTS, ignore_errors=True)  # what is done at full size is not done small
            data = tree / WORK / "data"
            make_small_data(data)
        if arguments.resume:
            unpack(arguments.resume, tree)
        options = {"data": data, "only": labels, "small": arguments.small, "commit": commit}
        if arguments.minutes:
            options["seconds"] = 60 * arguments.minutes - RESERVE - (time.monotonic() - start)
        driver = Driver(STEPS, tree, out, **options)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda signum, frame: setattr(driver, "stopped", signum))
        print(f"{driver.device}, commit {driver.commit}, " + ", ".join(f"{k} {v}" for k, v in driver.versions.items()))
        if lacks := missing():
            print(f"not met here: {'; '.join(lacks)}")
        driver.run()
        print(listing(driver.chosen, driver.state))
        for path in sorted(out.iterdir()):
            print(f"{path.name}: {path.stat().st_size:,} bytes")
        if driver.stopped:
            raise SystemExit(128 + driver.stopped)


if __name__ == "__main__":
    main()
