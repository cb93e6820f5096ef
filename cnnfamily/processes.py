"""The processes of one run: how they find each other, and how all of them end when one of them does.

Under `srun` or `mpirun` every process runs the same command and finds the others by itself. By hand, every process is given
JAX_COORDINATOR_ADDRESS (host:port of process 0, any free port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Elsewhere (Cloud TPU,
Kubernetes) CNNFAMILY_DISTRIBUTED=1 leaves it to JAX's own detection.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from cnnfamily import errors

# What the launchers of several processes set; a batch script outside `srun` has no SLURM_STEP_NUM_TASKS.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Silence after which the coordinator calls a process dead: where no collective says so earlier, all end within a minute.
_HEARTBEAT_SECONDS = 40
# What an exception says when another process has gone: from a collective (CPU, GPU), and from a barrier of a checkpoint.
_SIGNS_OF_LOSS = ("gloo", "nccl", "coordination service", "coordinationservice", "unavailable:", "barrier")
# What JAX's native code writes before it aborts the process for the same reason.
_ABORT_FOR_LOSS = b"JAX distributed service detected fatal errors"

_place = ""  # where the run is, for the line about a lost process
_last_word = threading.RLock()  # taken for good: the process ends with one line
_leaving = False


def note(step: int, saved: int | None) -> None:
    """Tells what the line about a lost process should say of this one: the step at hand and that of the last checkpoint."""
    global _place
    _place = f" (at step {step}); the last checkpoint is from step {saved or 0}"


def initialize() -> None:
    """Joins the other processes of the run, before any device is used; alone it does nothing.

    Raises:
      UsageError: started by hand, with a variable that is missing or no number.
    """
    given, address = {}, os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if os.environ.get("JAX_NUM_PROCESSES", "1") != "1":
        given = {"num_processes": _number("JAX_NUM_PROCESSES", 1), "process_id": _number("JAX_PROCESS_ID", 0)}
        if ":" not in address or given["process_id"] >= given["num_processes"]:
            raise errors.UsageError(
                f"JAX_NUM_PROCESSES={given['num_processes']}, JAX_PROCESS_ID={given['process_id']}, "
                f"JAX_COORDINATOR_ADDRESS={address!r}: expected a process below the number, and HOST:PORT of process 0"
            )
    launched = any(int(os.environ.get(name) or 1) > 1 for name in _LAUNCHED)
    several = given.get("num_processes", 1) > 1 or launched or os.environ.get("CNNFAMILY_DISTRIBUTED") == "1"
    if several and not jax.distributed.is_initialized():
        # Its handler of SIGTERM would replace ours, and knows nothing of SIGINT; `interrupt` agrees on both.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise errors.UsageError(f"{name}={text!r}: expected a whole number of {least} or more")
    return int(text)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A context for a command that may be one of several processes.

    What all of them come to together (done, stopped, a loss that is not finite) ends together. Anything else ends this one at
    once, without the barrier at which JAX would wait for the others; they notice, and end with `PeerLost`.
    """
    initialize()
    if jax.process_count() == 1:
        yield
        return
    native = None if "--debug" in sys.argv else _NativeErrors()
    together = None
    try:
        try:
            yield
        except (errors.Stopped, errors.NonFiniteLoss) as error:
            together = error
        jax.distributed.shutdown()
    except BaseException as error:
        lost = any(sign in f"{type(error).__name__}: {error}".lower() for sign in _SIGNS_OF_LOSS)
        leave(errors.PeerLost(_place) if lost and native else error)
    if native:
        native.close()
    if together and jax.process_index() == 0:
        raise together
    if together:
        sys.exit(together.status)  # the line is the first process's


def leave(error: BaseException) -> None:
    """Ends this process with an error's line and status, once, whatever threads and exit handlers still wait for."""
    global _leaving
    _last_word.acquire()
    if _leaving:  # this very thread, in the handler of a signal that came meanwhile
        return
    _leaving = True
    status = errors.conclude(error)
    if not isinstance(error, (errors.PeerLost, KeyboardInterrupt)) and jax.process_index() == 0:
        time.sleep(1)  # with this process the others lose their coordinator: if they found the same fault, they say so first
    with contextlib.suppress(OSError):  # a reader that went away
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a live line hides the cursor
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class _NativeErrors(threading.Thread):
    """Passes on what native code writes to standard error, and says in one line what is the death of another process.

    The coordinator's death, and a missed heartbeat, make JAX's native code write a page and abort; no public setting changes
    that. So the page comes here first, and an abort waits for six seconds (6 is SIGABRT, the argument of its handler, which is
    `sleep` itself: nothing else is safe there). Everything else is passed on after half a second of silence.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self._real = os.fdopen(os.dup(2), "wb", buffering=0)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")  # Python's own lines are not delayed
        self._pipe, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
        self.start()

    def run(self) -> None:
        held, open_ = b"", True
        while open_:
            ready = select.select([self._pipe], [], [], 0.5 if held else None)[0]
            part = os.read(self._pipe, 2**16) if ready else b""
            held, open_ = held + part, bool(part) or not ready
            if _ABORT_FOR_LOSS in held:
                leave(errors.PeerLost(_place))
            if not part or len(held) > 2**20:
                self._real.write(held)
                held = b""

    def close(self) -> None:
        """Gives standard error back, with what was still held."""
        os.dup2(self._real.fileno(), 2)
        self.join(timeout=2)
