"""The maximum over windows: its gradient on a CPU against JAX's own, and what torch's `ceil_mode` leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnfamily.models.pooling import max_pool, max_pool_of_map, max_pool_to_the_edge


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# (size of the image, window, stride, padding), and the padding that JAX's pool needs for the same windows.
CASES = [
    ((6, 8), 2, 2, 0, ((0, 0), (0, 0))),
    ((7, 8), 3, 2, 1, ((1, 1), (1, 2))),
    ((5, 6), 3, 1, 1, ((1, 1), (1, 1))),
    ((7, 6), 3, 2, 0, ((0, 0), (0, 1))),
    ((8, 8), 2, 3, 0, ((0, 0), (0, 0))),  # pixels between the windows
    ((3, 3), 3, 3, 0, ((0, 0), (0, 0))),
]


@pytest.mark.parametrize(("size", "window", "stride", "padding", "edges"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_equals_jax_in_value_and_gradient(x64, size, window, stride, padding, edges, dtype):
    x = jnp.asarray(draw(2, *size, 3), dtype)

    def plain(x):
        return nn.max_pool(x, (window, window), (stride, stride), padding=edges)

    @jax.jit
    def both(x):
        found, pull = jax.vjp(lambda x: max_pool_to_the_edge(x, window, stride, padding), x)
        expected, pull_plain = jax.vjp(plain, x)
        cotangent = jnp.asarray(draw(*expected.shape, seed=1), dtype)
        return (found, *pull(cotangent)), (expected, *pull_plain(cotangent))

    (found, gradient), (expected, expected_gradient) = both(x)
    np.testing.assert_array_equal(found, expected)
    assert gradient.dtype == expected_gradient.dtype
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 0.03}[dtype]  # bfloat16: JAX rounds after each addition
    np.testing.assert_allclose(np.float64(gradient), np.float64(expected_gradient), rtol=tolerance, atol=tolerance)


def test_windows_beyond_the_map_give_nothing():
    for size, window, edges in (((2, 5), 3, ((0, 0), (0, 0))), ((1, 1), 4, ((1, 0), (0, 1)))):
        x = jnp.ones((1, *size, 2))
        assert max_pool(x, window, 2, edges).size == 0
        np.testing.assert_array_equal(jax.grad(lambda x, *how: max_pool(x, *how).sum())(x, window, 2, edges), jnp.zeros_like(x))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_no_window_is_left(dtype):
    """XLA's compiler runs through each number by number."""
    x = jnp.zeros((2, 8, 8, 3), dtype)
    program = jax.jit(jax.value_and_grad(lambda x: max_pool(x, 3, 2).sum())).lower(x).compile().as_text()
    assert "reduce-window" not in program
    assert "select-and-scatter" not in program


def test_what_is_not_finite_stays_so():
    x = np.zeros((1, 4, 4, 3), np.float32)
    x[0, 0, 0] = np.nan, np.inf, -np.inf
    x[0, 1, 2:, 2] = x[0, 0, 2:, 2] = -np.inf
    np.testing.assert_array_equal(max_pool(x, 2, 2)[0, 0], [[np.nan, np.inf, 0], [0, 0, -np.inf]])


def test_of_equal_maxima_the_first_has_the_gradient():
    """After ReLU most windows have several zeros; torch and JAX take the first, row by row."""
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 0] = x[0, 1, 1] = 2
    gradient = jax.grad(lambda x: (max_pool(x, 2, 2) * jnp.array([[1, 2], [3, 4]], jnp.float32)[None, ..., None]).sum())(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 0, 2, 0], [1, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])


def test_the_maximum_of_a_map_is_one_pixel():
    """The first of equals has all of the gradient, as with torch; what is not finite stays so."""
    x = jnp.asarray(draw(2, 3, 5, 4), jnp.float32).at[0, 1, 2, 0].set(9).at[0, 2, 1, 0].set(9)
    np.testing.assert_array_equal(max_pool_of_map(x), np.asarray(x).max(axis=(1, 2)))
    gradient = jax.grad(lambda x: (max_pool_of_map(x) * jnp.arange(1.0, 9).reshape(2, 4)).sum())(x)
    np.testing.assert_array_equal(gradient.sum(axis=(1, 2)), np.arange(1.0, 9).reshape(2, 4))
    assert (np.count_nonzero(gradient, axis=(1, 2)) == 1).all()
    assert gradient[0, 1, 2, 0] == 1
    narrow = x.astype("bfloat16")
    np.testing.assert_array_equal(max_pool_of_map(narrow), narrow.max(axis=(1, 2)))
    assert max_pool_of_map(x[:0]).shape == (0, 4)
    odd = jnp.asarray([[-jnp.inf, -jnp.inf, jnp.nan], [-jnp.inf, jnp.inf, 0]]).reshape(1, 2, 1, 3)
    np.testing.assert_array_equal(max_pool_of_map(odd), [[-jnp.inf, jnp.inf, jnp.nan]])


def test_a_second_derivative():
    x = jnp.asarray(draw(1, 4, 4, 2), jnp.float32)
    hessian = jax.jacrev(jax.grad(lambda x: (max_pool(x, 2, 2) ** 3).sum()))(x).reshape(32, 32)
    expected = jax.jacrev(jax.grad(lambda x: (nn.max_pool(x, (2, 2), (2, 2)) ** 3).sum()))(x).reshape(32, 32)
    np.testing.assert_allclose(hessian, expected, rtol=1e-6)
    assert np.count_nonzero(hessian) == 8
