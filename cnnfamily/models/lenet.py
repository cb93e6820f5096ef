"""LeNet-5: the network of 1998, and the dense form that is taught today.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE 86, 1998,
http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf, section II-B and Table I.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnfamily.errors import UsageError
from cnnfamily.models.initializers import constant, parameter, symmetric_uniform, uniform_fan_in, zeros
from cnnfamily.models.layers import ACTIVATIONS, Conv, Linear, check_images, choose, logits, parameter_dtype_of
from cnnfamily.models.pooling import max_pool
from cnnfamily.scaling import round_filters

# Table I: which of the six maps of S2 each of the sixteen maps of C3 sees.
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip

# The fixed codes of the output units: the ten digits on a grid of 12 rows by 7 columns, one row of the text for each digit.
# The paper's are from an ASCII set that it shows in figure 3; these we drew.
DIGIT_CODES = (
    ".#####. ##...## #.....# #.....# #.....# #.....# #.....# #.....# #.....# ##...## .#####. .......",
    "...#... ..##... .###... ...#... ...#... ...#... ...#... ...#... ...#... ...#... .#####. .......",
    ".#####. #.....# ......# ......# .....#. ....#.. ...#... ..#.... .#..... #...... ####### .......",
    ".#####. #.....# ......# ......# ......# ..####. ......# ......# ......# #.....# .#####. .......",
    "....##. ...#.#. ..#..#. ..#..#. .#...#. .#...#. #....#. ####### .....#. .....#. .....#. .......",
    "####### #...... #...... #...... ######. ......# ......# ......# ......# #.....# .#####. .......",
    "..####. .#..... #...... #...... ######. #.....# #.....# #.....# #.....# #.....# .#####. .......",
    "####### ......# ......# .....#. .....#. ....#.. ....#.. ...#... ...#... ..#.... ..#.... .......",
    ".#####. #.....# #.....# #.....# .#####. #.....# #.....# #.....# #.....# #.....# .#####. .......",
    ".#####. #.....# #.....# #.....# #.....# .###### ......# ......# ......# .....#. .####.. .......",
)


def rbf_codes() -> np.ndarray:
    """The target of F6 for each digit, `[10, 84]` float32, +1 where the drawing has ink and -1 elsewhere."""
    rows = [[1.0 if pixel == "#" else -1.0 for pixel in code.replace(" ", "")] for code in DIGIT_CODES]
    return np.array(rows, np.float32)


def scaled_tanh(x):
    """1.7159 tanh(2x / 3): +1 at 1 and -1 at -1, appendix A of the paper."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


def sum_pool(x, window, strides):
    """Sum of each window; linen's `avg_pool` divides by a NumPy integer, which strict dtype promotion refuses."""
    return nn.pool(x, 0.0, jax.lax.add, window, strides, "VALID")


class LeNet5(nn.Module):
    """The dense LeNet-5 (61,706 parameters) for images `[batch, 32, 32, in_channels]`; logits `[batch, num_classes]` float32.

    C3 sees all maps, pools have no parameters and the output is linear. Taking ReLU and maxima for the paper's tanh and means
    is today's habit; `activation` and `pool` choose.
    """

    num_classes: int = 10
    in_channels: int = 1
    resolution: int = 32
    width: float = 1.0
    activation: str = "relu"
    pool: str = "max"  # or "average"
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        _check_size(images, self.in_channels, self.resolution)
        activation = choose("activation", self.activation, ACTIVATIONS)
        pools = {"max": lambda x: max_pool(x, 2, 2), "average": lambda x: sum_pool(x, (2, 2), (2, 2)) / 4}
        pool = choose("pool", self.pool, pools)

        def conv(filters, name):
            filters = round_filters(filters, self.width, divisor=1)
            return Conv(filters, 5, padding="valid", bias=True, dtype=self.dtype, name=name)

        x = pool(activation(conv(6, "c1")(images)))
        self.sow("intermediates", "s2_output", x)
        x = pool(activation(conv(16, "c3")(x)))
        self.sow("intermediates", "s4_output", x)
        x = activation(conv(120, "c5")(x)).reshape(x.shape[0], -1)
        x = activation(Linear(round_filters(84, self.width, divisor=1), dtype=self.dtype, name="f6")(x))
        self.sow("intermediates", "f6_output", x)
        return logits(Linear(self.num_classes, dtype=self.dtype, name="classifier")(x))


