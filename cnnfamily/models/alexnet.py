"""AlexNet: the network of 2012 in two groups, and the one column of 2014 that torchvision has.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012,
https://papers.nips.cc/paper/4824, section 3 and figure 2. One column: Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", 2014, https://arxiv.org/abs/1404.5997.
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
    local_response_norm,
    logits,
)
from cnnfamily.models.pooling import max_pool
from cnnfamily.scaling import round_filters

KERNELS = (11, 5, 3, 3, 3)
PAIRED = (1, 3, 4)  # the second, fourth and fifth convolution see only the maps of their own group


class AlexNet(nn.Module):
    """For images `[batch, height, width, in_channels]`; logits `[batch, num_classes]`, float32.

    Images have 63 pixels or more, 67 without `stem_padding`. With `train=True` it needs the random stream `dropout`, and
    `position` `[batch]`, the places of the examples in the global batch (default: 0, 1, ...). Of other sizes than the network's
    own the last maps are averaged to 6 x 6, as in torchvision.
    """

    num_classes: int = 1000
    in_channels: int = 3
    resolution: int = 224
    width: float = 1.0
    filters: tuple = (64, 192, 384, 256, 256)
    stem_padding: int = 2
    groups: int = 1  # of the second, fourth and fifth convolution
    response_norm: bool = False  # local response normalisation after the first two convolutions
    hidden: int = 4096  # units of the two layers before the classifier
    activation: str = "relu"
    dropout: float = 0.5
    batch_norm: bool = False  # after each convolution; neither network has it
    norm_place: str = "before"  # the activation, or "after" it
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_group: int = 0  # examples that share batch statistics; 0: the whole batch
    dropout_on: str = "inputs"  # of the two hidden layers, as in torchvision, or their "outputs", as in the paper
    initialization: str = "torch"  # uniform by fan-in; or "paper": normal with deviation 0.01, and biases of 1
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        check_images(images, self.in_channels, smallest=67 - 2 * self.stem_padding)
        position = jnp.arange(images.shape[0]) if position is None else position
        activation = choose("activation", self.activation, ACTIVATIONS)
        dropped = choose("dropout_on", self.dropout_on, ("inputs", "outputs"))
        conv, norm = conv_and_norm(self, train)
        of_paper = choose("initialization", self.initialization, ("torch", "paper")) == "paper"

        def starts(fan_in, bias):
            if of_paper:  # section 5: the ones give the rectifiers of these layers positive inputs at first
                return {"kernel_init": initializers.normal(0.01), "bias_init": initializers.constant(bias)}
            return {"kernel_init": initializers.torch_uniform(fan_in), "bias_init": initializers.torch_uniform(fan_in)}

        x = images
        for i, (filters, kernel) in enumerate(zip(self.filters, KERNELS, strict=True)):
            groups = self.groups if i in PAIRED else 1
            start = starts(x.shape[-1] // groups * kernel**2, 1.0 if i in PAIRED else 0.0)
            fields = {"groups": groups, "bias": True, "name": f"conv{i + 1}", **start}
            if i == 0:
                x = jnp.pad(x, ((0, 0), (self.stem_padding,) * 2, (self.stem_padding,) * 2, (0, 0)))
                fields |= {"stride": 4, "padding": "valid"}
            x = conv(round_filters(filters, self.width), kernel, **fields)(x)
            x = norm(activation, name=f"conv{i + 1}_norm")(x)
            if i < 2 and self.response_norm:
                x = local_response_norm(x)
            if i in (0, 1, 4):
                x = max_pool(x, 3, 2)  # windows overlap: section 3.4
                self.sow("intermediates", f"pool{i + 1}", x)
        x = adaptive_average(x, 6).reshape(x.shape[0], -1)
        for name in ("hidden1", "hidden2"):
            units = round_filters(self.hidden, self.width)
            if train and self.dropout and dropped == "inputs":
                x = dropout(self, x, self.dropout, position)
            x = activation(Linear(units, **starts(x.shape[-1], 1.0), dtype=self.dtype, name=name)(x))
            if train and self.dropout and dropped == "outputs":
                x = dropout(self, x, self.dropout, position)
        return logits(Linear(self.num_classes, **starts(x.shape[-1], 0.0), dtype=self.dtype, name="classifier")(x))


# The paper says 224 pixels, from which its 55 x 55 maps do not follow; 227 without padding give them.
_PAPER = {
    "resolution": 227,
    "filters": (96, 256, 384, 384, 256),
    "stem_padding": 0,
    "groups": 2,
    "response_norm": True,
    "dropout_on": "outputs",
    "initialization": "paper",
}

VARIANTS = {
    "alexnet": (AlexNet, {}),
    "alexnet_2012": (AlexNet, _PAPER),
}
