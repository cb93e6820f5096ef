"""Trains as `python -m cnnfamily.train` does and kills its own process with SIGKILL at a mark: `killed.py MARK ARGUMENT...`.

never          not at all
start          before anything is read
compile        while the step is being compiled
save:N         inside the first save from step N on: its files are being written
saved:N        after it, with nothing else done
line:N         in the middle of writing a line of the log, from step N on
"""

import contextlib
import os
import signal
import sys
import threading
import time

from cnnfamily import checkpoint, errors, runlog, train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def kill_at(mark: str) -> None:
    """Changes what the training calls so that the process dies at the mark."""
    kind, _, number = mark.partition(":")
    first = int(number or 0)
    if kind == "start":
        die()
    elif kind == "compile":
        original = train.Report.busy

        @contextlib.contextmanager
        def busy(self, text):
            threading.Timer(0.4, die).start()
            with original(self, text):
                yield

        train.Report.busy = busy
    elif kind in ("save", "saved"):
        original = checkpoint.Checkpoints.save

        def save(self, state, *arguments, **keywords):
            original(self, state, *arguments, **keywords)
            if int(state.step) >= first:
                if kind == "saved":
                    self._manager.wait_until_finished()
                die()

        checkpoint.Checkpoints.save = save
    elif kind == "line":
        original = runlog.RunLog.write

        def write(self, step, *arguments):
            if step >= first:
                self._file.write('{"step": ' + str(step) + ', "epo')
                self._file.flush()
                die()
            original(self, step, *arguments)

        runlog.RunLog.write = write
    elif kind != "never":
        raise ValueError(f"unknown mark {mark}")
    original_update = train.Report.update

    def update(self, step, *figures):
        original_update(self, step, *figures)
        with open(os.environ["KILLED_STEPS"], "a") as file:
            file.write(f"{step}\n")

    train.Report.update = update


if __name__ == "__main__":
    kill_at(sys.argv.pop(1))
    errors.run_command(train.main)
