"""A trained network as it infers fastest: batch norm folded, kernels narrowed once, and on a CPU convolutions by oneDNN."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnfamily import programs
from cnnfamily.errors import UsageError
from cnnfamily.fold import fold_batch_norm


def prepare(network: nn.Module, variables: dict) -> tuple[nn.Module, dict]:
    """The network with batch norm folded where it can be, and its variables, kernels in `network.dtype`, on the device."""
    # Copied before anything is computed: JAX on a CPU reads aligned arrays of NumPy's where they lie, and later.
    variables = jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)
    with contextlib.suppress(UsageError):  # no batch norm, or none that follows a convolution directly
        network, variables = fold_batch_norm(network, variables)

    def narrow(path, leaf):
        return leaf.astype(network.dtype) if path[-1].key == "kernel" else leaf

    return network, jax.device_put(jax.tree_util.tree_map_with_path(narrow, variables))


def optimize_for_inference(network: nn.Module, variables: dict) -> Callable[[jax.Array], jax.Array]:
    """A function of images `[batch, height, width, channels]`, normalised, to logits `[batch, num_classes]` in float32.

    The function of `network` in evaluation with `variables`, up to the order of sums and, below 32 bits, roundings: batch norm
    is folded into the convolutions before it where it can be (`fold_batch_norm`), kernels are kept in `network.dtype`, and
    convolutions are oneDNN's where this process has it (`onednn.missing` says why not). It is compiled at the first call with
    images of a shape, into no cache on disk, and has no gradient.

    Raises:
      UsageError: the function is called inside another that JAX traces (`jit`, `grad`, `vmap`); there `network.apply` belongs.
    """
    network, variables = prepare(network, variables)
    compiled = {}

    def infer(images: jax.Array) -> jax.Array:
        if isinstance(images, jax.core.Tracer):
            raise UsageError("found a traced array, expected images: what optimize_for_inference returns is compiled already")
        images = jnp.asarray(images)
        key = images.shape, images.dtype
        if key not in compiled:
            # Not `network.apply` itself, of which JAX may have a trace from outside, and would keep this one for outside.
            with programs.by_onednn("inference"):
                program = jax.jit(lambda variables, images: network.apply(variables, images))
                compiled[key] = program.lower(variables, images).compile()
        return compiled[key](variables, images)

    return infer
