"""How the gradient of a kernel reads the images on a CPU: window by window, each once the memory of those before is free."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnnfamily.models.geometry import Geometry, Pair, extent, pad, seen_by_taps, strided

# Bytes of a window that waits, fewer of which save nothing, and how many products may be under way.
LEAST_IN_TURN, AT_ONCE = 2**20, 2


def of_windows(product: Callable[[Array], Array], images: Array, cotangent: Array, geometry: Geometry) -> list[Array]:
    """`product` of what each tap sees of the images, `[batch, *outputs, channels]`, in row-major order of the taps.

    Once there is a cotangent, and of few large windows at once.

    XLA's CPU compiler schedules an operation as early as it can, so all nine windows would be there at once, as large as the
    images each, and from the forward pass on. So where a window begins depends on the product before the last one.
    Training, batch 16, 224 pixels, two cores of a Zen 3, JAX 0.10.2, in turn with nothing that waits: MiB of temporary memory,
    and how often as fast (medians by round, smallest and largest, n = 5 to 11):

        VGG16                 5,175 to 2,903   1.24 (1.03, 1.27)
        ResNet-50             1,829 to 1,489   1.03 (0.66, 1.33)
        ResNet-50, bfloat16   1,200 to 1,044   0.98 (0.97, 1.06); with one product at once 0.90 (0.85, 0.93)
        GoogLeNet               884 to 644     1.01 (0.68, 1.54), in another run 1.12 (0.87, 1.27)
        GoogLeNet, bfloat16     587 to 469     1.02 (0.99, 1.02)
        VGG16, ResNet-50 and GoogLeNet, JAX 0.12.0.1
                              3,099, 1,489 and 644 for the same; 0.96 (0.92, 1.15), 0.97 (0.90, 1.28), 1.08 (0.83, 1.24)

    With padded images that wait too: 2,660, 1,409 and 611 in float32, and 0.94 (0.87, 1.00), 1.01 and 1.02 times as fast as so.
    XLA's other scheduler (`--xla_cpu_enable_concurrency_optimized_scheduler=false`) does this to all operations: without this,
    1,629 and 1,454 for VGG16 and ResNet-50, but EfficientNet-B0 and MobileNetV2 need 1,342 for 1,175 and 1,095 for 880.
    Where `jax.jit` alone shards a batch, each product is now reduced over the devices by itself.
    """
    padded, outputs = pad(images, geometry.padding), geometry.output_size
    if images.shape[0] * math.prod(outputs) * images.shape[3] * images.dtype.itemsize < LEAST_IN_TURN:
        return [product(window) for window in seen_by_taps(padded, geometry.kernel_size, geometry.stride, outputs)]
    products = [cotangent] * AT_ONCE
    for row, column in np.ndindex(*geometry.kernel_size):
        window = slice_after(products[-AT_ONCE], padded, (row, column), extent(outputs, geometry.stride))
        products.append(product(strided(window, geometry.stride)))
    return products[AT_ONCE:]


def slice_after(x: Array, images: Array, start: Pair, size: Pair) -> Array:
    """`size` rows and columns of `images` from `start` on, once there is `x`: a 0 is added to it that XLA does not know."""
    zero = (x[(0,) * x.ndim] > jnp.inf).astype(jnp.int32)
    row, column = (np.int32(first) + zero for first in start)
    start, sizes = (np.int32(0), row, column, np.int32(0)), (images.shape[0], *size, images.shape[3])
    return lax.dynamic_slice(images, start, sizes, allow_negative_indices=False)
