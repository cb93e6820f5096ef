"""Compiled programs, kept on disk for the next start: EfficientNet-B0 on the digits compiles for 17 seconds on two cores."""

import contextlib
import glob
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from cnnfamily import disk, errors
from cnnfamily.models import onednn

# EfficientNet-B0 on the digits leaves 4.9 MB, half of it `untraced`'s: room for two hundred networks, and no burden on a home
# directory.
LIMIT_BYTES = 2**30
# JAX 0.10.0 writes two lines of 2,000 characters for each program that it reads on a CPU, and no setting of ours stops it.
_QUIET = (0, 10, 2)
_PROBLEM = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)", re.DOTALL)


@contextlib.contextmanager
def kept(config: ConfigDict | None = None) -> Iterator[Path | None]:
    """A context in which JAX reads compiled programs from a folder of the user's and writes new ones there: which is given.

    None is given where they are not kept, and where the user has set a folder.

    With `keep_programs` False in the config neither is done. What the user has set for JAX stays: a cache directory (in
    JAX_COMPILATION_CACHE_DIR or `jax.config`) is used as it is, and a cache that is turned off stays off. Afterwards the
    settings are as before. Programs that cannot be read or written cost one line on standard error, and their compilation.
    """
    # Without a config it is for published weights; one of a run from before has no such key.
    if config is not None and not config.get("keep_programs", True):
        with not_kept():
            yield None
        return
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir or jax.__version_info__ < _QUIET:
        yield None
        return
    try:
        folder = _prepare()
    except (OSError, RuntimeError) as error:  # no home directory is a RuntimeError
        _warn(f"compiled programs are not kept: {errors.one_line(str(error))}")
        yield None
        return
    settings = {"jax_compilation_cache_dir": str(folder)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX leaves out what compiles within a second, which is most of a small network: LeNet-5 on the digits took 18 s of CPU
        # time without a cache, 8.2 with JAX's threshold and 6.8 with none.
        settings["jax_persistent_cache_min_compile_time_secs"] = 0.0
    with _settings(settings), _one_line(folder):
        yield folder


@contextlib.contextmanager
def by_onednn(in_what: str) -> Iterator[None]:
    """For tracing and compiling: convolutions by oneDNN (`onednn.used`), and no cache on disk, which would not take them."""
    with not_kept(), onednn.used(in_what):
        yield


def not_kept() -> contextlib.AbstractContextManager:
    """A context in which programs are neither read from disk nor written, whatever the settings."""
    return _settings({"jax_enable_compilation_cache": False})


def folder_of_programs() -> Path:
    """Where the programs of this user lie, for every machine a folder; the XDG standard ignores a relative XDG_CACHE_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "cnnfamily" / "programs"


def machine() -> str:
    """What a program is compiled for and JAX's key of it leaves out: a name for a folder.

    The features of the CPU are in no key before JAX 0.12, and a home directory may be shared by unlike machines. The number of
    threads XLA's compiler divides the work by, and with it the last bits: with the programs of one core, two cores trained
    EfficientNet-B0 to another loss than with their own, and one core with those of two took 197 ms a step instead of 124.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = [platform.machine(), platform.processor(), os.environ.get("NPROC", ""), os.environ.get("PJRT_NPROC", "")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        # The first core's, on x86 and on ARM.
        for name in ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features"):
            described += [line for line in lines if line.partition(":")[0].strip() == name][:1]
    return f"{cores}_cores-{jax.local_device_count()}_devices-{disk.digest(repr(described))[:12]}"


def prune(folder: Path, limit: int = LIMIT_BYTES) -> None:
    """Deletes the files under `folder` that were used longest ago until `limit` bytes are left.

    JAX's own limit needs the package `filelock` and looks at every entry whenever it writes one; before 0.12 a single entry
    that a crash left half made ends its writing for good. A file system tells the last use to a day, or (noatime) the age.
    """
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process deletes too
            if path.is_file():
                stat = path.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in found) - limit
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        excess -= size


def _prepare() -> Path:
    """This machine's folder, which exists and can be written, its neighbours pruned."""
    root = folder_of_programs()
    try:
        folder = root / machine()
        # For nobody else: who can write a program here can run it in this user's name.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk has room for a name, not for this
            file.flush()
    except OSError as error:
        raise OSError(f"{root}: {disk.reason(error)}") from error
    if jax.process_index() == 0:
        prune(root)
    return folder


@contextlib.contextmanager
def _settings(values: dict[str, object]) -> Iterator[None]:
    """JAX's configuration with these values; its cache, which is opened at the first program, is opened anew for them."""
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Says in one line what JAX warns of for every program, and deletes what was written in part.

    JAX never replaces an entry: one that a crash or a full disk cut short would be compiled anew at every start.
    """
    show, said = warnings.showwarning, set()

    def replacement(message, category, *where):
        problem = _PROBLEM.match(str(message))
        if not problem:
            show(message, category, *where)
            return
        action, name, reason = problem.groups()
        for entry in folder.glob(f"{glob.escape(name)}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        if action not in said:
            _warn(f"{action} compiled programs in {folder} failed, {name} is compiled anew: {errors.one_line(reason)[:200]}")
        said.add(action)

    warnings.showwarning = replacement
    try:
        yield
    finally:
        if warnings.showwarning is replacement:
            warnings.showwarning = show


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        errors.warn(f"warning: {text}")
