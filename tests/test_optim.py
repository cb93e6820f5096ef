"""Schedules by hand, and each optimizer against its formula written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnfamily.config import load_config
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, variable_shapes
from cnnfamily.optim import decayed, duration, learning_rate_schedule, make_optimizer


def config_of(**fields):
    return load_config("configs/default.py:lenet5", {f"optim.{key}": value for key, value in fields.items()}).optim


def rates(steps, *, total_steps=100, steps_per_epoch=10, batch_size=64, **fields):
    schedule = learning_rate_schedule(
        config_of(**fields), total_steps=total_steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size
    )
    return [float(schedule(step)) for step in steps]


SCHEDULES = {
    "constant": ({"schedule": "constant", "learning_rate": 0.3}, {0: 0.3, 99: 0.3}),
    "peak grows with the batch": ({"schedule": "constant", "learning_rate": 0.1, "reference_batch": 256}, {0: 0.1 * 64 / 256}),
    "warm-up": (
        {"schedule": "constant", "learning_rate": 0.8, "warmup_epochs": 0.4},
        {0: 0, 1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 0.8},
    ),
    "cosine": ({"learning_rate": 2.0}, {0: 2, 25: 1 + 0.5**0.5, 50: 1, 75: 1 - 0.5**0.5, 100: 0}),
    "cosine falls from the end of warm-up": ({"learning_rate": 2.0, "warmup_steps": 20}, {10: 1, 20: 2, 60: 1, 100: 0}),
    "cosine to a share of the peak": ({"learning_rate": 2.0, "end_factor": 0.1}, {0: 2, 50: 1.1, 100: 0.2}),
    "linear": ({"schedule": "linear", "learning_rate": 1.0, "end_factor": 0.5}, {0: 1, 50: 0.75, 100: 0.5, 120: 0.5}),
    "linear after warm-up": (
        {"schedule": "linear", "learning_rate": 1.0, "warmup_steps": 20},
        {5: 0.25, 20: 1, 60: 0.5, 100: 0},
    ),
    "steps, boundaries in epochs": (
        {"schedule": "steps", "learning_rate": 1.0, "boundaries_epochs": (3.0, 4.5)},
        {29: 1, 30: 0.1, 44: 0.1, 45: 0.01, 99: 0.01},
    ),
    "steps, boundaries in steps": (
        {"schedule": "steps", "learning_rate": 1.0, "boundaries_steps": (7, 8), "decay_factor": 0.5},
        {6: 1, 7: 0.5, 8: 0.25},
    ),
    "warm-up does not shift the boundaries": (
        {"schedule": "steps", "learning_rate": 1.0, "boundaries_steps": (30,), "warmup_steps": 20},
        {5: 0.25, 20: 1, 29: 1, 30: 0.1},
    ),
    "exponential, EfficientNet's": (
        {"schedule": "exponential", "learning_rate": 1.0, "decay_factor": 0.97, "decay_epochs": 2.4},
        {0: 1, 23: 1, 24: 0.97, 47: 0.97, 48: 0.97**2, 99: 0.97**4},
    ),
    "warm-up does not shift the exponential": (
        {"schedule": "exponential", "learning_rate": 1.0, "decay_factor": 0.5, "decay_steps": 10, "warmup_steps": 5},
        {1: 0.2, 5: 1, 9: 1, 10: 0.5, 20: 0.25},
    ),
    "exponential without jumps": (
        {"schedule": "exponential", "learning_rate": 1.0, "decay_factor": 0.25, "decay_steps": 20, "decay_staircase": False},
        {0: 1, 10: 0.5, 20: 0.25},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    fields, expected = SCHEDULES[name]
    assert rates(expected, **fields) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_epochs": 1.0, "warmup_steps": 5}, "warmup_epochs=1.0 and warmup_steps=5 are both set"),
        ({"warmup_steps": 100}, "warm-up of 100 steps: expected fewer than the run's 100"),
        ({"warmup_epochs": 10.0}, "warm-up of 100 steps"),
        ({"schedule": "exponential", "decay_epochs": 1.0, "decay_steps": 5}, "decay_epochs=1.0 and decay_steps=5 are both set"),
        ({"schedule": "exponential"}, "expected optim.decay_epochs or optim.decay_steps above 0"),
        ({"schedule": "steps", "boundaries_epochs": (1.0,), "boundaries_steps": (5,)}, "both set"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    ],
)
def test_schedule_errors(fields, message):
    with pytest.raises(UsageError, match=message):
        rates([0], **fields)


def test_duration():
    assert duration(config_of(warmup_epochs=2.5), "warmup", 10) == 25
    assert duration(config_of(warmup_steps=7), "warmup", 10) == 7
    assert duration(config_of(), "warmup", 10) == 0


def test_only_kernels_decay():
    network = create_model("efficientnet_b0", width=0.25, depth=0.1)
    params = variable_shapes(network)["params"]
    flat = jax.tree_util.tree_leaves_with_path(decayed(params))
    names = {(path[-1].key, value) for path, value in flat}
    assert names == {("kernel", True), ("bias", False), ("scale", False)}
    assert len(flat) == len(jax.tree.leaves(params))


# Parameters, and the gradients of three steps: a kernel, which decays, and a bias, which does not.
START = {"kernel": np.array([1.0, -2.0, 0.5]), "bias": np.array([0.3])}
GRADIENTS = [
    {"kernel": np.array([0.4, -0.1, 0.0]), "bias": np.array([2.0])},
    {"kernel": np.array([-0.2, 0.3, 0.7]), "bias": np.array([-1.0])},
    {"kernel": np.array([0.1, 0.1, -0.9]), "bias": np.array([0.5])},
]
RATES = [0.1, 0.05, 0.2]


def run_optimizer(**fields):
    optimizer = make_optimizer(config_of(**fields), lambda count: jnp.asarray(RATES)[count])
    params = {"layer": jax.tree.map(jnp.asarray, START)}
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"layer": jax.tree.map(jnp.asarray, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    return params["layer"]


def run_formula(rule, decay=0.0):
    """The three steps of `rule(memory, step, w, g) -> w`, decay * w added to the kernel's gradient."""
    params = dict(START)
    for name, w in params.items():
        memory = {}
        for step, gradient in enumerate(GRADIENTS):
            w = rule(memory, step, w, gradient[name] + decay * w if name == "kernel" else gradient[name])
        params[name] = w
    return params


