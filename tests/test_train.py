"""The training loop: it learns, it continues, and every fault of the user's is one line with the right exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LENET, SHORT, short_config

from cnnfamily import checkpoint, errors, evaluate, runlog, train
from cnnfamily import config as configs

# XLA 0.10.0 prints lines of its own when it loads a program from the compilation cache.
NO_CACHE = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def lines_without_timing(workdir):
    return [{key: value for key, value in row.items() if key != "timing"} for row in runlog.read_metrics(workdir)]


def final_state(workdir):
    _, state, _ = evaluate.load_state(workdir, which="newest")
    return jax.device_get(state)


def assert_equal_states(one, two):
    paths = jax.tree_util.tree_leaves_with_path(one)
    for (path, a), b in zip(paths, jax.tree.leaves(two), strict=True):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)


def test_learns_and_writes_the_run_directory(finished):
    workdir, result = finished
    assert result.metrics["test_top1"] > 0.85
    assert result.metrics["test_examples"] == result.metrics["ema_test_examples"] == 360
    assert {path.name for path in workdir.iterdir()} >= {
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "curves.png",
    }
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = runlog.read_metrics(workdir)
    assert all({"step", "epoch"} <= row.keys() for row in rows)
    training = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in training] == [10, 20, 22, 30, 40, 44, 50, 60, 66, 70, 80, 88]
    assert training[0].keys() == {"step", "epoch", "train_loss", "train_top1", "grad_norm", "learning_rate", "timing"}
    tested = [row for row in rows if "test_loss" in row]
    assert [row["step"] for row in tested] == [22, 44, 66, 88]
    names = {f"{prefix}test_{name}" for prefix in ("", "ema_") for name in ("loss", "top1", "top5", "ece", "examples")}
    assert tested[0].keys() == {"step", "epoch"} | names
    assert configs.from_json((workdir / "config.json").read_text()) == short_config(ema__decay=0.95)
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["sessions"][0]["batch_size"] == {"global": 64, "device": 8}
    assert manifest["data"]["train_examples"] == 1437


def test_keeps_the_newest_and_the_best(finished):
    workdir, result = finished
    tested = [row for row in runlog.read_metrics(workdir) if "test_loss" in row]
    best = max(tested, key=lambda row: (row["ema_test_top1"], row["step"]))["step"]
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        assert (checkpoints.newest, checkpoints.best) == (88, best)
    assert checkpoint.newest_step(workdir / "checkpoints") == result.step == 88


def test_a_finished_run_says_so(finished, capsys):
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = train.run_training(short_config(ema__decay=0.95), workdir)
    assert again.metrics == result.metrics
    assert "is finished: 88 steps" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_interrupted_run_ends_as_the_one_that_was_not(finished, tmp_path, monkeypatch):
    """SIGTERM in the middle of a log interval, then the same call again: every bit and every line is that of the other run."""
    workdir, seen = tmp_path / "run", []

    def stop_at_37(self, step, *figures):
        seen.append(step)
        if step == 37:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Report, "update", stop_at_37)
    with pytest.raises(errors.Stopped) as stopped:
        train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert stopped.value.status == 143
    assert seen[-1] == checkpoint.newest_step(workdir / "checkpoints") == 37
    train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert seen[37:] == list(range(38, 89))
    assert_equal_states(final_state(workdir), final_state(finished[0]))
    assert lines_without_timing(workdir) == lines_without_timing(finished[0])


@pytest.mark.full  # real processes are killed in test_crashes.py
def test_killed_run_ends_as_the_one_that_was_not(finished, tmp_path, monkeypatch):
    """An end without a save: the log holds lines after the last checkpoint, which come again once."""
    workdir = tmp_path / "run"

    def die_at_63(self, step, *figures):
        if step == 63:
            raise ZeroDivisionError

    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        context.setattr(train.Report, "update", die_at_63)
        train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert checkpoint.newest_step(workdir / "checkpoints") == 44
    assert runlog.read_metrics(workdir)[-1]["step"] == 60
    train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert_equal_states(final_state(workdir), final_state(finished[0]))
    assert lines_without_timing(workdir) == lines_without_timing(finished[0])


@pytest.mark.full
def test_a_split_too_large_for_the_device_gives_the_same_run(finished, tmp_path):
    train.run_training(short_config(ema__decay=0.95, data__device_megabytes=0), tmp_path / "run", quiet=True)
    assert_equal_states(final_state(tmp_path / "run"), final_state(finished[0]))


# Faults of the user's. Each is one line and the exit status that the design fixes.


def run_command(monkeypatch, capsys, *arguments):
    """Exit status and standard error of `python -m cnnfamily.train`, in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        errors.run_command(train.main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.optim.learning_rat=0.1"], "did you mean 'optim.learning_rate'?"),
        (["--config.modle.width=2"], "did you mean 'model'?"),
        (["--config.model.widht=2"], "unknown field of lenet5 'widht'; did you mean 'width'?"),
        (["--config.model.name=lenet"], "unknown model 'lenet'; did you mean 'lenet5'?"),
        (["--config.optim.learning_rate=fast"], "config.optim.learning_rate='fast': expected float"),
        (["--config.batch_size=1.5"], "config.batch_size='1.5': expected int"),
        (["--config.seed=-1"], "config.seed=-1: expected 0 or more"),
        (["--config.optim.schedule=cosin"], "unknown schedule 'cosin'; did you mean 'cosine'?"),
        (["--config.data.source=npz:nothing.npz"], "nothing.npz"),
        (["--config.data.source=idx:nothing"], "nothing"),
        (["--config.data.source=tfds:nothing"], "tfds:nothing is not prepared: looked for "),
        (["--config.data.source=folder:nothing"], "nothing is not a folder; expected PATH/train/CLASS/*.jpg"),
        (["--config.loss=cross_entropi"], "unknown loss 'cross_entropi'; did you mean 'cross_entropy'?"),
        (["--config.data.fit=crop"], "data.fit is 'crop' and data.source 'digits'; expected 'resize' or 'pad'"),
        (["--config.data.workers=-2"], "config.data.workers=-2: expected -1 or more"),
        (["--config.batch_size=66"], "batch_size=66: expected a multiple of 8"),
        (["--config.batch_size=4000"], "batch_size=4000; expected 1 to 1437"),
        (["--config.data.resolution=20"], "images of 20 x 20 pixels are smaller than this network can take"),
        (["--config.model.num_classes=3"], "digits has 10 classes, more than model.num_classes=3"),
        (["--config.model.name=resnet20_cifar", "--config.model.norm_group=48"], "norm_group"),
        (["--config.total_epochs=0"], "expected 1 step or more"),
        (["--config.total_steps=3"], "are both set"),
        (["--batch_size=3"], "argument '--batch_size=3': expected --config=, --workdir= or --config.KEY=VALUE"),
        (["--workdir"], "expected one argument"),
        (["--config.model.width=-1"], "lenet5.width=-1.0: expected more than 0"),
        (["--config.model.name=efficientnet_b0", "--config.model.dropout=1.0"], "expected less than 1"),
        (["--config.model.name=efficientnet_b0", "--config.model.stages=(3,)"], "expected tuple"),
        (["--config.model.name=resnet20_cifar", "--config.model.groups=0"], "groups=0: expected more than 0"),
        (["--config.model.dtype=float64"], "expected JAX_ENABLE_X64=1"),
        (["--config.total_epochs=1e999"], "expected a finite number"),
        (["--config.optim.boundaries_steps={[]}"], "expected tuple"),
        (["--config.data.mean=('a',)"], "expected numbers"),
    ],
)  # fmt: skip
def test_faults_are_one_line_and_status_2(arguments, expected, tmp_path, monkeypatch, capsys):
    workdir = [] if "--workdir" in arguments else [f"--workdir={tmp_path / 'run'}"]
    status, line = run_command(monkeypatch, capsys, f"--config={LENET}", *arguments, *workdir)
    assert status == 2
    assert expected in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists(), "a refused run must leave nothing behind"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/lenet5_digit.py", "did you mean 'configs/lenet5_digits.py'?"),
        ("configs/lenet5_digits.py:digit", "unknown config argument 'digit'; did you mean 'digits'?"),
        ("README.md", "expected a Python file"),
        ("cnnfamily/rng.py", "expected a function get_config"),
    ],
)
def test_wrong_config_files_are_one_line_and_status_2(config, expected, monkeypatch, capsys):
    status, line = run_command(monkeypatch, capsys, f"--config={config}")
    assert (status, line.count("\n")) == (2, 1)
    assert expected in line


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("config.optim.learning_rat = 0.1", "Did you mean"),
        ("config.update({'augment': {'shfit': 3}})", "shfit"),
        ("config.batch_size = 'x'", "batch_size"),
        ("import nothing", "No module named 'nothing'"),
        ("return 3", "get_config returned int, expected a ConfigDict"),
        ("return (", "was never closed"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_and_status_2(mistake, expected, tmp_path, monkeypatch, capsys):
    lines = ["from configs import default", "def get_config(arg=''):", "    config = default.get_config()", f"    {mistake}"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "    return config"]))
    status, line = run_command(monkeypatch, capsys, f"--config={tmp_path / 'mine.py'}")
    assert (status, line.count("\n")) == (2, 1)
    assert "mine.py" in line
    assert expected in line


