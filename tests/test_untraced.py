"""A second start of the command reads its programs without tracing, and never one of other code."""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import UNOPTIMISED_PROCESS

import cnnfamily
from cnnfamily import programs, runlog, untraced
from cnnfamily.config import load_config
from cnnfamily.parallel import local_mesh, map_over_devices

pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < programs._QUIET, reason="programs are not kept with this JAX"),
    pytest.mark.usefixtures("on_cpu"),
]
# A user's config that changes code of ours; the targets of the loss are made where a step is traced and nowhere else.
CONFIG = """
from cnnfamily import losses
from configs import lenet5_digits

def smooth(*arguments, plain=losses.smooth):
    print("traced")
    return {factor} * plain(*arguments)

losses.smooth = smooth

def get_config(arg):
    return lenet5_digits.get_config("smoke")
"""


def start(tmp_path, name, *options):
    """How often the command traced a step, and its log."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | UNOPTIMISED_PROCESS
    command = [sys.executable, "-m", "cnnfamily.train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / name}"]
    environment = clean | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = runlog.read_metrics(tmp_path / name)
    for row in rows:
        row.pop("timing", None)
    return done.stdout.count("traced"), rows


@pytest.mark.parametrize("changed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_command_traces_nothing_the_second_time_and_all_when_a_file_has_changed(changed, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(CONFIG.format(factor=1))
    time.sleep(0.3)  # a file as young as the process is not trusted
    traced, expected = start(tmp_path, "first")
    assert traced == 1
    assert start(tmp_path, "second") == (0, expected)

    if not changed:
        return
    # Of the same size, and by its time of writing as old.
    times = config.stat().st_atime_ns, config.stat().st_mtime_ns
    config.write_text(CONFIG.format(factor=2))
    os.utime(config, ns=times)
    traced, rows = start(tmp_path, "third")
    assert traced == 1
    assert rows[0]["train_loss"] == pytest.approx(2 * expected[0]["train_loss"], rel=0.2)


@pytest.fixture
def start_here(tmp_path, monkeypatch):
    """A function that is one start of the command: what a step of it gives, whether it was traced, and what is kept then."""
    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(untraced, "_is_command", lambda: True)
    monkeypatch.setattr(untraced, "_loaded", lambda: {str(code)})
    monkeypatch.setattr(cnnfamily, "STARTED", time.time() + 60)
    folder = tmp_path / "programs"
    folder.mkdir()

    own = uuid.uuid4().int % 2**30  # in no program of another test, which JAX's cache would have

    def start(x=(1.0, 2.0), factor=3.0, of="a config", given=1, **names):
        traced, x = [], {names.get("taken", "x"): jnp.asarray(x)}

        def step(x):
            traced.append(x)
            (x,) = x.values()
            return {names.get("given", "y"): x * factor + len(str(tmp_path)), "own": own}

        with ThreadPoolExecutor(2) as aside:
            compiled = untraced.Program(folder, aside, of).compiled(jax.jit(step), x, given=given).result()
        (x,), y = x.values(), np.asarray(compiled(x)[names.get("given", "y")])
        np.testing.assert_array_equal(y, np.asarray(x, y.dtype) * factor + len(str(tmp_path)))
        return len(traced), *(len(list(folder.glob(f"*.{kind}"))) for kind in ("files", "program"))

    start.code, start.folder, start.monkeypatch = code, folder, monkeypatch
    return start


def test_a_program_is_found_by_what_it_depends_on(start_here):
    assert start_here() == (1, 1, 1)
    assert start_here() == (0, 1, 1)
    assert start_here(of="another") == (1, 2, 1)  # traced, to the same program
    assert start_here(of="another") == (0, 2, 1)
    assert start_here(of="another", given=2) == (1, 2, 1)
    assert start_here(of="another", given=2) == (0, 2, 1)
    assert start_here(x=(1.0, 2.0, 3.0)) == (1, 2, 2)  # the same name, which now is that of the other
    assert start_here(x=np.asarray([1.0, 2.0], np.float16)) == (1, 2, 3)


@pytest.mark.parametrize("names", [{"taken": "z"}, {"given": "z"}])
def test_a_program_of_other_names_is_not_taken(start_here, names):
    """Though its text may be the same: that of an argument is in none."""
    assert start_here()[0] == 1
    assert start_here(**names)[0] == 1
    assert start_here(of="another", **names)[0] == 1


def test_other_settings_are_traced_anew(start_here):
    assert start_here() == (1, 1, 1)
    for name in ("XLA_ANY", "FLAX_ANY"):
        start_here.monkeypatch.setenv(name, "1")
        assert start_here()[0] == 1
        start_here.monkeypatch.delenv(name)
        assert start_here()[0] == 0
    start_here.monkeypatch.setattr(sys, "argv", [sys.argv[0], "--config=mine.py:2", "--workdir=here"])
    assert start_here() == (1, 2, 1)
    start_here.monkeypatch.setattr(sys, "argv", [sys.argv[0], "--config=mine.py:2", "--workdir=there"])
    assert start_here() == (0, 2, 1)
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert start_here()[0] == 1
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize("change", ["written", "written with its old time", "touched", "gone"])
def test_a_file_that_has_changed_is_traced_anew(start_here, change):
    assert start_here() == (1, 1, 1)
    state = start_here.code.stat()
    if change == "gone":
        start_here.code.unlink()
        assert start_here(factor=4.0) == (1, 1, 2)
        return
    elif change == "touched":
        os.utime(start_here.code, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    else:
        time.sleep(0.05)  # more than a tick of the clock of files
        start_here.code.write_text("2")
        if change != "written":
            os.utime(start_here.code, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert start_here(factor=4.0) == (1, 1, 2)
    assert start_here(factor=4.0) == (0, 1, 2)


def test_with_a_module_more_or_less_all_is_traced_anew(start_here, tmp_path):
    code, other = str(start_here.code), tmp_path / "other.py"
    other.write_text("")
    assert start_here() == (1, 1, 1)
    start_here.monkeypatch.setattr(untraced, "_loaded", lambda: {code, str(other)})
    assert start_here() == (1, 2, 1)
    assert start_here() == (0, 2, 1)
    start_here.monkeypatch.setattr(untraced, "_loaded", lambda: {str(other)})
    assert start_here() == (1, 3, 1)


def test_a_module_of_no_file_is_not_trusted(start_here):
    start_here.monkeypatch.setattr(untraced, "_loaded", lambda: {str(start_here.code), "archive.zip/module.py"})
    assert start_here() == (1, 0, 1)


def test_a_file_that_changes_while_a_step_is_compiled_is_not_trusted(start_here, monkeypatch):
    """Even by a clock that is behind."""

    def compile_and_edit(lowered, compile_it=untraced._compile):
        os.utime(start_here.code, ns=(0, 0))
        return compile_it(lowered)

    monkeypatch.setattr(untraced, "_compile", compile_and_edit)
    assert start_here() == (1, 0, 1)


def test_a_program_that_calls_back_to_python_is_compiled_as_ever(start_here, tmp_path):
    def step(x):
        jax.debug.print("{x}", x=x)
        return x + 1

    with ThreadPoolExecutor(2) as aside:
        compiled = untraced.Program(start_here.folder, aside, "step").compiled(jax.jit(step), jnp.ones(3)).result()
    np.testing.assert_array_equal(compiled(jnp.ones(3)), [2, 2, 2])
    assert not list(start_here.folder.iterdir())


def test_a_file_that_changed_since_the_start_is_not_trusted(start_here):
    start_here.monkeypatch.setattr(cnnfamily, "STARTED", start_here.code.stat().st_ctime)
    assert start_here() == (1, 0, 1)
    assert start_here() == (1, 0, 1)
    start_here.monkeypatch.setattr(cnnfamily, "STARTED", start_here.code.stat().st_ctime + 1)
    assert start_here() == (1, 1, 1)
    assert start_here() == (0, 1, 1)


def test_what_came_from_jax_s_cache_is_not_written_again(start_here):
    """jaxlib 0.10 leaves functions out of it, which are missed only when it runs."""
    assert start_here() == (1, 1, 1)
    for file in start_here.folder.iterdir():
        file.unlink()
    assert start_here() == (1, 0, 0)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], lambda data: b""]
)
def test_a_damaged_program_costs_a_line(start_here, capsys, damage):
    start_here()
    (program,) = start_here.folder.glob("*.program")
    program.write_bytes(damage(program.read_bytes()))
    assert start_here() == (1, 1, 0)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {program} cannot be read and is compiled anew: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {}}', '{"files": 1, "program": 2}'])
def test_a_damaged_record_is_traced_anew(start_here, text):
    start_here()
    (record,) = start_here.folder.glob("*.files")
    record.write_text(text)
    assert start_here() == (1, 1, 1)
    assert json.loads(record.read_text())["files"].keys() == {str(start_here.code)}


def test_a_full_disk_costs_a_line(start_here, monkeypatch, capsys):
    def refuse(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(untraced, "_write", refuse)
    assert start_here() == (1, 0, 0)
    said = capsys.readouterr().err
    assert said == f"warning: {start_here.folder}: a compiled program is not kept: No space left on device\n"


def test_elsewhere_than_in_the_command_nothing_is_read_or_kept(start_here):
    start_here()
    start_here.monkeypatch.setattr(untraced, "_is_command", lambda: False)
    assert start_here() == (1, 1, 1)
    start_here.monkeypatch.undo()
    assert not untraced._is_command()


def test_config_files_of_one_name_are_all_among_the_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lenet5_digits.py").write_text("from configs.lenet5_digits import get_config")
        load_config(f"{tmp_path / folder / 'lenet5_digits.py'}:smoke")
    assert {str(tmp_path / folder / "lenet5_digits.py") for folder in ("a", "b")} <= untraced._loaded()


def test_which_arguments_a_step_uses_is_in_its_text():
    """JAX leaves out the others, unless told not to; of two equal texts the second is given the first one's program."""

    def text(used):
        batch = {name: jax.ShapeDtypeStruct((8,), jnp.int32) for name in ("index", "position")}
        mapped = map_over_devices(lambda state, batch, store: state + batch[used].sum(), local_mesh(), batch_axis=0, outputs=1)
        return mapped.lower(jax.ShapeDtypeStruct((), jnp.int32), batch, {}).as_text()

    assert text("index") != text("position")