def assert_same(found, expected):
    for name, value in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd(x64, nesterov):
    def rule(memory, step, w, g):
        memory["v"] = 0.9 * memory.get("v", 0) + g
        return w - RATES[step] * (g + 0.9 * memory["v"] if nesterov else memory["v"])

    assert_same(run_optimizer(name="sgd", nesterov=nesterov, weight_decay=0.01), run_formula(rule, decay=0.01))


def test_sgd_without_momentum(x64):
    def rule(memory, step, w, g):
        return w - RATES[step] * g

    assert_same(run_optimizer(name="sgd", nesterov=False, momentum=0.0), run_formula(rule))


def test_rmsprop_is_tensorflows(x64):
    def rule(memory, step, w, g):
        memory["ms"] = 0.8 * memory.get("ms", np.ones_like(g)) + 0.2 * g**2  # starts at 1
        memory["mom"] = 0.9 * memory.get("mom", 0) + RATES[step] * g / np.sqrt(memory["ms"] + 1e-3)
        return w - memory["mom"]

    found = run_optimizer(name="rmsprop", momentum=0.9, beta2=0.8, epsilon=1e-3, weight_decay=0.01)
    assert_same(found, run_formula(rule, decay=0.01))


def adam_direction(memory, step, g, epsilon=1e-8):
    """Adam's step before the learning rate, with betas of 0.9 and 0.99."""
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g**2
    m, v = memory["m"] / (1 - 0.9 ** (step + 1)), memory["v"] / (1 - 0.99 ** (step + 1))
    return m / (np.sqrt(v) + epsilon)


