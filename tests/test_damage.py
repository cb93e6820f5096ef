"""Damaged files, and a disk that is full, read-only or gone: one line, nothing believed that is not whole, and it goes on."""

import asyncio
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import short_config
from test_checkpoint import state_at
from test_train import assert_equal_states, final_state, lines_without_timing

from cnnfamily import checkpoint, disk, errors, evaluate, runlog, train
from cnnfamily.boards import TensorBoard
from cnnfamily.checkpoint import Checkpoints
from cnnfamily.errors import UsageError

CONFIG = {"ema__decay": 0.95}  # of the `finished` run


def flip(path, seed=0):
    """Flips one bit of one byte at a seeded place."""
    content, places = bytearray(path.read_bytes()), random.Random(f"{path.name}{seed}")
    content[places.randrange(len(content))] ^= 1 << places.randrange(8)
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of one's own, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def steps(tmp_path):
    """Checkpoints 3 (the best), 4 and 5."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, rank in ((3, 0.9), (4, 0.2), (5, 0.5)):
            checkpoints.save(state_at(step), [], rank)
    return tmp_path / "checkpoints"


@pytest.fixture
def largest_file():
    """A function that limits the size of files, in bytes; without an argument it lifts the limit. It stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit()


def step_of(directory, which="newest"):
    state = checkpoint.restore_state(directory, state_at(0), which=which)
    np.testing.assert_array_equal(state.params["w"], np.full(3, float(state.step)))
    return int(state.step)


# Damage


def test_a_flipped_byte_a_truncation_and_a_deletion_are_found_in_every_file(run):
    folder = run / "checkpoints" / "88"
    # Orbax writes this one after the digests, and nobody reads it: see the next test.
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "commit_success.txt"]
    assert len(files) >= 15
    assert disk.damage(folder) is None
    for path in files:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        flip(path, len(name))
        assert disk.damage(folder) == f"{name} has changed"
        path.write_bytes(content)
        truncate(path)
        assert disk.damage(folder) == f"{name} has changed"
        path.unlink()
        assert disk.damage(folder) == f"{name} is missing"
        path.write_bytes(content)
    for name in ("_METADATA", "manifest.ocdbt"):
        truncate(folder / "state" / name)
    assert disk.damage(folder).endswith("and 1 more")


def test_the_file_without_a_digest_is_of_no_consequence(steps):
    flip(steps / "5" / "commit_success.txt")
    assert step_of(steps) == 5
    (steps / "5" / "commit_success.txt").unlink()
    assert (checkpoint.newest_step(steps), step_of(steps)) == (5, 5)


def test_readers_take_the_newest_good_one_say_so_and_move_nothing(steps, capsys):
    flip(steps / "5" / "state" / "manifest.ocdbt")
    before = tree(steps.parent)
    assert (step_of(steps), checkpoint.newest_step(steps)) == (4, 4)
    line = f"checkpoint 5 in {steps} is damaged: state/manifest.ocdbt has changed; taking step 4\n"
    assert capsys.readouterr().err == line
    assert step_of(steps, "best") == 3
    assert capsys.readouterr().err == ""
    assert tree(steps.parent) == before


@pytest.mark.parametrize("name", ["metrics/metrics", "_CHECKPOINT_METADATA", "state/_METADATA", "digests.json"])
def test_a_damaged_best_one_gives_place_to_the_next(name, steps, capsys):
    truncate(steps / "3" / name)
    assert step_of(steps, "best") == 5
    assert f"checkpoint 3 in {steps} is damaged: {name} has changed; taking step 5" in capsys.readouterr().err


def test_without_a_good_one_it_is_one_line_and_nothing_is_moved(steps):
    for step in ("3", "4", "5"):
        (steps / step / "pending" / "metadata").unlink()
    before = tree(steps.parent)
    for use in (Checkpoints, checkpoint.newest_step, step_of):
        with pytest.raises(UsageError, match=r"damaged: 5 \(pending/metadata is missing\), 4 .*; put a copy back or"):
            use(steps)
    assert tree(steps.parent) == before


