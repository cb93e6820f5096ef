"""Batches on the devices: which images a step takes, where they lie, and what the network sees of them."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cnnfamily import parallel
from cnnfamily.data import augment, batches, sources
from cnnfamily.errors import UsageError

_MIX_KEYS = ("mixup", "cutmix", "mix_group")


def load_data(config: ConfigDict) -> sources.Dataset:
    """The data set that `config.data` names, fitted to what `config.model` takes.

    Raises:
      UsageError: the source cannot be read, or has more classes than the network.
    """
    data = sources.load(
        config.data.source,
        resolution=config.data.resolution or config.model.resolution,
        channels=config.model.in_channels,
        fit=config.data.fit,
        mean=config.data.mean,
        std=config.data.std,
    )
    if data.num_classes > config.model.num_classes:
        raise UsageError(f"{data.name} has {data.num_classes} classes, more than model.num_classes={config.model.num_classes}")
    return data


class TrainFeed:
    """The training batches of a data set on the devices of a mesh.

    A split that fits `data.device_megabytes` is kept whole on each device as uint8 (`store`), and a batch is then indices
    alone; of a larger one, images and labels travel with each batch. `view` and `mix` are what `step.Objective` takes.
    """

    def __init__(self, data: sources.Dataset, config: ConfigDict, mesh: Mesh):
        self.split, self.mesh, self.seed = data.train, mesh, config.seed
        self.batch_size, self.micro_batches = config.batch_size, config.accumulate_steps
        cuts = mesh.size * self.micro_batches
        if self.micro_batches < 1 or self.batch_size < 1 or self.batch_size % cuts:
            raise UsageError(
                f"batch_size={self.batch_size}: expected a multiple of {mesh.size * max(self.micro_batches, 1)}, "
                f"for {mesh.size} device(s) and accumulate_steps={self.micro_batches}"
            )
        self.steps_per_epoch = batches.steps_per_epoch(len(self.split.labels), self.batch_size)
        self.store = _store(self.split, config, mesh)
        changes = {name: value for name, value in config.augment.items() if name not in _MIX_KEYS}
        self.view = functools.partial(train_view, config=changes, mean=data.mean, std=data.std)
        mixing = dict(zip(("mixup", "cutmix", "group"), (config.augment[name] for name in _MIX_KEYS), strict=True))
        self.mix = functools.partial(augment.mix, **mixing) if mixing["mixup"] or mixing["cutmix"] else None

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step, `[micro-batches, examples, ...]`, a pure function of (seed, step)."""
        index = batches.train_indices(self.seed, step, len(self.split.labels), self.batch_size)
        arrays = {"index": index, "position": np.arange(self.batch_size, dtype=np.int32)}
        if not self.store:
            arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
        arrays = {name: array.reshape(self.micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}
        return parallel.place(arrays, self.mesh, batch_axis=1)


class TestFeed:
    """The test batches of a data set on the devices of a mesh; `store` as in `TrainFeed`."""

    def __init__(self, data: sources.Dataset, config: ConfigDict, mesh: Mesh):
        self.split, self.mesh = data.test, mesh
        wanted = min(config.evaluate.batch_size, len(self.split.labels))
        self.batch_size = -(-wanted // mesh.size) * mesh.size
        self.store = _store(self.split, config, mesh)
        self.view = functools.partial(augment.normalize, mean=data.mean, std=data.std)

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches `[examples, ...]` that hold every test example once; `mask` is False on the padding of the last."""
        for index, mask in batches.eval_batches(len(self.split.labels), self.batch_size):
            arrays = {"index": index, "mask": mask}
            if not self.store:
                arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
            yield parallel.place(arrays, self.mesh, batch_axis=0)


def _store(split: sources.Split, config: ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
    if split.images.nbytes > config.data.device_megabytes * 2**20:
        return {}
    return parallel.place({"images": split.images, "labels": split.labels}, mesh, batch_axis=None)


def train_view(
    keys: jax.Array, images: jax.Array, *, config: dict, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """What the network sees of uint8 images `[batch, height, width, channels]` in training: augmented, then normalised."""
    return augment.normalize(augment.augment(keys, images, **config), mean, std)