def test_labels_out_of_range_are_status_2(tmp_path, monkeypatch, capsys):
    images, labels = np.zeros((8, 32, 32), np.uint8), np.arange(8) % 3
    np.savez(
        tmp_path / "bad.npz",
        train_images=images,
        train_labels=labels - 1,
        test_images=images,
        test_labels=labels,
    )
    status, line = run_command(
        monkeypatch,
        capsys,
        f"--config={LENET}",
        f"--config.data.source=npz:{tmp_path / 'bad.npz'}",
        f"--workdir={tmp_path / 'r'}",
    )
    assert (status, line.count("\n")) == (2, 1)
    assert "train_labels" in line
    assert "-1" in line


def test_another_config_in_the_directory_is_refused_and_nothing_is_lost(finished, monkeypatch, capsys):
    workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    overrides = [f"--config.{key}={value}" for key, value in (SHORT | {"ema.decay": 0.9}).items()]
    status, line = run_command(monkeypatch, capsys, f"--config={LENET}", *overrides, f"--workdir={workdir}")
    assert (status, line.count("\n")) == (2, 1)
    assert "ema.decay (0.95 there, 0.9 here)" in line
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seed", 1, "seed (0 there, 1 here)"),
        ("batch_size", 32, "batch_size (64 there, 32 here)"),
        ("data.source", "fake", "data.source ('digits' there, 'fake' here)"),
        ("model.name", "lenet5_1998", "model.name ('lenet5' there, 'lenet5_1998' here)"),
    ],
)
def test_what_changed_is_named(finished, key, value, named):
    config = configs.load_config(LENET, SHORT | {"ema.decay": 0.95, key: value})
    with pytest.raises(errors.UsageError) as refused:
        train.run_training(config, finished[0], quiet=True)
    assert named in str(refused.value)


