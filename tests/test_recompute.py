"""`Objective.recompute`: the same update and the same random choices. What it saves, a GPU will tell."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

from cnnfamily import create_model, parallel
from cnnfamily.models import initialize, variable_shapes
from cnnfamily.step import Objective, create_state, train_step

SMALL = {
    # squeeze-and-excitation, dropout, and a branch in a conditional
    "efficientnet_b0": {
        "stages": ((1, 16, 1, 1, 3), (6, 16, 2, 1, 3)),
        "stochastic_depth": 0.2,
        "stochastic_depth_form": "batch",
        "head_filters": 64,
    },
    "resnet50": {"stage_sizes": (2, 1), "width": 0.5},
}


def compiled_step(name: str, dtype: str, recompute: bool):
    """A compiled step of SGD, and its arguments."""
    network = create_model(name, num_classes=10, dtype=dtype, **SMALL[name])
    optimizer = optax.sgd(1.0)
    variables = initialize(network, jax.random.key(0), resolution=32)
    objective = Objective(
        network.clone(axis_name="data"), lambda keys, images, store: images.astype(dtype) / 255, 0, recompute=recompute
    )
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, record=True)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 32, 32, 3), np.uint8)
    row = np.arange(16, dtype=np.int32)[None]
    batch = {"images": images, "index": row, "position": row, "labels": row % 10}
    arguments = (create_state(variables, optimizer, ema=False), batch, {})
    return parallel.map_over_devices(step, mesh_of(1), batch_axis=1, outputs=2).lower(*arguments).compile(), arguments


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_the_same_update(x64, name):
    (kept, arguments), (anew, _) = (compiled_step(name, "float64", recompute) for recompute in (False, True))
    (expected, metrics), (found, same) = kept(*arguments), anew(*arguments)
    assert float(metrics["grad_norm"]) > 0.1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), (found, same), (expected, metrics))


def test_what_is_kept_of_a_convolution_with_a_bias_is_rounded():
    """Twice the memory else: with a bias the sums stay in float32 until it is added."""
    network = create_model("vgg11", width=0.125, num_classes=10, dtype="bfloat16")
    variables = variable_shapes(network, resolution=32)
    apply = functools.partial(network.apply, train=True, rngs={"dropout": jax.random.key(0)})
    program = str(jax.make_jaxpr(apply)(variables, jnp.ones((2, 32, 32, 3))))
    kept = re.findall(r":(\w+)\[[\d,]*\] = name\[name=convolution\]", program)
    assert kept == ["bf16"] * 8
