"""Optimizers and schedules from optax, as the papers' codes have them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from cnnfamily.errors import UsageError, unknown

OPTIMIZERS = ("sgd", "rmsprop", "adamw", "lamb", "muon")
SCHEDULES = ("constant", "cosine", "steps", "exponential", "linear")


def duration(config: ConfigDict, name: str, steps_per_epoch: int) -> float:
    """`{name}_epochs` or `{name}_steps` of a config, in steps; both set is an error, neither is 0."""
    epochs, steps = config[f"{name}_epochs"], config[f"{name}_steps"]
    if epochs and steps:
        raise UsageError(f"{name}_epochs={epochs} and {name}_steps={steps} are both set: expected one of the two to be 0")
    return steps or epochs * steps_per_epoch


def learning_rate_schedule(config: ConfigDict, *, total_steps: int, steps_per_epoch: int, batch_size: int) -> Callable:
    """Learning rate as a function of the step, from `config.optim`: linear warm-up from 0, then the schedule.

    The peak is `learning_rate` at `reference_batch` examples a step and grows in proportion to the batch (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677); with `reference_batch` 0 it is as given. Steps and exponential count from the first
    step, warm-up covering their beginning without shifting it, as in the EfficientNet and torchvision codes; cosine and
    linear fall from where warm-up ends.
    """
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    peak = config.learning_rate * (batch_size / config.reference_batch if config.reference_batch else 1.0)
    warmup = round(duration(config, "warmup", steps_per_epoch))
    if warmup >= total_steps:
        raise UsageError(f"warm-up of {warmup} steps: expected fewer than the run's {total_steps}")
    rest = total_steps - warmup
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.end_factor)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.end_factor, rest)
    else:
        main = _staircase(config, peak, steps_per_epoch)
    shift = warmup if config.schedule in ("cosine", "linear") else 0

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)  # exact up to 16 million steps, and optax's schedules promote integers
        early = step < warmup
        # As a sum, which XLA computes once, and not in the update of each parameter; see `finite` in step.py.
        rates = jnp.stack([peak * step / max(warmup, 1), main(step - shift)])
        return jnp.where(jnp.stack([early, ~early]), rates, 0.0).sum()

    return schedule


def _staircase(config: ConfigDict, peak: float, steps_per_epoch: int) -> Callable:
    """The peak times `decay_factor` at each of the boundaries ("steps"), or every so many epochs or steps ("exponential")."""
    if config.schedule == "exponential":
        every = duration(config, "decay", steps_per_epoch)
        if not every:
            raise UsageError("optim.schedule='exponential': expected optim.decay_epochs or optim.decay_steps above 0")
        return optax.exponential_decay(peak, every, config.decay_factor, staircase=config.decay_staircase)
    if config.boundaries_epochs and config.boundaries_steps:
        raise UsageError("optim.boundaries_epochs and optim.boundaries_steps are both set: expected one of the two")
    boundaries = config.boundaries_steps or [round(epoch * steps_per_epoch) for epoch in config.boundaries_epochs]
    scales = {}
    for boundary in boundaries:  # two that round to one step both count
        scales[boundary] = scales.get(boundary, 1.0) * config.decay_factor
    return optax.piecewise_constant_schedule(peak, scales)


def decayed(params) -> dict:
    """Which parameters weight decay acts on: kernels; not biases, nor scales and biases of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def as_matrices(params):
    """How Muon sees each kernel: taps and input channels by output channels. None for what is none of its matrices.

    Those are all other parameters, the classifier, as in Muon's own code, and depthwise kernels, whose channels have nothing to
    do with each other.
    """

    def of_leaf(path, leaf):
        names = [step.key for step in path]
        if names[-1] != "kernel" or "classifier" in names or leaf.ndim < 2 or (leaf.ndim == 4 and leaf.shape[2] == 1):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def make_optimizer(config: ConfigDict, schedule: Callable) -> optax.GradientTransformation:
    """The optimizer of `config.optim` with clipping first and weight decay on kernels alone.

    `sgd` and `rmsprop` add weight_decay * w to the gradient; `adamw` decays the weights themselves (Loshchilov and Hutter 2019,
    https://arxiv.org/abs/1711.05101).
    `rmsprop` is that of the EfficientNet code: epsilon inside the root, mean square starting at 1, momentum after the
    learning rate. `lamb` is You et al. 2020, https://arxiv.org/abs/1904.00962. `muon` is that of Keller Jordan,
    https://kellerjordan.github.io/posts/muon, for kernels (see `as_matrices`); all else has AdamW at `adam_factor` times its
    learning rate.
    """
    if config.name not in OPTIMIZERS:
        raise unknown("optimizer", config.name, OPTIMIZERS)
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name in ("sgd", "rmsprop") and config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.name == "sgd":
        chain.append(optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov))
    elif config.name == "rmsprop":
        chain.append(
            optax.rmsprop(
                schedule,
                decay=config.beta2,
                eps=config.epsilon,
                initial_scale=1.0,
                eps_in_sqrt=True,
                momentum=config.momentum or None,
            )
        )
    elif config.name == "muon":
        chain.append(
            optax.contrib.muon(
                schedule,
                beta=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                weight_decay_mask=decayed,
                adam_b2=config.beta2,
                eps=config.epsilon,
                adam_learning_rate=lambda step: config.adam_factor * schedule(step),
                muon_weight_dimension_numbers=as_matrices,
            )
        )
    else:
        make = optax.adamw if config.name == "adamw" else optax.lamb
        fields = {"eps": config.epsilon, "weight_decay": config.weight_decay, "mask": decayed}
        chain.append(make(schedule, config.momentum, config.beta2, **fields))
    return optax.chain(*chain)
