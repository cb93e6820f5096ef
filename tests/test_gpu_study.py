"""What runs on a GPU unattended: the driver's time, what it packs and goes on from, and the schedules of its studies."""

import json
import re
import shlex
import shutil
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from cnnfamily import study as study_file

REPOSITORY = Path(__file__).parent.parent
for folder in ("speed", "gpu"):
    sys.path.insert(0, str(REPOSITORY / "experiments" / folder))
import candidates
import compare
import furthest
import run
import scale
import steps
from steps import STEPS, Step


def step(label: str, command: str, **fields) -> Step:
    return Step(label, "1", "a step", command, "", **{"least": 0, "grace": 5, "results": (f"results/{label}*",), **fields})


def write(name: str) -> str:
    """A command that writes a line to a file under results/."""
    return f"sh -c 'mkdir -p results; echo {name} >> results/{name}.txt'"


@pytest.fixture
def drive(tmp_path):
    """Makes a driver of these steps in a tree of its own, runs it, and gives it back."""

    def make(*rows: Step, tree: str = "tree", out: str = "out", **options) -> run.Driver:
        (tmp_path / tree).mkdir(exist_ok=True)
        driver = run.Driver(list(rows), tmp_path / tree, tmp_path / out, data=tmp_path / "data", commit="abc", **options)
        driver.run()
        return driver

    return make


def statuses(driver: run.Driver) -> dict[str, str]:
    return {label: found["status"] for label, found in driver.state.items()}


def test_the_steps_are_in_the_order_of_the_issue_and_long_ones_last():
    first = [row.item for row in STEPS if "whole" not in row.item]
    whole = [row.item for row in STEPS if "whole" in row.item]
    assert first == sorted(first)
    assert whole == sorted(whole)
    assert [row.item for row in STEPS] == first + whole
    assert set(first) == set("1234567")
    assert len({row.label for row in STEPS}) == len(STEPS)
    assert "| tests | 1 | the test suite, on the processor | 300 | done on h100 |" in run.listing(
        STEPS, {"tests": {"status": "done", "sessions": [{"device": "h100"}]}}
    )


@pytest.mark.parametrize("small", [False, True])
def test_what_the_steps_call_exists(small, tmp_path):
    driver = run.Driver(STEPS, tmp_path, tmp_path / "out", data=tmp_path, small=small)
    for row in STEPS:
        words = shlex.split(driver.command(row))
        assert words[0] == "python"
        assert not [word for word in words if "{" in word]
        for word in words:
            named = re.fullmatch(r"(?:--(?:sweep|config)=)?((?:experiments|configs|tests)/[\w/]+\.py)(?::\w+)?", word)
            assert named is None or (REPOSITORY / named[1]).exists() or named[1] == row.file, word
            for option, known in (("--only=", candidates.CANDIDATES), ("--models=", None)):
                if word.startswith(option) and known:
                    assert set(word.removeprefix(option).split(",")) <= set(known)
    assert sorted([*steps.FIRST.split(","), *steps.OTHERS.split(",")]) == sorted(compare.MODELS)


def test_a_step_that_is_done_is_not_done_again_and_one_that_failed_is(drive, tmp_path):
    rows = [step("one", write("one")), step("two", "sh -c 'test -e mended'"), step("three", write("three"))]
    driver = drive(*rows)
    assert statuses(driver) == {"one": "done", "two": "failed", "three": "done"}
    (session,) = driver.state["two"]["sessions"]
    assert (session["code"], session["commit"], session["device"]) == (1, "abc", driver.device)
    assert session["versions"]["python"]
    (tmp_path / "tree" / "mended").touch()
    again = drive(*rows)
    assert statuses(again) == dict.fromkeys(("one", "two", "three"), "done")
    assert [len(found["sessions"]) for found in again.state.values()] == [1, 2, 1]
    assert (tmp_path / "tree/results/one.txt").read_text() == "one\n"


@pytest.mark.full
def test_a_step_over_its_time_is_stopped_and_goes_on_when_others_have_left_some(drive, tmp_path):
    # It saves when asked to, as cnnfamily's commands do, and is done the second time.
    resumable = "test -e saved && exit 0; trap 'touch saved; exit 143' TERM; while :; do sleep 0.05; done"
    driver = drive(step("long", f'sh -c "{resumable}"', seconds=3), step("short", write("short")), seconds=60)
    assert statuses(driver) == {"long": "done", "short": "done"}
    first, second = driver.state["long"]["sessions"]
    assert (first["status"], first["code"]) == ("unfinished", 143)
    assert 3 <= first["seconds"] < 30
    assert second["status"] == "done"
    assert first["at"] <= driver.state["short"]["sessions"][0]["at"] <= second["at"], "what is left is for those not done"


