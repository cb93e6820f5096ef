"""The whole suite: four virtual CPU devices, strict dtype promotion, one compilation cache for the run and its processes."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="cnnfamily_tests_")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402  (reads the environment)
import pytest  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


def mesh_of(devices: int) -> Mesh:
    """A mesh of the first `devices` devices, as `parallel.data_mesh` makes one of all."""
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@pytest.fixture
def x64():
    """64-bit floats for one test."""
    with jax.enable_x64(True):
        yield
