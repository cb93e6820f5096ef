"""Batches on the devices: which images a step takes, where they lie, and what the network sees of them."""

import contextlib
import functools
import itertools
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
_HOST_KEYS = ("crop_scale", "crop_ratio", "crop_shorter", "repeats", "flip_alternating")
_ERASE_KEYS = ("erasing", "cutout_side")
CROP_PURPOSE = 2  # keeps the stream of crops apart from others drawn from the same seed (see `batches`)


def load_data(config: ConfigDict) -> sources.Dataset:
    """The data set that `config.data` names, fitted to what `config.model` takes.

    Raises:
      UsageError: the source cannot be read, or has more classes than the network.
    """
    fields = (
        *("dir", "fit", "mean", "std", "zca_epsilon", "resize", "interpolation"),
        *("test_share", "split_seed", "workers", "bad_images"),
    )
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
    """Side of the images in pixels, in evaluation."""
    return config.data.resolution or config.model.resolution


def training_resolutions(config: ConfigDict) -> dict[float, int]:
    """From which epoch on images have which side in training: progressive resizing, or one of its own (Touvron et al. 2019,
    https://arxiv.org/abs/1906.06423).

    Raises:
      UsageError: sides and epochs that do not belong together.
    """
    sides, boundaries = config.data.train_resolutions or (resolution_of(config),), config.data.train_boundaries_epochs
    found = f"data.train_resolutions={tuple(sides)} and data.train_boundaries_epochs={tuple(boundaries)}"
    if len(boundaries) != len(sides) - 1 or not all(side > 0 and side == int(side) for side in sides):
        raise UsageError(f"{found}: expected whole numbers above 0, and for each but the first the epoch in which it begins")
    if any(later <= earlier for earlier, later in itertools.pairwise((0, *boundaries))):
        raise UsageError(f"{found}: expected epochs above 0 that grow")
    if config.data.zca_epsilon and set(sides) != {resolution_of(config)}:
        raise UsageError(f"{found}, and data.zca_epsilon: whitening is for images of one size")
    return dict(zip((0.0, *boundaries), map(int, sides), strict=True))


