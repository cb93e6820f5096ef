"""Images per second of our networks, of the same in plain Flax, and of torch's, measured in turn.

`python experiments/speed/compare.py [--models=NAME,...] [--out=FILE.json] ...` on a machine with nothing else running: on a CPU
torch's threads wait for each other, and one that is held up holds up all. The same command again goes on where it stopped.

What is measured: batches of random images, batch norm over the whole batch, cross entropy, SGD with momentum 0.9.
  ours     the product's `step.train_step` under `parallel.map_over_devices`, state donated, huge pages as its commands have
  onednn   that with `config.onednn`, on a CPU and if asked for (`--sides`)
  plain    the same networks in plain Flax and the usual jitted step (`plain.py`)
  eager    torchvision's network, else timm's; channels_last, autocast for bfloat16, optimizer `torch.optim.SGD`
  compile  the same through `torch.compile`
The first three take uint8 images and normalise them in the step, torch's are normalised beforehand. Inference (`infer`) takes
normalised images on all sides, in the dtype, and torch's network is wholly in it; `infer_folded` has the batch norms folded
into the convolutions. There, and for networks without batch norm, ours is what `optimize_for_inference` gives. Dropout,
stochastic depth and auxiliary classifiers are on in training. All sides use all cores. On a GPU float32 is TensorFloat-32 for
products on all sides, and cuDNN benchmarks its algorithms. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command gives
every side huge pages.

The sides of one network, dtype and mode are processes that run side by side and wait; each in turn is asked for a burst of
steps, every burst awaited, so that a machine whose speed drifts slows all alike.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import platform
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from side import JAX, OURS, TORCH

from cnnfamily import disk

HERE = Path(__file__).resolve().parent
SIDES, MODES = (*JAX, *TORCH), ("train", "infer", "infer_folded")
MODELS = ["lenet5", "alexnet", "vgg16", "resnet50", "googlenet", "mobilenet_v1", "mobilenet_v2"]
MODELS += ["mobilenet_v3_large", "efficientnet_b0"]
KEY = ("model", "dtype", "mode", "batch", "resolution")


class Gone(Exception):
    """A side that answers no more; `cell` says why."""

    def __init__(self, cell: dict):
        super().__init__(str(cell))
        self.cell = cell


class Worker:
    """A process of `side.py`, and the pipe to it."""

    def __init__(self, job: dict, python: str):
        self.answers, self.complaints = queue.Queue(), collections.deque(maxlen=1)
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | job.get("environment", {})
        self.process = subprocess.Popen(
            [python, str(HERE / "side.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # torch.compile has processes of its own, which end with it
            env=environment,
        )
        read_log = functools.partial(self.complaints.extend, self.process.stderr)
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read, read_log)]
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def answer(self, timeout: float) -> dict:
        try:
            answer = self.answers.get(timeout=max(timeout, 0.01))
        except queue.Empty:
            raise Gone({"failed": "no answer in time"}) from None
        if answer is None:
            code = self.process.wait()
            self.readers[1].join(1)
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            last = without_folders("".join(self.complaints).strip())[:160]
            raise Gone({"failed": f"ended with {how}{', out of memory?' if code == -signal.SIGKILL else ''}; {last}"})
        if not {"failed", "not_measured"}.isdisjoint(answer):
            raise Gone(answer)
        return answer

    def burst(self, steps: int, timeout: float, **asked) -> dict:
        with contextlib.suppress(BrokenPipeError):  # the answer then says how it ended
            print(json.dumps({"steps": steps, **asked}), file=self.process.stdin, flush=True)
        return self.answer(timeout)

    def stop(self) -> None:
        """Ends the process and its own; again it does nothing."""
        if self.process.stdin.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader, pipe in zip(self.readers, (self.process.stdout, self.process.stderr), strict=True):
            reader.join()
            pipe.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def steps_for(worker: Worker, seconds: float, timeout: float) -> int:
    """How many steps a burst of about so many seconds has. Warms up: its last burst but one is a tenth as long at least."""
    steps = 1
    while True:
        took = worker.burst(steps, timeout)["seconds"]
        if took >= seconds / 3:
            return max(1, round(steps * seconds / took))
        steps = min(10 * steps, max(steps + 1, round(steps * seconds / took)))


def measure(jobs: dict, pythons: dict, arguments: argparse.Namespace) -> dict:
    """A cell for each job, under the same name: images/s of each round, or why there are none."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, job in jobs.items():
            workers[side] = Worker(job, pythons[side])
            stack.callback(workers[side].stop)
        cells = {side: {"images_per_second": []} for side in jobs}
        deadline = time.monotonic() + arguments.start_timeout

        def in_turn() -> Iterator[tuple[object, Worker, dict]]:
            for side in [side for side in jobs if side in workers]:
                yield side, workers[side], cells[side]

        def give_up(side: object, gone: Gone) -> None:
            workers.pop(side).stop()
            cells[side] = gone.cell

        for side, worker, cell in in_turn():
            try:
                answer = worker.answer(deadline - time.monotonic())
                cell["start_seconds"] = answer["ready"]
                cell |= {"temporary_bytes": answer["temporary_bytes"]} if "temporary_bytes" in answer else {}
            except Gone as gone:
                late = {"failed": f"not ready in {arguments.start_timeout} s"}
                give_up(side, Gone(late) if gone.cell == {"failed": "no answer in time"} else gone)
        for side, worker, cell in in_turn():
            try:
                cell["steps"] = steps_for(worker, arguments.seconds, arguments.start_timeout)
            except Gone as gone:
                give_up(side, gone)
        for _ in range(arguments.rounds):
            for side, worker, cell in in_turn():
                try:
                    answer = worker.burst(cell["steps"], arguments.start_timeout)
                except Gone as gone:
                    give_up(side, gone)
                    continue
                rate = cell["steps"] * jobs[side]["batch"] / answer["seconds"]
                cell["images_per_second"].append(round(rate, 3))
                cell["loss"] = answer["loss"]
                cell |= {"peak_bytes": answer["peak_bytes"]} if "peak_bytes" in answer else {}
    return cells


