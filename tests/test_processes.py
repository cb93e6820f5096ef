"""Several processes that train one run, as `srun` starts them: real ones, which find each other on this machine.

Each test is bounded: a process that hangs is killed, and fails its test.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import recorded
from conftest import LENET, QUICK, SHORT, mesh_of, short_config
from test_photographs import folder  # noqa: F401  (a fixture)
from test_step import batch_of, small_network, twenty_steps, update_of
from test_train import NO_CACHE, assert_equal_states, final_state, lines_without_timing

from cnnfamily import checkpoint, errors, evaluate, parallel, processes, runlog, train
from cnnfamily.data import feed
from cnnfamily.models import initialize
from cnnfamily.step import create_state

STRUCK = Path(__file__).with_name("struck.py")


@pytest.fixture
def start():
    """`start(COUNT, *ARGUMENTS, devices=N)`: COUNT processes `python ARGUMENTS` of one run, with N CPU devices each."""
    started = []

    def start(count: int, *arguments, devices: int = 1, env: dict = os.environ) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # XLA cuts what a device computes by its number of threads: the cores, or the devices of the process if they are more.
        # As many here as there make equal programs, and all processes with the same arguments share them.
        threads = str(max(len(os.sched_getaffinity(0)), len(jax.devices())))
        common = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}", "NPROC": threads}
        if count > 1:
            common |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
        command = [sys.executable, *map(str, arguments)]
        ours = [
            subprocess.Popen(
                command,
                env=env | common | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        for process in ours:
            process.port = port  # where the first one listens for the others
        started.extend(ours)
        return ours

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(started: list[subprocess.Popen], *, within: float = 180) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each process, all of which have to end `within` seconds."""
    deadline = time.monotonic() + within
    texts = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def said(err: str) -> list[str]:
    """The lines of standard error, without what XLA 0.10.0 says when it loads a program from the compilation cache."""
    return [line for line in err.splitlines() if "XLA:CPU AOT" not in line]


def arguments(workdir, **overrides) -> list[str]:
    """What follows `cnnfamily.train` to train `short_config` with averaged weights."""
    overrides = SHORT | {"ema.decay": 0.95} | overrides
    return [f"--config={LENET}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in overrides.items())]


def test_two_processes_are_one_with_two_devices(start, tmp_path, monkeypatch):
    """Equal bit for bit: the sum of two numbers does not depend on their order, nor an example on where it is."""
    ours = ends(start(2, "-m", "cnnfamily.train", *arguments(tmp_path / "two", total_epochs=1.0)))
    assert [(status, said(err)) for status, _, err in ours] == [(0, []), (0, [])]
    assert "lenet5 on digits, 2 cpu" in ours[0][1]
    assert "step" not in ours[1][1], "the first process speaks for all"
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(2))
    result = train.run_training(short_config(ema__decay=0.95, total_epochs=1.0), tmp_path / "one", quiet=True)
    assert_equal_states(final_state(tmp_path / "two"), final_state(tmp_path / "one"))
    lines = lines_without_timing(tmp_path / "two")
    assert lines == [pytest.approx(line, rel=1e-6) for line in lines_without_timing(tmp_path / "one")]
    assert lines[-1]["test_examples"] == result.metrics["ema_test_examples"] == 360


@pytest.mark.full
def test_two_processes_that_were_stopped_go_on_and_so_does_one(finished, start, tmp_path, monkeypatch):
    """SIGTERM to the second process stops both; the same command ends with the bits of one process with two devices.

    One process with eight devices goes on from there too.
    """
    workdir = tmp_path / "two"
    ours = ends(start(2, STRUCK, 1, "step", 36, int(signal.SIGTERM), *arguments(workdir)))
    assert [status for status, _, _ in ours] == [143, 143]
    stopped = checkpoint.newest_step(workdir / "checkpoints")
    assert stopped == 37, "the signal travels with the batch of the next step"
    line = f"Stopped: stopped and saved at step {stopped}; the same command goes on from there"
    assert [said(err) for _, _, err in ours] == [[line], []]
    shutil.copytree(workdir, tmp_path / "eight")

    ours = ends(start(2, "-m", "cnnfamily.train", *arguments(workdir)))
    assert [(status, said(err)) for status, _, err in ours] == [(0, []), (0, [])]
    with monkeypatch.context() as context:
        context.setattr(parallel, "data_mesh", lambda: mesh_of(2))
        train.run_training(short_config(ema__decay=0.95), tmp_path / "one", quiet=True)
    assert_equal_states(final_state(workdir), final_state(tmp_path / "one"))
    lines = lines_without_timing(workdir)
    assert lines == [pytest.approx(line, rel=1e-6) for line in lines_without_timing(tmp_path / "one")]
    assert [session["devices"] for session in runlog.read_manifest(workdir)["sessions"]] == [
        {"count": 2, "kind": "cpu", "processes": 2}
    ] * 2

    result = train.run_training(short_config(ema__decay=0.95), tmp_path / "eight", quiet=True)
    assert (result.step, result.metrics["test_examples"]) == (88, 360)
    assert result.metrics["test_top1"] == pytest.approx(finished[1].metrics["test_top1"], abs=0.03)
    assert [row["step"] for row in lines_without_timing(tmp_path / "eight")] == [row["step"] for row in lines]
    sessions = runlog.read_manifest(tmp_path / "eight")["sessions"]
    assert [session["devices"]["count"] for session in sessions] == [2, 8]