class TrainFeed:
    """The training batches of a data set on the devices of a mesh.

    Arrays that fit `data.device_megabytes` are kept whole on each device as uint8 (`store`), and a batch is then indices alone;
    of larger ones and of photographs, images and labels travel with each batch, those of photographs made `data.prefetch`
    batches ahead. `mix` is what `step.Objective` takes.
    """

    def __init__(self, data: sources.Dataset, config: ConfigDict, mesh: Mesh):
        self.split, self.mesh, self.seed, self._channels = data.train, mesh, config.seed, config.model.in_channels
        self.batch_size, self.micro_batches = config.batch_size, config.accumulate_steps
        cuts = mesh.size * self.micro_batches
        if self.micro_batches < 1 or self.batch_size < 1 or self.batch_size % cuts:
            raise UsageError(
                f"batch_size={self.batch_size}: expected a multiple of {mesh.size * max(self.micro_batches, 1)}, "
                f"for {mesh.size} device(s) and accumulate_steps={self.micro_batches}"
            )
        self.steps_per_epoch = batches.steps_per_epoch(len(self.split), self.batch_size)
        self.repeats, self._alternates = config.augment.repeats, config.augment.flip_alternating
        if self._alternates and config.augment.flip:
            raise UsageError("augment.flip and augment.flip_alternating are both True: expected one of the two to be False")
        self.store = _store(self.split, config, mesh, data.whitening)
        self.reader = make_reader(self.split, config)
        sides = training_resolutions(config)
        self._sides = {round(epoch * self.steps_per_epoch): side for epoch, side in sides.items()}
        if self.reader:
            self._crops = {side: training_crop(config, side) for side in sides.values()}
            self._here = parallel.rows_here((self.micro_batches, self.batch_size // self.micro_batches), mesh, batch_axis=1)
        self.batch = Ahead(self.make_batch, config.data.prefetch if self.reader and config.data.workers else 0)
        changes = {name: value for name, value in config.augment.items() if name not in _MIX_KEYS + _HOST_KEYS}
        view = functools.partial(train_view, config=changes, mean=data.mean, std=data.std)
        self._views = {side: functools.partial(view, side=side) for side in sides.values()}
        mixing = dict(zip(("mixup", "cutmix", "group"), (config.augment[name] for name in _MIX_KEYS), strict=True))
        self.mix = functools.partial(augment.mix, **mixing) if mixing["mixup"] or mixing["cutmix"] else None

    def make_batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step, `[micro-batches, examples, ...]`, a pure function of (seed, step). `batch` makes it ahead."""
        index = batches.train_indices(self.seed, step, len(self.split), self.batch_size, self.repeats)
        arrays = {"index": index, "position": np.arange(self.batch_size, dtype=np.int32)}
        if self.reader:
            crop, side = self._cropper(step), self.resolution(step)
            shape = (side, side, self._channels)
            arrays |= self.reader.images(index, crop, shape=shape, here=self._here.ravel())
        elif "images" not in self.store:
            arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
        if self._alternates:
            arrays["mirrored"] = batches.mirrored(self.seed, step // self.steps_per_epoch, index, len(self.split))
        arrays = {name: array.reshape(self.micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}
        return parallel.place(arrays, self.mesh, batch_axis=1)

    @property
    def resolutions(self) -> list[int]:
        """The sides of all its images, in pixels."""
        return sorted(self._views)

    def resolution(self, step: int) -> int:
        """Side of the images of a step in pixels."""
        return self._sides[max(first for first in self._sides if first <= step)]

    def view(self, resolution: int) -> Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array]:
        """What a network trained at `resolution` sees, as `step.Objective` takes it."""
        return self._views[resolution]

    def _cropper(self, step: int) -> Callable[[Image.Image, int, int], np.ndarray]:
        epoch, crop, different = (
            step // self.steps_per_epoch,
            self._crops[self.resolution(step)],
            self.batch_size // self.repeats,
        )

        def cropped(picture, index, row):
            repeat = row // different
            # The first of its repeats is cut as without any.
            return crop(picture, np.random.default_rng((self.seed, epoch, index, CROP_PURPOSE, *[repeat] * bool(repeat))))

        return cropped

    @property
    def counts(self) -> dict[str, int]:
        """`bad_images` that have been replaced so far, batches made ahead included; {} if there are none."""
        return _counts(self.reader)

    def close(self) -> None:
        """Ends the threads that make batches."""
        self.batch.close()
        if self.reader:
            self.reader.close()


class TestFeed:
    """The test batches of a data set on the devices of a mesh; `store` as in `TrainFeed`.

    `of_training` takes so many training images instead, at random and in a random order, the middle of each.
    """

    def __init__(self, data: sources.Dataset, config: ConfigDict, mesh: Mesh, *, of_training: int = 0):
        self.split, self.mesh = data.test, mesh
        if of_training:
            self.split = data.train.part(batches.epoch_order(config.seed, 0, len(data.train))[:of_training])
            config = config.copy_and_resolve_references()
            with config.unlocked():
                config.evaluate.crops = 1
        self.mirrored = crops_of(config) > 1
        wanted = min(config.evaluate.batch_size, len(self.split))
        self.batch_size = -(-wanted // mesh.size) * mesh.size
        self.store = _store(self.split, config, mesh, data.whitening)
        self.reader = make_reader(self.split, config)
        if self.reader:
            self._crop = evaluation_crop(config)
            self._shape = (5,) * self._crop.corners + (self._crop.resolution,) * 2 + (config.model.in_channels,)
            self._here = parallel.rows_here((self.batch_size,), mesh, batch_axis=0)
            self._ahead = config.data.prefetch if config.data.workers else 0
        self.view = functools.partial(test_view, mean=data.mean, std=data.std)

    def batches(self, *, full: bool = False) -> Iterator[dict[str, jax.Array]]:
        """Batches `[examples, ...]` that hold every example once; `mask` is False on the padding of the last.

        `full` leaves out a last one that would be padded, unless there is no other.
        """
        whole = list(batches.eval_batches(len(self.split), self.batch_size))
        if full and len(whole) > 1 and not whole[-1][1].all():
            whole.pop()

        def make(number: int) -> dict[str, jax.Array] | None:
            if number >= len(whole):
                return None
            index, mask = whole[number]
            arrays = {"index": index, "mask": mask}
            if self.reader:
                arrays |= self.reader.images(
                    index, lambda picture, *_: self._crop(picture), shape=self._shape, here=self._here & mask
                )
            elif "images" not in self.store:
                arrays |= {"images": self.split.images[index], "labels": self.split.labels[index]}
            return parallel.place(arrays, self.mesh, batch_axis=0)

        with contextlib.closing(Ahead(make, self._ahead if self.reader else 0)) as ahead:
            for number in range(len(whole)):
                yield ahead(number)

    @property
    def counts(self) -> dict[str, int]:
        """`bad_images` that have been replaced, as in `TrainFeed`; each is evaluated as the image that took its place."""
        return _counts(self.reader)

    def close(self) -> None:
        """Ends the threads that decode."""
        if self.reader:
            self.reader.close()


def _store(
    split: sources.Split | Photographs, config: ConfigDict, mesh: Mesh, whitening: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    arrays = dict(whitening)
    if not isinstance(split, Photographs) and split.images.nbytes <= config.data.device_megabytes * 2**20:
        arrays |= {"images": split.images, "labels": split.labels}
    return parallel.place(arrays, mesh, batch_axis=None)


def _counts(reader: Reader | None) -> dict[str, int]:
    return {"bad_images": reader.bad_images} if reader and reader.bad_images else {}


def sample(data: sources.Dataset, count: int = 5000) -> np.ndarray:
    """At most `count` training images, evenly spread over their split, as the network sees them in an evaluation.

    float32 `[n, height, width, channels]`, on the host: every process has the same.

    Raises:
      UsageError: they are photographs, which are decoded when needed.
    """
    if isinstance(data.train, Photographs):
        raise UsageError("data.fit='crop' and a network that is measured on its images: expected 'resize' or 'pad'")
    images = data.train.images[:: -(-len(data.train) // count)]
    return np.asarray(test_view(images, data.whitening, mean=data.mean, std=data.std))


def crops_of(config: ConfigDict) -> int:
    """How many views of an image an evaluation takes.

    Raises:
      UsageError: another number than 1, 2 or 10, or ten of images that are not cut out of photographs.
    """
    crops = config.evaluate.crops
    if crops not in (1, 2, 10):
        raise UsageError(f"evaluate.crops={crops}: expected 1, 2 (mirrored too) or 10 (corners and middle, mirrored too)")
    if crops == 10 and config.data.fit != "crop":
        raise UsageError(f"evaluate.crops=10 and data.fit={config.data.fit!r}: expected data.fit='crop', or evaluate.crops=2")
    return crops


def training_crop(config: ConfigDict, resolution: int) -> TrainCrop | ScaleCrop:
    """What a training step gets of a photograph, before it is augmented."""
    chosen, interpolation = config.augment, config.data.interpolation
    if chosen.crop_shorter:
        return ScaleCrop(resolution, chosen.crop_shorter, interpolation)
    return TrainCrop(resolution, chosen.crop_scale, chosen.crop_ratio, interpolation)


def evaluation_crop(config: ConfigDict) -> CentreCrop:
    """What an evaluation sees of a photograph."""
    return CentreCrop(resolution_of(config), config.data.resize, config.data.interpolation, corners=crops_of(config) == 10)


def make_reader(split: sources.Split | Photographs, config: ConfigDict) -> Reader | None:
    """What decodes the images of a split, if they are photographs."""
    if not isinstance(split, Photographs):
        return None
    return Reader(split, channels=config.model.in_channels, workers=config.data.workers, bad_images=config.data.bad_images)


def train_view(
    keys: jax.Array,
    images: jax.Array,
    store: dict[str, jax.Array],
    *,
    config: dict,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    side: int,
) -> jax.Array:
    """What the network sees of uint8 images `[batch, height, width, channels]` in training.

    They are augmented, brought to `side` pixels square if they are not, normalised, erased, and whitened if `store` says how.
    """
    after = {name: config[name] for name in _ERASE_KEYS if name in config}
    before = {name: value for name, value in config.items() if name not in _ERASE_KEYS}
    images = augment.augment(keys, images, **before)
    if images.shape[1:3] != (side, side):  # photographs come as they are wanted
        images = jax.image.resize(images, (len(images), side, side, images.shape[3]), "linear")
    return augment.whiten(augment.erase(keys, augment.normalize(images, mean, std), **after), store)


def test_view(images: jax.Array, store: dict[str, jax.Array], *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """What the network sees of uint8 images `[..., height, width, channels]` in an evaluation: normalised and whitened."""
    return augment.whiten(augment.normalize(images, mean, std), store)
