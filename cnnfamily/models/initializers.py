"""How parameters start: functions of (key, shape, dtype), and the way in which layers ask for them.

Compiled as one program, EfficientNet-B0's initialisation took 8.7 to 9.2 seconds, for each of its 82 kernels brought its own
copy of the generator. So `parameter` evaluates it at once even while the layers around it are only traced, and draws come in
few sizes: 2.7 to 2.8 seconds, the same numbers (two Zen 5 cores, jaxlib 0.10.2, three runs of each in turn).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError

# The most numbers of one draw. The generator's arrays are three times as large as what it gives, and 4^14 were drawn for the
# 102.8 million of VGG16's first linear layer: its `initialize` took 30 s and 7.8 or 6.8 GB at most, and takes 6.8 and 2.2, and
# AlexNet's 9 s and 2.0 GB, now 5.5 and 1.1 (two Zen 3 cores, JAX 0.10.2, malloc as in our commands, two of each in turn).
MOST_DRAWN = 4**12

# In a trace whose outputs nobody reads: whether anybody reads the parameters of the module at a path. None in every other.
_PARAMETERS_READ: contextvars.ContextVar[Callable[[tuple[str, ...]], bool] | None]
_PARAMETERS_READ = contextvars.ContextVar("parameters_read", default=None)


@contextlib.contextmanager
def outputs_unread(parameters_read: Callable[[tuple[str, ...]], bool]) -> Iterator[None]:
    """For a trace whose outputs nobody reads: convolutions are the plain operation, and parameters that nobody reads are zeros.

    No place for the first call of a function under `jax.jit` that outlives it: outside it would keep the form that it got here.
    """
    before = _PARAMETERS_READ.set(parameters_read)
    try:
        yield
    finally:
        _PARAMETERS_READ.reset(before)


def outputs_are_read() -> bool:
    """False in `outputs_unread`."""
    return _PARAMETERS_READ.get() is None


def parameter(module: nn.Module, name: str, init, shape: tuple[int, ...], dtype) -> jax.Array:
    """`module.param`, of `shape`, computed at once if its key is known, also under `jax.eval_shape`; see `models.initialize`.

    Zeros where it is absent and in `outputs_unread` nobody reads it.

    Raises:
      ScopeParamShapeError: the parameter is there and has another shape.
    """
    parameters_read = _PARAMETERS_READ.get()
    if parameters_read and not parameters_read(module.path) and not module.has_variable("params", name):
        module.put_variable("params", name, jnp.zeros(shape, dtype))
    if not module.has_variable("params", name):
        with jax.ensure_compile_time_eval():
            return module.param(name, init, shape, dtype)
    # `module.param` would trace an initializer to see its shape: 2 of the 23 s of a second start of EfficientNet-B0's training
    # (two Zen 3 cores, JAX 0.10.2).
    module.scope.reserve(name, "params")  # no two parameters of one name
    value = module.get_variable("params", name)
    if np.shape(value) != shape:
        raise ScopeParamShapeError(name, module.scope.path_text, np.shape(value), shape)
    return value


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _draw(kind: str, key: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    return {"normal": jax.random.normal, "uniform": jax.random.uniform}[kind](key, (size,), dtype)


def _random(kind: str, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array | np.ndarray:
    """`jax.random.normal` or `uniform` of `shape`, cut from draws whose sizes are powers of 4 so that few are compiled.

    Under partitionable threefry, JAX's default, number i of a draw does not depend on how many are drawn. More than
    `MOST_DRAWN` come in pieces of that many, piece k > 0 from `fold_in(key, k)`.
    """
    size, pieces = math.prod(shape), []
    for number, start in enumerate(range(0, size, MOST_DRAWN)):
        count = min(size - start, MOST_DRAWN)
        piece_key = jax.random.fold_in(key, number) if number else key
        piece = _draw(kind, piece_key, max(256, 4 ** math.ceil(math.log(count, 4))), jnp.dtype(dtype))
        if not isinstance(piece, jax.core.Tracer):
            piece = np.asarray(piece)  # NumPy cuts and joins without compiling a program for every shape
        pieces.append(piece[:count])
    if len(pieces) == 1:
        return pieces[0].reshape(shape)
    join = np if isinstance(pieces[0], np.ndarray) else jnp
    return join.concatenate(pieces).reshape(shape)


def he_fan_out(groups: int):
    """Normal with variance 2 / (kernel area * filters / groups), He et al. 2015 (https://arxiv.org/abs/1502.01852).

    A depthwise filter feeds one channel, so its fan-out is its area alone, as in the authors' MobileNet and EfficientNet
    code; dividing by all filters, as torchvision does, starts it far too small.
    """

    def init(key, shape, dtype):
        height, width, _, filters = shape
        return np.asarray(math.sqrt(2 * groups / (height * width * filters)), dtype) * _random("normal", key, shape, dtype)

    return init


def partial_identity(init):
    """`init`, but as many of the first filters as there are channels hand on one channel each: torch's `dirac_`.

    A 3x3 convolution then begins as the identity and new filters beside it; airbench94_muon.py of
    https://github.com/KellerJordan/cifar10-airbench.
    """

    def start(key, shape, dtype):
        height, width, channels, filters = shape
        same = np.arange(min(channels, filters))
        identity, drawn = np.zeros(shape, dtype), np.ones(filters, dtype)
        identity[height // 2, width // 2, same, same] = 1
        drawn[same] = 0
        return drawn * init(key, shape, dtype) + identity

    return start


def normal(stddev: float):
    """Normal with mean 0; torchvision's MobileNets and VGG have a deviation of 0.01 in their linear layers."""
    return lambda key, shape, dtype: np.asarray(stddev, dtype) * _random("normal", key, shape, dtype)


def uniform_fan_out(key, shape, dtype):
    """Uniform in +-1 / sqrt(units), the classifier's in the EfficientNet code; `shape` is `[inputs, units]`."""
    return symmetric_uniform(key, shape, dtype, 1 / math.sqrt(shape[-1]))


def uniform_fan_in(key, shape, dtype):
    """Uniform in +-2.4 / fan-in, LeCun et al. 1998, appendix A."""
    return symmetric_uniform(key, shape, dtype, 2.4 / math.prod(shape[:-1]))


def xavier_fan_in(key, shape, dtype):
    """Uniform in +-sqrt(3 / fan-in), a variance of 1 / fan-in: what Caffe calls "xavier" (Glorot and Bengio 2010)."""
    return symmetric_uniform(key, shape, dtype, math.sqrt(3 / math.prod(shape[:-1])))


def torch_uniform(fan_in: int):
    """Uniform in +-1 / sqrt(fan-in): what torch gives the kernels and the biases of convolutions and linear layers."""
    return lambda key, shape, dtype: symmetric_uniform(key, shape, dtype, 1 / math.sqrt(fan_in))


def symmetric_uniform(key, shape, dtype, bound):
    """Uniform in +-bound; `bound` may be an array that broadcasts to `shape`."""
    return np.asarray(2 * bound, dtype) * (_random("uniform", key, shape, dtype) - np.asarray(0.5, dtype))


def constant(value: float):
    """The same value everywhere."""
    return lambda key, shape, dtype: np.full(shape, value, dtype)


zeros, ones = constant(0.0), constant(1.0)