@pytest.mark.full
def test_a_step_that_does_not_end_when_asked_is_ended_with_all_that_it_started(drive, tmp_path):
    stubborn = "trap '' TERM; setsid sleep 60 & echo $! > orphan; while :; do sleep 0.05; done"
    start = time.monotonic()
    driver = drive(step("stubborn", f'sh -c "{stubborn}"', seconds=3, grace=1), seconds=4)
    assert time.monotonic() - start < 30
    assert statuses(driver) == {"stubborn": "unfinished"}
    assert driver.state["stubborn"]["sessions"][0]["code"] == -9
    orphan = Path("/proc") / (tmp_path / "tree/orphan").read_text().strip() / "status"
    assert not orphan.exists() or "zombie" in orphan.read_text()


def test_a_step_waits_for_what_it_needs_and_says_so(drive):
    rows = [
        step("fast", "true", file="configs/such.py"),
        step("profile", "true", after=("broken",)),
        step("broken", "false"),
        step("photographs", "true", needs=("flowers",)),
        step("late", "true", least=1000),
    ]
    driver = drive(*rows, seconds=100)
    assert {label: found.get("why") for label, found in driver.state.items()} == {
        "fast": "configs/such.py does not exist",
        "profile": "after broken",
        "broken": None,
        "photographs": "no flowers128.tar in data",
    }


def test_small_archives_become_the_data_that_steps_train_on(drive, tmp_path):
    run.make_small_data(tmp_path / "data")
    (tmp_path / "tree/experiments").mkdir(parents=True)
    script = "experiments/cifar10_jpeg75_to_npz.py"
    shutil.copy(REPOSITORY / script, tmp_path / "tree" / script)
    rows = [step("flowers", "sh -c 'ls {flowers} > seen'", needs=("flowers",)), step("cifar", "ls {cifar}", needs=("cifar",))]
    assert statuses(drive(*rows)) == {"flowers": "done", "cifar": "done"}
    assert (tmp_path / "tree/seen").read_text().split() == list("vwxyz")
    with np.load(tmp_path / "tree" / run.WORK / "cifar10.npz") as arrays:
        assert arrays["train_images"].shape == (256, 32, 32, 3)