# Results


def describe(sides: list[str], pythons: dict[str, str]) -> dict:
    """Machine and versions; stops where JAX and torch would run on different devices."""
    found, versions = {}, {}
    for side in [next(s for s in sides if s in kind) for kind in (JAX, TORCH) if set(kind) & set(sides)]:
        worker = Worker({"side": side, "describe": True}, pythons[side])
        try:
            found[side] = worker.answer(300)
        except Gone as gone:
            raise SystemExit(f"{side}: {gone.cell}") from None
        finally:
            worker.stop()
        versions |= found[side]["versions"]
    devices = {side: one["device"] for side, one in found.items()}
    if len(set(devices.values())) > 1:
        raise SystemExit(f"the sides would run on different devices: {devices}")
    first = next(iter(found.values()))
    machine = {"device": first["device"], "processor": processor(), "cores": first["cores"], "system": platform.system()}
    return {"machine": machine, "versions": versions}


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load(path: Path, where: dict) -> dict:
    """What was measured before, on this machine with these versions (else it stops), or the beginning of a new file."""
    study = json.loads(path.read_text()) if path.exists() else {**where, "commands": [], "rows": []}
    for part in ("machine", "versions"):
        differ = {k: (study[part][k], v) for k, v in where[part].items() if study[part].get(k, v) != v}
        if differ:
            raise SystemExit(f"{path.name} is of another machine or other versions, {differ}: take another --out")
        study[part] |= where[part]
    return study


def sides_to_measure(rows: list[dict], job: dict, sides: list[str], rounds: int) -> list[str]:
    """None if a row has all these sides; else these and what the row has, for a row is measured in one go."""
    for row in rows:
        if all(row[key] == job[key] for key in KEY) and row["rounds"] >= rounds:
            return [] if set(sides) <= set(row["sides"]) else [side for side in SIDES if side in {*sides, *row["sides"]}]
    return [side for side in SIDES if side in sides]


