"""Which images a step takes: pure functions of (seed, step), so a resumed run needs no stored position.

Plain NumPy: the choice is the same for any number of devices, processes and workers.
"""

import functools
from collections.abc import Iterator

import numpy as np

from cnnfamily.errors import UsageError

# Keeps this stream apart from others drawn from the same seed. Not zero: SeedSequence takes (s, e) and (s, e, 0) for
# the same entropy.
ORDER_PURPOSE = 1
FLIP_PURPOSE = 3  # 2 is `feed.CROP_PURPOSE`


# Two, because the steps of two epochs alternate where batches are prepared ahead.
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n training images in an epoch: a read-only int32 permutation [n]."""
    order = np.random.default_rng((seed, epoch, ORDER_PURPOSE)).permutation(n).astype(np.int32)
    order.flags.writeable = False
    return order


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full batches in n images; what is left over is left out, other images each epoch."""
    if not 1 <= batch_size <= n:
        raise UsageError(f"batch_size={batch_size}; expected 1 to {n}, for there are {n} training images")
    return n // batch_size


def train_indices(seed: int, step: int, n: int, batch_size: int, repeats: int = 1) -> np.ndarray:
    """The dataset indices, int32 [batch_size], of global step `step`, counted from 0 over all epochs.

    With `repeats` each of batch_size / repeats images stands there so often, that many rows apart, and an epoch, as long as
    ever, sees the first n / repeats of its order: repeated augmentation (Berman et al. 2019, https://arxiv.org/abs/1902.05509,
    section 3.3) as in torchvision's recipes. Far apart, so that groups for batch norm and mixing hold different images.
    """
    epoch, step_in_epoch = divmod(int(step), steps_per_epoch(n, batch_size))
    if repeats < 1 or batch_size % repeats:
        raise UsageError(f"augment.repeats={repeats}; expected a divisor of batch_size={batch_size}")
    different = batch_size // repeats
    start = step_in_epoch * different
    index = epoch_order(seed, epoch, n)[start : start + different]
    return np.tile(index, repeats) if repeats > 1 else index


@functools.lru_cache(maxsize=1)
def _coins(seed: int, n: int) -> np.ndarray:
    coins = np.random.default_rng((seed, 0, FLIP_PURPOSE)).integers(0, 2, n).astype(bool)
    coins.flags.writeable = False
    return coins


def mirrored(seed: int, epoch: int, index: np.ndarray, n: int) -> np.ndarray:
    """Whether each of the images `index`, of n, is turned left to right in an epoch: bool `[len(index)]`.

    In every other epoch, and in the first by a coin of its own, so that two epochs always show both sides: alternating flip,
    Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6.
    """
    return _coins(seed, n)[index] ^ bool(epoch % 2)


def eval_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (index int32, mask bool), both [batch_size], whose true entries are 0..n-1, each once and in order.

    The last is filled up with index 0 and mask False, so that every batch has one shape and no example is left out.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}; expected at least 1")
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = index < n
        yield np.where(mask, index, np.int32(0)), mask
