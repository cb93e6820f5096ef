"""The network of airbench, made to reach 94 % on CIFAR-10 in the shortest time.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498, in the form of
airbench94_muon.py of https://github.com/KellerJordan/cifar10-airbench.

| layers                                                       | filters | side of the maps |
|--------------------------------------------------------------|---------|------------------|
| stem: 2x2 convolution, its kernel measured and never trained | 24      | 31               |
| group1: convolution, maximum of 2x2, norm; convolution, norm | 64      | 15               |
| group2: the same                                             | 256     | 7                |
| group3: the same                                             | 256     | 3                |
| maximum of the map; classifier                               | 10      | 1                |
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnfamily.models import initializers
from cnnfamily.models.convolution import convolution
from cnnfamily.models.initializers import parameter
from cnnfamily.models.layers import ACTIVATIONS, BatchNorm, Conv, Linear, check_images, choose, logits, parameter_dtype_of
from cnnfamily.models.pooling import max_pool, max_pool_of_map
from cnnfamily.scaling import round_filters

FILTERS = (64, 256, 256)
EPSILON = 5e-4  # added to the eigenvalues, so that directions without variance are not blown up


def whitening_kernel(images: np.ndarray) -> np.ndarray:
    """The kernel `[2, 2, channels, 8 channels]` that whitens the 2x2 patches of images `[n, height, width, channels]`.

    Its filters are the eigenvectors of the patches' second moments over sqrt(eigenvalue + 5e-4), and the same negated, so that
    the activation behind loses nothing. Not about the mean, which the convolution does not subtract. In float64.
    """
    size, moments, count = 4 * images.shape[3], 0.0, 0
    for start in range(0, len(images), 256):
        part = np.asarray(images[start : start + 256], np.float64)
        rows = part[:, :-1], part[:, 1:]
        corners = [corner for row in rows for corner in (row[:, :, :-1], row[:, :, 1:])]
        patches = np.concatenate(corners, axis=3).reshape(-1, size)
        moments, count = moments + patches.T @ patches, count + len(patches)
    values, vectors = np.linalg.eigh(moments / count)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    vectors *= np.sign(largest)  # a vector and its negative are both right: one of them, whatever LAPACK returns
    filters = vectors / np.sqrt(np.maximum(values, 0) + EPSILON)
    return np.concatenate([filters, -filters], axis=1).reshape(2, 2, images.shape[3], 2 * size)


class Whitening(nn.Module):
    """A 2x2 convolution, without padding, of a trained bias and a kernel that lies among the batch statistics.

    There checkpoints and averages hold it, and optimizer and weight decay pass it by. As all statistics it is averaged over the
    devices, of which more than two may round its last bit. Until `Airbench.start_from` it takes each number of a patch for
    itself, which whitens white noise.
    """

    dtype: str

    @nn.compact
    def __call__(self, x):
        channels, parameter_dtype = x.shape[-1], parameter_dtype_of(self.dtype)
        one = np.eye(4 * channels, dtype=parameter_dtype)
        start = np.concatenate([one, -one], axis=1).reshape(2, 2, channels, 8 * channels)
        kernel = self.variable("batch_stats", "kernel", lambda: start).value
        bias = parameter(self, "bias", initializers.zeros, (8 * channels,), parameter_dtype)
        return convolution(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Airbench(nn.Module):
    """For images `[batch, height, width, in_channels]` of 9 pixels or more; logits `[batch, num_classes]`, float32.

    The scale of its norms is 1 and not trained.
    """

    num_classes: int = 10
    in_channels: int = 3
    resolution: int = 32
    width: float = 1.0
    whitening: bool = True  # False: the first kernel is drawn and trained as others are
    activation: str = "gelu"
    norm_momentum: float = 0.6
    norm_epsilon: float = 1e-12
    norm_group: int = 0
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=9)
        activation = choose("activation", self.activation, ACTIVATIONS)
        statistics = (self.norm_momentum, self.norm_epsilon, self.norm_group, self.axis_name)
        norm = partial(BatchNorm, train, *statistics, scale_init=None, dtype=self.dtype)

        def conv(x, filters, name):
            init = initializers.partial_identity(initializers.torch_uniform(9 * x.shape[-1]))
            return Conv(filters, 3, kernel_init=init, dtype=self.dtype, name=name)(x)

        if self.whitening:
            x = Whitening(self.dtype, name="stem")(images)
        else:
            init = initializers.torch_uniform(4 * self.in_channels)
            fields = {"padding": "valid", "bias": True, "kernel_init": init, "dtype": self.dtype}
            x = Conv(8 * self.in_channels, 2, name="stem", **fields)(images)
        x = activation(x)
        self.sow("intermediates", "stem_output", x)
        for i, count in enumerate(FILTERS, start=1):
            filters, name = round_filters(count, self.width), f"group{i}"
            x = max_pool(conv(x, filters, f"{name}_conv1"), 2, 2)
            x = norm(name=f"{name}_norm1")(x, activation)
            x = norm(name=f"{name}_norm2")(conv(x, filters, f"{name}_conv2"), activation)
            self.sow("intermediates", f"{name}_output", x)
        x = max_pool_of_map(x)
        start = partial(initializers.symmetric_uniform, bound=math.sqrt(3))  # deviation 1; the division makes up for it
        return logits(Linear(self.num_classes, start, bias=False, dtype=self.dtype, name="classifier")(x) / x.shape[-1])

    @nn.nowrap
    def start_from(self, variables: dict, images: np.ndarray) -> dict:
        """`variables` whose first kernel whitens training images `[n, height, width, channels]`, as the network sees them."""
        if not self.whitening:
            return variables
        batch_stats = variables["batch_stats"]
        kernel = jnp.asarray(whitening_kernel(images), batch_stats["stem"]["kernel"].dtype)
        return {**variables, "batch_stats": {**batch_stats, "stem": {"kernel": kernel}}}


VARIANTS = {"airbench94": (Airbench, {})}