def commit(folder: Path = HERE) -> str:
    """HEAD, and "-dirty" if a tracked file differs from it, but for the results, which a run before has written."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)

    with contextlib.suppress(OSError):  # no git
        if found := git("rev-parse", "--short=12", "HEAD").stdout.strip():
            differs = git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results").returncode
            return f"{found}-dirty" if differs else found
    return os.environ.get("CNNFAMILY_COMMIT", "unknown")  # of a copy without its history, who copied it knows


def command_line(arguments: list[str]) -> str:
    return shlex.join(["python", "experiments/speed/compare.py", *(without_folders(one) for one in arguments)])


def without_folders(text: str) -> str:
    """Results go into the repository, where the folders of a machine have no place; a path within it stays."""
    return re.sub(r"(?<![\w.+-])/(?:[\w.+-]+/)+", "", text)


# The table


def rate(cell: dict | None) -> str:
    """A cell of the table."""
    if not cell or "not_measured" in cell:
        return "not measured" + (f": {cell['not_measured']}" if cell else "")
    if "failed" in cell:
        return f"failed: {cell['failed']}".replace("|", "/")
    values, digits = cell["images_per_second"], 1 if statistics.median(cell["images_per_second"]) < 100 else 0
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    memory = f", {cell['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in cell else ""
    return f"{middle} ({low} to {high}){memory}" + (" loss not finite" if cell.get("loss") == "not finite" else "")


def best(rows: dict[str, dict], sides: tuple[str, ...], dtypes: list[str]) -> float:
    """The largest median among these sides and dtypes, 0 if none has any."""
    cells = [rows[dtype]["sides"].get(side, {}) for dtype in dtypes if dtype in rows for side in sides]
    return max((statistics.median(cell["images_per_second"]) for cell in cells if cell.get("images_per_second")), default=0)


def ratio(above: float, below: float) -> str:
    return f"{above / below:.2f}" if above and below else ""


def peak_ratio(row: dict | None) -> str:
    """Our peak of memory over the smaller one of torch's."""
    peaks = {side: cell["peak_bytes"] for side, cell in (row or {}).get("sides", {}).items() if "peak_bytes" in cell}
    return ratio(peaks.get("ours", 0), min((peaks[side] for side in TORCH if side in peaks), default=0))


