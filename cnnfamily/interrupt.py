"""SIGINT and SIGTERM ask a run to stop after the step at hand."""

import signal
import threading


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `signum`; a second SIGINT interrupts at once.

    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self):
        self.signum = 0
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
