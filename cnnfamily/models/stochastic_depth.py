"""Stochastic depth: residual branches that are left out at random in training (Huang et al. 2016,
https://arxiv.org/abs/1603.09382). In evaluation every branch runs.

A residual network has the fields `stochastic_depth` (the rate) and `stochastic_depth_form`, `_schedule`, `_scaling`, `_group`.
It asks `drops` once what happens to each of its blocks, and calls `branch_output` where it would have called the branch.

    example   every example drops or keeps the branch for itself; the branch is computed for all (EfficientNet's code)
    batch     one coin a block and step; a dropped branch is not computed (the paper and its code)
    subset    the branch is computed for k of every g consecutive examples of the global batch, chosen at random
    none      no branch is dropped

On every platform a dropped branch of form `batch` costs no time. On a CPU its convolutions are traced for the branch of a
conditional (`convolution.in_a_branch`), where the gradients that JAX makes of them would be slow.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from cnnfamily import rng
from cnnfamily.errors import UsageError
from cnnfamily.models import onednn
from cnnfamily.models.convolution import in_a_branch
from cnnfamily.models.layers import choose

FORMS = ("example", "batch", "subset", "none")


@dataclasses.dataclass(frozen=True)
class Drop:
    """What one call does to one residual branch; the default runs it as it is.

    `scale` multiplies its output. `keep` is bool: `[batch]` in form "example", `[]` in form "batch". In form "subset" the
    branch sees `kept` of every `group` examples: those at `chosen`, and row `place` of its output belongs to each example
    (past the end: to a dropped one).
    """

    form: str = "none"
    scale: float = 1.0
    keep: Array | None = None
    kept: int = 1
    group: int = 1
    chosen: Array | None = None
    place: Array | None = None

    def norm_group(self, examples: int) -> int:
        """The examples that a batch-norm group of `examples` leaves in the branch; 0, the whole batch, stays that."""
        if examples % self.group:
            raise UsageError(
                f"batch-norm groups of {examples} examples (model.norm_group) with stochastic_depth_form=subset: "
                f"expected 0 or a multiple of stochastic_depth_group={self.group}"
            )
        return examples * self.kept // self.group


def drop_rates(rate: float, blocks: int, schedule: str) -> tuple[float, ...]:
    """Probability that stochastic depth drops each of `blocks` residual branches.

    "l/L": rate * l / L with l from 1, the last block at `rate` (Huang et al. 2016, eq. 4).
    "i/N": rate * i / N with i from 0, the first block never dropped (the EfficientNet code).
    """
    first = {"l/L": 1, "i/N": 0}
    return tuple(rate * (i + choose("stochastic-depth schedule", schedule, first)) / blocks for i in range(blocks))


def kept_of(group: int, rate: float) -> int:
    """Form "subset": how many of `group` examples run a branch with this drop rate, rounded, at least 1."""
    return max(1, int(group * (1 - rate) + 0.5))


def drops(network: nn.Module, blocks: int, train: bool, position: Array) -> list[Drop]:
    """What happens to each of the residual branches of `network` in this call; `position` `[batch]` in the global batch.

    In training a branch that runs is scaled by 1 / (1 - drop rate), so that its expectation is that of evaluation; with
    `stochastic_depth_scaling="test"` it is left as it is and multiplied by (1 - drop rate) in evaluation instead, as in the
    paper (eq. 5). Where form "subset" rounds the rate, the rounded one counts.

    Raises:
      UsageError: an unknown form, schedule or scaling, a rate outside [0, 1), or groups that do not divide the batch.
    """
    form = choose("stochastic-depth form", network.stochastic_depth_form, FORMS)
    at_test = choose("stochastic-depth scaling", network.stochastic_depth_scaling, ("train", "test")) == "test"
    rates = drop_rates(network.stochastic_depth, blocks, network.stochastic_depth_schedule)
    if not 0 <= network.stochastic_depth < 1:
        raise UsageError(f"stochastic_depth={network.stochastic_depth}: expected a rate from 0 to below 1")
    if form == "none" or not any(rates) or not (train or at_test):
        return [Drop()] * blocks
    group = network.stochastic_depth_group
    if form == "subset":
        rates = tuple(1 - kept_of(group, rate) / group for rate in rates)
    if not train:
        return [Drop(scale=1 - rate) for rate in rates]
    scales = [1.0 if at_test else 1 / (1 - rate) for rate in rates]
    key, size = network.make_rng("stochastic_depth"), position.shape[0]
    survival = jnp.asarray([1 - rate for rate in rates], jnp.float32)
    if form == "subset":
        if size % group:
            raise UsageError(
                f"stochastic_depth_group={group} does not divide the {size} examples that a device has in a "
                f"micro-batch: expected a divisor of {size}"
            )
        # The rank of an example's draw among those of its group, which lies whole on one device: no communication.
        draws = rng.example_uniform(key, position, (blocks,)).reshape(-1, group, blocks)
        order = jnp.argsort(draws, axis=1)
        rank = jnp.argsort(order, axis=1)
        keep = rank < jnp.asarray([kept_of(group, rate) for rate in rates])
    elif form == "batch":
        keep = jnp.broadcast_to(jax.random.uniform(key, (blocks,), jnp.float32) < survival, (size, blocks))
    else:
        keep = rng.example_uniform(key, position, (blocks,)) < survival
    network.sow("choices", "stochastic_depth", keep.reshape(size, blocks))

    def drop(i: int) -> Drop:
        if not rates[i]:
            return Drop()
        if form == "batch":
            return Drop(form, scales[i], keep[0, i])
        if form == "example":
            return Drop(form, scales[i], keep[:, i])
        kept, first = kept_of(group, rates[i]), jnp.arange(size // group)[:, None]
        place = jnp.where(keep[..., i], first * kept + rank[..., i], size)
        chosen = first * group + order[:, :kept, i]
        return Drop(form, scales[i], None, kept, group, chosen.reshape(-1), place.reshape(-1))

    return [drop(i) for i in range(blocks)]


def branch_output(branch: nn.Module, x: Array, drop: Drop) -> Array:
    """What a residual branch adds to its shortcut, `[batch, ...]`: `branch(x)` under stochastic depth."""
    if drop.form == "batch":
        y = _conditional(branch, x, drop.keep)
    elif drop.form == "subset":
        y = _exchange(branch(_exchange(x, drop.chosen, drop.place)), drop.place, drop.chosen)
    else:
        y = branch(x)
    if drop.form == "example":
        factor = jnp.where(drop.keep, jnp.asarray(drop.scale, y.dtype), jnp.zeros((), y.dtype))
        return y * factor.reshape(-1, 1, 1, 1)
    if drop.scale == 1.0:
        return y  # which may be pending
    y = onednn.finished(y)
    return y * jnp.asarray(drop.scale, y.dtype)


def _conditional(branch: nn.Module, x: Array, keep: Array) -> Array:
    """`branch(x)` if `keep`, else zeros and unchanged batch statistics.

    By a pure function of the branch's variables, because a bare `lax.cond` around bound linen modules leaks tracers.
    """

    @jax.jit  # traced once, for its shape and for the conditional
    def run(variables, x):
        with in_a_branch():
            output, updates = branch.clone(parent=None, name=None).apply(variables, x, mutable=["batch_stats"])
        return output, updates["batch_stats"]

    def skip(variables, x):
        return jnp.zeros(output.shape, output.dtype), variables["batch_stats"]

    variables = {name: branch.variables.get(name, {}) for name in ("params", "batch_stats")}
    output = jax.eval_shape(run, variables, x)[0]
    y, updates = lax.cond(keep, run, skip, variables, x)
    for name, value in updates.items():
        branch.put_variable("batch_stats", name, value)
    return y


@jax.custom_vjp
def _exchange(x: Array, there: Array, back: Array) -> Array:
    """Rows `there` of x, zeros for a row past its end; `back` undoes it, so the gradient is a gather as well, no scatter."""
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


_exchange.defvjp(
    lambda x, there, back: (_exchange(x, there, back), (there, back)),
    lambda indices, cotangent: (_exchange(cotangent, indices[1], indices[0]), None, None),
)
