"""The gradient of a 1x1 convolution's kernel by oneDNN, in which torch is ahead on a CPU: as it is, and otherwise.

    python experiments/speed/kernel_gradient.py [--dtype=bfloat16] [--rounds=11] [--batch=16]

It is a product summed over all pixels of a batch. In turn: the one product of `onednn_forms.to_kernel`; the batch in 16, 8, 4
and 2 parts, each a product of its own in one batched call with a float32 result, which are then added up; and the one product
the other way round. Each is compared with the first. Prints a Markdown table of milliseconds, medians (smallest to largest),
of the shapes in ResNet-50; without `--dtype` in the narrowest that oneDNN has on this processor. Only on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cnnfamily import programs
from cnnfamily.models import onednn

# Side, channels and filters.
SHAPES = ((56, 64, 64), (56, 64, 256), (56, 256, 64), (28, 128, 512), (28, 512, 128))
SHAPES += ((14, 256, 1024), (14, 1024, 256), (7, 512, 2048), (7, 2048, 512))
PARTS = (16, 8, 4, 2)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest value


def as_it_is(images: Array, cotangent: Array) -> Array:
    return onednn.product(_flat(images), _flat(cotangent), images.dtype, left_turned=True)


def turned(images: Array, cotangent: Array) -> Array:
    return onednn.product(_flat(cotangent), _flat(images), images.dtype, left_turned=True).T


def in_parts(parts: int) -> Callable[[Array, Array], Array]:
    def sums(images: Array, cotangent: Array) -> Array:
        left, right = (x.reshape(parts, -1, x.shape[-1]) for x in (images, cotangent))
        settings = {"onednn_matmul_config": {"transpose_a": True, "transpose_b": False}}
        shape = parts, left.shape[2], right.shape[2]
        return onednn._call("matmul", settings, shape, jnp.float32, left, right).sum(axis=0).astype(images.dtype)

    return sums


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def milliseconds(forms: dict[str, Callable], arguments: tuple, rounds: int) -> dict[str, list[float]]:
    """Of each form in each round, after one call that is not timed."""
    compiled = {name: jax.jit(form).lower(*arguments).compile() for name, form in forms.items()}
    found = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in compiled.items():
            jax.block_until_ready(form(*arguments))
            start = time.perf_counter()
            for _ in range(3):
                jax.block_until_ready(form(*arguments))
            found[name].append((time.perf_counter() - start) / 3 * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=tuple(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=16)
    chosen = parser.parse_args()
    dtype = chosen.dtype or ("float32" if onednn.missing("bfloat16") else "bfloat16")
    if why := onednn.missing(dtype):
        parser.error(f"--dtype={dtype}: {why}")
    parts = [count for count in PARTS if chosen.batch % count == 0]
    forms = {"as it is": as_it_is, **{f"{count} parts": in_parts(count) for count in parts}, "turned": turned}
    print(f"{dtype}, batch {chosen.batch}, n = {chosen.rounds}, JAX {jax.__version__}; ms\n")
    print(f"| convolution | {' | '.join(forms)} |")
    print("|---" * (len(forms) + 1) + "|")
    for side, channels, filters in SHAPES:
        keys = jax.random.split(jax.random.key(0))
        shapes = [(chosen.batch, side, side, width) for width in (channels, filters)]
        arguments = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
        results = {name: np.asarray(jax.jit(form)(*arguments), np.float32) for name, form in forms.items()}
        for name, result in results.items():
            difference = np.abs(result - results["as it is"]).max() / np.abs(result).max()
            assert difference < TOLERANCE[dtype], f"{name} differs by {difference:.1e}, expected less than {TOLERANCE[dtype]}"
        found = milliseconds(forms, arguments, chosen.rounds)
        cells = (f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" for times in found.values())
        print(f"| {side} x {side}, {channels} to {filters} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with programs.not_kept():  # which a cache on disk could not hold
        main()
