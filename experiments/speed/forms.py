"""Milliseconds of every form of a convolution in `cpu_forms.py` and `cpu_depthwise.py`, beside the plain one and others.

Of the gradient of a dense kernel also by oneDNN, as training has it and otherwise, where it can be called.

`python experiments/speed/forms.py [PATTERN]` on a CPU with nothing else running; PATTERN is part of a row's name. Each
product of each shape runs in all its forms in turn, after one call that compiles it. Prints a Markdown table.
"""

import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from cnnfamily import memory, programs
from cnnfamily.models import convolution, cpu_depthwise, cpu_forms, onednn, onednn_forms
from cnnfamily.models.geometry import Geometry, pad, seen_by_taps

BATCH, ROUNDS = 16, 7
POINTWISE = ((112, 32, 16), (112, 16, 96), (56, 24, 144), (56, 144, 24), (56, 64, 64), (56, 64, 256), (56, 256, 64))
POINTWISE += ((28, 40, 240), (28, 128, 512), (28, 512, 128), (14, 112, 672), (14, 256, 1024), (14, 1024, 256))
POINTWISE += ((7, 320, 1280), (7, 2048, 512))
DENSE = ((224, 3, 32, 3, 2), (224, 3, 64, 7, 2), (56, 64, 64, 3, 1), (56, 128, 128, 3, 2), (28, 128, 128, 3, 1))
DENSE += ((14, 256, 256, 3, 1), (14, 512, 512, 3, 2), (7, 512, 512, 3, 1))
DEPTHWISE = ((112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 5, 2), (28, 240, 3, 2), (14, 480, 3, 1), (14, 672, 5, 1))
DEPTHWISE += ((7, 1152, 5, 1),)


def flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def product(left: Array, right: Array, axes: tuple[int, ...]) -> Array:
    return cpu_forms._wide_product(left, right, axes, axes)


