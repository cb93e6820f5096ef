"""How fast this machine multiplies matrices and moves memory: what a network's figures are compared with in `benchmark`."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnfamily import parallel

WARM_UP_STEPS = 2
FEWEST_STEPS = 3  # for a median, however long one takes
_CUT = PartitionSpec(parallel.AXIS)


def durations(step: Callable[[], object], *, steps: int = 0, seconds: float = 0.0) -> np.ndarray:
    """Seconds of each of `steps` calls after two that warm up; with `steps=0` of as many as fit in `seconds`, at least 3."""
    for _ in range(WARM_UP_STEPS):
        step()
    found, first = [], time.perf_counter()
    while len(found) < (steps or FEWEST_STEPS) or (not steps and time.perf_counter() - first < seconds):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return np.array(found)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What all devices of a mesh together reach: floating-point operations and bytes of memory a second."""

    flops_per_second: float
    bytes_per_second: float


def measure_ceilings(dtype: str, mesh: Mesh, *, seconds: float = 0.1, mebibytes: int = 0) -> Ceilings:
    """Measures both ceilings.

    Args:
      dtype: of the factors of the matrix products, which are summed in float32.
      seconds: matrices double from 1,024 to at most 16,384 rows until one product takes as long; the fastest size counts.
      mebibytes: of each of the two arrays on each device; 0: 1,024, or together 256 on CPU devices, which share one memory.
    """
    mebibytes = mebibytes or (max(1, 256 // mesh.size) if mesh.devices.flat[0].platform == "cpu" else 1024)
    best = 0.0
    for rows in (2**power for power in range(10, 15)):
        duration = _time_matrix_product(rows, dtype, mesh)
        best = max(best, 2 * rows**3 * mesh.size / duration)
        if duration > seconds:
            break
    return Ceilings(best, 3 * mebibytes * 2**20 * mesh.size / _time_elementwise(mebibytes * 2**18, mesh))


def _time_matrix_product(rows: int, dtype: str, mesh: Mesh) -> float:
    """Seconds in which every device multiplies two square matrices."""

    def product(left, right):
        return lax.dot_general(left, right, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    product = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(_CUT, _CUT), out_specs=_CUT, check_vma=False))
    left, right = (_normal((rows * mesh.size, rows), dtype, mesh, seed) for seed in (0, 1))
    return float(np.median(durations(lambda: jax.block_until_ready(product(left, right)), steps=5)))


def _time_elementwise(elements: int, mesh: Mesh) -> float:
    """Seconds in which every device computes x * a + y over float32 arrays of so many elements, in the place of x."""

    def combine(x, y):
        return x * jnp.float32(0.5) + y  # below 1, so that repeating it stays finite

    mapped = jax.shard_map(combine, mesh=mesh, in_specs=(_CUT, _CUT), out_specs=_CUT, check_vma=False)
    combine = jax.jit(mapped, donate_argnums=0)  # else a CPU's time goes into the page faults of a new array
    x, y = (_normal((elements * mesh.size,), "float32", mesh, seed) for seed in (0, 1))

    def step():
        nonlocal x
        x = jax.block_until_ready(combine(x, y))

    return float(np.median(durations(step, steps=7)))


def _normal(shape: tuple[int, ...], dtype: str, mesh: Mesh, seed: int) -> jax.Array:
    sharding = NamedSharding(mesh, _CUT)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.dtype(dtype)), out_shardings=sharding)
    return jax.block_until_ready(draw(jax.random.key(seed)))