def test_checkpoints_that_cannot_be_read_are_one_line(steps, monkeypatch):
    """Root may read everything, so the error is made."""
    monkeypatch.setattr(checkpoint, "_entries", lambda directory: os.listdir(directory / "5" / "_CHECKPOINT_METADATA"))
    for use in (Checkpoints, checkpoint.newest_step, step_of):
        with pytest.raises(UsageError, match="_CHECKPOINT_METADATA cannot be read: Not a directory"):
            use(steps)


def test_what_is_no_checkpoint_does_not_matter(steps, capsys):
    (steps / "99" / "state").mkdir(parents=True)
    (steps / "120").write_text("")
    (steps / "0100").mkdir()
    (steps / "notes").mkdir()
    shutil.copytree(steps / "5", steps / "6.orbax-checkpoint-tmp")
    assert (checkpoint.newest_step(steps), step_of(steps)) == (5, 5)
    with Checkpoints(steps) as checkpoints:
        assert (checkpoints.newest, checkpoints.best) == (5, 3)
        checkpoints.save(state_at(6), [], 0.1)
    assert step_of(steps) == 6
    assert {path.name for path in steps.iterdir()} == {"3", "5", "6", "0100", "notes"}
    assert capsys.readouterr().err == ""


def test_a_damaged_step_is_saved_again_and_the_damaged_one_stays_beside(steps, capsys):
    for again in ("5", "5.1"):
        flip(steps / "5" / "state" / "_METADATA")
        damaged = (steps / "5" / "state" / "_METADATA").read_bytes()
        with Checkpoints(steps) as checkpoints:
            assert (checkpoints.newest, checkpoints.best) == (4, 3)
            checkpoints.save(state_at(5), [], 0.5)
        assert disk.damage(steps / "5") is None
        assert step_of(steps) == 5
        assert (steps.parent / "damaged" / again / "state" / "_METADATA").read_bytes() == damaged
        assert f"has changed; moved to {steps.parent / 'damaged' / again}, going on from step 4\n" in capsys.readouterr().err


def test_a_save_that_orbax_refuses_is_no_silence(steps):
    with Checkpoints(steps) as checkpoints, pytest.raises(AssertionError, match="refuses to save step 4, the newest is 5"):
        checkpoints.save(state_at(4), [], 0.5)


def test_digests_are_of_what_orbax_wrote_last(tmp_path):
    """Its metadata is written by a thread of its own; and a folder that came anew meanwhile is no checkpoint."""

    def folder(step):
        late = types.SimpleNamespace(
            wait_until_finished=lambda: (tmp_path / f"{step}.orbax-checkpoint-tmp/late").write_text("")
        )
        return checkpoint._SealedFolder.from_final(tmp_path / str(step), checkpoint_metadata_store=late)

    async def save(step, meanwhile):
        path = folder(step)
        meanwhile(await path.create())
        await path.finalize()

    tmp_path = checkpoint.ocp.path.step.epath.Path(tmp_path)
    asyncio.run(save(1, lambda made: None))
    assert "late" in json.loads((tmp_path / "1" / "digests.json").read_text())["files"]
    with pytest.raises(FileNotFoundError):
        asyncio.run(save(2, lambda made: (made.rename(tmp_path / "away"), made.mkdir())))
    assert not (tmp_path / "2").exists()


