"""Prepares a data set of TensorFlow Datasets once: `python -m cnnfamily.data.prepare NAME [--data_dir=DIR] [--manual_dir=DIR]`.

Downloads what can be downloaded, or reads what --manual_dir holds (for `imagenet2012`: ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar), and writes ArrayRecord files, which training then reads as `data.source=tfds:NAME` without TensorFlow.
The preparation itself needs it for most sets: pip install 'cnnfamily[prepare]'.
"""

import difflib
import importlib.util
import re
import socket
from pathlib import Path

import absl.logging

from cnnfamily import errors

HOST = "storage.googleapis.com"  # of the library's list of sets, and of most downloads


def prepare(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Path:
    """Prepares a set and returns its directory; one that is prepared already is left as it is.

    Raises:
      UsageError: no such set, nothing to prepare it from, no network, or a library that is missing.

    Whether a set is prepared is asked of the directory, so that nothing is downloaded twice.
    """
    try:
        import tensorflow_datasets as library
    except ImportError as error:
        raise errors.UsageError(f"preparing needs tensorflow-datasets ({error}): pip install 'cnnfamily[prepare]'") from error
    absl.logging.set_verbosity(absl.logging.ERROR)  # it warns of every directory that is not there yet
    if manual_dir is not None and not Path(manual_dir).expanduser().is_dir():
        raise errors.UsageError(f"--manual_dir={manual_dir} is not a folder; expected one that holds the set's own files")
    manual = str(Path(manual_dir).expanduser()) if manual_dir else None
    try:
        builder = library.builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            if importlib.util.find_spec("tensorflow") is None:
                raise errors.UsageError(f"preparing {name} needs tensorflow: pip install 'cnnfamily[prepare]'")
            if not manual:
                _expect_network(name)
            builder.download_and_prepare(download_config=library.download.DownloadConfig(manual_dir=manual))
    except library.core.DatasetNotFoundError as error:
        known = re.findall(r"- (\w+)", str(error))
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none like it"
        text = f"unknown data set {name!r}; TensorFlow Datasets has {len(known)}, the nearest: {near}"
        raise errors.UsageError(text) from error
    except errors.UsageError:
        raise
    except Exception as error:  # each of a thousand builders has its own
        raise errors.UsageError(f"{name} cannot be prepared: {type(error).__name__}: {error}") from error
    return Path(builder.data_dir)


def _expect_network(name: str) -> None:
    """The library would try again for minutes before it gives up."""
    try:
        socket.create_connection((HOST, 443), timeout=5).close()
    except OSError as error:
        text = f"{name} is to be downloaded, but {HOST} cannot be reached ({error}); --manual_dir=DIR takes files that are here"
        raise errors.UsageError(text) from error


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.data.prepare", __doc__)
    parser.add_argument(
        "name", metavar="NAME", help="as TensorFlow Datasets calls it: mnist, imagenet2012, imagenette/160px-v2"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="default: TFDS_DATA_DIR, or ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", metavar="DIR", help="files that have to be fetched by hand")
    arguments = parser.parse_args(argv)
    folder = prepare(arguments.name, data_dir=arguments.data_dir, manual_dir=arguments.manual_dir)
    print(f"{folder} is prepared: --config.data.source=tfds:{arguments.name}")


if __name__ == "__main__":
    errors.run_command(main)