@pytest.mark.full
def test_two_processes_share_the_decoding_of_photographs(folder, start, tmp_path, monkeypatch):  # noqa: F811
    """Each decodes what its own devices get, and together they are one process with two devices."""
    given = {"data.source": f"folder:{folder}", "data.fit": "crop", "model.in_channels": 3, "model.num_classes": 3}
    given |= {"batch_size": 8, "optim.warmup_epochs": 0.0, "evaluate.batch_size": 4}
    ours = ends(start(2, "-m", "cnnfamily.train", *arguments(tmp_path / "two", **given)))
    assert [(status, said(err)) for status, _, err in ours] == [(0, []), (0, [])]
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(2))
    overrides = {key.replace(".", "__"): value for key, value in given.items()}
    train.run_training(short_config(ema__decay=0.95, **overrides), tmp_path / "one", quiet=True)
    assert_equal_states(final_state(tmp_path / "two"), final_state(tmp_path / "one"))
    lines = [lines_without_timing(tmp_path / name) for name in ("two", "one")]
    assert lines[0] == [pytest.approx(line, rel=1e-6) for line in lines[1]]


@pytest.mark.full
@pytest.mark.parametrize("at", [44, 88])
def test_a_signal_during_an_evaluation_leaves_it_to_the_next_start(at, finished, tmp_path, monkeypatch):
    """It is saved at once; the run that goes on evaluates first, and ends as the one that was not stopped, best included."""
    workdir, original = tmp_path / "run", feed.TestFeed.batches
    evaluations = []

    def batches(self):
        evaluations.append(None)
        for batch in original(self):
            if len(evaluations) == 1 + 2 * at // 22:  # the first is compiling, then two an evaluation: take the second
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as context, pytest.raises(errors.Stopped) as stopped:
        context.setattr(feed.TestFeed, "batches", batches)
        train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert stopped.value.status == 143
    assert checkpoint.newest_step(workdir / "checkpoints") == at
    assert [row["step"] for row in runlog.read_metrics(workdir) if "test_loss" in row] == list(range(22, at, 22))
    result = train.run_training(short_config(ema__decay=0.95), workdir, quiet=True)
    assert result.metrics == finished[1].metrics
    assert_equal_states(final_state(workdir), final_state(finished[0]))
    assert lines_without_timing(workdir) == lines_without_timing(finished[0])
    with checkpoint.Checkpoints(workdir / "checkpoints") as ours, checkpoint.Checkpoints(finished[0] / "checkpoints") as theirs:
        assert (ours.newest, ours.best) == (theirs.newest, theirs.best)


@pytest.mark.full
@pytest.mark.parametrize(("victim", "place", "count"), [(1, "step", 30), (0, "pause", 30)])
def test_a_process_that_dies_ends_the_other_with_one_line(victim, place, count, start, tmp_path):
    """The second one's death makes a collective fail; the coordinator's makes native code write a page and abort."""
    ours = start(2, STRUCK, victim, place, count, int(signal.SIGKILL), *arguments(tmp_path / "run"))
    ours[victim].wait(timeout=120)
    status, _, err = ends([ours[1 - victim]], within=50)[0]
    assert (status, len(said(err))) == (1, 1), err
    assert said(err)[0].startswith("PeerLost: another process of this run has died (at step ")
    assert "the last checkpoint is from step 22;" in err
    assert checkpoint.newest_step(tmp_path / "run/checkpoints") == 22


@pytest.mark.full
def test_native_code_that_aborts_is_still_heard(start):
    """What it wrote comes through; only the page about a lost process becomes a line, however quickly the abort follows."""
    code = """
import ctypes, os
from cnnfamily import processes
processes._NativeErrors()
os.write(2, (b"JAX distributed service detected fatal errors", b"Check failed: 1 == 2")[int(os.environ["JAX_PROCESS_ID"])])
ctypes.CDLL(None).abort()
"""
    lost, broken = ends(start(2, "-c", code))
    assert lost[0] == 1
    assert lost[2] == "PeerLost: another process of this run has died; the same command goes on\n"
    assert (broken[0], broken[2]) == (-signal.SIGABRT, "Check failed: 1 == 2")


@pytest.mark.full
def test_a_second_ctrl_c_ends_at_once_even_while_another_process_hangs(start, tmp_path):
    """The second process stands still, so the first waits for it in native code, where Python hears no signal."""
    first, second = start(2, STRUCK, 1, "step", 5, int(signal.SIGSTOP), *arguments(tmp_path / "run"))
    deadline = time.monotonic() + 120
    while not os.waitid(os.P_PID, second.pid, os.WSTOPPED | os.WNOHANG):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline, "no fifth step within two minutes"
        time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert first.poll() is None, "the first signal waits for the step"
    first.send_signal(signal.SIGINT)
    status, _, err = ends([first], within=20)[0]
    assert (status, len(said(err))) == (130, 1), err
    assert said(err)[0].startswith("Interrupted: SIGINT: ended at once")


