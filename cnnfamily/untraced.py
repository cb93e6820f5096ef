"""Compiled programs of an earlier start, found without tracing: by the command, and by the files of all code.

JAX finds a compiled program by what tracing and lowering make of the code; of EfficientNet-B0's step that takes as long as all
the rest of a second start. So the command notes down beside a program which files the modules of its process came from. A
later one with the same arguments, config, settings and modules reads the program at once, if each file has the size and times
of then. One of these times is, but on Windows, that of the last change of any kind (ctime), which copying and unpacking do not
set back; Python itself asks for less before it runs what it has once compiled of a file.

What nobody sees is what code in a config reads besides, if it changes how a step is traced: environment variables (other than
XLA's, JAX's and Flax's) and files of its own. `--config.keep_programs=False` traces whatever there is. A program that JAX's
cache has of a notebook, or of an evaluation alone, is traced at every start.

In the command alone, for in a notebook functions may have been replaced; in one process; on a CPU, for on others it was not
tried. Everything else is compiled as ever.
"""

import contextlib
import json
import os
import pickle
import sys
import threading
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered, Wrapped

import cnnfamily
from cnnfamily import disk, errors

_COMMAND = "cnnfamily.train"
_GRAIN = 0.1  # seconds: the clock of a local file system is behind by up to a hundredth
_ENVIRONMENT = ("XLA_", "JAX_", "FLAX_")


class Program:
    """One program of a run, which an earlier start may have left in `folder` (None: nothing is read or kept).

    `name` tells it from the command's others, and what is found under it is read in `aside` from now on. `given` is what it
    depends on besides code, settings and the shapes of its arguments. Both by their `repr`.
    """

    def __init__(self, folder: Path | None, aside: Executor, *name: object):
        self._aside, self._folder = aside, folder if _is_command() else None
        if self._folder:
            loaded = _loaded()
            self._states = _states(loaded)
            arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--workdir=")]
            named = name, arguments, sorted(loaded), _settings()
            self._record = self._folder / f"{disk.digest(repr(named))}.files"
            self._found = aside.submit(self._find)

    def compiled(self, jitted: Wrapped, *arguments: Any, given: object = None) -> Future[Compiled]:
        """`jitted.lower(*arguments).compile()`, or the same from an earlier start."""
        if not self._folder:
            return self._aside.submit(jitted.lower(*arguments).compile)
        before, found = self._found.result()
        if found and before == repr(given) and _takes(found, arguments):
            future = Future()
            future.set_result(found)
            return future
        return self._aside.submit(self._compile_and_keep, jitted.lower(*arguments), arguments, repr(given))

    def _find(self) -> tuple[str, Compiled | None]:
        try:
            record = json.loads(self._record.read_text())
            if record["files"] == _states(record["files"]):
                return record["given"], _read(self._folder / record["program"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
            pass
        return "", None

    def _compile_and_keep(self, lowered: Lowered, arguments: tuple, given: str) -> Compiled:
        """Compiles, unless an earlier start has compiled the same of other code; and keeps that, and of what files it is."""
        versions = jax.__version__, jaxlib.version.__version__
        program = self._folder / f"{disk.digest(repr((lowered.as_text(), versions, _settings())))}.program"
        compiled, data = _read(program), b""
        if not compiled or not _takes(compiled, arguments):
            compiled, fresh = _compile(lowered)
            data = _packed(compiled) if fresh else b""
            if not data:
                return compiled
        states = _states(_loaded())
        try:
            if data:
                _write(program, data)
            if _are_old(states) and _states(self._states) == self._states:
                _write(self._record, json.dumps({"files": states, "program": program.name, "given": given}).encode())
        except OSError as error:
            errors.warn(f"warning: {self._folder}: a compiled program is not kept: {disk.reason(error)}")
        return compiled


def _is_command() -> bool:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    is_command = specification is not None and specification.name == _COMMAND
    return is_command and jax.process_count() == 1 and jax.default_backend() == "cpu"


def _settings() -> tuple:
    """What a program depends on besides its code and arguments, in this process."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT))
    return sys.version, environment, sorted(jax.config.values.items()), jax.device_count()


def _loaded() -> set[str]:
    """The files that the modules of this process come from."""
    files = {getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values())}
    return {str(file) for file in files if file}


def _states(files: Iterable[str]) -> dict[str, list[int] | None]:
    """Of each file the size in bytes and, in nanoseconds, the times of the last writing and of the last change of any kind.

    None of what is no file, or no more.
    """
    states = {}
    for file in files:
        try:
            stat = os.stat(file)
            states[file] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        except (OSError, ValueError):
            states[file] = None
    return states


def _are_old(states: dict[str, list[int] | None]) -> bool:
    """Whether all are files, and from before this process began: another may not be what was loaded."""
    began = (cnnfamily.STARTED - _GRAIN) * 1e9
    return all(state and max(state[1:]) < began for state in states.values())


def _takes(compiled: Compiled, arguments: tuple) -> bool:
    """Whether it was compiled for arguments of this structure, these shapes and dtypes."""
    expected = [(x.shape, x.dtype) for x in jax.tree.leaves(compiled.in_avals)]
    found = [(x.shape, x.dtype) for x in jax.tree.leaves(arguments)]
    return compiled.in_tree == jax.tree.structure((arguments, {})) and found == expected


def _compile(lowered: Lowered) -> tuple[Compiled, bool]:
    """The compiled program, and whether it was compiled here and not read from JAX's cache.

    What jaxlib 0.10 has read it writes incomplete: "Function not found" when that runs.
    """
    here, hits = threading.get_ident(), []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == here:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        return lowered.compile(), not hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _packed(compiled: Compiled) -> bytes:
    """What `_read` takes; nothing of a program that calls back to Python, or whose trees have a type from inside a function."""
    try:
        devices = [device.id for device in compiled.runtime_executable().local_devices()]
        data = pickle.dumps((serialize_executable.serialize(compiled), devices))
    except Exception:  # each of these has another
        return b""
    return zlib.compress(data, 1)  # the first level: 0.1 s for 2.2 MB of 12, EfficientNet-B0's step on two Zen 3 cores


def _read(program: Path) -> Compiled | None:
    """The program in a file, None if there is none; one that cannot be read costs a line, and is deleted."""
    try:
        serialized, devices = pickle.loads(zlib.decompress(program.read_bytes()))
        by_id = {device.id: device for device in jax.devices()}
        return serialize_executable.deserialize_and_load(*serialized, execution_devices=[by_id[i] for i in devices])
    except FileNotFoundError:
        return None
    except Exception as error:  # of zlib, of pickle, of jaxlib: whatever a damaged file leads to
        errors.warn(f"warning: {program} cannot be read and is compiled anew: {errors.one_line(str(error))[:200]}")
        with contextlib.suppress(OSError):
            program.unlink()
        return None


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also where several processes write the same, which `disk.replacing` is not for."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
