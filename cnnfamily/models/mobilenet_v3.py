"""MobileNetV3, large and small: searched inverted residuals with squeeze-and-excitation and hard-swish.

Howard et al., "Searching for MobileNetV3", 2019, https://arxiv.org/abs/1905.02244, Tables 1 and 2, with torchvision's padding:
https://github.com/pytorch/vision/blob/main/torchvision/models/mobilenetv3.py.
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
from cnnfamily.scaling import round_filters, round_repeats

# The first version of the paper prints the stride of the large network's last stage one row late.
LARGE = (  # kernel, expanded filters, filters, squeeze-and-excitation, nonlinearity (ReLU or hard-swish), stride
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2),
    (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2),
    (5, 120, 40, True, "RE", 1),
    (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2),
    (3, 200, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1),
    (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2),
    (5, 960, 160, True, "HS", 1),
    (5, 960, 160, True, "HS", 1),
)
SMALL = (
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
)
WIDTH_RULES = {  # whether `width` scales the stem, expands a row's scaled input by the table's ratio, thins the hidden layer
    "torchvision": (True, False, True),
    "hybrid": (True, False, False),
    "paper": (True, True, False),
    "keras": (False, True, False),
}


class Bottleneck(nn.Module):
    """1x1 expansion (if it widens), depthwise convolution, squeeze-and-excitation, linear 1x1 projection; a branch."""

    conv: Callable
    norm: Callable
    activation: Callable
    expanded: int
    filters: int
    stride: int
    kernel: int
    squeezed: int
    summed: bool  # a sum follows
    last_scale_init: Callable
    dtype: str

    @nn.compact
    def __call__(self, x):
        if self.expanded != x.shape[-1]:
            x = self.norm(self.activation, name="expand_norm")(self.conv(self.expanded, 1, name="expand")(x))
        x = self.conv(self.expanded, self.kernel, self.stride, groups=self.expanded, name="depthwise")(x)
        x = self.norm(self.activation, rounded=not self.squeezed, name="depthwise_norm")(x)
        if self.squeezed:
            x = SqueezeExcite(self.squeezed, gate=ACTIVATIONS["hard_sigmoid"], dtype=self.dtype, name="se")(x)
        norm = self.norm(scale_init=self.last_scale_init, rounded=not self.summed, name="project_norm")
        return norm(self.conv(self.filters, 1, name="project")(x))


class MobileNetV3(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    `width_rule` says what `width` does; at 1.0 all are alike. "paper": a row's input, already scaled and rounded, is expanded
    by the table's ratio, and the hidden layer is widened but not thinned; so the large network has Table 9's multiply-adds.
    "keras": the same, with 16 filters in the stem at every width. "torchvision": the table's expanded filters are scaled, and
    the hidden layer is thinned as well. "hybrid": torchvision's, but for that layer.

    With `train=True` it needs the random stream `dropout`, and `stochastic_depth` where that is above 0, and `position`
    `[batch]`, the places of the examples in the global batch (default: 0, 1, ...).
    """

    stages: tuple
    hidden_units: int
    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224  # what summary and data take for this network; any size from 32 up works
    width: float = 1.0
    width_rule: str = "torchvision"
    depth: float = 1.0  # times which each row stands, rounded up: 2.0 doubles them
    stem_filters: int = 16
    shortcut: bool = True
    activation: str = "hard_swish"  # of stem, head, hidden layer and the rows marked "HS"; those marked "RE" have ReLU
    se_ratio: float = 0.25  # of the expanded filters, in the rows that have it; 0: without
    dropout: float = 0.2
    stochastic_depth: float = 0.0
    stochastic_depth_form: str = "example"  # example, batch, subset or none: see stochastic_depth
    stochastic_depth_schedule: str = "i/N"
    stochastic_depth_scaling: str = "train"  # "test": as in the paper
    stochastic_depth_group: int = 16  # form "subset" computes a branch for some of so many examples
    zero_init_last: bool = False  # scale of each block's last norm starts at 0: the block starts as the identity
    batch_norm: bool = True  # without, convolutions have a bias
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.99
    norm_epsilon: float = 1e-3
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    padding: str = "symmetric"  # torchvision's; "same" is TensorFlow's
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=32)
        scales_stem, by_ratio, thins_hidden = choose("width_rule", self.width_rule, WIDTH_RULES)
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        nonlinearities = {"RE": nn.relu, "HS": activation}
        conv, norm = conv_and_norm(self, train)

        def linear(units, name):
            return Linear(units, kernel_init=initializers.normal(0.01), dtype=self.dtype, name=name)

        repeats = round_repeats(1, self.depth)
        drop = iter(drops(self, repeats * len(self.stages), train, position))
        table_filters = self.stem_filters  # of a row's input, before it is scaled
        x = conv(round_filters(self.stem_filters, self.width if scales_stem else 1.0), 3, 2, name="stem")(images)
        x = norm(activation, name="stem_norm")(x)
        for i, (kernel, table_expanded, filters, has_se, nonlinearity, row_stride) in enumerate(self.stages):
            scaled = round_filters(filters, self.width)
            for j in range(repeats):
                if by_ratio:
                    expanded = round_filters(x.shape[-1] * table_expanded / table_filters)
                else:
                    expanded = round_filters(table_expanded, self.width)
                stride, block_drop = row_stride if j == 0 else 1, next(drop)
                # By stride and channels, as in the paper; the shapes alone would add a shortcut where a 1x1 map is "halved".
                residual = self.shortcut and stride == 1 and x.shape[-1] == scaled
                block = Bottleneck(
                    conv,
                    partial(norm, group=block_drop.norm_group(self.norm_group)) if residual else norm,
                    choose("nonlinearity", nonlinearity, nonlinearities),
                    expanded,
                    filters=scaled,
                    stride=stride,
                    kernel=kernel,
                    squeezed=round_filters(expanded * self.se_ratio) if has_se and self.se_ratio else 0,
                    summed=residual,
                    last_scale_init=initializers.zeros if self.zero_init_last else initializers.ones,
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = residual_sum(x, branch_output(block, x, block_drop), x.dtype) if residual else block(x)
                table_filters = filters
            self.sow("intermediates", f"stage{i + 1}", x)
        x = norm(activation, name="head_norm")(conv(6 * x.shape[-1], 1, name="head")(x))
        self.sow("intermediates", "head_output", x)
        x = x.mean(axis=(1, 2))
        hidden = round_filters(self.hidden_units, self.width if thins_hidden else max(1.0, self.width))
        x = activation(linear(hidden, "hidden")(x))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        return logits(linear(self.num_classes, "classifier")(x))


VARIANTS = {
    "mobilenet_v3_large": (MobileNetV3, {"stages": LARGE, "hidden_units": 1280}),
    "mobilenet_v3_small": (MobileNetV3, {"stages": SMALL, "hidden_units": 1024}),
}
