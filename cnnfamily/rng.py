"""Randomness as a pure function of what is being drawn; nothing random is kept in the state.

Choices in the training step depend on (seed, step, purpose, position in the global batch). The position of an example does not
change with the number of devices or micro-batches, so neither do its crop, its dropout mask or the blocks it skips.
"""

import jax
import jax.numpy as jnp

# One number a purpose. They enter every key: changing one changes every run, so numbers are only ever added.
AUGMENT = 0
STOCHASTIC_DEPTH = 1
DROPOUT = 2
MIX = 3


def step_key(seed: int, step: jax.Array | int, purpose: int) -> jax.Array:
    """The key of one purpose in one training step, the same on every device."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), purpose)
    return jax.random.fold_in(key, step)


def example_keys(key: jax.Array, position: jax.Array) -> jax.Array:
    """One key for each example: keys `[batch]` from positions `[batch]`, an example's place in the global batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, position)


def example_uniform(key: jax.Array, position: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 numbers in [0, 1), `[batch, *shape]`, those of one example depending on its position alone."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32))(example_keys(key, position))
