"""EfficientNet: MBConv blocks with squeeze-and-excitation, scaled in width, depth and resolution at once.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, https://arxiv.org/abs/1905.11946,
Table 1, as the authors' code has it: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnfamily.models import initializers
from cnnfamily.models.layers import (
    ACTIVATIONS,
    Linear,
    SqueezeExcite,
    check_images,
    choose,
    conv_and_norm,
    dropout,
    logits,
    residual_sum,
)
from cnnfamily.models.stochastic_depth import branch_output, drops
from cnnfamily.scaling import PUBLISHED, round_filters, round_repeats

STAGES = (  # expansion, filters, repeats, stride, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, linear 1x1 projection; an inverted residual's branch."""

    conv: Callable
    norm: Callable
    activation: Callable
    expansion: int
    filters: int
    stride: int
    kernel: int
    squeezed: int
    summed: bool  # a sum follows
    last_scale_init: Callable
    dtype: str

    @nn.compact
    def __call__(self, x):
        expanded = round_filters(x.shape[-1] * self.expansion)
        y = x
        if expanded != x.shape[-1]:
            y = self.norm(self.activation, name="expand_norm")(self.conv(expanded, 1, name="expand")(y))
        y = self.conv(expanded, self.kernel, self.stride, groups=expanded, name="depthwise")(y)
        y = self.norm(self.activation, rounded=not self.squeezed, name="depthwise_norm")(y)
        if self.squeezed:
            y = SqueezeExcite(self.squeezed, self.activation, dtype=self.dtype, name="se")(y)
        norm = self.norm(scale_init=self.last_scale_init, rounded=not self.summed, name="project_norm")
        return norm(self.conv(self.filters, 1, name="project")(y))


class EfficientNet(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    With `train=True` it needs the random streams `stochastic_depth` and `dropout`, and `position` `[batch]`, the places of the
    examples in the global batch (default: 0, 1, ...).
    """

    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224  # what summary and data take for this network; any size from 32 up works
    width: float = 1.0
    depth: float = 1.0
    stages: tuple = STAGES
    stem_filters: int = 32
    head_filters: int = 1280
    shortcut: bool = True
    activation: str = "silu"
    se_ratio: float = 0.25  # of the block's input filters; 0: without
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    stochastic_depth_form: str = "example"  # example, batch, subset or none: see stochastic_depth
    stochastic_depth_schedule: str = "i/N"
    stochastic_depth_scaling: str = "train"  # "test": as in the paper
    stochastic_depth_group: int = 16  # form "subset" computes a branch for some of so many examples
    zero_init_last: bool = False  # scale of each block's last norm starts at 0: the block starts as the identity
    batch_norm: bool = True  # without, convolutions have a bias
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
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
        for i, (expansion, filters, _, stage_stride, kernel) in enumerate(self.stages):
            filters = round_filters(filters, self.width)
            for j in range(repeats[i]):
                stride, block_drop = stage_stride if j == 0 else 1, next(drop)
                # By stride and channels, as in the paper; the shapes alone would add a shortcut where a 1x1 map is "halved".
                residual = self.shortcut and stride == 1 and x.shape[-1] == filters
                block = MBConv(
                    conv,
                    partial(norm, group=block_drop.norm_group(self.norm_group)) if residual else norm,
                    activation,
                    expansion,
                    filters=filters,
                    stride=stride,
                    kernel=kernel,
                    squeezed=max(1, int(x.shape[-1] * self.se_ratio)) if self.se_ratio else 0,
                    summed=residual,
                    last_scale_init=initializers.zeros if self.zero_init_last else initializers.ones,
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = residual_sum(x, branch_output(block, x, block_drop), x.dtype) if residual else block(x)
            self.sow("intermediates", f"stage{i + 1}", x)
        x = norm(activation, name="head_norm")(conv(round_filters(self.head_filters, self.width), 1, name="head")(x))
        self.sow("intermediates", "head_output", x)
        x = x.mean(axis=(1, 2))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        return logits(Linear(self.num_classes, dtype=self.dtype, name="classifier")(x))


def _variant(name: str) -> dict:
    width, depth, resolution, dropout_rate = PUBLISHED[name]
    fields = {"width": width, "depth": depth, "resolution": resolution, "dropout": dropout_rate}
    if name[-1] in "567":  # ported from the TensorFlow checkpoints, whose statistics torchvision kept
        fields |= {"norm_epsilon": 1e-3, "norm_momentum": 0.99}
    return fields


VARIANTS = {name: (EfficientNet, _variant(name)) for name in PUBLISHED}