def test_adamw(x64):
    def rule_of(decay):
        return lambda memory, step, w, g: w - RATES[step] * (adam_direction(memory, step, g) + decay * w)

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power in its bias correction
        found = run_optimizer(name="adamw", momentum=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.05)
    expected = {"kernel": run_formula(rule_of(0.05))["kernel"], "bias": run_formula(rule_of(0.0))["bias"]}
    assert_same(found, expected)


def test_lamb(x64):
    """Adam's step with decay, brought to the length of the weights, each array by itself; `trust` 1 where either is 0."""

    def rule_of(decay):
        def rule(memory, step, w, g):
            update = adam_direction(memory, step, g, epsilon=1e-6) + decay * w
            return w - RATES[step] * np.linalg.norm(w) / np.linalg.norm(update) * update

        return rule

    with jax.numpy_dtype_promotion("standard"):
        found = run_optimizer(name="lamb", momentum=0.9, beta2=0.99, epsilon=1e-6, weight_decay=0.05)
    expected = {"kernel": run_formula(rule_of(0.05))["kernel"], "bias": run_formula(rule_of(0.0))["bias"]}
    assert_same(found, expected)


def test_muon_makes_kernels_orthogonal_and_has_adam_for_the_rest(x64):
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 4, 8)},
        "hidden": {"kernel": (20, 6), "bias": (6,)},
        "depthwise": {"kernel": (3, 3, 1, 8)},
        "classifier": {"kernel": (6, 10)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params, *gradients = (jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=is_shape) for _ in range(3))
    fields = {"momentum": 0.9, "nesterov": False, "beta2": 0.99, "weight_decay": 0.1, "adam_factor": 0.5}
    optimizer = make_optimizer(config_of(name="muon", **fields), lambda count: jnp.asarray(RATES)[count])
    found, state = params, optimizer.init(jax.tree.map(jnp.asarray, params))
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, found)
            found = optax.apply_updates(found, updates)

    def muon(w, gradients):
        moment = 0
        for step, g in enumerate(gradients):
            moment = 0.9 * moment + 0.1 * g
            x = (moment / (1 - 0.9 ** (step + 1))).reshape(-1, g.shape[-1]).T
            x = x / np.linalg.norm(x)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            update = x.T.reshape(g.shape) * max(1, g.shape[-1] / (g.size / g.shape[-1])) ** 0.5
            singular = np.linalg.svd(x, compute_uv=False)
            assert 0.6 < singular.min() <= singular.max() < 1.3
            w = w - RATES[step] * (update + 0.1 * w)
        return w

    def adam(w, gradients):
        memory = {}
        for step, g in enumerate(gradients):
            w = w - 0.5 * RATES[step] * adam_direction(memory, step, g)
        return w

    for layer, name, rule in (
        ("conv", "kernel", muon),
        ("hidden", "kernel", muon),
        ("hidden", "bias", adam),
        ("depthwise", "kernel", adam),
        ("classifier", "kernel", adam),
    ):
        expected = rule(params[layer][name], [gradient[layer][name] for gradient in gradients])
        np.testing.assert_allclose(found[layer][name], expected, rtol=1e-6, atol=1e-8, err_msg=f"{layer} {name}")


def test_clipping_comes_first_and_is_global(x64):
    def clipped(step):
        norm = np.sqrt(sum((g**2).sum() for g in GRADIENTS[step].values()))
        return min(1.0, 0.5 / norm)

    def rule(memory, step, w, g):
        # The decay is added after the clipping: it is no part of the norm.
        return w - RATES[step] * clipped(step) * g - (RATES[step] * 0.01 * w if w.size == 3 else 0)

    found = run_optimizer(name="sgd", nesterov=False, momentum=0.0, clip_norm=0.5, weight_decay=0.01)
    assert_same(found, run_formula(rule))


def test_unknown_optimizer():
    with pytest.raises(UsageError, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        make_optimizer(config_of(name="adam"), lambda step: 0.1)