def test_other_data_under_the_same_name_is_refused(tmp_path):
    def save(shift):
        images = np.random.default_rng(shift).integers(0, 255, (64, 32, 32), np.uint8)
        labels = np.arange(64) % 10
        arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
        np.savez(tmp_path / "data.npz", **arrays)
        return short_config(data__source=f"npz:{tmp_path / 'data.npz'}", checkpoint__every_steps=1)

    runlog.claim(tmp_path / "run", save(0))
    data = train.feed.load_data(save(0))
    runlog.write_manifest(tmp_path / "run", config=save(0), data=data, total_steps=4, first_step=0)
    with pytest.raises(errors.UsageError, match="has changed since this run began"):
        train.run_training(save(1), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("jump", [30, *(pytest.param(jump, marks=pytest.mark.full) for jump in (43, 49))])
def test_a_loss_that_is_not_finite_is_status_3_and_keeps_the_checkpoints(jump, tmp_path, monkeypatch, capsys):
    """The learning rate is infinite once: between saves, or at the update that an evaluation (44) or a save (50) would keep."""

    def schedule(*_, **__):
        return lambda step: jnp.where(jnp.asarray(step) == jump, jnp.inf, 0.01)

    monkeypatch.setattr(train.optim, "learning_rate_schedule", schedule)
    overrides = SHORT | {"optim.name": "sgd", "optim.clip_norm": 0.0, "checkpoint.every_steps": 10}
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    status, line = run_command(monkeypatch, capsys, f"--config={LENET}", *arguments, f"--workdir={tmp_path / 'run'}")
    assert (status, line.count("\n")) == (3, 1)
    noticed, saved = {30: (32, 30), 43: (44, 40), 49: (50, 44)}[jump]
    assert f"at step {noticed}, first in parameter " in line
    assert f"the last checkpoint is from step {saved}" in line
    state = final_state(tmp_path / "run")
    assert state.step == saved
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert all(np.isfinite(row.get("test_loss", 0)) for row in runlog.read_metrics(tmp_path / "run"))


def test_two_processes_in_one_directory_are_refused(finished, tmp_path, monkeypatch):
    def start_another(self, step, *figures):
        if step == 5:
            with pytest.raises(errors.UsageError, match="is in use by another training process"), runlog.exclusive(tmp_path):
                pass
            raise ZeroDivisionError

    monkeypatch.setattr(train.Report, "update", start_another)
    with pytest.raises(ZeroDivisionError):
        train.run_training(short_config(ema__decay=0.95), tmp_path, quiet=True)


def test_a_process_that_comes_late_drops_nothing(finished, monkeypatch):
    """It compiled while another process trained: what it knows of the checkpoints is old."""
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(train.checkpoint, "newest_step", lambda directory: 22)
    with pytest.raises(errors.UsageError, match="another process has trained"):
        train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.full
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    """`train | head -1`"""
    command = f"{sys.executable} -m cnnfamily.train --config={LENET}:smoke --workdir={tmp_path / 'run'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env=NO_CACHE)
    assert done.stderr == ""
    manifest = runlog.read_manifest(tmp_path / "run")
    assert checkpoint.newest_step(tmp_path / "run/checkpoints") == manifest["total_steps"] == 4


def test_signals_end_the_real_command_with_their_status(tmp_path):
    """SIGINT to a process of its own: it saves, says how to go on, and ends with 130; the curve is there."""
    command = [sys.executable, "-m", "cnnfamily.train", f"--config={LENET}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [*command, "--config.total_epochs=100000", "--config.log.every_steps=5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=NO_CACHE,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no first line within two minutes"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"the same command goes on from there" in err
    assert err.count(b"\n") == 1
    assert checkpoint.newest_step(tmp_path / "run/checkpoints") >= 5