def test_a_run_with_a_damaged_checkpoint_ends_as_the_one_without(finished, run, monkeypatch, capsys):
    """It had finished; it is not finished any more. Its log is on the disk before each checkpoint is."""
    flip(run / "checkpoints" / "88" / "state" / "manifest.ocdbt")
    (run / "checkpoints" / "99").mkdir()
    calls, sync, save = [], runlog.RunLog.sync, Checkpoints.save
    monkeypatch.setattr(runlog.RunLog, "sync", lambda self: (calls.append("sync"), sync(self)))
    monkeypatch.setattr(Checkpoints, "save", lambda self, *state, **rank: (calls.append("save"), save(self, *state, **rank)))
    train.run_training(short_config(**CONFIG, checkpoint__every_steps=0), run)
    out, err = capsys.readouterr()
    assert "continues from step 66 of 88" in out
    assert err.startswith("checkpoint 88 is damaged: state/manifest.ocdbt has changed; moved to ")
    assert err.count("\n") == 1
    assert calls == ["sync", "save"]
    assert_equal_states(final_state(run), final_state(finished[0]))
    assert lines_without_timing(run) == lines_without_timing(finished[0])


# Faults of the disk


@pytest.mark.full
def test_a_run_through_a_full_disk_and_a_moved_directory_ends_as_the_one_without(
    finished, tmp_path, largest_file, monkeypatch, caplog
):
    def fault_at(wanted, fault):
        monkeypatch.setattr(train.Report, "update", lambda self, step, *figures: fault() if step == wanted else None)

    def train_on():
        return train.run_training(short_config(**CONFIG), tmp_path / "run", quiet=True)

    fault_at(30, lambda: largest_file(100_000))  # less than a checkpoint's largest file
    with pytest.raises(UsageError) as full:
        train_on()
    assert "checkpoint 44 in " in str(full.value)
    assert "cannot be written: File too large; the last checkpoint is from step 22, and the same" in str(full.value)
    assert not caplog.records
    largest_file()

    def move():
        while not (tmp_path / "run" / "checkpoints" / "44").exists():
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "away")

    fault_at(48, move)
    with pytest.raises(UsageError, match=r"metrics.jsonl cannot be written: No such file .*there is no checkpoint in"):
        train_on()
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    assert checkpoint.newest_step(tmp_path / "run" / "checkpoints") == 44

    fault_at(0, None)
    train_on()
    assert_equal_states(final_state(tmp_path / "run"), final_state(finished[0]))
    assert lines_without_timing(tmp_path / "run") == lines_without_timing(finished[0])