class Subsample(nn.Module):
    """Sum of each 2x2 square, times a trainable coefficient, plus a trainable bias, for each map (S2 and S4)."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        shape, parameter_dtype = (x.shape[-1],), parameter_dtype_of(self.dtype)
        scale = parameter(self, "scale", constant(0.25), shape, parameter_dtype)
        bias = parameter(self, "bias", zeros, shape, parameter_dtype)
        total = sum_pool(x, (2, 2), (2, 2))
        return total * scale.astype(self.dtype) + bias.astype(self.dtype)


class SparseConv(nn.Module):
    """A valid 5x5 convolution in which output map i sees the input maps `table[i]` only; `kernel` is `[5, 5, connections]`."""

    table: tuple
    dtype: str

    @nn.compact
    def __call__(self, x):
        maps = [(source, target) for target, sources in enumerate(self.table) for source in sources]
        parameter_dtype = parameter_dtype_of(self.dtype)
        bound = 2.4 / np.array([25 * len(self.table[target]) for _, target in maps])  # over each map's own fan-in
        init = functools.partial(symmetric_uniform, bound=bound)
        kernel = parameter(self, "kernel", init, (5, 5, len(maps)), parameter_dtype)
        bias = parameter(self, "bias", zeros, (len(self.table),), parameter_dtype)
        dense = jnp.zeros((5, 5, x.shape[-1], len(self.table)), parameter_dtype)
        dense = dense.at[:, :, [source for source, _ in maps], [target for _, target in maps]].set(kernel)
        dense = dense.astype(self.dtype)
        y = jax.lax.conv_general_dilated(x, dense, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias.astype(self.dtype)


class LeNet5Original(nn.Module):
    """LeNet-5 as published, for images `[batch, 32, 32, in_channels]`; logits `[batch, num_classes]` float32.

    Sparse C3, trainable sub-sampling, scaled tanh. With `output="rbf"` the logits are the negative squared distances of F6
    from the fixed codes of the ten digits (60,000 parameters; softmax cross-entropy is then the paper's equation 9 without
    its constant); with "linear" they are an affine map of it (60,850).
    """

    num_classes: int = 10
    in_channels: int = 1
    resolution: int = 32
    output: str = "rbf"
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, position: jax.Array | None = None) -> jax.Array:
        _check_size(images, self.in_channels, self.resolution)
        rbf = choose("output", self.output, ("rbf", "linear")) == "rbf"
        if rbf and self.num_classes != len(DIGIT_CODES):
            raise UsageError(
                f"num_classes={self.num_classes}: the codes of output='rbf' are the {len(DIGIT_CODES)} digits; "
                f"output='linear' takes any number of classes"
            )
        conv = {"padding": "valid", "bias": True, "kernel_init": uniform_fan_in, "dtype": self.dtype}
        x = scaled_tanh(Conv(6, 5, name="c1", **conv)(images))
        x = scaled_tanh(Subsample(self.dtype, name="s2")(x))
        self.sow("intermediates", "s2_output", x)
        x = scaled_tanh(SparseConv(C3_TABLE, self.dtype, name="c3")(x))
        x = scaled_tanh(Subsample(self.dtype, name="s4")(x))
        self.sow("intermediates", "s4_output", x)
        x = scaled_tanh(Conv(120, 5, name="c5", **conv)(x)).reshape(x.shape[0], -1)
        x = scaled_tanh(Linear(84, uniform_fan_in, dtype=self.dtype, name="f6")(x))
        self.sow("intermediates", "f6_output", x)
        if rbf:
            return -jnp.square(logits(x)[:, None] - rbf_codes().astype(parameter_dtype_of(self.dtype))).sum(axis=-1)
        return logits(Linear(self.num_classes, uniform_fan_in, dtype=self.dtype, name="classifier")(x))


def _check_size(images: jax.Array, in_channels: int, resolution: int) -> None:
    check_images(images, in_channels, smallest=32)
    if images.shape[1:3] != (resolution, resolution):
        raise UsageError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels: "
            f"LeNet-5 flattens its maps and takes {resolution} x {resolution} (model.resolution)"
        )


VARIANTS = {"lenet5": (LeNet5, {}), "lenet5_1998": (LeNet5Original, {})}
