"""Devices and processes: one mesh with the axis `data`, and the step mapped over it.

One code path serves a laptop, several GPUs and several hosts; `processes` says how several processes find each other.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh() -> Mesh:
    """All devices of all processes in one row. Auto: linen's modules fail under the Explicit axes that are JAX's default."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """One device of this process."""
    return jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:1])


def map_over_devices(step: Callable, mesh: Mesh, *, batch_axis: int, outputs: int, donate: bool = False) -> Callable:
    """Compiles `step(state, batch, store)`, written for one device, for all: `batch` is cut along `batch_axis`.

    Everything else is the same on all devices, before and after. `check_vma=False`: the step reduces its gradients itself, and
    under True they would arrive summed already, which Adam hides and SGD does not.
    """
    cut = PartitionSpec(*[None] * batch_axis, AXIS)
    whole = PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, cut, whole),
        out_specs=(whole,) * outputs if outputs > 1 else whole,
        check_vma=False,
    )
    # Unused arguments too: `untraced` tells a program from others by its text, which does not say what JAX left out.
    return jax.jit(mapped, donate_argnums=(0,) if donate else (), keep_unused=True)


def place(arrays: dict[str, np.ndarray], mesh: Mesh, *, batch_axis: int | None) -> dict[str, jax.Array]:
    """Host arrays, which every process holds whole, on the devices: cut along `batch_axis`, or copied to each if None."""
    spec = PartitionSpec() if batch_axis is None else PartitionSpec(*[None] * batch_axis, AXIS)
    sharding = NamedSharding(mesh, spec)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda where, array=array: array[where])
        for name, array in arrays.items()
    }


def rows_here(shape: tuple[int, ...], mesh: Mesh, *, batch_axis: int) -> np.ndarray:
    """True for what of an array of this shape, cut along `batch_axis`, lies on devices of this process."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, AXIS))
    here = np.zeros(shape, bool)
    for where in sharding.addressable_devices_indices_map(shape).values():
        here[where] = True
    return here


def replicate(tree, mesh: Mesh):
    """A tree of arrays, the same in every process, copied to all devices."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def copy(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])

    return jax.tree.map(copy, tree)
