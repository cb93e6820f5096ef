"""What can go wrong for a user, and how a command ends.

Exit status of every command: 0 done; 1 a fault of ours (traceback); 2 wrong usage, config, data or weights,
or a disk that fails; 3 the loss became non-finite; 130 interrupted and 143 asked to stop, both after saving.
"""

import argparse
import difflib
import signal
import sys
import traceback
from collections.abc import Callable, Iterable


class UsageError(Exception):
    """The user's input cannot be used; the message is one line: what was found, what was expected, what exists."""

    status = 2


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite."""

    status = 3


class Stopped(Exception):
    """A signal asked the run to stop and its state has been saved; the status is 128 plus the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 128 + signum


def warn(text: str) -> None:
    """A line on standard error about what does not stop the command."""
    print(text, file=sys.stderr)


def unknown(kind: str, found: str, known: Iterable[str]) -> UsageError:
    """An error for a name that does not exist: suggests the nearest and lists all.

    Example: `unknown model 'resnt50'; did you mean 'resnet50'? known: lenet5, resnet18, ...`
    """
    known = list(known)
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UsageError(f"unknown {kind} {found!r}{hint} known: {', '.join(known)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; {self.format_usage().strip()}")


def argument_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE` whose errors are `UsageError`s; abbreviated options are not accepted."""
    return _Parser(
        prog=f"python -m {module}",
        description=description.split("\n\n")[0],
        epilog="--debug shows the traceback of an error that is otherwise one line",
        allow_abbrev=False,
    )


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's `main(argv)` and ends the process with the status above; `--debug` shows tracebacks."""
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        main(argv)
    except (UsageError, NonFiniteLoss, Stopped) as error:
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `... | head` closed our output: not an error
        sys.stderr.close()
