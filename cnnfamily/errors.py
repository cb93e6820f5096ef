"""What can go wrong for a user, and how a command ends.

Exit status of every command: 0 done; 1 a fault of ours (traceback); 2 wrong usage, config, data or weights, or a disk that
fails; 3 the loss became non-finite; 130 interrupted and 143 asked to stop, both after saving if there was anything to save. Of
several processes of one run, those that lose another one end with 1 as well, and one line.
"""

import argparse
import difflib
import errno
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


class Interrupted(KeyboardInterrupt):
    """A signal ended the command at once: a second Ctrl-C, or any before the first step."""

    def __init__(self, signum: int):
        name = signal.Signals(signum).name
        super().__init__(f"{name}: ended at once; the same command goes on from the last checkpoint, if there is one")
        self.status = 128 + signum


class PeerLost(Exception):
    """Another process of the run has died, so this one cannot go on."""

    status = 1

    def __init__(self, place: str = ""):
        super().__init__(f"another process of this run has died{place}; the same command goes on")


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


def one_line(text: str) -> str:
    """A text without line breaks, and with the middle of a word of more than 300 characters left out."""
    words = (word if len(word) <= 300 else f"{word[:100]}...{word[-30:]}" for word in text.split())
    return " ".join(words)


def conclude(error: BaseException) -> int:
    """Writes an error to standard error, in one line if it is of the kinds above, and returns the exit status it stands for."""
    if _name_too_long(error):  # of a file; only the system knows its limits, wherever a path comes in
        error = UsageError(f"{error.strerror}: {error.filename!r}").with_traceback(error.__traceback__)
    expected = isinstance(error, (UsageError, NonFiniteLoss, Stopped, Interrupted, PeerLost))
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if "--debug" in sys.argv[1:] or not (expected or isinstance(error, KeyboardInterrupt)):
        traceback.print_exception(error)
    if expected:
        print(f"{type(error).__name__}: {one_line(str(error))}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1


def _name_too_long(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's `main(argv)` and ends the process with the status above; `--debug` shows tracebacks."""
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        main(argv)
    except BrokenPipeError:  # `... | head` closed our output: not an error
        sys.stderr.close()
    except (UsageError, NonFiniteLoss, Stopped, PeerLost, KeyboardInterrupt) as error:
        sys.exit(conclude(error))
    except OSError as error:
        if not _name_too_long(error):
            raise
        sys.exit(conclude(error))