def test_checkpoints_that_vanish_are_not_made_anew(steps):
    vanished = pytest.raises(disk.DiskError, match=f"checkpoint 6 cannot be written: {steps} has vanished")
    with vanished, Checkpoints(steps) as checkpoints:
        steps.rename(steps.parent / "away")
        (steps / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # as TensorStore would, in the middle of a save
        checkpoints.save(state_at(6), [], 0.1)
    assert {path.name for path in steps.parent.iterdir()} == {"away"}


@pytest.mark.full
def test_a_folder_that_cannot_be_made_does_not_keep_the_process_waiting(steps):
    code = f"""import errno, os, pathlib, test_checkpoint
from cnnfamily import checkpoint
def mkdir(*path, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
with checkpoint.Checkpoints(pathlib.Path({str(steps)!r})) as checkpoints:
    os.mkdir = mkdir
    checkpoints.save(test_checkpoint.state_at(6), [], 0.5)"""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr.splitlines()[-1].endswith("cannot be written: No space left on device")


@pytest.mark.parametrize("name", [".lock", "manifest.json", "metrics.jsonl", "curves.png", "tensorboard", "checkpoints"])
def test_what_cannot_be_written_is_one_line(name, tmp_path):
    """Something else is in the way: also for root, who may write into a read-only folder."""
    runlog.claim(tmp_path, short_config())
    data = train.feed.load_data(short_config())
    way = tmp_path / (f"{name}.partial" if "." in name[1:] else name)
    way.write_text("") if name in ("tensorboard", "checkpoints") else way.mkdir()
    with (
        pytest.raises(UsageError) as error,
        checkpoint.resumable(tmp_path),
        runlog.exclusive(tmp_path),
        Checkpoints(tmp_path / "checkpoints"),
    ):
        runlog.write_manifest(tmp_path, config=short_config(), data=data, total_steps=88, first_step=0)
        with runlog.RunLog(tmp_path, from_step=0, boards=[TensorBoard]):
            runlog.draw_curves(tmp_path)
    assert f"{tmp_path / name} cannot be written: " in str(error.value)
    assert str(error.value).endswith(f"; there is no checkpoint in {tmp_path}, and the same command begins anew")


@pytest.mark.parametrize("board", [False, True])
def test_a_log_that_cannot_grow_keeps_its_lines(board, tmp_path, largest_file):
    """With TensorBoard files too, which are the larger ones: tensorboardX's SummaryWriter would wait forever."""
    full = pytest.raises(
        disk.DiskError, match=f"{'tensorboard' if board else 'metrics.jsonl'} cannot be written: File too large"
    )
    with full, runlog.RunLog(tmp_path, from_step=0, boards=[TensorBoard] if board else []) as log:
        for step in range(1, 1000):
            log.write(step, step / 10, {"train_loss": 1.0})
            if step == 20:
                largest_file(1500)
    largest_file()
    rows = runlog.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 20
    with runlog.RunLog(tmp_path, from_step=20) as log:
        log.write(21, 2.1, {"train_loss": 1.0})
    assert [row["step"] for row in runlog.read_metrics(tmp_path)] == list(range(1, 22))


# Damaged JSON


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_damaged_json_is_one_line_and_status_2(name, run, monkeypatch, capsys):
    def lines():
        for use in (lambda: evaluate.load_state(run, which="newest"), lambda: train.run_training(short_config(**CONFIG), run)):
            with pytest.raises(UsageError) as error:
                use()
            yield str(error.value)

    path = run / name
    content = path.read_text()
    for seed in range(25):
        flip(path, seed)
        assert all(name in line for line in lines())
        path.write_text(content)
    some = list(json.loads(content).items())[3:]
    for text in (
        "",
        content[:-3],
        content[:100],
        "{}",
        "[]",
        "3",
        "null",
        '"text"',
        "[1, 2]",
        json.dumps(dict(some)),
        "\0" * 99,
    ):
        path.write_text(text)
        assert all(name in line for line in lines())
    monkeypatch.setattr("sys.argv", ["evaluate", f"--workdir={run}"])
    with pytest.raises(SystemExit) as end:
        errors.run_command(evaluate.main)
    line = capsys.readouterr().err
    assert (end.value.code, line.count("\n")) == (2, 1)


def test_a_config_that_was_deleted_is_written_again_for_the_same_run_alone(run):
    content = (run / "config.json").read_bytes()
    (run / "config.json").unlink()
    with pytest.raises(UsageError, match=r"holds a run with another config, and no config\.json"):
        runlog.check(run, short_config(ema__decay=0.9))
    runlog.check(run, short_config(**CONFIG))
    runlog.claim(run, short_config(**CONFIG))
    assert (run / "config.json").read_bytes() == content


def test_damaged_lines_of_the_log_are_left_out_and_named(run, capsys):
    path, rows = run / "metrics.jsonl", runlog.read_metrics(run)
    lines = path.read_bytes().splitlines()
    damaged = [
        *lines[:2],
        lines[2].replace(b'"', b"\xff", 1),
        b"3",
        b'{"step": "x"}',
        *lines[3:],
        b"\0\0\0",
        b'{"step": 90, "epo',
    ]
    path.write_bytes(b"\n".join(damaged))
    assert runlog.read_metrics(run) == rows[:2] + rows[3:]
    assert capsys.readouterr().err == "".join(f"line {number} of {path} is damaged and left out\n" for number in (3, 4, 5))
    for seed in range(8):
        path.write_bytes(b"\n".join(lines))
        flip(path, seed)
        runlog.draw_curves(run)


def test_a_checkpoint_of_another_network_is_one_line(run):
    like = jax.tree.map(lambda leaf: leaf, state_at(0))
    with pytest.raises(UsageError, match="does not fit the network of this config"):
        checkpoint.restore_state(run / "checkpoints", like, which="newest")
