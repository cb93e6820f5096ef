"""MobileNet (V1): depthwise separable convolutions, thinned by a width and a resolution multiplier.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
https://arxiv.org/abs/1704.04861, Table 1. What the paper leaves open is as in the authors' code:
https://github.com/tensorflow/models/blob/master/research/slim/nets/mobilenet_v1.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnfamily.models import initializers
from cnnfamily.models.layers import ACTIVATIONS, Linear, check_images, choose, conv_and_norm, dropout, logits
from cnnfamily.scaling import round_filters, round_repeats

# The last row is printed with stride 2, but its maps of 7x7 in and out need 1.
STAGES = (  # filters, repeats, stride
    (64, 1, 1),
    (128, 2, 2),
    (256, 2, 2),
    (512, 6, 2),
    (1024, 2, 2),
)


class Separable(nn.Module):
    """A 3x3 convolution of each channel, then 1x1 across channels; each with batch norm and activation (Figure 3)."""

    conv: Callable
    norm: Callable
    activation: Callable
    filters: int
    stride: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = self.conv(channels, 3, self.stride, groups=channels, name="depthwise")(x)
        x = self.norm(self.activation, name="depthwise_norm")(x)
        return self.norm(self.activation, name="pointwise_norm")(self.conv(self.filters, 1, name="pointwise")(x))


class Full(nn.Module):
    """The 3x3 convolution that a `Separable` stands for, across space and channels at once."""

    conv: Callable
    norm: Callable
    activation: Callable
    filters: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return self.norm(self.activation, name="conv_norm")(self.conv(self.filters, 3, self.stride, name="conv")(x))


class MobileNetV1(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    `width` is the paper's multiplier alpha; its resolution multiplier rho is `resolution` (with `data.resolution` where a run
    sets that) over 224: no weight depends on it. With `train=True` and `dropout` above 0 it needs the random stream `dropout`,
    and `position` `[batch]`, the places of the examples in the global batch (default: 0, 1, ...).
    """

    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224  # what summary and data take for this network; any size from 32 up works
    width: float = 1.0
    depth: float = 1.0
    stages: tuple = STAGES
    stem_filters: int = 32
    depthwise: bool = True  # False: full 3x3 convolutions in the place of separable ones, "Conv MobileNet" of Table 4
    activation: str = "relu"  # the authors' code has relu6
    dropout: float = 0.0  # not in the paper; 0.001 in the authors' code
    batch_norm: bool = True  # without, convolutions have a bias
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    padding: str = "same"  # TensorFlow's, which the authors used; "symmetric" is torch's
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=32)
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        conv, norm = conv_and_norm(self, train)
        block = partial(Separable if self.depthwise else Full, conv, norm, activation)
        x = norm(activation, name="stem_norm")(conv(round_filters(self.stem_filters, self.width), 3, 2, name="stem")(images))
        blocks = 0
        for i, (filters, repeats, stride) in enumerate(self.stages):
            for j in range(round_repeats(repeats, self.depth)):
                blocks += 1
                x = block(round_filters(filters, self.width), stride if j == 0 else 1, name=f"block{blocks}")(x)
            self.sow("intermediates", f"stage{i + 1}", x)
        x = x.mean(axis=(1, 2))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        classifier = Linear(self.num_classes, kernel_init=initializers.normal(0.01), dtype=self.dtype, name="classifier")
        return logits(classifier(x))


VARIANTS = {"mobilenet_v1": (MobileNetV1, {})}