def make_run(folder: Path, total: int, saved: dict[int, int]) -> None:
    """A run directory with checkpoints of so many bytes."""
    for at, size in saved.items():
        state = folder / "checkpoints" / str(at)
        state.mkdir(parents=True)
        (state / "state").write_bytes(b"x" * size)
        (state / "digests.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"total_steps": total}))
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_text("{}\n")


def test_a_session_goes_on_elsewhere_from_what_the_one_before_packed(drive, tmp_path):
    runs = tmp_path / "tree" / run.WORK / "study"
    make_run(runs / "under_way", 100, {10: 10, 20: 40 * 2**20})
    (runs / "under_way/checkpoints/30").mkdir()  # a save that was killed
    make_run(runs / "finished", 100, {90: 10, 100: 10})
    make_run(runs / "large", 100, {50: 60 * 2**20})
    rows = [step("one", write("one")), step("two", "false"), step("three", write("three"))]
    drive(*rows, only=["one", "two"])
    (tmp_path / "out/unfinished.tar.7").write_text("of a session before, and larger")
    drive(*rows, only=["two"])
    packed = list((tmp_path / "out").iterdir())
    assert {path.name for path in packed} == {"results.tar.gz", "steps.json", *(f"unfinished.tar.{i}" for i in range(3))}
    assert len(packed) <= run.FILES
    assert max(path.stat().st_size for path in packed) <= run.FILE_BYTES
    assert sum(path.stat().st_size for path in packed) <= 64 * 2**20
    assert json.loads((tmp_path / "out/steps.json").read_text())["left_out"] == [f"{run.WORK}/study/large"]

    elsewhere = tmp_path / "elsewhere"
    run.unpack(tmp_path / "out", elsewhere)
    under_way = elsewhere / run.WORK / "study/under_way"
    assert sorted(path.name for path in under_way.iterdir()) == ["checkpoints", "config.json", "manifest.json", "metrics.jsonl"]
    assert [path.name for path in (under_way / "checkpoints").iterdir()] == ["20"]
    assert (under_way / "checkpoints/20/state").stat().st_size == 40 * 2**20
    assert not (elsewhere / run.WORK / "study/finished").exists()
    driver = drive(*rows, tree="elsewhere", out="out2")
    assert statuses(driver) == {"one": "done", "two": "failed", "three": "done"}
    assert [len(found["sessions"]) for found in driver.state.values()] == [1, 3, 1], "what was done is known here too"
    with tarfile.open(tmp_path / "out2/results.tar.gz") as archive:
        assert {"results/one.txt", "results/three.txt", f"{run.WORK}/logs/two.log"} <= set(archive.getnames())


def test_a_machine_with_other_versions_writes_files_of_its_own(tmp_path, monkeypatch):
    def driver(**versions) -> run.Driver:
        monkeypatch.setattr(run, "versions", lambda: {"jax": "0.11.2", **versions})
        monkeypatch.setattr(run, "gpu", lambda: ("h100", "580"))
        return run.Driver([], tmp_path, tmp_path / "out", data=tmp_path)

    (profile,) = (row for row in STEPS if row.label == "profile")
    assert [driver().name, driver(jax="0.12").name, driver().name, driver(jax="0.12").name] == [
        "h100",
        "h100-2",
        "h100",
        "h100-2",
    ]
    results = tmp_path / "experiments/speed/results"
    results.mkdir(parents=True)
    (results / "gpu_h100.json").touch()
    assert driver(jax="0.12").command(profile).endswith("results/gpu_h100.json"), "what was measured on another"
    (results / "gpu_h100-2.json").touch()
    assert driver(jax="0.12").command(profile).endswith("results/gpu_h100-2.json")


def test_a_long_log_comes_back_by_its_end(drive, tmp_path):
    drive(step("loud", "sh -c 'seq 100000; echo the end'"))
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        log = archive.extractfile(f"{run.WORK}/logs/loud.log").read()
    assert len(log) == run.LOG_BYTES
    assert log.endswith(b"100000\nthe end\n")


def rows_of(form: str) -> list[study_file.Row]:
    return study_file.load_study(f"experiments/cifar_resnet/sweep.py{form and ':'}{form}", {"data.source": "npz:x.npz"}).rows


def test_the_cifar_networks_have_the_schedule_of_the_paper():
    rows = rows_of("")
    named = [(row.config.model.name, row.config.seed) for row in rows]
    assert named == [(f"resnet{n}_cifar", s) for n, s in ((20, 0), (20, 1), (20, 2), (32, 0), (44, 0), (56, 0), (110, 0))]
    for row in rows:
        optim = row.config.optim
        assert (row.config.total_steps, optim.boundaries_steps, row.config.batch_size) == (64_000, (32_000, 48_000), 128)
        assert optim.warmup_steps == (400 if row.config.model.name == "resnet110_cifar" else 0)
    whole, short = rows[0].config, rows_of("short")[0].config
    assert (short.total_steps, short.optim.boundaries_steps) == (6_400, (3_200, 4_800))
    assert [row.config.model.name for row in rows_of("short")] == [row.config.model.name for row in rows]
    assert {key for key in ("optim", "augment", "model") if whole[key] != short[key]} == {"optim"}


def test_stochastic_depth_has_the_schedule_of_its_paper_and_the_short_form_costs_as_much_as_the_others():
    rows = rows_of("stochastic_depth")
    assert [row.config.model.stochastic_depth_form for row in rows] == ["none", "batch", "example", "subset"]
    for row in rows:
        assert (row.config.total_epochs, row.config.optim.boundaries_epochs) == (500.0, (250.0, 375.0))
        assert (row.config.model.stochastic_depth, row.config.model.stochastic_depth_scaling) == (0.5, "test")
    for row in rows_of("stochastic_depth_short"):
        epochs, (first, second) = row.config.total_epochs, row.config.optim.boundaries_epochs
        assert round(epochs * 50_000 / 128) == 6_400
        assert (first, second) == (pytest.approx(epochs / 2, abs=1e-3), pytest.approx(epochs * 3 / 4, abs=1e-3))


def test_the_flowers_train_by_one_recipe():
    rows = study_file.load_study("experiments/flowers/sweep.py", {"data.source": "folder:x"}).rows
    assert [row.config.model.name for row in rows[:5]] == [
        *("efficientnet_b0", "resnet50", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3")
    ]
    assert {(row.config.model.stochastic_depth, row.config.model.num_classes, row.config.data.resolution) for row in rows} == {
        (0.0, 5, 128)
    }
    assert [row.config.seed for row in rows] == [seed for seed in range(3) for _ in range(5)]


def test_the_batch_doubles_until_it_is_told_otherwise():
    assert scale.values_of("batch", 1, 256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert scale.values_of("batch", 64, 2048) == (64, 128, 256, 512, 1024, 2048)
    assert scale.values_of("depth", 64, 2048) == scale.LINES["depth"]


def row_of(model: str, dtype: str, mode: str = "train", **rates) -> dict:
    sides = {side: {"images_per_second": [rate]} for side, rate in rates.items()}
    return {"model": model, "dtype": dtype, "mode": mode, "batch": 4, "resolution": 32, "sides": sides}


def test_the_networks_furthest_behind_are_those_with_the_smallest_ratio_in_their_best_dtypes():
    rows = [
        row_of("a", "float32", ours=10, eager=10),
        row_of("a", "bfloat16", ours=30, eager=10, compile=60),
        row_of("b", "float32", ours=9, compile=10),
        row_of("c", "float32", ours=8, plain=9),
        row_of("d", "bfloat16", ours=8, eager=100, mode="infer"),
    ]
    found = furthest.behind({"rows": rows})
    assert [(ratio, row["model"], row["dtype"]) for ratio, row in found] == [(0.5, "a", "bfloat16"), (0.9, "b", "float32")]
