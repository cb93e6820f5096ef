"""Bad input at large: random command lines, overrides, config files, images and damaged run directories, from a seed.

    python tests/fuzz.py --cases=3000 --seed=0

Every case ends with status 0 or 2 (3 where training itself becomes non-finite); with one line on standard error unless it is 0;
never with a traceback, never after the time limit, and with 0 only if what was asked for was done. Each case runs in this
process, so that thousands take minutes. A case is a function of (seed, number): `--case=N` runs one and shows its output.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cnnfamily import checkpoint, errors, evaluate, predict, runlog, summary, train
from cnnfamily import config as configs

LENET = "configs/lenet5_digits.py:smoke"
# One step and one evaluation on little data: what is valid after all costs a second. Overrides come after these.
BRIEF = {
    "total_epochs": 0.0,
    "total_steps": 1,
    "evaluate.every_epochs": 1.0,
    "optim.warmup_epochs": 0.0,
    "optim.warmup_steps": 0,
}
VALUES = (
    *("", " ", "None", "nan", "inf", "-inf", "-1", "0", "1", "2", "7", "0.5", "1e-3", "1e999", "-0.0", "True", "False", "true"),
    *("2147483648", "9223372036854775808", "1" + "0" * 30, "1" * 5000, "1_0", "0x10", "1j", "()", "(1,)", "[1, 2]", "((),)"),
    *(
        "{}",
        "{[]}",
        "'x'",
        "x",
        "sgd",
        "adamw",
        "lenet5",
        "resnet20_cifar",
        "digits",
        "fake",
        "fake:n=8",
        "fake:n=-1",
        "fake:n=x",
    ),
    *(
        "fake:n=99999999999999",
        "npz:",
        "npz:/",
        "npz:nothing.npz",
        "idx:",
        "idx:.",
        "tfds:",
        "tfds:mnist",
        "folder:",
        ":",
        "=",
        "==",
    ),
    *(
        "bfloat16",
        "float64",
        "int8",
        "relu",
        "tanh",
        "mean",
        "a" * 10000,
        "(" * 500,
        "[" * 5000,
        "\\",
        "\n",
        "\x1b[31m",
        "é",
        "∞",
    ),
    *("{0}", "%s", "__import__('os')", "lambda: 0", "1 if True else 2", "..", "/", "~", "$HOME", "*", "--config", "-h"),
)
JUNK = (
    "x",
    "-x",
    "--x",
    "--x=1",
    "--config",
    "--config=",
    "--config.",
    "--config.=",
    "--config.seed",
    "--workdir",
    "--debug=",
    "",
)


@dataclasses.dataclass
class Case:
    """A command with its arguments, and what must be true if it ends with status 0."""

    kind: str
    main: Callable[[list[str]], None]
    arguments: list[str]
    done: Callable[[str], bool]  # of standard output


@dataclasses.dataclass
class Setting:
    """What the cases of one session share: a folder, a finished run and its true figures by step."""

    folder: Path
    finished: Path
    figures: dict[int, dict]
    images: list[Path]


def prepare(folder: Path) -> Setting:
    """Trains the run that cases copy and damage, and draws the images that they predict."""
    from PIL import Image

    config = configs.load_config(LENET, {"ema.decay": 0.9})
    finished = folder / "finished"
    train.run_training(config, finished, quiet=True)
    known = {}
    for row in runlog.read_metrics(finished):
        if "test_loss" in row:
            known[row["step"]] = {name: value for name, value in row.items() if "test_" in name}
    rng = random.Random(0)
    (folder / "images").mkdir()
    whole, cut, text, empty = (folder / "images" / name for name in ("whole.png", "cut.png", "text.png", "empty.jpg"))
    Image.frombytes("L", (20, 30), rng.randbytes(600)).save(whole)
    cut.write_bytes(whole.read_bytes()[:200])
    text.write_text("no image")
    empty.touch()
    return Setting(folder, finished, known, [whole, cut, text, empty, folder / "images", folder / "none.png", folder])


def overrides(rng: random.Random, count: int) -> list[str]:
    """Some overrides: a key that exists or nearly, and any value."""
    keys = sorted(configs.flatten(configs.load_config(LENET)))
    arguments = []
    for _ in range(count):
        key, value = rng.choice(keys), rng.choice(VALUES)
        if rng.random() < 0.3:
            place = rng.randrange(len(key) + 1)
            key = rng.choice((key[:place] + rng.choice("x.=_ é") + key[place:], key[:place], key.upper(), "." + key, key + "."))
        elif key in ("total_steps", "total_epochs") and takes_long(value):
            value = "-" + value
        arguments.append(f"--config.{key}={value}")
    return arguments


def takes_long(value: str) -> bool:
    """Whether a run of as many steps or epochs would."""
    try:
        return float(value) > 20
    except ValueError:
        return False


def brief() -> list[str]:
    return [f"--config.{key}={value}" for key, value in BRIEF.items()]


def has_trained(workdir: Path) -> Callable[[str], bool]:
    def done(output: str) -> bool:
        steps = runlog.read_manifest(workdir)["total_steps"]
        return checkpoint.newest_step(workdir / "checkpoints") == steps and any(
            row["step"] == steps and "test_loss" in row for row in runlog.read_metrics(workdir)
        )

    return done


def train_with_overrides(rng: random.Random, setting: Setting, folder: Path) -> Case:
    arguments = [f"--config={LENET}", *brief(), *overrides(rng, rng.choice((1, 1, 2, 3)))]
    return Case("overrides", train.main, [*arguments, f"--workdir={folder / 'run'}"], has_trained(folder / "run"))


def train_with_junk(rng: random.Random, setting: Setting, folder: Path) -> Case:
    arguments = [f"--config={LENET}", *brief(), f"--workdir={folder / 'run'}"]
    for _ in range(rng.choice((1, 2))):
        change = rng.random()
        if change < 0.4:
            arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(JUNK))
        elif change < 0.6:
            del arguments[rng.randrange(len(arguments))]
        elif change < 0.8:
            arguments[0] = f"--config={rng.choice(VALUES)}"
        else:
            arguments[0] = rng.choice(("--config=configs/lenet5_digits.py:", "--config=configs/lenet5_digits.py")) + rng.choice(
                VALUES
            )
    if not any(argument.startswith("--workdir=") for argument in arguments) or "total_steps" not in " ".join(arguments):
        arguments = arguments[:1] + [rng.choice(JUNK[:-1])]  # would train where or for as long as it likes
    return Case("command line", train.main, arguments, has_trained(folder / "run"))


def train_with_a_mutated_config(rng: random.Random, setting: Setting, folder: Path) -> Case:
    lines = (configs.REPOSITORY / "configs" / "lenet5_digits.py").read_text().splitlines()
    for _ in range(rng.choice((1, 2, 4, 8))):
        i = rng.randrange(len(lines))
        line, place = lines[i], rng.randrange(len(lines[i]) + 1)
        lines[i] = rng.choice(
            (
                "",
                line + "\n" + line,
                line[:place] + rng.choice("()[]{}:=,.'\"#\\x0 \t") + line[place:],
                line[:place] + line[place + 1 :],
                line[:place],
                "    " + line,
                line.replace("=", "==", 1),
                line.replace("config", rng.choice(("cfg", "None", "default", "1"))),
            )
        )
    file = folder / "mutated.py"
    file.write_text("\n".join(lines))
    arguments = [f"--config={file}:smoke", *brief(), f"--workdir={folder / 'run'}"]
    return Case("config file", train.main, arguments, has_trained(folder / "run"))


def with_a_damaged_run(rng: random.Random, setting: Setting, folder: Path) -> Case:
    workdir = folder / "run"
    shutil.copytree(setting.finished, workdir)
    files = sorted(path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock")
    for file in rng.sample(files, rng.choice((1, 1, 2, 3))):
        damage(rng, file)
    if rng.random() < 0.1:
        (workdir / "checkpoints" / rng.choice(("9", "999", "x", "4.orbax-checkpoint-tmp"))).mkdir(exist_ok=True)
    command = rng.choice(("train", "train", "evaluate", "predict"))
    if command == "train":
        arguments = [f"--config={LENET}", "--config.ema.decay=0.9", f"--workdir={workdir}"]
        return Case("damaged run", train.main, arguments, has_trained(workdir))
    which = f"--checkpoint={rng.choice(('newest', 'best'))}"
    if command == "predict":
        return Case("damaged run", predict.main, [f"--workdir={workdir}", str(setting.images[0])], bool)
    return Case("damaged run", evaluate.main, [f"--workdir={workdir}", which], lambda output: is_true(output, setting))


def is_true(output: str, setting: Setting) -> bool:
    """Whether an evaluation's figures are those of a step of the finished run: damage must not change them unseen."""
    found = json.loads(output.splitlines()[-1])
    return {name: value for name, value in found.items() if name != "step"} == setting.figures[found["step"]]


