"""ResNet: residual blocks, for ImageNet and CIFAR; also the plain network, ResNeXt, Wide ResNet and SE-ResNet as rows.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, https://arxiv.org/abs/1512.03385, Table 1 and
section 4.2. ResNeXt: https://arxiv.org/abs/1611.05431. Wide: https://arxiv.org/abs/1605.07146. SE: https://arxiv.org/abs/1709.01507.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnfamily.errors import UsageError
from cnnfamily.models import initializers, onednn
from cnnfamily.models.layers import (
    ACTIVATIONS,
    Linear,
    SqueezeExcite,
    check_images,
    choose,
    conv_and_norm,
    logits,
    residual_sum,
)
from cnnfamily.models.pooling import max_pool
from cnnfamily.models.stochastic_depth import Drop, branch_output, drops
from cnnfamily.scaling import round_filters, round_repeats

SHORTCUTS = ("A", "A_average", "B", "C", "none")


class Shortcut(nn.Module):
    """The input of a block, made to fit its output (section 3.3 of the paper).

    Where the shape stays it is the input itself (but for C). Elsewhere A subsamples and pads with zero channels, "A_average"
    averages instead of subsampling (the stochastic-depth code), B and C project by a 1x1 convolution; C projects everywhere.
    """

    kind: str
    conv: Callable
    norm: Callable
    stride: int

    @nn.compact
    def __call__(self, x, shape):
        if x.shape == shape and self.kind != "C":
            return x
        if self.kind in ("B", "C"):
            return self.norm(rounded=False, name="norm")(self.conv(shape[-1], 1, self.stride, name="conv")(x))
        if self.kind == "A":
            x = x[:, :: self.stride, :: self.stride]
        elif self.stride > 1:
            window = (0.0, jax.lax.add, (self.stride,) * 2, (self.stride,) * 2, "SAME")
            x = nn.pool(x, *window) / nn.pool(jnp.ones_like(x[..., :1]), *window)  # an edge divides by what it has
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, shape[-1] - x.shape[-1])))


class Branch(nn.Module):
    """The residual function of a block: two 3x3 convolutions ("basic"), or 1x1, 3x3, 1x1 ("bottleneck").

    A norm follows each convolution; with `preactivation` it stands before it, that of the first in `Block`.
    """

    kind: str
    conv: Callable
    norm: Callable
    activation: Callable
    filters: int
    stride: int
    stride_on: str
    groups: int
    group_width: int
    squeezed: Callable
    preactivation: bool
    last_scale_init: Callable
    dtype: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "basic":
            convs = ((self.filters, 3, self.stride, 1), (self.filters, 3, 1, 1))
        else:
            inner = int(self.filters * self.group_width / 64) * self.groups
            first, second = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            convs = ((inner, 1, first, 1), (inner, 3, second, self.groups), (4 * self.filters, 1, 1, 1))
        for i, (filters, kernel, stride, groups) in enumerate(convs, start=1):
            if self.preactivation and i > 1:
                x = self.norm(self.activation, name=f"norm{i}")(x)
            x = self.conv(filters, kernel, stride, groups=groups, name=f"conv{i}")(x)
            if not self.preactivation and i < len(convs):
                x = self.norm(self.activation, name=f"norm{i}")(x)
            elif not self.preactivation:
                x = self.norm(scale_init=self.last_scale_init, rounded=False, name=f"norm{i}")(x)
        if self.squeezed(x.shape[-1]):
            x = SqueezeExcite(self.squeezed(x.shape[-1]), dtype=self.dtype, name="se")(x)
        return x


class Block(nn.Module):
    """A branch and its shortcut, added, then the activation; `norm` serves the shortcut.

    With `preactivation` norm and activation come first instead, and a projection sees their output too, as in the code of
    "Identity Mappings in Deep Residual Networks", He et al. 2016, https://arxiv.org/abs/1603.05027, figure 4 (e).
    """

    branch: Callable
    shortcut: str
    conv: Callable
    norm: Callable
    activation: Callable
    stride: int
    preactivation: bool

    @nn.compact
    def __call__(self, x, drop: Drop):
        activated = self.norm(self.activation, name="norm")(x) if self.preactivation else x
        y = branch_output(self.branch(name="branch"), activated, drop)
        activation = ACTIVATIONS["identity"] if self.preactivation else self.activation
        if self.shortcut != "none":
            projects = self.shortcut == "C" or (self.shortcut == "B" and y.shape != x.shape)
            norm = (lambda **_: ACTIVATIONS["identity"]) if self.preactivation else self.norm
            shortcut = Shortcut(self.shortcut, self.conv, norm, self.stride, name="shortcut")
            return residual_sum(shortcut(activated if projects else x, y.shape), y, x.dtype, activation)
        return activation(onednn.finished(y)).astype(x.dtype)


class ResNet(nn.Module):
    """ResNet for images `[batch, height, width, in_channels]`; logits `[batch, num_classes]` float32.

    The ImageNet stem takes 32 pixels or more, the CIFAR stem 4. With `train=True` and `stochastic_depth` above 0 it needs the
    random stream of that name, and `position` `[batch]`, the places of the examples in the global batch (default: 0, 1, ...).
    """

    stage_sizes: tuple
    block: str
    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    filters: int = 64
    shortcut: str = "B"
    stride_on: str = "3x3"  # which convolution of a bottleneck strides: "1x1" in the paper (v1), "3x3" in torch's code (v1.5)
    groups: int = 1
    group_width: int = 64
    se_reduction: int = 0  # 16 in the SE paper; 0: without
    activation: str = "relu"
    preactivation: bool = False  # norm and activation before each convolution, not after
    batch_norm: bool = True  # without, convolutions have a bias
    norm_place: str = "before"  # the activation, or "after" it
    stochastic_depth: float = 0.0
    stochastic_depth_form: str = "example"  # example, batch, subset or none: see stochastic_depth
    stochastic_depth_schedule: str = "l/L"
    stochastic_depth_scaling: str = "train"  # "test": as in the paper
    stochastic_depth_group: int = 16  # form "subset" computes a branch for some of so many examples
    zero_init_last: bool = False  # scale of each block's last norm starts at 0: the block starts as the identity
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    padding: str = "symmetric"
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        imagenet = choose("stem", self.stem, ("imagenet", "cifar")) == "imagenet"
        choose("block", self.block, ("basic", "bottleneck"))
        choose("stride_on", self.stride_on, ("1x1", "3x3"))
        choose("shortcut", self.shortcut, SHORTCUTS)
        check_images(images, self.in_channels, smallest=32 if imagenet else 4)
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        conv, norm = conv_and_norm(self, train)
        if self.preactivation and self.zero_init_last:
            raise UsageError("zero_init_last=True with preactivation=True: no branch ends with a norm")

        def squeezed(filters):
            return max(1, filters // self.se_reduction) if self.se_reduction else 0

        repeats = [round_repeats(size, self.depth) for size in self.stage_sizes]
        blocks = sum(repeats)  # of a plain network none is left out: it has no shortcuts
        drop = iter(drops(self, blocks, train, position) if self.shortcut != "none" else [Drop()] * blocks)
        filters = round_filters(self.filters, self.width)
        x = conv(filters, 7, 2, name="stem")(images) if imagenet else conv(filters, 3, name="stem")(images)
        x = x if self.preactivation else norm(activation, name="stem_norm")(x)
        if imagenet:
            same = self.padding == "same"
            edges = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), "SAME") if same else ((1, 1), (1, 1))
            x = max_pool(x, 3, 2, edges)
        for i, count in enumerate(repeats):
            for j in range(count):
                stride, block_drop = 2 if i > 0 and j == 0 else 1, next(drop)
                branch = partial(
                    Branch,
                    self.block,
                    conv,
                    partial(norm, group=block_drop.norm_group(self.norm_group)),
                    activation,
                    filters=round_filters(self.filters * 2**i, self.width),
                    stride=stride,
                    stride_on=self.stride_on,
                    groups=self.groups,
                    group_width=self.group_width,
                    squeezed=squeezed,
                    preactivation=self.preactivation,
                    last_scale_init=initializers.zeros if self.zero_init_last else initializers.ones,
                    dtype=self.dtype,
                )
                fields = (self.shortcut, conv, norm, activation, stride, self.preactivation)
                x = Block(branch, *fields, name=f"stage{i + 1}_block{j + 1}")(x, block_drop)
            self.sow("intermediates", f"stage{i + 1}", x)
        x = norm(activation, name="head_norm")(x) if self.preactivation else x
        x = x.mean(axis=(1, 2))
        return logits(Linear(self.num_classes, dtype=self.dtype, name="classifier")(x))


def _imagenet(block: str, *stage_sizes: int, **fields) -> tuple[type[ResNet], dict]:
    return ResNet, {"block": block, "stage_sizes": stage_sizes, **fields}


def _cifar(layers: int, **fields) -> tuple[type[ResNet], dict]:
    """Section 4.2: 6n + 2 layers, 16, 32 and 64 filters, shortcut A."""
    sizes = ((layers - 2) // 6,) * 3
    small = {"num_classes": 10, "resolution": 32, "stem": "cifar", "filters": 16, "shortcut": "A"}
    return ResNet, {"block": "basic", "stage_sizes": sizes, **small, **fields}


VARIANTS = {
    "resnet18": _imagenet("basic", 2, 2, 2, 2),
    "resnet34": _imagenet("basic", 3, 4, 6, 3),
    "resnet50": _imagenet("bottleneck", 3, 4, 6, 3),
    "resnet101": _imagenet("bottleneck", 3, 4, 23, 3),
    "resnet152": _imagenet("bottleneck", 3, 8, 36, 3),
    "resnet50_v1": _imagenet("bottleneck", 3, 4, 6, 3, stride_on="1x1"),
    "resnet101_v1": _imagenet("bottleneck", 3, 4, 23, 3, stride_on="1x1"),
    "resnet152_v1": _imagenet("bottleneck", 3, 8, 36, 3, stride_on="1x1"),
    "plain18": _imagenet("basic", 2, 2, 2, 2, shortcut="none"),
    "plain34": _imagenet("basic", 3, 4, 6, 3, shortcut="none"),
    "resnext50_32x4d": _imagenet("bottleneck", 3, 4, 6, 3, groups=32, group_width=4),
    "resnext101_32x8d": _imagenet("bottleneck", 3, 4, 23, 3, groups=32, group_width=8),
    "resnext101_64x4d": _imagenet("bottleneck", 3, 4, 23, 3, groups=64, group_width=4),
    "wide_resnet50_2": _imagenet("bottleneck", 3, 4, 6, 3, group_width=128),
    "wide_resnet101_2": _imagenet("bottleneck", 3, 4, 23, 3, group_width=128),
    "se_resnet18": _imagenet("basic", 2, 2, 2, 2, se_reduction=16),
    "se_resnet34": _imagenet("basic", 3, 4, 6, 3, se_reduction=16),
    "se_resnet50": _imagenet("bottleneck", 3, 4, 6, 3, se_reduction=16),
    "se_resnet101": _imagenet("bottleneck", 3, 4, 23, 3, se_reduction=16),
    "se_resnet152": _imagenet("bottleneck", 3, 8, 36, 3, se_reduction=16),
    "resnet20_cifar": _cifar(20),
    "resnet32_cifar": _cifar(32),
    "resnet44_cifar": _cifar(44),
    "resnet56_cifar": _cifar(56),
    "resnet110_cifar": _cifar(110),
    "resnet1202_cifar": _cifar(1202),
    "plain20_cifar": _cifar(20, shortcut="none"),
    "plain56_cifar": _cifar(56, shortcut="none"),
}
