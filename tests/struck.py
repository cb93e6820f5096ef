"""The training command, in which process VICTIM gets a signal at a place: `struck.py VICTIM PLACE COUNT SIGNAL ARGUMENT...`.

The place is the COUNT-th call of a method: step, save, test (an evaluation), or pause: as step, but all other processes wait
there, and so in no collective.
"""

import os
import sys
import time

from jax._src import compiler

from cnnfamily import checkpoint, errors, train
from cnnfamily.data import feed

PLACES = {
    "step": (train.Report, "update"),
    "pause": (train.Report, "update"),
    "save": (checkpoint.Checkpoints, "save"),
    "test": (feed.TestFeed, "batches"),
}


def strike(victim: int, place: str, count: int, signum: int) -> None:
    """Changes the method so that its COUNT-th call raises the signal."""
    original, calls = getattr(*PLACES[place]), []

    def struck(*arguments, **keywords):
        calls.append(place)
        if len(calls) == count and int(os.environ["JAX_PROCESS_ID"]) == victim:
            os.kill(os.getpid(), signum)
        elif len(calls) == count and place == "pause":
            time.sleep(60)
        return original(*arguments, **keywords)

    setattr(*PLACES[place], struck)


def keep_programs_of_every_process() -> None:
    """On CPUs each process has programs of its own, and JAX writes only the first one's into its cache."""
    original, state = compiler._cache_write, compiler.distributed.global_state

    def write(*arguments):
        kept, state.process_id = state.process_id, 0
        try:
            original(*arguments)
        finally:
            state.process_id = kept

    compiler._cache_write = write


if __name__ == "__main__":
    victim, place, count, signum = sys.argv[1:5]
    del sys.argv[1:5]
    keep_programs_of_every_process()
    strike(int(victim), place, int(count), int(signum))
    errors.run_command(train.main)