def in_pairs(row: dict | None) -> str:
    """ours / plain, round by round."""
    ours, plain = (((row or {}).get("sides", {}).get(side) or {}).get("images_per_second", []) for side in ("ours", "plain"))
    ratios = [one / other for one, other in zip(ours, plain, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def table(study: dict) -> str:
    """Markdown: what ran where, and a row for each network and mode."""
    rows, groups = study["rows"], {}
    for row in rows:
        groups.setdefault((row["model"], row["batch"], row["resolution"], row["mode"]), {})[row["dtype"]] = row
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    sides = [side for side in SIDES if any(side in row["sides"] for row in rows)]
    rounds = sorted({row["rounds"] for row in rows})
    columns = ["network", "batch x pixels", "mode", *(f"{side} {dtype}" for dtype in dtypes for side in sides)]
    columns += ["ours / torch float32", "ours / torch", *(f"ours / plain, {dtype}" for dtype in dtypes)]
    counted = any("peak_bytes" in cell for row in rows for cell in row["sides"].values())
    columns += [f"peak memory, ours / torch, {dtype}" for dtype in dtypes if counted]
    lines = []
    for (model, batch, resolution, mode), of in groups.items():
        cells = [rate(of[dtype]["sides"].get(side) if dtype in of else None) for dtype in dtypes for side in sides]
        ours = best(of, OURS, dtypes)
        ratios = [ratio(ours, best(of, TORCH, ["float32"])), ratio(ours, best(of, TORCH, dtypes))]
        ratios += [in_pairs(of.get(dtype)) for dtype in dtypes] + [peak_ratio(of.get(dtype)) for dtype in dtypes if counted]
        lines.append([model, f"{batch} x {resolution}", mode, *cells, *ratios])
    machine, versions = study["machine"], ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    text = [
        *(f"`{command}`" for command in study["commands"]),
        f"\nDevice {machine['device']}; {machine['processor']}, {machine['cores']} cores, {machine['system']}; {versions}; "
        f"cnnfamily {', '.join(dict.fromkeys(row['commit'] for row in rows))}.",
        f"\nImages/s, medians (smallest to largest) of n = {' or '.join(map(str, rounds))} bursts, the sides in turn. "
        "ours / torch: ours in its fastest dtype, by oneDNN where that is faster, over the fastest of torch, eager or "
        "compiled, in float32 and in any dtype. "
        "ours / plain: by rounds."
        + " GiB: the allocator's peak since its process began, with what choosing algorithms needs."
        * counted,
        "",
        *(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]),
    ]
    return "\n".join(text) + "\n"


# The command


def jobs_of(arguments: argparse.Namespace, models: list[str]) -> Iterator[dict]:
    for model in models:
        own = {"lenet5": 32}.get(model) or arguments.resolution or {"efficientnet_b4": 380}.get(model, 224)
        for mode in arguments.modes:
            for dtype in arguments.dtypes:
                yield {"model": model, "dtype": dtype, "mode": mode, "batch": arguments.batch, "resolution": own}


def run(arguments: argparse.Namespace) -> None:
    pythons = {side: arguments.torch_python if side in TORCH else sys.executable for side in SIDES}
    where = describe(arguments.sides, pythons)
    gpu = where["machine"]["device"] != "cpu"
    path = arguments.out or HERE / "results" / f"{'gpu' if gpu else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    study = load(path, where)
    if (command := command_line(sys.argv[1:])) not in study["commands"]:
        study["commands"].append(command)
    jobs = list(jobs_of(arguments, arguments.models or MODELS + ["efficientnet_b4"] * gpu))
    wanted = [(job, sides_to_measure(study["rows"], job, arguments.sides, arguments.rounds)) for job in jobs]
    wanted = [(job, sides) for job, sides in wanted if sides]
    for first in range(0, len(wanted), arguments.together):
        group = wanted[first : first + arguments.together]
        of_all = {(i, side): job | {"side": side} for i, (job, sides) in enumerate(group) for side in sides}
        found = measure(of_all, {(i, side): pythons[side] for i, side in of_all}, arguments)
        for i, (job, sides) in enumerate(group):
            cells = {side: found[i, side] for side in sides}
            study["rows"] = [row for row in study["rows"] if any(row[key] != job[key] for key in KEY)]
            study["rows"].append(job | {"rounds": arguments.rounds, "commit": commit(), "sides": cells})
            shown = "; ".join(f"{side} {rate(cell)}" for side, cell in cells.items())
            print(f"{job['model']} {job['dtype']} {job['mode']}: {shown}", flush=True)
        disk.write_whole(path, json.dumps(study, indent=1) + "\n")
        disk.write_whole(path.with_suffix(".md"), table(study))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, known in (("sides", ("ours", "plain", *TORCH), SIDES), ("modes", MODES[:2], MODES), ("models", (), ())):
        parser.add_argument(f"--{name}", default=list(default), type=lambda text, known=known: listed(text, known))
    parser.add_argument("--dtypes", default=["float32", "bfloat16"], type=lambda text: listed(text, ("float32", "bfloat16")))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=0, help="0: 224, of efficientnet_b4 380; lenet5 always has 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=1, help="networks and dtypes that get ready at once; all have to fit")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a burst, about")
    parser.add_argument("--start-timeout", type=float, default=240.0, help="seconds to compile, and for a burst")
    parser.add_argument("--torch-python", default=sys.executable, help="where torch lies in an environment without JAX")
    parser.add_argument("--out", type=Path, help="default: results/cpu.json or gpu.json beside this file; a table beside it")
    run(parser.parse_args())


def listed(text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    if known and not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
    return names


if __name__ == "__main__":
    main()
