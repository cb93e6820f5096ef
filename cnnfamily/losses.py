"""The loss, and the sums from which an evaluation's figures are made."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnfamily.errors import unknown

CALIBRATION_BINS = 15


def smooth(labels: jax.Array, num_classes: int, smoothing: float, dtype=jnp.float32) -> jax.Array:
    """Targets `[batch, num_classes]` with 1 - smoothing on the label and smoothing spread over all classes.

    Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567), section 7.
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=dtype), smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats for each example, `[batch]`, of logits and targets `[batch, num_classes]`."""
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A yes or no for each class, in nats, the mean over classes for each example, `[batch]`; arguments as `cross_entropy`.

    Wightman et al. 2021 (https://arxiv.org/abs/2110.00476), section 2.1. With mixed images every class of the mixture is a yes
    in the paper; here the targets are the shares. The gradient of a mean over many classes is small: see `resnet50_a2.py`.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def choose(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The training loss of that name; a `UsageError` names the nearest for one that does not exist."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]


def hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k highest logits, bool `[batch]`; an equal logit before it counts against it.

    With fewer than k classes every label is; but where any logit is NaN, none is.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1], dtype=labels.dtype) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    return (ahead.sum(axis=1) < k) & ~jnp.isnan(logits).any(axis=1)


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the unmasked examples: loss, top-1 and top-5 hits, their count, and calibration bins `[3, bins]`.

    A bin holds the count, the confidence and the hits of the examples whose highest probability falls in it.
    """
    logits = jnp.where(mask[:, None], logits, 0)  # a padding row may be anything, NaN included, and NaN times 0 is NaN
    loss = cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype))
    top1 = hits(logits, labels, 1)
    confidence = jax.nn.softmax(logits).max(axis=1)
    bins = jnp.clip((confidence * CALIBRATION_BINS).astype(jnp.int32), 0, CALIBRATION_BINS - 1)
    weight = mask.astype(logits.dtype)
    member = jax.nn.one_hot(bins, CALIBRATION_BINS, dtype=logits.dtype) * weight[:, None]
    return {
        "loss": (loss * weight).sum(),
        "top1": (top1 & mask).sum(),
        "top5": (hits(logits, labels, 5) & mask).sum(),
        "examples": mask.sum(),
        "calibration": jnp.stack(
            [(member * value[:, None]).sum(axis=0) for value in (weight, confidence, top1.astype(logits.dtype))]
        ),
    }


def evaluation_metrics(sums: dict[str, np.ndarray], prefix: str) -> dict[str, float | int]:
    """`{prefix}loss`, `top1`, `top5`, `ece` and `examples` from sums over the whole split.

    The expected calibration error is the mean over examples of |accuracy - confidence| of their bin, 15 bins of equal width
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    examples = int(sums["examples"])
    _, confidence, correct = np.asarray(sums["calibration"], np.float64)
    return {
        f"{prefix}loss": float(sums["loss"]) / examples,
        f"{prefix}top1": int(sums["top1"]) / examples,
        f"{prefix}top5": int(sums["top5"]) / examples,
        f"{prefix}ece": float(np.abs(correct - confidence).sum()) / examples,
        f"{prefix}examples": examples,
    }
