"""Photographs that are decoded when they are needed: in threads, some batches ahead of the step.

Decoding and resizing leave Python's lock, so that threads are enough: no process to start, none to die. What a batch holds is a
function of (seed, epoch, index) for each image, and the same for any number of threads, processes and batches ahead.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from cnnfamily.data.decoding import BadImageError, decode
from cnnfamily.errors import UsageError, unknown, warn


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
    """A split whose images are encoded files or records."""

    size: int
    read: Callable[[int], tuple[bytes, int]]  # the encoded image of an index, and its label
    name: Callable[[int], str]  # where it comes from, for messages

    def __len__(self) -> int:
        return self.size

    def part(self, indices: np.ndarray) -> "Photographs":
        """Some of them, in the order given."""
        chosen = [int(index) for index in indices]
        return Photographs(len(chosen), lambda index: self.read(chosen[index]), lambda index: self.name(chosen[index]))


def shuffle_split(whole: Photographs, test_share: float, seed: int, place) -> tuple[Photographs, Photographs]:
    """Training and test images of a set that has no split of its own, each in the order of the whole.

    By a permutation from `seed`, which is not the run's: runs of other seeds compare on the same images.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"data.test_share={test_share}: expected more than 0 and less than 1, for {place} has no test split")
    order = np.random.default_rng(seed).permutation(len(whole))
    cut = round(len(whole) * test_share)
    if not 0 < cut < len(whole):
        raise UsageError(f"{place} has {len(whole)} images: data.test_share={test_share} leaves a split without any")
    return whole.part(np.sort(order[cut:])), whole.part(np.sort(order[:cut]))


class Reader:
    """Images of a split as arrays, decoded in `workers` threads: 0 is none, -1 as many as the process has cores.

    A bad image raises `UsageError` with its path and the reason if `bad_images` is "stop". If it is "replace", a line says so
    once a file, and the next image of the split that is good takes its place, with its label.
    """

    def __init__(self, split: Photographs, *, channels: int, workers: int = -1, bad_images: str = "stop"):
        if bad_images not in ("stop", "replace"):
            raise unknown("data.bad_images", bad_images, ("stop", "replace"))
        self._split, self._channels, self._replaces = split, channels, bad_images == "replace"
        self._bad: dict[int, str] = {}
        if workers < 0:  # only Linux tells which cores a process may use
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "decode") if workers else None

    @property
    def bad_images(self) -> int:
        """Different images that have been replaced so far."""
        return len(self._bad)

    def images(
        self,
        index: np.ndarray,
        crop: Callable[[Image.Image, int, int], np.ndarray],
        *,
        shape: tuple[int, ...],
        here: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """`images` uint8 `[n, *shape]` and `labels` int32 `[n]` of dataset indices `[n]`.

        `crop` makes `shape` of a picture, its index and its row in the batch. What is False in `here` `[n]` is left empty.
        """
        images, labels = np.zeros((len(index), *shape), np.uint8), np.zeros(len(index), np.int32)

        def fill(rows: np.ndarray) -> None:
            for i in rows:
                images[i], labels[i] = self._read(int(index[i]), lambda picture, taken, row=int(i): crop(picture, taken, row))

        rows = np.arange(len(index)) if here is None else np.flatnonzero(here)
        # Some at a time, for handing over each takes Python's lock (experiments/speed).
        for _ in (self._pool.map if self._pool else map)(fill, np.array_split(rows, max(1, len(rows) // 8))):
            pass
        return {"images": images, "labels": labels}

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, index: int, crop: Callable[[Image.Image, int], np.ndarray]) -> tuple[np.ndarray, int]:
        """What `crop` makes of the picture of an index, or of the next one that is good, and its label."""
        n = len(self._split)
        for taken in ((index + i) % n for i in range(n)):
            try:
                data, label = self._split.read(taken)
                return crop(decode(data, self._channels), taken), label
            except (BadImageError, OSError) as error:
                text = f"image {self._split.name(taken)} cannot be read: {error}"
            if not self._replaces:
                raise UsageError(f"{text}; data.bad_images='replace' takes another image in its place")
            if self._bad.setdefault(taken, text) is text:  # the first thread that finds it
                warn(f"warning: {text}; the next good one takes its place")
        raise UsageError(f"none of the {n} images can be read; the first: {self._bad[0]}")


class Ahead:
    """The values of a function of 0, 1, 2, ...: made in threads, `ahead` of them before they are asked for."""

    def __init__(self, make: Callable[[int], Any], ahead: int):
        self._make, self._ahead, self._futures = make, ahead, {}
        # Two: while one copies a batch to the device, the other keeps those busy that decode (experiments/speed).
        self._threads = concurrent.futures.ThreadPoolExecutor(min(ahead, 2), "ahead") if ahead else None

    def __call__(self, number: int) -> Any:
        if not self._threads:
            return self._make(number)
        wanted = range(number, number + self._ahead + 1)
        for other in set(self._futures) - set(wanted):
            self._futures.pop(other).cancel()
        for other in wanted:
            if other not in self._futures:
                self._futures[other] = self._threads.submit(self._make, other)
        return self._futures[number].result()

    def close(self) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
