"""Sweeps: what is expanded and refused, what is run once and only once, and what is written down of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import QUICK

from cnnfamily import errors, sweep
from cnnfamily import study as study_file
from cnnfamily.errors import UsageError

ROWS = """
BASE = {"": "configs/lenet5_digits.py", "mnist": "configs/lenet5_mnist.py"}


def sweep():
    for width in (0.5, 1.0):
        for seed in range(2):
            yield {"model.width": width, "seed": seed}
"""


@pytest.fixture
def study(tmp_path):
    """Writes a sweep file, and loads it."""

    def make(text=ROWS, name=""):
        file = tmp_path / "study" / "sweep.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return study_file.load_study(f"{file}{name and ':'}{name}")

    return make


def test_rows_are_overrides_of_a_base_and_known_by_their_whole_config(study):
    first, other = study(), study(name="mnist")
    assert [row.overrides for row in first.rows] == [{"model.width": w, "seed": s} for w in (0.5, 1.0) for s in (0, 1)]
    assert first.rows[2].config.model.width == 1.0
    assert len({row.hash for row in (*first.rows, *other.rows)}) == 8
    again = study(ROWS.replace('"model.width": width, "seed": seed', '"seed": seed, "model.width": width'))
    assert [row.hash for row in again.rows] == [row.hash for row in first.rows]
    assert (first.name, first.results.name) == ("study", "results.jsonl")
    assert (other.name, other.results.name) == ("study-mnist", "results-mnist.jsonl")


def test_a_row_is_called_by_what_tells_it_from_the_others(study):
    ours = study(ROWS.replace('{"model.width"', '{"model.name": "lenet5", "model.width"'))
    assert [row.label for row in ours.rows[:2]] == ["model.width=0.5 seed=0", "model.width=0.5 seed=1"]
    assert len(ours.select("model.name=lenet5")) == 4, "what is the same in all can still be asked for"
    assert study("BASE = 'configs/lenet5_digits.py'\n\n\ndef sweep():\n    yield {}\n").rows[0].label == "base"


def test_overrides_for_all_rows(study, tmp_path):
    study()
    rows = study_file.load_study(str(tmp_path / "study/sweep.py"), {"total_epochs": "3", "seed": "9"}).rows
    assert [(row.config.total_epochs, row.config.seed) for row in rows] == [(3.0, 0), (3.0, 1)] * 2, "a row's own come last"


def test_a_sweep_may_ask_for_the_name_of_its_base(study):
    text = ROWS.replace("def sweep():", "def sweep(name):").replace('"seed": seed', '"seed": seed + len(name)')
    assert [row.overrides["seed"] for row in study(text).rows[:2]] == [0, 1]
    assert [row.overrides["seed"] for row in study(text, "mnist").rows[:2]] == [5, 6]


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (("model.width", "model.widht"), "", r"row 1 of .*widht.*: unknown field of lenet5 'widht'; did you mean 'width'"),
        (("(0.5, 1.0)", "(0.5, -1.0)"), "", r"row 3 of .*: lenet5.width=-1.0: expected more than 0"),
        (("(0.5, 1.0)", "(0.5, 0.5)"), "", "rows 1 and 3 of .* are the same run: model.width=0.5 seed=0"),
        (("yield", "return; yield"), "", "yields no rows"),
        (("lenet5_digits", "lenet5_digit"), "", "unknown config file 'configs/lenet5_digit.py'; did you mean"),
        (("def sweep", "def sweeps"), "", "AttributeError: .*expected BASE and sweep"),
        (("range(2)", "rang(2)"), "", "NameError: name 'rang' is not defined"),
        (("", ""), "mnits", "unknown name in BASE of .* 'mnits'; did you mean 'mnist'"),
    ],
)
def test_a_wrong_row_is_refused_before_anything_runs(study, change, name, message):
    with pytest.raises(UsageError, match=message):
        study(ROWS.replace(*change), name)


def test_an_unknown_file_is_one_line():
    with pytest.raises(UsageError, match=r"unknown sweep file 'experiments/widht/sweep\.py'"):
        study_file.load_study("experiments/widht/sweep.py")


# Runs by a script that stands for training


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces training by Python code that gets the run's directory as `run`, and the result by what it wrote there."""

    def replace(code):
        def command(self, row, run):
            text = f"import os, pathlib, signal, sys, time\nrun = pathlib.Path({str(run)!r})\nrow = {row.overrides!r}\n{code}"
            return [sys.executable, "-c", text]

        def describe(row, run):
            return {"row": row.number, "hash": row.hash, "status": "done", "overrides": row.overrides, "seed": row.config.seed,
                    "top1": 0.5, "loss": 1.0, "seconds": 1.0, "images_per_second": 1.0, "params": 1, "macs": 1}  # fmt: skip

        monkeypatch.setattr(sweep.Runner, "command", command)
        monkeypatch.setattr(sweep, "describe_run", describe)

    return replace


