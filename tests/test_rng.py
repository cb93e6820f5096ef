"""Keys and draws depend on (seed, step, purpose, position) and on nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cnnfamily import rng
from cnnfamily.rng import example_keys, example_uniform, step_key


def test_purposes_keep_their_numbers():
    assert (rng.AUGMENT, rng.STOCHASTIC_DEPTH, rng.DROPOUT) == (0, 1, 2)


def test_the_stream_is_known():
    # A change here changes every run that was ever started, and breaks the resume of those that are not finished.
    key = step_key(3, 7, rng.STOCHASTIC_DEPTH)
    assert jax.random.key_data(key).tolist() == [2432397215, 3576330691]
    expected = [[0.383447527885437, 0.05797123908996582], [0.37949228286743164, 0.4568523168563843]]
    assert example_uniform(key, jnp.arange(2), (2,)).tolist() == expected


def test_keys_differ_by_seed_step_purpose_and_position():
    # Small numbers that a mere sum of the four would confuse.
    cases = itertools.product((0, 1, 2), (0, 1, 2), (rng.AUGMENT, rng.STOCHASTIC_DEPTH, rng.DROPOUT))
    keys = [example_keys(step_key(seed, step, purpose), jnp.arange(4)) for seed, step, purpose in cases]
    data = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(data, axis=0)) == 27 * 4


def test_a_traced_step_gives_the_same_key():
    traced = jax.jit(lambda step: jax.random.key_data(step_key(5, step, rng.DROPOUT)))(jnp.int32(11))
    np.testing.assert_array_equal(traced, jax.random.key_data(step_key(5, 11, rng.DROPOUT)))


def test_a_part_of_the_batch_draws_its_part_of_the_numbers():
    key, position = step_key(0, 0, rng.DROPOUT), np.arange(12)
    whole = np.asarray(example_uniform(key, jnp.asarray(position), (3, 2)))
    assert (whole.shape, whole.dtype) == ((12, 3, 2), np.float32)
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(np.unique(whole)) == whole.size
    for part in (slice(4, 8), slice(None, None, -1), [9, 2, 5]):
        np.testing.assert_array_equal(example_uniform(key, jnp.asarray(position[part]), (3, 2)), whole[part])
