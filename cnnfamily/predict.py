"""Classes of images by a network of one's own: `python -m cnnfamily.predict --workdir=DIR IMAGE_OR_FOLDER...`."""

from pathlib import Path

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from cnnfamily import errors, runlog
from cnnfamily.data import augment, sources
from cnnfamily.evaluate import load_run

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def predict_images(workdir: str | Path, paths: list[Path], *, top: int = 5) -> list[list[tuple[str, float]]]:
    """For each image file the `top` most likely (class name, probability) pairs by the run's newest checkpoint.

    Images are turned to grey or colour, brought to size and normalised as the run's data were.

    Raises:
      UsageError: no run there, or a file that is no image.
    """
    network, variables, config = load_run(workdir)
    data = runlog.read_manifest(Path(workdir))["data"]
    resolution = config.data.resolution or config.model.resolution
    fit = {"resolution": resolution, "channels": config.model.in_channels, "fit": config.data.fit}
    apply = jax.jit(network.apply)
    rows = []
    for path in paths:
        images = augment.normalize(sources.fit_images(_read_image(path)[None], **fit), data["mean"], data["std"])
        probabilities = np.asarray(jax.nn.softmax(apply(variables, images))[0])
        best = np.argsort(-probabilities, kind="stable")[: min(top, len(data["class_names"]))]
        rows.append(
            [(data["class_names"][i] if i < len(data["class_names"]) else str(i), float(probabilities[i])) for i in best]
        )
    return rows


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise errors.UsageError(f"{path} does not exist; expected an image or a folder of images") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise errors.UsageError(f"{path} cannot be read as an image: {error}") from error


def find_images(names: list[str]) -> list[Path]:
    """The files named, and for a folder the image files in it, sorted."""
    paths = []
    for path in map(Path, names):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise errors.UsageError(f"folder {path} has no images; expected files ending in {', '.join(SUFFIXES)}")
        paths += found
    return paths


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.predict", __doc__)
    parser.add_argument("--workdir", required=True, help="the directory of a training run")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    arguments = parser.parse_args(argv)
    paths = find_images(arguments.images)
    for path, row in zip(paths, predict_images(arguments.workdir, paths), strict=True):
        print(f"{path}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in row))


if __name__ == "__main__":
    errors.run_command(main)
