"""oneDNN on a CPU: its calls, where they can be made, and convolutions of inference with what follows in the same pass.

oneDNN (https://uxlfoundation.github.io/oneDNN) is what torch computes with on a CPU. jaxlib contains it, and though no flag
that was tried makes XLA's compiler use it, a program that names its convolution or product as the compiler would gets it. In
bfloat16 whole networks infer 1.4 to 2.3 times as fast as with the forms in `cpu_forms` (`experiments/speed/README.md`).

A program with it cannot be kept on disk: jaxlib takes the call for one of another kind and reads memory that is none of its
(seen as std::bad_alloc). A call that oneDNN refuses ends the process. So it is used for what `optimize_for_inference`
compiles and for training that asks for it (`onednn_forms`), and only with versions of jaxlib and processors known to do.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
from flax import linen as nn
from jax import Array, lax

from cnnfamily.models.geometry import Geometry

TRIED = ((0, 10), (0, 11), (0, 12))  # versions of jaxlib whose wheels pass tests/test_onednn.py and test_onednn_forms.py
# Those of its operations on an output that XLA passes on, and their coefficient.
_AFTER: dict[Callable, tuple[str, float]] = {
    nn.relu: ("RELU", 0.0),
    nn.relu6: ("RELU6", 0.0),
    nn.silu: ("SWISH", 1.0),
    nn.sigmoid: ("SIGMOID", 0.0),
    jnp.tanh: ("TANH", 0.0),
}
_USED = contextvars.ContextVar("onednn_used", default="")


@contextlib.contextmanager
def used(in_what: str = "inference") -> Iterator[None]:
    """For what is traced: its convolutions are computed by oneDNN, if `missing` finds nothing that is missing.

    `in_what` is "inference" (no gradients, and with what follows in the same pass) or "training". What is traced has to be
    compiled without a cache on disk: see `programs.by_onednn`.
    """
    if in_what not in ("inference", "training"):
        raise ValueError(f"in_what={in_what!r}: expected 'inference' or 'training'")
    before = _USED.set(in_what)
    try:
        yield
    finally:
        _USED.reset(before)


def missing(dtype: str) -> str:
    """Why this process cannot compute convolutions of `dtype` with oneDNN, in words; "" if it can."""
    if jax.default_backend() != "cpu":
        return f"the device is a {jax.default_backend()}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()}: tried on Linux on x86_64 alone"
    if _version() not in TRIED:
        return f"jaxlib {_words(_version())}: tried with " + ", ".join(map(_words, TRIED))
    # For bfloat16 without these instructions it has no convolution, or widens the operands, as XLA does.
    needed = {"float32": ("avx2",), "bfloat16": ("avx512_bf16", "amx_bf16")}.get(jnp.dtype(dtype).name)
    if not needed:
        return f"dtype {jnp.dtype(dtype).name}: float32 and bfloat16 alone"
    return "" if _features() & set(needed) else f"the processor has no {' and no '.join(needed)}"


def applies(images: Array, kernel: Array, geometry: Geometry, in_what: str = "inference") -> bool:
    """Whether a convolution that is being traced is to be one of oneDNN's: one that `used(in_what)` asks for and it can have.

    Not of one pixel, as in squeeze-and-excitation: for each call it turns the kernel into an order of its own. 16 such of 960
    channels to 1280 take 0.88 ms, 0.15 as a matrix product (bfloat16, two Zen 5 cores, n = 15 in turn).
    """
    if geometry.image_size == (1, 1) or min(map(min, geometry.padding)) < 0:  # a call that pads by less than nothing is refused
        return False
    sane = images.size and min(geometry.output_size) > 0 and images.shape[3] == kernel.shape[2] * geometry.groups
    return bool(_USED.get() == in_what and sane and images.dtype == kernel.dtype and not missing(images.dtype))


def convolution(
    images: Array,
    kernel: Array,
    geometry: Geometry,
    dtype: jnp.dtype,
    fusions: dict | None = None,
    operands: Sequence[Array] = (),
    turned: bool = False,
) -> Array:
    """oneDNN's own, `[batch, *outputs, filters]` in `dtype`, which is that of `images` or float32.

    Of images `[batch, height, width, channels]` and a kernel `[height, width, channels / groups, filters]`; `turned`: `[height,
    width, filters, channels]`. `fusions` are operations on the output in the words of XLA's configuration, and `operands` what
    they take. What it refuses, a negative padding for one, ends the process: `applies` has to hold.
    """
    (top, bottom), (left, right) = geometry.padding
    data = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    channels, filters = (3, 2) if turned else (2, 3)
    settings = {
        "dims": 4,
        "input": data,
        "kernel": {"filter": {"input_feature_dim": channels, "output_feature_dim": filters, "spatial_dims": [0, 1]}},
        "output": data,
        "window": {
            "size": geometry.kernel_size,
            "pad_left": [top, left],
            "pad_right": [bottom, right],
            "strides": geometry.stride,
            "window_dilations": [1, 1],
        },
        "feature_groups": geometry.groups,
        "fusions": fusions or {},
    }
    shape = (images.shape[0], *geometry.output_size, kernel.shape[filters])
    return _call("convolution", {"onednn_conv_config": settings}, shape, dtype, images, kernel, *operands)


def product(left: Array, right: Array, dtype: jnp.dtype, *, left_turned: bool = False, right_turned: bool = False) -> Array:
    """oneDNN's own of two matrices, `[rows of left, columns of right]` in `dtype`, which is theirs or float32.

    Each may be transposed first. What it refuses ends the process. The same call of a batch of matrices hangs or leaves the
    heap corrupted (jaxlib 0.10.2; 16 of 3,136 x 64 by 64, within 150 calls).
    """
    shape = left.shape[1 if left_turned else 0], right.shape[0 if right_turned else 1]
    settings = {"transpose_a": left_turned, "transpose_b": right_turned}
    return _call("matmul", {"onednn_matmul_config": settings}, shape, dtype, left, right)


def _call(which: str, settings: dict, shape: tuple[int, ...], dtype: jnp.dtype, *operands: Array) -> Array:
    result = jax.ShapeDtypeStruct(shape, dtype)
    call = jax.ffi.ffi_call(
        f"__onednn${which}",
        result,
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(settings),
        vmap_method="sequential",
    )
    return call(*operands)


@dataclasses.dataclass
class Pending:
    """A convolution of images `[batch, height, width, channels]` that waits for what is done with its output."""

    images: Array
    kernel: Array  # [height, width, channels / groups, filters], in the dtype of `images`
    bias: Array | None  # [filters], float32
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.images.shape[0], *self.geometry.output_size, self.kernel.shape[3])

    def output(self, activation: Callable = lambda x: x, summand: Array | None = None) -> Array:
        """The activation of convolution, bias and summand, in the dtype of `images`: rounded once, twice if oneDNN has it not.

        `summand` has the output's shape and dtype.
        """
        operation, coefficient = _AFTER.get(activation, ("", 0.0))
        operations = ["BIAS"] * (self.bias is not None) + ["BINARY_ADD"] * (summand is not None) + [operation] * bool(operation)
        operands = [operand for operand in (self.bias, summand) if operand is not None]
        fusions = {"ops": operations, "alpha": [coefficient] * bool(operation)}
        output = convolution(self.images, self.kernel, self.geometry, self.images.dtype, fusions, operands)
        # Widened first: of narrow numbers XLA rounds each operation.
        return output if operation else _rounded(activation(output.astype(jnp.float32)), output.dtype)


def finished(x: Array | Pending) -> Array:
    """`x` as an array `[batch, height, width, channels]`: of what is pending the output without activation."""
    return x.output() if isinstance(x, Pending) else x


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    """`x.astype(dtype)`, to bfloat16 by whole numbers.

    XLA's own rounding takes most of what stands beside it: hard-swish of 112 x 112 x 16 1.1 ms for 0.2, and all of
    MobileNetV3-Large 21.9 ms for 20.6 (1.06 by round, n = 25; two Zen 5 cores, JAX 0.10.2). Elsewhere it does not pay: see
    "Tried" in experiments/speed/README.md.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits, half = lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(0x7FFF)
    upper = bits >> jnp.uint32(16)
    nearest = (bits + half + (upper & jnp.uint32(1))) >> jnp.uint32(16)  # to even
    # A carry would make a number of some NaNs.
    found = jnp.where(x != x, upper | jnp.uint32(0x40), nearest)
    return lax.bitcast_convert_type(found.astype(jnp.uint16), jnp.bfloat16)


def _version() -> tuple[int, ...]:
    return jaxlib.version.__version_info__[:2]


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@functools.cache
def _features() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
