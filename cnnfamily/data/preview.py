"""What the network sees in training: `python -m cnnfamily.data.preview --config=FILE.py[:ARG] [--output=preview.png]`.

Draws the first images of the first batch as they enter the network, cropped, augmented and mixed, under their classes, and on
the left of each its original, as an evaluation would see it. `--step=N` takes another batch, `--count=N` another number.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cnnfamily import config as configs
from cnnfamily import errors, parallel
from cnnfamily.data import feed, sources
from cnnfamily.data.photographs import Photographs
from cnnfamily.models import build
from cnnfamily.step import Objective


def preview(config: ConfigDict, *, step: int = 0, count: int = 24) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images as the network gets them in a step, uint8 `[n, height, width, channels]`, their originals, and their classes.

    `n` is `count`, or the batch if that is smaller. A class is that of the largest share of the targets, with the next one's
    name behind it if there is any, as mixing makes it.
    """
    mesh = parallel.local_mesh()
    data = feed.load_data(config)
    with contextlib.closing(feed.TrainFeed(data, config, mesh)) as train:
        batch = {name: array[0] for name, array in train.make_batch(step).items()}
        objective = Objective(build(config.model), train.view(train.resolution(step)), config.seed, train.mix)
        images, targets, _ = jax.jit(objective.inputs, static_argnums=3)(jnp.asarray(step), batch, train.store, jnp.float32)
        index = np.asarray(batch["index"])[:count]
    # Whitened pixels have no scale of their own: two deviations to either side of grey.
    mean, std = (0.5, 0.25) if data.whitening else (np.asarray(data.mean), np.asarray(data.std))
    pixels = (np.asarray(images, np.float32)[:count] * std + mean) * 255
    names = [_describe(row, data.class_names) for row in np.asarray(targets)[:count]]
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8), _originals(data, config, index), names


def _describe(targets: np.ndarray, class_names: tuple[str, ...]) -> str:
    first, second = np.argsort(-targets)[:2] if len(targets) > 1 else (0, 0)
    if targets[second] < 0.005 or first == second:
        return class_names[first]
    return f"{class_names[first]} {targets[first]:.0%}, {class_names[second]} {targets[second]:.0%}"


def _originals(data: sources.Dataset, config: ConfigDict, index: np.ndarray) -> np.ndarray:
    if not isinstance(data.train, Photographs):
        return data.train.images[index]
    with contextlib.closing(feed.make_reader(data.train, config)) as reader:
        crop = dataclasses.replace(feed.evaluation_crop(config), corners=False)
        shape = (crop.resolution, crop.resolution, config.model.in_channels)
        return reader.images(index, lambda picture, *_: crop(picture), shape=shape)["images"]


def draw(images: np.ndarray, originals: np.ndarray, names: list[str], file: Path) -> None:
    """A grid of pairs, the original on the left of what became of it."""
    import matplotlib.figure

    columns = 4
    rows = -(-len(images) // columns)
    figure = matplotlib.figure.Figure(figsize=(2.6 * columns, 1.55 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).ravel():
        axes.set_axis_off()
    for axes, image, original, name in zip(figure.axes, images, originals, names, strict=False):
        if image.shape != original.shape:  # trained at another resolution
            nearest = np.arange(len(original)) * len(image) // len(original)
            image = image[nearest[:, None], nearest]
        gap = np.full((image.shape[0], max(1, image.shape[1] // 16), image.shape[2]), 255, np.uint8)
        axes.imshow(np.concatenate([original, gap, image], axis=1).squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name, fontsize=7)
    figure.savefig(file, dpi=130)


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.data.preview", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--output", default="preview.png", metavar="FILE.png", type=Path)
    parser.add_argument("--step", default=0, type=int)
    parser.add_argument("--count", default=24, type=int)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.step < 0 or arguments.count < 1:
        raise errors.UsageError(f"--step={arguments.step} and --count={arguments.count}: expected 0 or more, and 1 or more")
    if not arguments.output.parent.is_dir():
        raise errors.UsageError(f"--output={arguments.output}: its folder does not exist")
    config = configs.load_config(arguments.config, configs.read_overrides(rest, "--config=, --output=, --step=, --count="))
    configs.check(config)
    images, originals, names = preview(config, step=arguments.step, count=arguments.count)
    draw(images, originals, names, arguments.output)
    print(f"{len(images)} images of step {arguments.step}, each beside its original: {arguments.output}")


if __name__ == "__main__":
    errors.run_command(main)
