"""SIGINT and SIGTERM ask a run to stop after the step at hand, all its processes after the same one."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from cnnfamily import errors, parallel, processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAME = "stop"  # of the signal's number in a batch and in the metrics of a step


def agree(step: Callable) -> Callable:
    """`step`, written for one device as in `step.py`, with the signals of all processes in its metrics.

    Every process brings the number of its own signal with the batch, and the step tells all of them the highest: so they read
    the same of the same step, without a message of its own. Where there is one process, the step is left alone.
    """
    if jax.process_count() == 1:
        return step

    def agreeing(state: Any, batch: dict[str, jax.Array], store: dict[str, jax.Array]) -> Any:
        signum = {_NAME: lax.pmax(batch[_NAME].max(), parallel.AXIS)}
        result = step(state, {name: array for name, array in batch.items() if name != _NAME}, store)
        return (*result[:-1], result[-1] | signum) if isinstance(result, tuple) else result | signum

    return agreeing


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only noted; a second SIGINT interrupts at once (`Interrupted`).

    Outside the main thread Python delivers no signals, and this hears of none.
    """

    active: "StopRequest | None" = None

    def __init__(self):
        self._received = self._agreed = 0
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._previous[signum] = signal.signal(signum, self._receive)
            StopRequest.active = self
        return self

    def __exit__(self, *exception) -> None:
        StopRequest.active = None
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame) -> None:
        if self._received and signum == signal.SIGINT:
            raise errors.Interrupted(signum)
        self._received = signum

    @property
    def signum(self) -> int:
        """The signal received, or 0; of several processes the highest that all knew of at the last `read`."""
        return self._received if jax.process_count() == 1 else self._agreed

    def add(self, batch: dict[str, jax.Array], mesh: Mesh, *, batch_axis: int) -> dict[str, jax.Array]:
        """A batch with this process's signal, for a step under `agree`."""
        if jax.process_count() == 1:
            return batch
        mine = np.full((1,) * batch_axis + (mesh.size,), self._received, np.int32)
        return batch | parallel.place({_NAME: mine}, mesh, batch_axis=batch_axis)

    def read(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a step under `agree`, on the host, without the signals of all processes: `signum` has them now."""
        self._agreed = int(metrics.get(_NAME, 0))
        return {name: value for name, value in metrics.items() if name != _NAME}


class Guard:
    """A context in which a signal ends the command at once where nothing can be saved, and on the second SIGINT.

    The main thread cannot hear a signal while native code keeps it: where it waits for another process, at the start or at the
    exit. A thread that hears it ends the process where the main one has not within a second.
    """

    def __enter__(self) -> "Guard":
        self._left = threading.Event()
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._hears, self._tells = os.pipe()
            os.set_blocking(self._tells, False)
            signal.set_wakeup_fd(self._tells)
            threading.Thread(target=self._listen, daemon=True).start()
            self._previous = {signum: signal.signal(signum, self._receive) for signum in _SIGNALS}
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, errors.Interrupted):
            processes.leave(error)  # Python's exit would wait for what native threads are at: XLA's, Orbax's
        self._left.set()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            os.close(self._tells)

    def _receive(self, signum: int, frame) -> None:
        processes.leave(errors.Interrupted(signum))  # an exception could arise where it is only reported, as in a destructor

    def _listen(self) -> None:
        noted = False
        while signum := os.read(self._hears, 1):
            signum = signum[0]
            if signum not in _SIGNALS:
                continue
            at_once = StopRequest.active is None or (noted and signum == signal.SIGINT)
            noted = True
            if at_once and not self._left.wait(1.0):
                processes.leave(errors.Interrupted(signum))
        os.close(self._hears)
