"""GoogLeNet: Inception modules, two auxiliary classifiers.

Szegedy et al., "Going Deeper with Convolutions", 2014, https://arxiv.org/abs/1409.4842, Table 1; and as torchvision has it,
with batch normalisation, a 3x3 convolution where the paper has 5x5 (https://github.com/pytorch/vision/issues/906), and a 2x2
window in the last of the pools between stages.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnfamily.errors import UsageError
from cnnfamily.models import initializers
from cnnfamily.models.layers import (
    ACTIVATIONS,
    Linear,
    adaptive_average,
    check_images,
    choose,
    conv_and_norm,
    dropout,
    local_response_norm,
    logits,
)
from cnnfamily.models.pooling import max_pool_to_the_edge
from cnnfamily.scaling import round_filters

MODULES = (  # name, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
    ("3a", 64, 96, 128, 16, 32, 32),
    ("3b", 128, 128, 192, 32, 96, 64),
    ("4a", 192, 96, 208, 16, 48, 64),
    ("4b", 160, 112, 224, 24, 64, 64),
    ("4c", 128, 128, 256, 24, 64, 64),
    ("4d", 112, 144, 288, 32, 64, 64),
    ("4e", 256, 160, 320, 32, 128, 128),
    ("5a", 256, 160, 320, 32, 128, 128),
    ("5b", 384, 192, 384, 48, 128, 128),
)
AUXILIARY = {"4a": "aux1", "4d": "aux2"}  # after which modules the auxiliary classifiers stand


class Inception(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and a 3x3 maximum side by side, figure 2b; without reductions figure 2a."""

    conv: Callable
    filters: tuple  # a row of `MODULES` without its name, scaled
    kernel: int  # of the branch that has 5 x 5 in the paper
    reductions: bool

    @nn.compact
    def __call__(self, x):
        ones, reduce3, threes, reduce5, fives, projection = self.filters
        pooled = max_pool_to_the_edge(x, 3, 1, 1)
        if not self.reductions:
            branches = (self.conv(ones, 1, name="branch1"), self.conv(threes, 3, name="branch2"))
            branches += (self.conv(fives, self.kernel, name="branch3"),)
            return jnp.concatenate([*(branch(x) for branch in branches), pooled], axis=-1)
        first = self.conv(ones, 1, name="branch1")(x)
        second = self.conv(threes, 3, name="branch2")(self.conv(reduce3, 1, name="branch2_reduce")(x))
        third = self.conv(fives, self.kernel, name="branch3")(self.conv(reduce5, 1, name="branch3_reduce")(x))
        fourth = self.conv(projection, 1, name="branch4")(pooled)
        return jnp.concatenate([first, second, third, fourth], axis=-1)


class ConvNorm(nn.Module):
    """Convolution, batch norm if any, activation."""

    conv: Callable
    norm: Callable
    start: dict
    activation: Callable
    filters: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        conv = self.conv(self.filters, self.kernel, self.stride, name="conv", **self.start)
        return self.norm(self.activation, name="norm")(conv(x))


def start_of(batch_norm: bool) -> tuple[dict, dict]:
    """How the hidden layers and the classifiers start; torchvision's deviation of 0.01 where norms undo it.

    The paper states none, and without norms 0.01 shrinks the maps tenfold in each module, to 4e-13 after the last. So that
    form has the start of Caffe's GoogLeNet (models/bvlc_googlenet/train_val.prototxt of BVLC/caffe): "xavier", which there is
    uniform with a variance of 1 / fan-in, and biases of 0.2, those of classifiers 0.
    """
    if batch_norm:
        start = {"kernel_init": initializers.normal(0.01)}
        return start, start
    start = {"kernel_init": initializers.xavier_fan_in}
    return start | {"bias_init": initializers.constant(0.2)}, start