COUNT = "with open(f'{run}.count', 'a') as file:\n    file.write('x')\n"


def runs_of(workdir):
    return {path.stem: len(path.read_text()) for path in workdir.glob("*.count")}


def statuses(study):
    return {row["hash"]: row["status"] for row in study_file.read_results(study.results)}


def test_what_is_done_or_has_failed_is_not_run_again(study, stand_in, tmp_path, capsys):
    ours, workdir = study(), tmp_path / "runs"
    stand_in(COUNT + "if row == {'model.width': 1.0, 'seed': 0}:\n    print('UsageError: no'); sys.exit(2)")
    with pytest.raises(UsageError, match=r"1 of 4 rows failed, the others are done: see .*results\.jsonl; --retry"):
        sweep.run_study(ours, workdir)
    assert statuses(ours) == {row.hash: "failed" if row.number == 3 else "done" for row in ours.rows}
    assert "model.width=1.0 seed=0: failed: UsageError: no" in capsys.readouterr().out
    with pytest.raises(UsageError, match="1 of 4 rows failed"):
        sweep.run_study(ours, workdir)
    assert runs_of(workdir) == {row.hash: 1 for row in ours.rows}
    stand_in(COUNT)
    sweep.run_study(ours, workdir, retry=True)
    assert runs_of(workdir)[ours.rows[2].hash] == 2
    assert set(statuses(ours).values()) == {"done"}
    with pytest.raises(UsageError, match=r"--only=depth: no row of .* has that in model\.width=0\.5 seed=0"):
        sweep.run_study(ours, workdir, only="depth")