@pytest.mark.full
def test_ctrl_c_ends_a_process_whose_peer_does_not_come(start, tmp_path):
    """JAX waits for it in native code, for five minutes."""
    first, second = start(2, "-m", "cnnfamily.train", *arguments(tmp_path / "run"))
    second.kill()
    deadline = time.monotonic() + 60
    with socket.socket() as coordinator:
        while coordinator.connect_ex(("localhost", first.port)):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline, "no coordinator within a minute"
            time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signal.SIGINT)
    status, _, err = ends([first], within=20)[0]
    assert (status, len(said(err))) == (130, 1), err
    assert said(err)[0].startswith("Interrupted: SIGINT: ended at once")


@pytest.mark.full
def test_a_signal_while_compiling_ends_at_once(start, tmp_path):
    command = ["-u", "-m", "cnnfamily.train", "--config=configs/efficientnet_b0.py:digits", f"--workdir={tmp_path / 'run'}"]
    (process,) = start(1, *command, env=NO_CACHE)
    while process.stdout.readline() != "compiling ...\n":
        assert process.poll() is None, process.communicate()
    time.sleep(1)  # it takes half a minute
    process.send_signal(signal.SIGTERM)
    status, out, err = ends([process], within=20)[0]
    assert (status, len(said(err))) == (143, 1), err
    assert said(err)[0].startswith("Interrupted: SIGTERM: ended at once")
    assert "compiling:" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': expected a whole number of 1 or more"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID='': expected a whole number of 0 or more"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_PROCESS_ID=2"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "expected a process below the number, and HOST:PORT"),
    ],
)
def test_wrong_variables_are_usage_errors(variables, expected, monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UsageError, match=expected):
        processes.initialize()


# What several processes rest on, on the devices of one.


@pytest.mark.full  # test_step.py has it of EfficientNet's blocks, after twenty steps
@pytest.mark.parametrize("group", [0, 2])
def test_batch_statistics_are_equal_on_all_devices(group, x64):
    """With the whole batch, and with groups of which each device holds two: nothing need be averaged before an evaluation."""
    network, optimizer, mesh = small_network(norm_group=group), optax.sgd(0.05), mesh_of(4)
    state = create_state(initialize(network, jax.random.key(1), resolution=8), optimizer, ema=True)
    state, update = parallel.replicate(state, mesh), update_of(network, mesh, optimizer, ema_decay=0.9)
    for step in range(3):
        state, _ = jax.block_until_ready(update(state, parallel.place(batch_of(step, 1), mesh, batch_axis=1), {}))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 4
        assert all(np.array_equal(shards[0], shard) for shard in shards), jax.tree_util.keystr(path)


def test_every_test_example_counts_once_on_any_number_of_devices(finished):
    """360 examples in batches of 100, 102 on three devices: the last one is padded, and its padding counts nothing."""
    config = short_config(ema__decay=0.95, evaluate__batch_size=100)
    network, state, _ = evaluate.load_state(finished[0], which="newest")
    data, figures = feed.load_data(config), []
    for devices in (1, 3, 4):
        mesh = mesh_of(devices)
        placed = parallel.replicate(state, mesh)
        evaluator = evaluate.make_evaluator(network, feed.TestFeed(data, config, mesh), placed)
        figures.append(evaluate.evaluate_state(evaluator, placed))
    for figure in figures:
        assert figure["test_examples"] == figure["ema_test_examples"] == 360
        assert figure["test_top1"] == figures[0]["test_top1"]
        assert figure == pytest.approx(finished[1].metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "numbers"),
    [(form, (1, 2)) for form in ("example", "subset")],
)
@pytest.mark.full  # half a minute; in the suite one process has them on two and eight devices (test_step.py)
def test_two_processes_make_the_same_random_choices(form, numbers, start, x64, tmp_path):
    """Two devices each, in so many micro-batches, against one process with one: as the running step recorded them."""
    file, script = tmp_path / "choices.npz", Path(recorded.__file__)
    ours = ends(start(2, script, file, form, 4, *numbers, devices=2))
    assert [(status, said(err)) for status, _, err in ours] == [(0, []), (0, [])]
    state, steps, _ = twenty_steps(form, 4, 1, 1)
    expected, found = recorded.flat(state, steps), np.load(file)
    assert {f"{micro_batches} {name}" for micro_batches in numbers for name in expected} == set(found.files)
    assert sum(name.startswith("choice") for name in expected) == 20 * 8
    for micro_batches, (name, value) in itertools.product(numbers, expected.items()):
        other = found[f"{micro_batches} {name}"]
        if name.startswith("choice"):
            np.testing.assert_array_equal(other, value, err_msg=name)
        else:
            assert np.abs(other - value).max() <= 1e-9 * max(np.abs(value).max(), 1e-6), name
