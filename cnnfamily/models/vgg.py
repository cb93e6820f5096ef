"""VGG: stages of 3x3 convolutions, three linear layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014,
https://arxiv.org/abs/1409.1556, Table 1, columns A, B, D and E; with batch normalisation as in torchvision.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnfamily.models import initializers
from cnnfamily.models.layers import (
    ACTIVATIONS,
    Linear,
    adaptive_average,
    check_images,
    choose,
    conv_and_norm,
    dropout,
    logits,
)
from cnnfamily.models.pooling import max_pool
from cnnfamily.scaling import round_filters, round_repeats

FILTERS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """For images `[batch, height, width, in_channels]` of 32 pixels or more; logits `[batch, num_classes]`, float32.

    With `train=True` it needs the random stream `dropout`, and `position` `[batch]`, the places of the examples in the global
    batch (default: 0, 1, ...). Of other sizes than 224 pixels the last maps are averaged to 7 x 7, as in torchvision.
    """

    stage_sizes: tuple  # convolutions in each of the five stages
    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224
    width: float = 1.0
    depth: float = 1.0
    batch_norm: bool = False
    norm_place: str = "before"  # the activation, or "after" it
    hidden: int = 4096  # units of the two layers before the classifier
    pooled: int = 7  # side of the maps that the first of them sees
    activation: str = "relu"
    dropout: float = 0.5
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=2 ** len(self.stage_sizes))
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        conv, norm = conv_and_norm(self, train)
        x = images
        for i, (count, filters) in enumerate(zip(self.stage_sizes, FILTERS, strict=False)):
            for j in range(round_repeats(count, self.depth)):
                name = f"stage{i + 1}_conv{j + 1}"
                # The bias stays where a norm follows and removes it, so that torchvision's weights fit.
                x = conv(round_filters(filters, self.width), 3, bias=True, name=name)(x)
                x = norm(activation, name=f"{name}_norm")(x)
            x = max_pool(x, 2, 2)
            self.sow("intermediates", f"stage{i + 1}", x)
        x = adaptive_average(x, self.pooled).reshape(x.shape[0], -1)
        start = initializers.normal(0.01)
        for name in ("hidden1", "hidden2"):
            units = round_filters(self.hidden, self.width)
            x = activation(Linear(units, start, dtype=self.dtype, name=name)(x))
            if train and self.dropout:
                x = dropout(self, x, self.dropout, position)
        return logits(Linear(self.num_classes, start, dtype=self.dtype, name="classifier")(x))


COLUMNS = {  # of Table 1: convolutions in each stage
    "vgg11": (1, 1, 2, 2, 2),  # A
    "vgg13": (2, 2, 2, 2, 2),  # B
    "vgg16": (2, 2, 3, 3, 3),  # D
    "vgg19": (2, 2, 4, 4, 4),  # E
}

VARIANTS = {name: (VGG, {"stage_sizes": sizes}) for name, sizes in COLUMNS.items()} | {
    f"{name}_bn": (VGG, {"stage_sizes": sizes, "batch_norm": True}) for name, sizes in COLUMNS.items()
}
