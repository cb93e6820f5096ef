"""The mathematics of one update, and of one batch of an evaluation, written for one device of the mapped axis `data`.

A batch is a dictionary of arrays `[micro-batches, examples, ...]`: `index` (place in the dataset), `position` (place in the
global batch), `images` (uint8) and `labels` unless the whole split lies in `store`, and `mirrored` if some images are to be.
Positions follow the global order and a micro-batch is a contiguous part of it, so crops, masks and batch-norm groups are those
of one device on any number of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from cnnfamily import losses, rng
from cnnfamily.models import batch_norm, convolution


@flax.struct.dataclass
class TrainState:
    """What a run carries from step to step; `ema` is `{"params", "batch_stats"}`, or empty without averaging."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


def create_state(variables: dict, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step. The averages are copies: a donated buffer must not be shared."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), averages)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of one micro-batch as a function of the parameters; all its randomness is that of (seed, state.step, position).

    `view`: (keys `[examples]`, uint8 images, store) to what the network sees: augmentation and normalisation. `mix`: (key,
    position, images, targets) to images and targets blended with a partner's, and what was chosen; None leaves them.
    """

    network: nn.Module
    view: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array]
    seed: int
    mix: Callable | None = None
    label_smoothing: float = 0.0
    loss: Callable[[jax.Array, jax.Array], jax.Array] = losses.cross_entropy
    aux_weight: float = 0.3  # of the loss of each auxiliary classifier, where the network has any
    # What lies between convolutions anew in the backward pass, instead of kept. Not in the config: not measured on a GPU yet,
    # and on a CPU it saves nothing: a small ResNet-50's step has 1.4 times the temporary memory (jaxlib 0.10.2).
    recompute: bool = False

    def __call__(self, params: Any, state: TrainState, micro: dict[str, jax.Array], store: dict[str, jax.Array]):
        """The mean loss, and with it the new batch statistics, the top-1 share, and each random choice by name."""
        images, targets, choices = self.inputs(state.step, micro, store, _float_dtype(params))
        rngs = {
            "stochastic_depth": rng.step_key(self.seed, state.step, rng.STOCHASTIC_DEPTH),
            "dropout": rng.step_key(self.seed, state.step, rng.DROPOUT),
        }

        def forward(params, images):
            return self.network.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                position=micro["position"],
                rngs=rngs,
                mutable=["batch_stats", "choices", "aux_logits"],
            )

        if self.recompute:
            keep = jax.checkpoint_policies.save_only_these_names(convolution.KEPT, batch_norm.KEPT)
            forward = jax.checkpoint(forward, policy=keep)
        logits, updates = forward(params, images)
        loss = self.loss(logits, targets).mean()
        for auxiliary in jax.tree.leaves(updates.get("aux_logits", {})):
            loss += self.aux_weight * self.loss(auxiliary, targets).mean()
        top1 = losses.hits(logits, choices["labels"], 1).astype(jnp.float32).mean()
        return loss, (updates.get("batch_stats", {}), top1, choices | updates.get("choices", {}))

    def inputs(self, step: jax.Array, micro: dict[str, jax.Array], store: dict[str, jax.Array], dtype: jnp.dtype):
        """What the network gets: images, targets, and the choices that led to them."""
        augment_key = rng.step_key(self.seed, step, rng.AUGMENT)
        images = take(store, micro, "images")
        if "mirrored" in micro:
            images = jnp.where(micro["mirrored"][:, None, None, None], images[:, :, ::-1], images)
        images = self.view(rng.example_keys(augment_key, micro["position"]), images, store)
        labels = take(store, micro, "labels")
        targets = losses.smooth(labels, self.network.num_classes, self.label_smoothing, dtype)
        choices = {"images": images, "labels": labels}
        if self.mix:
            mix_key = rng.step_key(self.seed, step, rng.MIX)
            images, targets, choices["mix"] = self.mix(mix_key, micro["position"], images, targets)
        return images, targets, choices


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    store: dict[str, jax.Array],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    ema_warmup: bool = False,
    record: bool = False,
    axis_name: str = "data",
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, and its metrics `loss`, `top1` and `grad_norm`, means over the global batch.

    A step whose loss or gradient is not finite leaves the state as it was, so that `nonfinite.find` can look for the cause.

    Args:
      ema_warmup: limits the decay to (1 + step) / (10 + step), as TensorFlow's averages do when given the step.
      record: adds `choices` to the metrics, every random choice of the step: arrays `[global batch, ...]` in its order.
    """

    def of_micro_batch(micro):
        # Every micro-batch starts from the same running statistics and their mean is kept: as if it were one batch in groups.
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (batch_stats, top1, choices)), grads = gradient(state.params, state, micro, store)
        return (grads, batch_stats, loss, top1), choices if record else {}

    def zeros():
        of_tree = jax.tree.map(jnp.zeros_like, (state.params, state.batch_stats))
        return *of_tree, jnp.zeros((), _float_dtype(state.params)), jnp.zeros((), jnp.float32)

    total, choices = _accumulate(of_micro_batch, zeros, batch)
    # One reduction for everything that devices must agree on. Under check_vma=False gradients are still local here. On a CPU
    # one of a single device is not removed but copies: 8 of the 26 ms of a step of a small MobileNetV3.
    if lax.axis_size(axis_name) > 1:
        total = lax.pmean(total, axis_name)
    micro_batches = batch["position"].shape[0]
    grads, batch_stats, loss, top1 = jax.tree.map(lambda x: x / micro_batches, total) if micro_batches > 1 else total
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power; all else may be strict
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
        step = state.step.astype(_float_dtype(state.params))
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step)) if ema_warmup else jnp.asarray(ema_decay, step.dtype)
        new = {"params": params, "batch_stats": batch_stats}
        ema = jax.tree.map(lambda old, x: old + (1 - decay) * (x - old), ema, new)
    metrics = {"loss": loss, "top1": top1, "grad_norm": optax.tree.norm(grads)}
    # Of a vector: what is computed of scalars alone XLA computes anew in the update of each parameter, on a CPU. With the
    # learning rate, 7,700 of 61,400 operations in EfficientNet-B0's step (Adam, jaxlib 0.10.2).
    finite = jnp.isfinite(jnp.stack([loss, metrics["grad_norm"]])).all()
    after = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    after = jax.tree.map(lambda new, old: lax.select(finite, new, old), after, state)  # `jnp.where` takes long to trace
    if record:
        metrics["choices"] = _in_global_order({"index": batch["index"], **choices}, axis_name)
    return after, metrics


