"""MobileNetV2: inverted residuals, wide inside and narrow between, where the narrow end is linear.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, https://arxiv.org/abs/1801.04381, Table 2, with
torchvision's normalisation and padding: https://github.com/pytorch/vision/blob/main/torchvision/models/mobilenetv2.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnfamily.models import initializers
from cnnfamily.models.layers import ACTIVATIONS, Linear, check_images, choose, conv_and_norm, dropout, logits, residual_sum
from cnnfamily.models.stochastic_depth import branch_output, drops
from cnnfamily.scaling import round_filters, round_repeats

STAGES = (  # expansion, filters, repeats, stride: t, c, n, s in the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Bottleneck(nn.Module):
    """1x1 expansion (not where it is 1), 3x3 depthwise convolution, 1x1 projection; an inverted residual's branch."""

    conv: Callable
    norm: Callable
    activation: Callable
    expansion: int
    filters: int
    stride: int
    linear: bool
    summed: bool  # a sum follows
    last_scale_init: Callable

    @nn.compact
    def __call__(self, x):
        expanded = x.shape[-1] * self.expansion
        if self.expansion != 1:
            x = self.norm(self.activation, name="expand_norm")(self.conv(expanded, 1, name="expand")(x))
        x = self.conv(expanded, 3, self.stride, groups=expanded, name="depthwise")(x)
        x = self.norm(self.activation, name="depthwise_norm")(x)
        activation = ACTIVATIONS["identity"] if self.linear else self.activation
        norm = self.norm(activation, scale_init=self.last_scale_init, rounded=not self.summed, name="project_norm")
        return norm(self.conv(self.filters, 1, name="project")(x))


class MobileNetV2(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    With `train=True` it needs the random stream `dropout`, and `stochastic_depth` where that is above 0, and `position`
    `[batch]`, the places of the examples in the global batch (default: 0, 1, ...).
    """

    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224  # what summary and data take for this network; any size from 32 up works
    width: float = 1.0
    depth: float = 1.0
    stages: tuple = STAGES
    stem_filters: int = 32
    head_filters: int = 1280  # the multiplier widens these but does not thin them (section 4)
    linear_bottleneck: bool = True  # False: the activation after the projection too, as in Figure 6 (a)
    shortcut: bool = True  # False: without residuals, as in Figure 6 (b)
    activation: str = "relu6"
    dropout: float = 0.2
    stochastic_depth: float = 0.0
    stochastic_depth_form: str = "example"  # example, batch, subset or none: see stochastic_depth
    stochastic_depth_schedule: str = "i/N"
    stochastic_depth_scaling: str = "train"  # "test": as in the paper
    stochastic_depth_group: int = 16  # form "subset" computes a branch for some of so many examples
    zero_init_last: bool = False  # scale of each block's last norm starts at 0: the block starts as the identity
    batch_norm: bool = True  # without, convolutions have a bias
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5  # torchvision's; 1e-3 in the authors' code
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    padding: str = "symmetric"  # torchvision's; "same" is TensorFlow's
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=32)
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        conv, norm = conv_and_norm(self, train)
        repeats = [round_repeats(stage[2], self.depth) for stage in self.stages]
        drop = iter(drops(self, sum(repeats), train, position))
        x = norm(activation, name="stem_norm")(conv(round_filters(self.stem_filters, self.width), 3, 2, name="stem")(images))
        for i, (expansion, filters, _, stage_stride) in enumerate(self.stages):
            filters = round_filters(filters, self.width)
            for j in range(repeats[i]):
                stride, block_drop = stage_stride if j == 0 else 1, next(drop)
                # By stride and channels, as in the paper; the shapes alone would add a shortcut where a 1x1 map is "halved".
                residual = self.shortcut and stride == 1 and x.shape[-1] == filters
                block = Bottleneck(
                    conv,
                    partial(norm, group=block_drop.norm_group(self.norm_group)) if residual else norm,
                    activation,
                    expansion,
                    filters=filters,
                    stride=stride,
                    linear=self.linear_bottleneck,
                    summed=residual,
                    last_scale_init=initializers.zeros if self.zero_init_last else initializers.ones,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = residual_sum(x, branch_output(block, x, block_drop), x.dtype) if residual else block(x)
            self.sow("intermediates", f"stage{i + 1}", x)
        x = conv(round_filters(self.head_filters, max(1.0, self.width)), 1, name="head")(x)
        x = norm(activation, name="head_norm")(x)
        self.sow("intermediates", "head_output", x)
        x = x.mean(axis=(1, 2))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        classifier = Linear(self.num_classes, kernel_init=initializers.normal(0.01), dtype=self.dtype, name="classifier")
        return logits(classifier(x))


VARIANTS = {"mobilenet_v2": (MobileNetV2, {})}