def kernel_in_4d(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """A product for each tap over batch, height and width as they are."""
    return taps(images, cotangent, geometry, lambda window: product(window, cotangent, (0, 1, 2)))


def kernel_in_2d(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """The same over the pixels in one dimension."""
    return taps(images, cotangent, geometry, lambda window: product(flat(window), flat(cotangent), (0,)))


def kernel_turned(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """The same with the factors exchanged, and transposed after."""
    return taps(images, cotangent, geometry, lambda window: product(flat(cotangent), flat(window), (0,)).T)


def kernel_by_rows(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """A product for each row of the kernel, its windows side by side."""
    windows, wide = all_seen(images, geometry), geometry.kernel_size[1]
    rows = [jnp.concatenate([flat(x) for x in windows[i : i + wide]], 1) for i in range(0, len(windows), wide)]
    return jnp.stack([product(row, flat(cotangent), (0,)) for row in rows]).astype(images.dtype)


def kernel_exchanged(images: Array, cotangent: Array, geometry: Geometry) -> Array:
    """oneDNN's convolution with the cotangent for a kernel, channels for the batch, and the batch for channels."""

    def turned(x: Array, *axes: int) -> Array:
        return onednn_forms._of_bits(onednn_forms._bits(x).transpose(axes), x.dtype)

    back = Geometry(geometry.image_size, geometry.output_size, (1, 1), geometry.padding, 1)
    found = onednn.convolution(turned(images, 3, 1, 2, 0), turned(cotangent, 1, 2, 0, 3), back, images.dtype)
    return found.transpose(1, 2, 0, 3)


def taps(images: Array, cotangent: Array, geometry: Geometry, one: Callable) -> Array:
    return jnp.stack([one(window) for window in all_seen(images, geometry)]).astype(images.dtype)


def all_seen(images: Array, geometry: Geometry) -> list[Array]:
    return seen_by_taps(pad(images, geometry.padding), geometry.kernel_size, geometry.stride, geometry.output_size)


def forms(kind: str, which: str, channels: int, stride: int, dtype: str) -> dict[str, Callable]:
    """By name; "ours" is what a CPU gets if `convolution` gives the shape this kind, of a dense one a product for each tap."""
    prefix = {"dense": "by_taps"}.get(kind, kind)
    ours = cpu_depthwise if kind == "depthwise" else cpu_forms
    found = {"plain": getattr(convolution, f"_plain_{which}"), "ours": getattr(ours, f"{prefix}_{which}")}
    if which == "to_kernel" and kind != "depthwise":
        found |= {"4-D": kernel_in_4d, "2-D": kernel_in_2d, "2-D turned": kernel_turned}
    if kind == "dense":
        found["ordered"] = getattr(cpu_forms, f"ordered_{which}")
        found |= {"by rows": kernel_by_rows, "by images": cpu_forms.by_images_to_kernel} if which == "to_kernel" else {}
        if channels <= cpu_forms.MOST_FEW and which != "to_images":
            found["patches"] = getattr(cpu_forms, f"patches_{which}")
        if which == "to_kernel" and not onednn.missing(dtype):
            found["oneDNN"] = onednn_forms.to_kernel
            found |= {"oneDNN exchanged": kernel_exchanged} if stride == 1 else {}
    return found


def measure(functions: dict[str, Callable], left: Array, right: Array, geometry: Geometry) -> dict[str, float]:
    def rounded(form: Callable) -> Callable:
        return lambda left, right: form(left, right, geometry).astype(left.dtype)

    compiled = {name: jax.jit(rounded(form)).lower(left, right).compile() for name, form in functions.items()}
    seconds = {name: [] for name in compiled}
    for _ in range(ROUNDS + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(left, right))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}


def cases() -> list[tuple[str, int, int, int, int, int]]:
    found = [("pointwise", side, channels, filters, 1, 1) for side, channels, filters in POINTWISE]
    found += [("dense", *shape) for shape in DENSE]
    return found + [("depthwise", side, channels, channels, taps, stride) for side, channels, taps, stride in DEPTHWISE]


def main(pattern: str) -> None:
    print(f"JAX {jax.__version__}, batch {BATCH}, medians of {ROUNDS} in turn, milliseconds\n")
    print("| product | multiply-adds, M | plain | ours | others |\n|---|---|---|---|---|")
    for kind, side, channels, filters, size, stride in cases():
        groups = channels if kind == "depthwise" else 1
        around = (size // 2, (size - 1) // 2)
        geometry = Geometry((side, side), (size, size), (stride, stride), (around, around), groups)
        for dtype in ("float32", "bfloat16"):
            keys = jax.random.split(jax.random.key(0), 3)
            images = jax.random.normal(keys[0], (BATCH, side, side, channels), dtype)
            kernel = jax.random.normal(keys[1], (size, size, channels // groups, filters), dtype)
            cotangent = jax.random.normal(keys[2], (BATCH, *geometry.output_size, filters), dtype)
            operands = {"output": (images, kernel), "to_images": (cotangent, kernel), "to_kernel": (images, cotangent)}
            for which, (left, right) in operands.items():
                name = f"{kind} {which} {dtype} {side}x{side}, {channels} to {filters}, {size}x{size}, stride {stride}"
                if pattern in name:
                    found = measure(forms(kind, which, channels, stride, dtype), left, right, geometry)
                    least = min(found.values())
                    shown = {one: f"{'**' * (ms == least)}{ms:.2f}{'**' * (ms == least)}" for one, ms in found.items()}
                    others = ", ".join(f"{one} {ms}" for one, ms in shown.items() if one not in ("plain", "ours"))
                    macs = cotangent.size * size**2 * channels // groups / 1e6
                    print(f"| {name} | {macs:,.0f} | {shown['plain']} | {shown['ours']} | {others} |", flush=True)


if __name__ == "__main__":
    memory.tune_malloc()
    with programs.not_kept():  # a program on disk cannot hold calls of oneDNN
        main(" ".join(sys.argv[1:]))
