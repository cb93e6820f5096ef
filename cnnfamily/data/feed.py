"""Batches on the devices: which images a step takes, where they lie, and what the network sees of them."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from cnnfamily import parallel
from cnnfamily.data import augment, batches, sources
from cnnfamily.data.decoding import CentreCrop, ScaleCrop, TrainCrop
from cnnfamily.data.photographs import Ahead, Photographs, Reader
from cnnfamily.errors import UsageError

_MIX_KEYS = ("mixup", "cutmix", "mix_group")
_CROP_KEYS = ("crop_scale", "crop_ratio", "crop_shorter")
_ERASE_KEYS = ("erasing", "cutout_side")
CROP_PURPOSE = 2  # keeps the stream of crops apart from others drawn from the same seed (see `batches`)


def load_data(config: ConfigDict) -> sources.Dataset:
    """The data set that `config.data` names, fitted to what `config.model` takes.

    Raises:
      UsageError: the source cannot be read, or has more classes than the network.
    """
    fields = ("dir", "fit", "mean", "std", "resize", "interpolation", "test_share", "split_seed", "workers", "bad_images")
    data = sources.load(
        config.data.source,
        resolution=resolution_of(config),
        channels=config.model.in_channels,
        **{field: config.data[field] for field in fields},
    )
    if data.num_classes > config.model.num_classes:
        raise UsageError(f"{data.name} has {data.num_classes} classes, more than model.num_classes={config.model.num_classes}")
    return data


def resolution_of(config: ConfigDict) -> int:
    """Side of the images in pixels."""
    return config.data.resolution or config.model.resolution


class TrainFeed:
    """The training batches of a data set on the devices of a mesh.

    Arrays that fit `data.device_megabytes` are kept whole on each device as uint8 (`store`), and a batch is then indices alone;
    of larger ones and of photographs, images and labels travel with each batch, those of photographs made `data.prefetch`
    batches ahead. `view` and `mix` are what `step.Objective` takes.
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
        self.steps_per_epoch = batches.steps_per_epoch(len(self.split), self.batch_size)
        self.store = _store(self.split, config, mesh)
        self.reader = make_reader(self.split, config)
        if self.reader:
            self._crop = training_crop(config)
            self._here = parallel.rows_here((self.micro_batches, self.batch_size // self.micro_batches), mesh, batch_axis=1)
        self.batch = Ahead(self.make_batch, config.data.prefetch if self.reader and config.data.workers else 0)
        changes = {name: value for name, value in config.augment.items() if name not in _MIX_KEYS + _CROP_KEYS}
        self.view = functools.partial(train_view, config=changes, mean=data.mean, std=data.std)
        mixing = dict(zip(("mixup", "cutmix", "group"), (config.augment[name] for name in _MIX_KEYS), strict=True))
        self.mix = functools.partial(augment.mix, **mixing) if mixing["mixup"] or mixing["cutmix"] else None

    def make_batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step, `[micro-batches, examples, ...]`, a pure function of (seed, step). `batch` makes it ahead."""
        index = batches.train_indices(self.seed, step, len(self.split), self.batch_size)
        arrays = {"index": index, "position": np.arange(self.batch_size, dtype=np.int32)}
        if self.reader:
            arrays |= self.reader.images(index, self._cropper(step // self.steps_per_epoch), here=self._here.ravel())
        elif not self.store:
            arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
        arrays = {name: array.reshape(self.micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}
        return parallel.place(arrays, self.mesh, batch_axis=1)

    def _cropper(self, epoch: int) -> Callable[[Image.Image, int], np.ndarray]:
        return lambda picture, index: self._crop(picture, np.random.default_rng((self.seed, epoch, index, CROP_PURPOSE)))

    @property
    def counts(self) -> dict[str, int]:
        """`bad_images` that have been replaced so far, batches made ahead included; {} if there can be none."""
        return {"bad_images": self.reader.bad_images} if self.reader and self.reader.bad_images else {}

    def close(self) -> None:
        """Ends the threads that make batches."""
        self.batch.close()
        if self.reader:
            self.reader.close()


class TestFeed:
    """The test batches of a data set on the devices of a mesh; `store` as in `TrainFeed`."""

    def __init__(self, data: sources.Dataset, config: ConfigDict, mesh: Mesh):
        self.split, self.mesh = data.test, mesh
        wanted = min(config.evaluate.batch_size, len(self.split))
        self.batch_size = -(-wanted // mesh.size) * mesh.size
        self.store = _store(self.split, config, mesh)
        self.reader = make_reader(self.split, config)
        if self.reader:
            self._crop = evaluation_crop(config)
            self._here = parallel.rows_here((self.batch_size,), mesh, batch_axis=0)
            self._ahead = config.data.prefetch if config.data.workers else 0
        self.view = functools.partial(augment.normalize, mean=data.mean, std=data.std)

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches `[examples, ...]` that hold every test example once; `mask` is False on the padding of the last."""
        whole = list(batches.eval_batches(len(self.split), self.batch_size))

        def make(number: int) -> dict[str, jax.Array] | None:
            if number >= len(whole):
                return None
            index, mask = whole[number]
            arrays = {"index": index, "mask": mask}
            if self.reader:
                arrays |= self.reader.images(index, lambda picture, index: self._crop(picture), here=self._here & mask)
            elif not self.store:
                arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
            return parallel.place(arrays, self.mesh, batch_axis=0)

        with contextlib.closing(Ahead(make, self._ahead if self.reader else 0)) as ahead:
            for number in range(len(whole)):
                yield ahead(number)

    def close(self) -> None:
        """Ends the threads that decode."""
        if self.reader:
            self.reader.close()


def _store(split: sources.Split, config: ConfigDict, mesh: Mesh) -> dict[str, jax.Array]:
    if isinstance(split, Photographs) or split.images.nbytes > config.data.device_megabytes * 2**20:
        return {}
    return parallel.place({"images": split.images, "labels": split.labels}, mesh, batch_axis=None)


def training_crop(config: ConfigDict) -> TrainCrop | ScaleCrop:
    """What a training step gets of a photograph, before it is augmented."""
    chosen, resolution, interpolation = config.augment, resolution_of(config), config.data.interpolation
    if chosen.crop_shorter:
        return ScaleCrop(resolution, chosen.crop_shorter, interpolation)
    return TrainCrop(resolution, chosen.crop_scale, chosen.crop_ratio, interpolation)


def evaluation_crop(config: ConfigDict) -> CentreCrop:
    """What an evaluation sees of a photograph."""
    return CentreCrop(resolution_of(config), config.data.resize, config.data.interpolation)


def make_reader(split: sources.Split | Photographs, config: ConfigDict) -> Reader | None:
    """What decodes the images of a split, if they are photographs."""
    if not isinstance(split, Photographs):
        return None
    size = {"resolution": resolution_of(config), "channels": config.model.in_channels}
    return Reader(split, **size, workers=config.data.workers, bad_images=config.data.bad_images)


def train_view(
    keys: jax.Array, images: jax.Array, *, config: dict, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """What the network sees of uint8 images `[batch, height, width, channels]` in training: augmented, normalised, erased."""
    after = {name: config[name] for name in _ERASE_KEYS if name in config}
    before = {name: value for name, value in config.items() if name not in _ERASE_KEYS}
    images = augment.normalize(augment.augment(keys, images, **before), mean, std)
    return augment.erase(keys, images, **after)