def damage(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    how = rng.choice(("flip", "flip", "cut", "empty", "delete", "folder", "append", "noise"))
    if how == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif how == "append":
        data += rng.choice((b"\x00", b"{}", b"\n\n", b"[]", b"null"))
    elif how == "noise":
        data[:] = rng.choice((b"null", b"[]", b"{}", b"3", b'"x"', rng.randbytes(50)))
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "delete":
        file.write_bytes(b"" if how == "empty" else data)


def another_command(rng: random.Random, setting: Setting, folder: Path) -> Case:
    name = rng.choice(("summary", "predict", "evaluate"))
    workdir = f"--workdir={rng.choice((setting.finished, setting.folder, folder / 'none', '', setting.images[0]))}"
    extra = rng.sample(JUNK + VALUES, rng.choice((0, 0, 1)))
    if name == "summary":
        models = rng.sample(("lenet5", "lenet*", "lenet5_1998", "lenet", "resnt*", *VALUES), rng.choice((1, 1, 2)))
        options = [option for option in ("--layers", "--json") if rng.random() < 0.5]
        return Case(name, summary.main, [*models, *options], bool)
    if name == "predict":
        images = [str(image) for image in rng.sample(setting.images, rng.choice((0, 1, 1, 2)))]
        return Case(name, predict.main, [workdir, *images, *extra], bool)
    return Case(name, evaluate.main, [workdir, *extra], lambda output: is_true(output, setting))


MAKERS = (
    (train_with_overrides, 50),
    (train_with_junk, 15),
    (train_with_a_mutated_config, 10),
    (with_a_damaged_run, 15),
    (another_command, 10),
)


def make(seed: int, number: int, setting: Setting, folder: Path) -> Case:
    """Case `number` of a seed, with its files in `folder`."""
    rng = random.Random(f"{seed}/{number}")
    (maker,) = rng.choices([maker for maker, _ in MAKERS], [weight for _, weight in MAKERS])
    return maker(rng, setting, folder)


class TooLong(BaseException):
    """Not to be caught by what is tested."""


def run(case: Case, limit: int = 120) -> tuple[int | str, str, str]:
    """The exit status of a case (or what escaped), its standard output and its standard error."""

    def give_up(signum, frame):
        raise TooLong

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit)
    sys.argv = [case.kind, *case.arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            errors.run_command(case.main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except TooLong:
        status = "too long"
    except BaseException:
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def verdict(case: Case, status: int | str, out: str, err: str) -> str:
    """What is wrong with how a case ended; empty if nothing is."""
    if status not in (0, 2, 3):
        return f"status {status}"
    if "Traceback" in err:
        return f"a traceback: {err}"
    if status == 0:
        if "-h" in case.arguments or "--help" in case.arguments:
            return "" if "usage:" in out else "no help"
        try:
            return "" if case.done(out) else "status 0, but not done"
        except Exception:
            return f"status 0, but {traceback.format_exc()}"
    lines = err.rstrip("\n").splitlines()
    if not lines or ("Error: " not in lines[-1] and "NonFiniteLoss: " not in lines[-1]):
        return f"no line that says why: {err!r}"
    if len(lines) > 1 and not all(line.startswith("warning: ") for line in lines[:-1]):
        return f"{len(lines)} lines: {err!r}"
    return f"a line of {len(lines[-1])} characters" if len(lines[-1]) > 1500 else ""


def fuzz(seed: int, numbers: range, folder: Path, *, tell: bool = False) -> tuple[collections.Counter, list[str]]:
    """Runs cases; how they ended, by (kind, status), and what was wrong."""
    setting = prepare(folder)
    ends, wrong = collections.Counter(), []
    for number in numbers:
        place = folder / "case"
        place.mkdir()
        case = make(seed, number, setting, place)
        start = time.monotonic()
        status, out, err = run(case)
        fault = verdict(case, status, out, err)
        ends[case.kind, status if isinstance(status, int) else "fault"] += 1
        if fault:
            wrong.append(f"case {number} of seed {seed}, {case.kind} {[a[:200] for a in case.arguments]}: {fault}")
        if tell and (fault or len(numbers) == 1):
            print(wrong[-1] if fault else f"{case.arguments}\nstatus {status}\n{out}{err}", flush=True)
        if tell and time.monotonic() - start > 20:
            print(f"case {number} took {time.monotonic() - start:.0f} s: {case.arguments}", flush=True)
        shutil.rmtree(place)
    return ends, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    chosen = range(options.cases) if options.case is None else range(options.case, options.case + 1)
    with tempfile.TemporaryDirectory() as temporary:
        began = time.monotonic()
        ended, faults = fuzz(options.seed, chosen, Path(temporary), tell=True)
    for (kind, status), count in sorted(ended.items(), key=str):
        print(f"{kind:>14}  status {status}: {count}")
    print(f"seed {options.seed}: {len(chosen)} cases, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    sys.exit(bool(faults))
