"""Files that outlive a crash: written whole, sealed with digests, and a disk that fails said in one line."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cnnfamily.errors import UsageError

DIGESTS = "digests.json"


class DiskError(UsageError):
    """A file of a run directory cannot be written; the message says which and why."""


@contextlib.contextmanager
def writing(what: str | Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turns an error of these kinds into a `DiskError` that names what was being written."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise DiskError(f"{what} cannot be written: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why the operating system refused, out of an error that may hold kilobytes: `No space left on device`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return os.strerror(int(code[1]))
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the new one, whatever happens."""
    with replacing(path) as partial, partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # on a full disk it would take the place of what is worth more
        raise


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal(folder: Path) -> None:
    """Writes the digest of every file under `folder` into `digests.json` there, and all of it to the disk itself."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("r+b") as file:  # to be written, or Windows would not bring it to the disk
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
    write_whole(folder / DIGESTS, json.dumps({"files": found, "digest": digest(json.dumps(found))}, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `seal` has sealed, file by file: `state/d/1f has changed`; None if nothing is.

    Further files are no damage: file managers and network file systems leave some.
    """
    try:
        text = (folder / DIGESTS).read_bytes()
        expected = json.loads(text)["files"]
        intact = text == json.dumps({"files": expected, "digest": digest(json.dumps(expected))}, indent=1).encode()
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except (OSError, ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        return f"{DIGESTS} has changed"
    faults = []
    for name, value in expected.items():
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != value:
                    faults.append(f"{name} has changed")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read: {reason(error)}")
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else None
