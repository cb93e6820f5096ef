"""Each form drops what it says, with the right probability and scale, and computes no more than it says."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initialize
from cnnfamily.models.layers import BatchNorm, Conv
from cnnfamily.models.stochastic_depth import branch_output, drop_rates, drops, kept_of
from cnnfamily.summary import summarize


class Depth(nn.Module):
    """The fields that `drops` reads."""

    stochastic_depth: float = 0.6
    stochastic_depth_form: str = "example"
    stochastic_depth_schedule: str = "i/N"
    stochastic_depth_scaling: str = "train"
    stochastic_depth_group: int = 8

    def __call__(self, train, position):
        return drops(self, 3, train, jnp.asarray(position))


def drops_of(position, train=True, seed=0, **fields):
    rngs = {"stochastic_depth": jax.random.key(seed)}
    return Depth(**fields).apply({}, train, position, rngs=rngs, mutable=["choices"])


def kept(position, seed=0, **fields):
    """What the call records of its choices: bool [examples, 3 blocks]."""
    _, recorded = drops_of(position, seed=seed, **fields)
    return np.asarray(recorded["choices"]["stochastic_depth"][0])


def test_drop_rates():
    assert drop_rates(0.5, 4, "l/L") == (0.125, 0.25, 0.375, 0.5)
    assert drop_rates(0.2, 4, "i/N") == pytest.approx((0, 0.05, 0.1, 0.15))
    assert drop_rates(0.5, 0, "l/L") == ()
    with pytest.raises(UsageError, match="unknown stochastic-depth schedule 'l/N'"):
        drop_rates(0.5, 4, "l/N")


def test_example_form():
    first, second, third = drops_of(range(4000))[0]
    assert (first.form, first.scale) == ("none", 1.0)  # rate 0: always runs
    for drop, rate in ((second, 0.2), (third, 0.4)):
        assert drop.scale == pytest.approx(1 / (1 - rate))
        # The mean of n coins has a deviation of sqrt(p (1 - p) / n).
        assert abs(float(drop.keep.mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / 4000) ** 0.5
    both = 1 - (second.keep | third.keep).mean()  # blocks drop independently
    assert abs(both - 0.2 * 0.4) < 5 * (0.08 * 0.92 / 4000) ** 0.5
    np.testing.assert_array_equal(kept(range(4000)), np.stack([np.ones(4000, bool), second.keep, third.keep], 1))


def test_batch_form_has_one_coin_for_all_examples():
    found = np.stack([kept(range(5), seed, stochastic_depth_form="batch") for seed in range(300)])
    assert (found == found[:, :1]).all()
    for share, rate in zip(found[:, 0].mean(0), (0, 0.2, 0.4), strict=True):
        assert abs(share - (1 - rate)) <= 5 * (rate * (1 - rate) / 300) ** 0.5


def test_subset_form_keeps_k_of_every_group():
    fields = {"stochastic_depth_form": "subset", "stochastic_depth_schedule": "l/L"}
    found = kept(range(8000), **fields).reshape(1000, 8, 3)
    assert [kept_of(8, rate) for rate in (0.2, 0.4, 0.6)] == [6, 5, 3]
    for i, k in enumerate((6, 5, 3)):
        assert (found[:, :, i].sum(1) == k).all()
        # Every place of a group is as likely as any other.
        assert np.abs(found[:, :, i].mean(0) - k / 8).max() < 5 * (k / 8 * (1 - k / 8) / 1000) ** 0.5
    patterns = {tuple(row) for row in found[:, :, 2]}
    assert len(patterns) == 56, "all choices of 3 out of 8 occur in 1,000 groups"
    for i, drop in enumerate(drops_of(range(16), **fields)[0]):
        k, mask = (6, 5, 3)[i], kept(range(16), **fields)[:, i]
        assert drop.scale == pytest.approx(8 / k)
        assert sorted(np.asarray(drop.chosen)) == list(np.flatnonzero(mask))
        assert all(drop.place[row] == i for i, row in enumerate(drop.chosen))
        assert (np.asarray(drop.place)[~mask] >= 2 * k).all()
    assert kept_of(16, 0.999) == 1
    assert kept_of(16, 0.03) == 16


@pytest.mark.parametrize("form", ["example", "subset"])
def test_choices_belong_to_positions(form):
    fields = {"stochastic_depth_form": form, "stochastic_depth_schedule": "l/L"}
    whole = kept(range(64), **fields)
    np.testing.assert_array_equal(kept(range(40, 56), **fields), whole[40:56])
    if form == "example":
        np.testing.assert_array_equal(kept([40, 3, 17], **fields), whole[[40, 3, 17]])
    assert (kept(range(64), seed=1, **fields) != whole).any()
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8  # groups choose for themselves


@pytest.mark.parametrize("fields", [{"train": False}, {"stochastic_depth": 0.0}, {"stochastic_depth_form": "none"}])
def test_no_branch_is_touched(fields):
    assert [(drop.form, drop.scale) for drop in drops_of(range(4), **fields)[0]] == [("none", 1.0)] * 3


def test_scaling_at_test():
    """Huang et al. 2016, eq. 5: branches as they are in training, times their survival in evaluation."""
    for form in ("example", "batch"):
        fields = {"stochastic_depth_form": form, "stochastic_depth_scaling": "test"}
        assert [drop.scale for drop in drops_of(range(4), **fields)[0]] == [1.0] * 3
        evaluated, _ = drops_of(range(4), train=False, **fields)
        assert [(drop.form, drop.scale) for drop in evaluated] == [("none", pytest.approx(s)) for s in (1.0, 0.8, 0.6)]
    fields["stochastic_depth_form"] = "subset"  # the rates that rounding leaves: 6 and 5 of 8
    assert [drop.scale for drop in drops_of(range(4), train=False, **fields)[0]] == [1.0, 6 / 8, 5 / 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stochastic_depth": -0.1}, "stochastic_depth=-0.1: expected a rate from 0 to below 1"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0: expected a rate from 0 to below 1"),
        ({"stochastic_depth_form": "bach"}, "unknown stochastic-depth form 'bach'; did you mean 'batch'?"),
        ({"stochastic_depth_scaling": "Train"}, "unknown stochastic-depth scaling 'Train'; did you mean 'train'?"),
        ({"stochastic_depth_form": "subset", "stochastic_depth_group": 3}, "group=3 does not divide the 4 examples"),
    ],
)
def test_faults_are_named(fields, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        drops_of(range(4), **fields)


def test_a_norm_group_must_hold_whole_subset_groups():
    drop = drops_of(range(16), stochastic_depth_form="subset")[0][2]
    assert [drop.norm_group(n) for n in (0, 8, 16)] == [0, 5, 10]
    with pytest.raises(UsageError, match="expected 0 or a multiple of stochastic_depth_group=8"):
        drop.norm_group(12)


# What runs


EXECUTED = collections.Counter()


class Branch(nn.Module):
    """A residual branch with a convolution, batch statistics, and a count of its executions, backward ones apart."""

    kernel: int
    train: bool

    @nn.compact
    def __call__(self, x):
        y = Conv(x.shape[-1], self.kernel, dtype="float64", name="conv")(x)
        return BatchNorm(self.train, dtype="float64", name="norm")(_counted(y))


def _counted(x):
    def count(which):
        jax.debug.callback(lambda: EXECUTED.update([which]))

    @jax.custom_vjp
    def identity(x):
        return x

    def forward(x):
        count("forward")
        return x, None

    def backward(_, cotangent):
        count("backward")
        return (cotangent,)

    identity.defvjp(forward, backward)
    return identity(x)


class Net(nn.Module):
    """One input, `blocks` residual branches in a row."""

    stochastic_depth: float = 0.5
    stochastic_depth_form: str = "batch"
    stochastic_depth_schedule: str = "l/L"
    stochastic_depth_scaling: str = "train"
    stochastic_depth_group: int = 4
    blocks: int = 4
    kernel: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        for i, drop in enumerate(drops(self, self.blocks, train, jnp.arange(x.shape[0]))):
            branch = Branch(self.kernel, train, name=f"branch{i}")
            x = x + branch_output(branch, x, drop)
        return x


def loss_and_updates(params, stats, x, key, net):
    output, updates = net.apply(
        {"params": params, "batch_stats": stats},
        x,
        train=True,
        rngs={"stochastic_depth": key},
        mutable=["batch_stats", "choices"],
    )
    return jnp.square(output - 1).mean(), updates


gradient = jax.jit(jax.value_and_grad(loss_and_updates, has_aux=True), static_argnames="net")


def prepare(**fields):
    net = Net(**fields)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 5, 3)))
    return net, net.init(jax.random.key(0), x), x


def by_hand(params, stats, x, keep, form, kernel):
    """The same network for given choices bool [examples, blocks], each branch computed on the kept examples alone."""
    updates = {}
    for i in range(keep.shape[1]):
        rows = np.flatnonzero(keep[:, i])
        rate = drop_rates(0.5, keep.shape[1], "l/L")[i]
        name, scale = f"branch{i}", 1 / (1 - rate) if form == "batch" else 4 / kept_of(4, rate)
        updates[name] = stats[name]
        if len(rows):
            variables = {"params": params[name], "batch_stats": stats[name]}
            branch = Branch(kernel, True)
            y, update = branch.apply(variables, x[rows], mutable=["batch_stats"])
            updates[name] = update["batch_stats"]
            x = x.at[rows].add(scale * y)
    return jnp.square(x - 1).mean(), updates


# A branch of 1x1 holds no convolution operation on a CPU, one of 3x3 does.
@pytest.mark.parametrize(
    ("form", "kernel"),
    [("batch", 3), ("subset", 3), *(pytest.param(form, 1, marks=pytest.mark.full) for form in ("batch", "subset"))],
)
def test_value_gradient_and_statistics_are_those_of_the_kept_branches(x64, form, kernel):
    net, variables, x = prepare(stochastic_depth_form=form, kernel=kernel)
    params, stats = variables["params"], variables["batch_stats"]
    seen = set()
    for seed in range(3):
        (loss, updates), grads = gradient(params, stats, x, jax.random.key(seed), net)
        keep = np.asarray(updates["choices"]["stochastic_depth"][0])
        expected = jax.value_and_grad(by_hand, has_aux=True)(params, stats, x, keep, form, kernel)
        found = ((loss, updates["batch_stats"]), grads)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        seen.add(tuple(keep.any(0)))
    assert form == "subset" or len(seen) > 1, "some branch must have been dropped in one of the steps"


def test_a_dropped_branch_is_not_executed():
    """Counted while it runs, on a CPU."""
    with jax.enable_x64(True):
        net, variables, x = prepare(kernel=3)
        EXECUTED.clear()
        for seed in range(8):
            (_, updates), _ = gradient(variables["params"], variables["batch_stats"], x, jax.random.key(seed), net)
            jax.effects_barrier()
            runs = int(updates["choices"]["stochastic_depth"][0][0].sum())
            assert {"forward": runs, "backward": runs} == EXECUTED if runs else not EXECUTED
            EXECUTED.clear()


def computations(hlo):
    """The computations of an HLO module: name -> its text."""
    return {
        match.group(1): match.group(2) for match in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^}", hlo, re.M | re.S)
    }


def convolutions_inside_conditionals(hlo):
    """Every convolution that a conditional may run, as often as the module calls it."""
    every = computations(hlo)

    def below(text):
        found = [line for line in text.splitlines() if " convolution(" in line]
        return found + [line for name in re.findall(r"[\w.-]+", text) if name in every for line in below(every[name])]

    conditionals = [line.strip() for text in every.values() for line in text.splitlines() if " conditional(" in line]
    return [line for conditional in conditionals for line in below(conditional)]


@pytest.mark.parametrize(
    ("name", "platform"),
    [pytest.param("efficientnet_b0", "cpu", marks=pytest.mark.full), ("resnet20_cifar", "cpu"), ("resnet20_cifar", "cuda")],
)
def test_what_stands_in_the_conditional(name, platform):
    """All convolutions of a branch; on a CPU in the order of dimensions for which XLA has fast code there (TPU as GPU)."""
    small = {"stages": ((6, 32, 1, 1, 3),) * 2} if name == "efficientnet_b0" else {"stage_sizes": (2,)}
    net = create_model(name, stochastic_depth=0.5, stochastic_depth_form="batch", **small)
    variables = initialize(net, jax.random.key(0), resolution=32)

    def loss(params, key):
        rngs = dict.fromkeys(("stochastic_depth", "dropout"), key)
        images = jnp.ones((2, 32, 32, 3))
        return net.apply({**variables, "params": params}, images, train=True, rngs=rngs, mutable=["batch_stats"])[0].sum()

    lowered = jax.jit(jax.grad(loss)).trace(variables["params"], jax.random.key(0)).lower(lowering_platforms=(platform,))
    hlo = lowered.compile().as_text() if platform == "cpu" else lowered.compiler_ir("hlo").as_hlo_text()
    inside = convolutions_inside_conditionals(hlo)
    # Of ResNet two branches, forward and both gradients, two convolutions each; EfficientNet's are other operations on a CPU.
    count = len(set(inside) if platform == "cpu" else inside)  # there a kernel's gradient has a conditional of its own as well
    assert count == (2 * 3 * 2 if name == "resnet20_cifar" else 0)
    # The stem's; of EfficientNet on a CPU a product of patches.
    assert (" convolution(" in hlo) == (name == "resnet20_cifar")
    if platform == "cpu":
        assert all("dim_labels=b01f_01io->b01f" in line for line in inside)
        # Each batch norm has one for its moments and one in its gradient, each branch that may be dropped likewise.
        norms, branches = len(jax.tree.leaves(variables["batch_stats"])) // 2, 1 if name == "efficientnet_b0" else 2
        kernels = 4 if name == "resnet20_cifar" else 0
        assert hlo.count(" conditional(") == 2 * norms + 2 * branches + kernels


def multiply_adds(hlo):
    """Those of convolutions and matrix products in optimised HLO; zeros that a dilation inserts are not counted."""
    shapes = dict(re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", hlo))
    sizes = {name: [int(n) for n in text.split(",")] if text else [] for name, text in shapes.items()}
    total = 0
    for line in hlo.splitlines():
        found = re.search(r"%?([\w.-]+) = \w+\[[\d,]*\]\S* (convolution|dot)\(([^)]*)\)", line)
        if not found:
            continue
        name, kind, operands = found.groups()
        left, right = (re.search(r"%?([\w.-]+)$", operand.strip()).group(1) for operand in operands.split(","))
        outputs = math.prod(sizes[name])
        if kind == "dot":
            contracted = [int(n) for n in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line).group(1).split(",")]
            total += outputs * math.prod(sizes[left][axis] for axis in contracted)
            continue
        kernel_labels = re.search(r"dim_labels=\w+_(\w+)->", line).group(1)
        dilation = re.search(r"lhs_dilate=([\dx]+)", line)
        spread = math.prod(int(n) for n in dilation.group(1).split("x")) if dilation else 1
        total += outputs * math.prod(sizes[right]) // sizes[right][kernel_labels.index("o")] // spread
    return total


@pytest.mark.parametrize("form", ["none", "subset"])
def test_multiply_adds_of_the_compiled_step(form):
    """Sum over blocks of branch cost times k / g, in forward and both gradients, within 2 %; the rest in full."""
    rate, group, batch = 0.6, 8, 16
    net = create_model(
        "resnet20_cifar",
        stage_sizes=(2, 1),
        filters=24,  # with 64 in the second stage a CPU lays images side by side, and multiplies what is between them
        resolution=16,
        stochastic_depth=rate,
        stochastic_depth_form=form,
        stochastic_depth_group=group,
    )
    variables = initialize(net, jax.random.key(0))

    def loss(params, images, key):
        apply = {"train": True, "rngs": {"stochastic_depth": key}, "mutable": ["batch_stats"]}
        return jnp.square(net.apply({**variables, "params": params}, images, **apply)[0]).sum()

    step = jax.jit(jax.grad(loss)).lower(variables["params"], jnp.ones((batch, 16, 16, 3)), jax.random.key(0))
    expected = 0
    for layer in summarize(net).layers:
        share = 1.0
        if form == "subset" and "/branch/" in layer.name:
            block = ("stage1_block1", "stage1_block2", "stage2_block1").index(layer.name.split("/")[0])
            share = kept_of(group, drop_rates(rate, 3, "l/L")[block]) / group
        products = 2 if layer.name == "stem" else 3  # images have no gradient
        expected += batch * layer.macs * share * products
    assert multiply_adds(step.compile().as_text()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("form", ["example", "batch", "subset"])
def test_in_evaluation_all_blocks_run(form):
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    plain = create_model("resnet20_cifar", stage_sizes=(1,), stochastic_depth_form="none")
    variables = initialize(plain, jax.random.key(0), resolution=16)
    network = plain.clone(stochastic_depth=0.9, stochastic_depth_form=form)
    np.testing.assert_array_equal(network.apply(variables, images), plain.apply(variables, images))
    at_test = network.clone(stochastic_depth_scaling="test")
    scaled = jax.tree.map(jnp.copy, variables)  # the one branch ends in a norm whose bias is 0
    survival = 1 - 0.9 if form != "subset" else 2 / 16
    scaled["params"]["stage1_block1"]["branch"]["norm2"]["scale"] *= survival
    np.testing.assert_allclose(at_test.apply(variables, images), plain.apply(scaled, images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fields"), [("resnet20_cifar", {"stage_sizes": (1,)}), ("efficientnet_b0", {"stages": ((1, 32, 1, 1, 3),)})]
)
def test_a_norm_group_stays_the_same_examples_in_a_subset(name, fields):
    """Other images in the second half of the batch change nothing in the first, whose statistics are its own."""
    depth = {"stochastic_depth": 0.5, "stochastic_depth_form": "subset", "stochastic_depth_schedule": "l/L"}
    network = create_model(name, norm_group=8, stochastic_depth_group=8, **depth, **fields)
    variables = initialize(network, jax.random.key(0), resolution=32)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    other = np.concatenate([images[:8], 3 * images[8:] + 1])

    @jax.jit
    def train(images):
        rngs = dict.fromkeys(("stochastic_depth", "dropout"), jax.random.key(1))
        return network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    one, two = train(images), train(other)
    np.testing.assert_array_equal(one[:8], two[:8])
    assert (one[8:] != two[8:]).any()