def test_two_runners_share_the_rows(study, stand_in, tmp_path):
    ours, workdir = study(ROWS.replace("range(2)", "range(4)")), tmp_path / "runs"
    stand_in(COUNT + "time.sleep(0.2)")
    runners = [threading.Thread(target=sweep.run_study, args=(ours, workdir), kwargs={"jobs": 2}) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert runs_of(workdir) == {row.hash: 1 for row in ours.rows}
    lines = ours.results.read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == list(range(1, 9))


def test_a_run_that_is_killed_goes_on_once_and_then_counts_as_killed(study, stand_in, tmp_path):
    ours, workdir = study(), tmp_path / "runs"
    stand_in(COUNT + "if row['seed'] == 1 or len(open(f'{run}.count').read()) == 1:\n    os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UsageError, match="2 of 4 rows failed"):
        sweep.run_study(ours, workdir)
    assert set(runs_of(workdir).values()) == {2}
    assert statuses(ours) == {row.hash: "done" if row.overrides["seed"] == 0 else "killed" for row in ours.rows}
    error = next(row["error"] for row in study_file.read_results(ours.results) if row["status"] == "killed")
    assert error == "killed twice by SIGKILL: as the system does when memory runs out"
    stand_in(COUNT)
    sweep.run_study(ours, workdir)  # by itself: memory may be free now
    assert set(statuses(ours).values()) == {"done"}


def test_a_signal_stops_the_runs_and_the_next_start_goes_on(study, stand_in, tmp_path):
    ours, workdir = study(), tmp_path / "runs"
    stand_in(COUNT + "if row['model.width'] == 1.0:\n    signal.signal(15, lambda *_: sys.exit(143))\n    time.sleep(60)")

    def stop():
        while len(runs_of(workdir)) < 3:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(errors.Stopped, match="stopped with 2 of 4 rows done; the same command goes on") as stopped:
        sweep.run_study(ours, workdir)
    assert stopped.value.status == 143
    assert list(statuses(ours).values()) == ["done", "done"]
    stand_in(COUNT)
    sweep.run_study(ours, workdir)
    assert len(statuses(ours)) == 4
    assert max(runs_of(workdir).values()) == 2


def test_a_row_stays_taken_while_its_run_outlives_the_runner(study, stand_in, tmp_path):
    """The child holds the lock: a second runner must not start the row beside it."""
    ours, workdir = study(), tmp_path / "runs"
    stand_in("time.sleep(60)")
    runner = sweep.Runner(ours, workdir, jobs=1, retry=False)
    thread = threading.Thread(target=runner.run, args=(ours.rows[0], 0))
    thread.start()
    while not runner._children:
        time.sleep(0.02)
    other = sweep.Runner(ours, workdir, jobs=1, retry=False)
    assert other.run(ours.rows[0], 0) is None
    assert [row.number for row in other.elsewhere] == [1]
    runner.stop(signal.SIGKILL)
    thread.join()
    assert statuses(ours) == {}, "stopped, not failed"


def test_a_line_cut_short_is_no_row(study, tmp_path):
    ours = study()
    for number in (1, 2):
        study_file.append_result(ours.results, {"row": number, "hash": str(number), "status": "done"})
        with ours.results.open("a") as file:
            file.write('{"row": 9, "hash": "9", "sta')
    study_file.append_result(ours.results, {"row": 1, "hash": "1", "status": "failed"})
    assert {row["hash"]: row["status"] for row in study_file.read_results(ours.results)} == {"1": "failed", "2": "done"}


def test_a_full_disk_stops_with_one_line(study, stand_in, tmp_path, monkeypatch):
    ours = study()
    stand_in("")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"results\.jsonl cannot be written: No space left on device"):
        sweep.run_study(ours, tmp_path / "runs")
    assert ours.results.read_text() == ""


def test_gpus_are_handed_out_one_a_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [sweep.device_of(slot, 3)[0]["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5, 6, 7, 8})
    assert [sweep.device_of(slot, 2)[1] for slot in range(2)] == [[4, 5], [6, 7, 8]]
    assert [sweep.device_of(slot, 9)[1] for slot in (0, 1)] == [[4, 5, 6, 7, 8], [4]]


def test_a_study_from_its_file_to_its_results(tmp_path, capsys):
    """The command itself, with training."""
    file = tmp_path / "study" / "sweep.py"
    file.parent.mkdir()
    fields = '"seed": 1, "total_epochs": 1.0, "optim.warmup_epochs": 0.0, "data.source": "fake:n=128,size=32,channels=1"'
    file.write_text(f'BASE = "configs/lenet5_digits.py"\n\n\ndef sweep():\n    yield {{{fields}}}\n')
    arguments = [f"--sweep={file}", f"--workdir={tmp_path / 'runs'}"]
    one_device = os.environ | {"XLA_FLAGS": QUICK}  # of the suite's eight they start slowly
    command = [sys.executable, "-m", "cnnfamily.sweep", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=one_device)
    assert (done.returncode, done.stderr) == (0, "")
    (first,) = study_file.read_results(file.with_name("results.jsonl"))
    assert first["status"] == "done"
    assert first.keys() >= {"overrides", "seed", "commit", "hash", "device", "versions", "params", "macs", "seconds", "loss"}
    assert (first["seed"], first["params"], first["macs"], first["device"]) == (1, 61_706, 416_520, "1 cpu")
    assert first["curve"][-1] == [1.0, first["top1"]]
    sweep.main([*arguments, "--dry-run"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["done"]


@pytest.mark.full
def test_a_runner_and_its_run_killed_in_the_middle_change_no_result(tmp_path):
    """Real training: SIGKILL to both while the second of three rows is between two checkpoints, and the same command again."""
    text = 'BASE = "configs/lenet5_digits.py"\n\n\ndef sweep():\n    for seed in range(3):\n        yield {"seed": seed}\n'
    fields = ["--config.total_epochs=4", "--config.checkpoint.every_steps=10", "--config.log.every_steps=5"]
    environment = os.environ | {"XLA_FLAGS": QUICK}
    results = {}
    for name in ("whole", "killed"):
        file = tmp_path / name / "sweep.py"
        file.parent.mkdir()
        file.write_text(text)
        runs = tmp_path / f"runs-{name}"
        command = [sys.executable, "-m", "cnnfamily.sweep", f"--sweep={file}", f"--workdir={runs}", *fields]
        if name == "killed":
            second = study_file.load_study(str(file), {f[9:].split("=")[0]: f.split("=")[1] for f in fields}).rows[1].hash
            runner = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
            metrics = runs / second / "metrics.jsonl"
            while not (metrics.exists() and '"step": 45' in metrics.read_text()):  # checkpoints at 40 and 50
                assert runner.poll() is None
                time.sleep(0.01)
            os.killpg(runner.pid, signal.SIGKILL)  # first: it must not see its run die
            subprocess.run(["pkill", "-KILL", "-f", f"workdir={runs / second}"], check=True)
            runner.wait()
            assert len(study_file.read_results(file.with_name("results.jsonl"))) == 1
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows = study_file.read_results(file.with_name("results.jsonl"))
        clocks = ("seconds", "images_per_second")
        results[name] = sorted([{k: v for k, v in row.items() if k not in clocks} for row in rows], key=lambda row: row["row"])
    sessions = json.loads((runs / second / "manifest.json").read_text())["sessions"]
    assert len(sessions) == 2, "the second row was begun twice"
    assert [row["status"] for row in results["whole"]] == ["done"] * 3
    assert results["killed"] == results["whole"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("lenet_width", 12),
        ("mobilenet_grid", 48),
        ("mobilenet_grid:photographs", 48),
        pytest.param("scaling", 60, marks=pytest.mark.full),
        pytest.param("scaling:cifar10", 60, marks=pytest.mark.full),
        pytest.param("scaling:photographs", 60, marks=pytest.mark.full),
        pytest.param("grid_search", 27, marks=pytest.mark.full),
        pytest.param("grid_search:cifar10", 27, marks=pytest.mark.full),
    ],
)
def test_the_studies_of_the_repository_expand(name, rows):
    study, _, argument = name.partition(":")
    assert len(study_file.load_study(f"experiments/{study}/sweep.py{argument and ':'}{argument}").rows) == rows
