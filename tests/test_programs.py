"""Compiled programs on disk: the second start reads them, to the same bits, and nothing about them can end a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from conftest import UNOPTIMISED_PROCESS

from cnnfamily import config as configs
from cnnfamily import programs, runlog, train
from cnnfamily.study import load_study

pytestmark = pytest.mark.skipif(jax.__version_info__ < programs._QUIET, reason="programs are not kept with this JAX")
SMOKE = "configs/lenet5_digits.py:smoke"
# As in a notebook, with a program of one's own afterwards; JAX counts what it finds and what it compiles.
CODE = """
import json, sys
import jax, cnnfamily
from cnnfamily import programs
counts = {}
jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
settings = lambda: [getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs")]
before = settings()
cnnfamily.run_training(cnnfamily.load_config(sys.argv[1], json.loads(sys.argv[3])), sys.argv[2], quiet=True)
assert settings() == before
inside = counts.copy()
jax.jit(lambda x: x + len(sys.argv))(1)  # a program of one's own
assert counts.get("/jax/compilation_cache/cache_misses") == inside.get("/jax/compilation_cache/cache_misses")
print(json.dumps([inside.get(f"/jax/compilation_cache/cache_{name}", 0) for name in ("hits", "misses")]))
"""


def start(tmp_path, name, **overrides):
    """A run in a process of its own, whose user has the cache directory: (hits, misses), standard error, its log."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | UNOPTIMISED_PROCESS
    command = [sys.executable, "-c", CODE, SMOKE, str(tmp_path / name), json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    rows = runlog.read_metrics(tmp_path / name)
    for row in rows:
        row.pop("timing", None)
    return json.loads(done.stdout), done.stderr, rows


def entries(tmp_path):
    return sorted((tmp_path / "cache/cnnfamily/programs").glob("*/*-cache"))


@pytest.mark.full  # what the command keeps, test_untraced.py
def test_a_second_start_reads_what_the_first_has_compiled_to_the_same_bits(tmp_path):
    (_, written), said, expected = start(tmp_path, "first")
    assert said == ""
    assert len(entries(tmp_path)) == written > 10
    second, said, rows = start(tmp_path, "second")
    assert (second[1], said, rows) == (0, "", expected)
    assert second[0] >= written

    # An entry that a crash or a full disk has cut short is said in one line, and replaced.
    damaged = next(entry for entry in entries(tmp_path) if entry.name.startswith("jit_train_step"))
    whole = damaged.stat().st_size
    damaged.write_bytes(damaged.read_bytes()[: whole // 2])
    (_, misses), said, rows = start(tmp_path, "third")
    assert (misses, len(said.splitlines()), rows) == (1, 1, expected)
    assert said.startswith(f"warning: reading compiled programs in {damaged.parent} failed, jit_train_step is compiled anew: ")
    assert damaged.stat().st_size > 0.9 * whole


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without settings for JAX, in this process; the suite has some."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    programs.compilation_cache.reset_cache()
    yield tmp_path / "cnnfamily/programs"
    jax.config.update("jax_compilation_cache_dir", before)
    programs.compilation_cache.reset_cache()


def test_settings_last_as_long_as_the_context(home):
    before = jax.config.jax_compilation_cache_dir
    with programs.kept():
        inside = Path(jax.config.jax_compilation_cache_dir)
        assert inside.parent == home
        assert inside.stat().st_mode & 0o777 == 0o700
        with programs.kept():
            assert jax.config.jax_compilation_cache_dir == str(inside)
        with programs.kept(configs.load_config(SMOKE, {"keep_programs": False})):
            assert not jax.config.jax_enable_compilation_cache
        assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir == before


def test_this_suite_leaves_the_user_s_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with programs.kept(configs.load_config(SMOKE)):
        assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/none", "file"])
def test_a_folder_that_cannot_be_written_costs_a_line(home, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    with programs.kept():
        assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: compiled programs are not kept: {tmp_path / place}/cnnfamily/programs: N")
    assert said.count("\n") == 1


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_full_or_closed_disk_costs_a_line(home, monkeypatch, capsys, fault):
    def refuse(**_):
        raise fault

    monkeypatch.setattr(programs.tempfile, "TemporaryFile", refuse)
    with programs.kept():
        assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err == f"warning: compiled programs are not kept: {home}: {fault.strerror}\n"


def test_a_disk_that_fills_meanwhile_costs_a_line(home, monkeypatch, capsys, recwarn):
    """The program runs all the same, and what was written of it in part is gone."""

    def put(self, key, value):
        (self.path / f"{key}-cache").write_bytes(value[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax._src.lru_cache.LRUCache.put", put)
    with programs.kept():
        programs.warnings.simplefilter("always")
        assert [int(jax.jit(lambda x, n=n: 5 * x + n)(1)) for n in (1, 2)] == [6, 7]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "writing compiled programs in" in said
    assert said.endswith("No space left on device\n")
    assert not list(home.glob("*/*-cache"))


def test_other_warnings_are_shown_as_before(home, recwarn):
    with programs.kept():
        programs.warnings.simplefilter("always")
        programs.warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["another"]


def test_the_folder_does_not_grow_without_bound(tmp_path):
    """What was used last stays, whatever machine's it is."""
    now = time.time()
    for age, name in enumerate(["a/new", "b/read", "a/older", "b/oldest"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        written = now - 1000 * (9 if name == "b/read" else age)
        os.utime(path, (now - 1000 * age, written))
    programs.prune(tmp_path, limit=400)
    assert len(list(tmp_path.glob("*/*"))) == 4
    programs.prune(tmp_path, limit=250)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["new", "read"]


def test_cores_and_features_have_folders_of_their_own(monkeypatch):
    here = programs.machine()
    assert programs.machine() == here
    found = {here}
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)))
        found.add(programs.machine())
    monkeypatch.setenv("NPROC", "3")
    found.add(programs.machine())
    monkeypatch.setattr(programs.platform, "processor", lambda: "another")
    found.add(programs.machine())
    assert len(found) == (4 if hasattr(os, "sched_getaffinity") else 3)


def test_a_relative_or_missing_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert programs.folder_of_programs() == tmp_path / ".cache/cnnfamily/programs"


def test_keeping_programs_is_no_part_of_a_run_s_identity(tmp_path, finished):
    """A run goes on and a row of a study is the same with another value, and without the key, as from before."""
    workdir, _ = finished
    config = runlog.read_config(workdir)
    with config.unlocked():
        config.keep_programs = False
    runlog.check(workdir, config)
    with config.unlocked():
        del config.keep_programs
    runlog.check(workdir, config)
    assert train.run_training(config, workdir, quiet=True).step == 88
    study = "experiments/lenet_width/sweep.py"
    hashes = [[row.hash for row in load_study(study, {"keep_programs": keep}).rows] for keep in (True, False)]
    assert hashes[0] == hashes[1]
    with programs.kept(config):
        pass


# What is imported only where it is used.
HEAVY = (
    "matplotlib",
    "scipy",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "torch",
    "h5py",
    "pandas",
    "torchvision",
)
CHECKPOINTS = ("orbax", "tensorstore", "optax", "PIL", "safetensors")


IMPORTS = {  # one process has one line after the other, and what it must not have loaded after each
    "import cnnfamily": {*HEAVY, *CHECKPOINTS, "jax", "numpy", "flax"},
    "cnnfamily.create_model('efficientnet_b0')": {*HEAVY, *CHECKPOINTS},
    "import cnnfamily.train, cnnfamily.evaluate, cnnfamily.predict": {*HEAVY},
}


def test_what_is_not_used_is_not_imported():
    code = "".join(f"{line}\nprint(*sys.modules)\n" for line in IMPORTS)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    for (line, absent), loaded in zip(IMPORTS.items(), done.stdout.splitlines(), strict=True):
        assert "cnnfamily" in loaded.split()
        assert not absent & set(loaded.split()), line


@pytest.mark.full
def test_training_imports_no_more_up_to_its_first_step(tmp_path):
    code = (
        "import sys, cnnfamily\nfrom cnnfamily import train\n"
        f"def update(*_):\n    print(*sys.modules)\n    sys.exit()\ntrain.Report.update = update\n"
        f"cnnfamily.run_training(cnnfamily.load_config('configs/lenet5_digits.py'), {str(tmp_path / 'run')!r}, quiet=True)"
    )
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "orbax" in loaded
    assert not loaded & set(HEAVY)