def _in_global_order(choices: Any, axis_name: str) -> Any:
    """Arrays `[micro-batches, examples, ...]` of each device as `[global batch, ...]` on all."""
    whole = lax.all_gather(choices, axis_name, axis=1, tiled=True)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)


def _accumulate(compute: Callable, zeros: Callable, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
    """Over the micro-batches, the first of the pair `compute(micro)` summed, and the second stacked, `[micro-batches, ...]`.

    `zeros()` is a sum of none. On a CPU unrolled, because XLA does not optimise convolutions inside a loop there; and of one
    alone nothing is added up, for that takes its time to trace, parameter by parameter.
    """

    def add(total, part):
        return jax.tree.map(jnp.add, total, part)

    def unrolled(batch):
        total, outputs = None, []
        for i in range(batch["position"].shape[0]):
            part, output = compute(jax.tree.map(lambda x, i=i: x[i], batch))
            total = add(total, part) if outputs else part  # at once, so that no gradients wait
            outputs.append(output)
        return total, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    def scanned(batch):
        def step(total, micro):
            part, output = compute(micro)
            return add(total, part), output

        return lax.scan(step, zeros(), batch)

    if batch["position"].shape[0] == 1:
        return unrolled(batch)
    return lax.platform_dependent(batch, cpu=unrolled, default=scanned)


def _float_dtype(params: Any) -> jnp.dtype:
    return jnp.result_type(*jax.tree.leaves(params))


def take(store: dict[str, jax.Array], batch: dict[str, jax.Array], name: str) -> jax.Array:
    """What a batch has of `images` or `labels`, from `store` if the split lies there."""
    return batch[name] if name in batch else jnp.take(store[name], batch["index"], axis=0)


@jax.jit
def largest_magnitude(tree: Any) -> jax.Array:
    """The largest absolute value in a tree of arrays: NaN or infinite if any of them is."""
    return jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)]))


def eval_step(
    variables: dict,
    batch: dict[str, jax.Array],
    store: dict[str, jax.Array],
    *,
    network: nn.Module,
    view: Callable[[jax.Array, dict[str, jax.Array]], jax.Array],
    mirrored: bool = False,
    axis_name: str = "data",
) -> dict[str, jax.Array]:
    """Sums over one evaluation batch (`losses.evaluation_sums`) in which `mask` `[examples]` marks what is no padding.

    Where an example has several views, `[examples, views, height, width, channels]` or its mirror image too (`mirrored`), its
    probabilities are the means over them.
    """
    images = view(take(store, batch, "images"), store)
    if images.ndim == 4:
        images = images[:, None]
    if mirrored:
        images = jnp.concatenate([images, images[..., ::-1, :]], axis=1)
    logits = network.apply(variables, images.reshape(-1, *images.shape[2:]), train=False)
    if images.shape[1] > 1:
        logits = jax.nn.log_softmax(logits.reshape(*images.shape[:2], -1))
        logits = jax.nn.logsumexp(logits, axis=1) - np.log(images.shape[1]).astype(logits.dtype)
    sums = losses.evaluation_sums(logits, take(store, batch, "labels"), batch["mask"])
    return lax.psum(sums, axis_name)