class GoogLeNet(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    With `train=True` it needs the random stream `dropout`, and `position` `[batch]`, the places of the examples in the global
    batch (default: 0, 1, ...). With `aux`, training sows the logits of the two auxiliary classifiers in the collection
    `aux_logits`; they belong to the loss, and nothing is computed of them in evaluation.
    """

    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224
    width: float = 1.0
    modules: tuple = MODULES
    kernel: int = 3  # of the third branch; 5 in the paper
    reductions: bool = True  # 1x1 convolutions before the large ones and after the maximum
    batch_norm: bool = True  # without, convolutions have a bias
    response_norm: bool = False  # local response normalisation around the second convolution
    last_pool: int = 2  # window of the maximum before 5a; 3 in the paper
    aux: bool = False
    aux_pool: str = "adaptive"  # to 4 x 4; "paper": windows of 5 x 5 at a stride of 3
    aux_dropout: float = 0.7
    transform_input: bool = True  # from the usual normalisation to the one for which the published weights were trained
    activation: str = "relu"
    dropout: float = 0.2
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-3
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=32)
        choose("aux_pool", self.aux_pool, ("adaptive", "paper"))
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        start, classifier_start = start_of(self.batch_norm)
        conv = partial(ConvNorm, *conv_and_norm(self, train), start, activation)

        def response_norm(x):
            return local_response_norm(x) if self.response_norm else x

        x = self._transformed(images) if self.transform_input else images
        x = max_pool_to_the_edge(conv(round_filters(64, self.width), 7, 2, name="conv1")(x), 3, 2)
        x = conv(round_filters(64, self.width), 1, name="conv2")(response_norm(x))
        x = response_norm(conv(round_filters(192, self.width), 3, name="conv3")(x))
        x = max_pool_to_the_edge(x, 3, 2)
        stage = "3"
        for name, *filters in self.modules:
            if name[0] != stage:
                self.sow("intermediates", f"stage{stage}", x)
                x = max_pool_to_the_edge(x, 3 if name[0] == "4" else self.last_pool, 2)
                stage = name[0]
            filters = tuple(round_filters(count, self.width) for count in filters)
            x = Inception(conv, filters, self.kernel, self.reductions, name=f"inception{name}")(x)
            if self.aux and name in AUXILIARY:
                self._auxiliary(AUXILIARY[name], x, conv, activation, train, position)
        self.sow("intermediates", f"stage{stage}", x)
        x = x.mean(axis=(1, 2))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        return logits(Linear(self.num_classes, **classifier_start, dtype=self.dtype, name="classifier")(x))

    def _auxiliary(self, name, x, conv, activation, train, position):
        start = start_of(self.batch_norm)
        head = Auxiliary(self.num_classes, conv, start, activation, self.aux_pool, self.aux_dropout, self.dtype, name=name)
        if self.is_initializing():
            head(x, train, position)  # its parameters are made whatever `train` is
        elif train:
            self.sow("aux_logits", f"{name}_logits", head(x, train, position))

    def _transformed(self, images):
        """Normalised by mean and deviation 1/2 instead of ImageNet's."""
        if self.in_channels != 3:
            raise UsageError(f"transform_input=True with in_channels={self.in_channels}: expected 3 channels, or False")
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        return images * (deviation / 0.5).astype(images.dtype) + ((mean - 0.5) / 0.5).astype(images.dtype)


class Auxiliary(nn.Module):
    """A classifier on the maps of a middle module, section 5: mean to 4 x 4, 1x1 convolution, two linear layers."""

    num_classes: int
    conv: Callable
    start: tuple  # of the hidden layer, of the classifier
    activation: Callable
    pool: str
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x, train, position):
        if self.pool == "paper" and min(x.shape[1:3]) >= 5:
            x = nn.pool(x, 0.0, jax.lax.add, (5, 5), (3, 3), "VALID") / 25
        x = adaptive_average(x, 4)  # the paper's windows give 4 x 4 of its 14 x 14 maps
        x = self.conv(128, 1, name="conv")(x).reshape(x.shape[0], -1)
        hidden_start, classifier_start = self.start
        x = self.activation(Linear(1024, **hidden_start, dtype=self.dtype, name="hidden")(x))
        if train and self.dropout:
            x = dropout(self, x, self.dropout, position)
        return logits(Linear(self.num_classes, **classifier_start, dtype=self.dtype, name="classifier")(x))


_PAPER = {
    "kernel": 5,
    "batch_norm": False,
    "response_norm": True,  # its constants are AlexNet's: the paper gives none
    "last_pool": 3,
    "aux_pool": "paper",
    "transform_input": False,
    "dropout": 0.4,
}

VARIANTS = {
    "googlenet": (GoogLeNet, {}),
    "googlenet_paper": (GoogLeNet, _PAPER),
}
