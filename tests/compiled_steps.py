"""Operations, bytes and memory of compiled training steps; `python tests/compiled_steps.py` records them for this jaxlib.

XLA's own count for a CPU after fusion, so work that fusion copies into several users counts as often as it is done, and a
convolution that falls back on a slow form shows. No clock: the same on every machine of one jaxlib.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from flax import linen as nn
from jax.stages import Compiled

from cnnfamily import create_model, parallel
from cnnfamily.models import initialize
from cnnfamily.step import Objective, create_state, train_step

RECORD = Path(__file__).with_name("compiled_steps.json")
BATCH, SIDE = 8, 64
# Of each family two or three blocks: a step's compilation costs seconds, and what fusion does it does in each block.
NETWORKS = {
    "efficientnet_b0": {"stages": ((1, 16, 1, 1, 3), (6, 24, 1, 2, 3), (6, 40, 1, 2, 5)), "head_filters": 128},
    "mobilenet_v2": {"stages": ((1, 16, 1, 1), (6, 24, 2, 2)), "head_filters": 128},
    "resnet50": {"stage_sizes": (1, 1), "width": 0.5},
}
DTYPES = ("float32", "bfloat16")


def compiled_step(network: nn.Module, optimizer: optax.GradientTransformation, *, side: int, channels: int = 3) -> Compiled:
    """One step of `BATCH` images on one device."""
    objective = Objective(network.clone(axis_name="data"), lambda keys, images, store: images.astype(jnp.float32) / 255, 0)
    state = jax.eval_shape(lambda: create_state(initialize(network, jax.random.key(0), resolution=side), optimizer, ema=False))
    rows = jax.ShapeDtypeStruct((1, BATCH), np.int32)
    images = jax.ShapeDtypeStruct((1, BATCH, side, side, channels), np.uint8)
    batch = {"index": rows, "position": rows, "labels": rows, "images": images}
    step = functools.partial(train_step, objective=objective, optimizer=optimizer)
    mapped = parallel.map_over_devices(step, parallel.local_mesh(), batch_axis=1, outputs=2, donate=True)
    return mapped.lower(state, batch, {}).compile()


def measure(name: str, dtype: str) -> dict[str, float]:
    """Floating-point operations, bytes accessed and bytes of temporary memory of one step."""
    network = create_model(name, num_classes=10, dtype=dtype, **NETWORKS[name])
    compiled = compiled_step(network, optax.sgd(0.1, momentum=0.9), side=SIDE)
    counts = compiled.cost_analysis()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"operations": counts["flops"], "bytes": counts["bytes accessed"], "temporary_bytes": memory}


def main() -> None:
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    recorded[jaxlib.__version__] = {f"{name} {dtype}": measure(name, dtype) for name in NETWORKS for dtype in DTYPES}
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
