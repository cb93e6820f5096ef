"""Classes of images, by a network of one's own: `python -m cnnfamily.predict --workdir=DIR IMAGE_OR_FOLDER...`.

Or by published weights: `--model=resnet50 --weights=FILE IMAGE_OR_FOLDER...`; `--model=resnet50.IMAGENET1K_V2` prepares images
as torchvision's second weights want them (see `cnnfamily.preprocess`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from cnnfamily import errors, programs, runlog
from cnnfamily.data import augment, feed, preprocessing, sources
from cnnfamily.data.decoding import BadImageError, decode
from cnnfamily.data.folder import SUFFIXES
from cnnfamily.evaluate import load_run
from cnnfamily.weights import load_pretrained


def predict_images(workdir: str | Path, paths: list[Path], *, top: int = 5) -> list[list[tuple[str, float]]]:
    """For each image file the `top` most likely (class name, probability) pairs by the run's newest checkpoint.

    Images are turned to grey or colour, brought to size and normalised as the run's data were.

    Raises:
      UsageError: no run there, or a file that is no image.
    """
    network, variables, config = load_run(workdir)
    data = runlog.read_manifest(Path(workdir))["data"]
    resolution, channels = feed.resolution_of(config), config.model.in_channels
    crop = dataclasses.replace(feed.evaluation_crop(config), corners=False)
    if config.data.zca_epsilon:
        raise errors.UsageError(
            f"{workdir} has data.zca_epsilon: the whitening is that of its training images, not kept in a run"
        )

    def prepare(picture):
        if config.data.fit == "crop":
            pixels = crop(picture.convert("L" if channels == 1 else "RGB"))
        else:
            pixels = sources.fit_picture(picture, resolution=resolution, channels=channels, fit=config.data.fit)
        return augment.normalize(pixels[None], data["mean"], data["std"])

    return _predict(network, variables, prepare, data["class_names"], paths, top)


def predict_with_weights(model: str, file: str, paths: list[Path], *, top: int = 5) -> list[list[tuple[str, float]]]:
    """The same by published weights, as `load_pretrained` reads them; images go through `cnnfamily.preprocess(model)`.

    Where torchvision publishes nothing under the name, they go through what most of its weights want. Of a network with other
    than 1000 classes these are named by number.
    """
    network, variables = load_pretrained(model.partition(".")[0], file)
    steps = (
        preprocessing.preprocess(model)
        if model.partition(".")[0] in preprocessing.WEIGHTS
        else preprocessing.Preprocessing(256, 224)
    )
    names = preprocessing.imagenet_classes() if network.num_classes == 1000 else map(str, range(network.num_classes))
    return _predict(network, variables, lambda image: steps(image)[None], list(names), paths, top)


def _predict(network, variables, prepare, names: list[str], paths: list[Path], top: int) -> list[list[tuple[str, float]]]:
    apply, rows = jax.jit(network.apply), []
    for path in paths:
        probabilities = np.asarray(jax.nn.softmax(apply(variables, _read_image(path, prepare))[0]))
        best = np.argsort(-probabilities, kind="stable")[: min(top, len(names))]
        rows.append([(names[i] if i < len(names) else str(i), float(probabilities[i])) for i in best])
    return rows


def _read_image(path: Path, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    try:
        return prepare(decode(path.read_bytes()))
    except FileNotFoundError:
        raise errors.UsageError(f"{path} does not exist; expected an image or a folder of images") from None
    except (BadImageError, OSError) as error:
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
    parser.add_argument("--workdir", help="the directory of a training run")
    parser.add_argument("--model", metavar="NAME", help="a network with published weights, instead")
    parser.add_argument("--weights", metavar="FILE", help="its weights: .safetensors, .pth or hf:OWNER/REPO")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    arguments = parser.parse_args(argv)
    if bool(arguments.workdir) == bool(arguments.model) or bool(arguments.model) != bool(arguments.weights):
        raise errors.UsageError("expected either --workdir=DIR, or --model=NAME with --weights=FILE")
    paths = find_images(arguments.images)
    if arguments.workdir:
        with programs.kept(runlog.read_config(Path(arguments.workdir))):
            rows = predict_images(arguments.workdir, paths)
    else:
        with programs.kept():
            rows = predict_with_weights(arguments.model, arguments.weights, paths)
    for path, row in zip(paths, rows, strict=True):
        print(f"{path}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in row))


if __name__ == "__main__":
    errors.run_command(main)
