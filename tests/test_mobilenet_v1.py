"""MobileNetV1's layer table, its two multipliers, and the networks that its paper compares it with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.models import create_model
from cnnfamily.summary import summarize

# Howard et al. 2017, Table 1: filters and side of the output, and the stride, of each depthwise separable block.
BLOCKS = [
    (64, 112, 1), (128, 56, 2), (128, 56, 1), (256, 28, 2), (256, 28, 1), (512, 14, 2), (512, 14, 1), (512, 14, 1),
    (512, 14, 1), (512, 14, 1), (512, 14, 1), (1024, 7, 2), (1024, 7, 1),
]  # fmt: skip

# (width, pixels) -> parameters, multiply-adds, from an analytic counter; Tables 6 and 7 print 569, 418, 290 and 186 million by
# resolution and 569, 325, 149 and 41 by width, with 4.2, 2.6, 1.3 and 0.5 million parameters.
COUNTS = {
    (1.0, 224): (4_231_976, 568_740_352),
    (1.0, 192): (4_231_976, 418_121_728),
    (1.0, 160): (4_231_976, 290_675_200),
    (1.0, 128): (4_231_976, 186_400_768),
    (0.75, 224): (2_585_560, 325_400_448),
    (0.75, 192): (2_585_560, 239_273_472),
    (0.75, 160): (2_585_560, 166_396_800),
    (0.75, 128): (2_585_560, 106_770_432),
    (0.5, 224): (1_331_592, 149_497_088),
    (0.5, 192): (1_331_592, 109_970_432),
    (0.5, 160): (1_331_592, 76_524_800),
    (0.5, 128): (1_331_592, 49_160_192),
    (0.25, 224): (470_072, 41_030_272),
    (0.25, 192): (470_072, 30_212_608),
    (0.25, 160): (470_072, 21_059_200),
    (0.25, 128): (470_072, 13_570_048),
}


def layers_of(**fields):
    return {layer.name: layer for layer in summarize(create_model("mobilenet_v1", **fields)).layers}


def test_layers():
    found = layers_of()
    assert (found["stem"].output, found["stem"].params) == ((112, 112, 32), 3 * 3 * 3 * 32)
    channels = 32
    for i, (filters, side, _) in enumerate(BLOCKS, start=1):
        assert found[f"block{i}/depthwise"].output == (side, side, channels)
        assert found[f"block{i}/depthwise"].params == 3 * 3 * channels
        assert found[f"block{i}/pointwise"].output == (side, side, filters)
        assert found[f"block{i}/pointwise"].params == channels * filters
        channels = filters
    assert len(found) == 2 + 4 * len(BLOCKS) + 1  # each convolution has its norm
    assert found["classifier"].output == (1000,)


IN_THE_SUITE = [row for row in COUNTS if row[0] == 1.0 or row[1] == 128]  # a resolution changes no width
OTHERS = [pytest.param(*row, marks=pytest.mark.full) for row in COUNTS if row not in IN_THE_SUITE]


@pytest.mark.parametrize(("width", "pixels"), [*IN_THE_SUITE, *OTHERS])
def test_counts(width, pixels):
    found = summarize(create_model("mobilenet_v1", width=width, resolution=pixels))
    assert (found.params, found.macs) == COUNTS[width, pixels]


def test_shares_of_the_layers():
    # Table 2 in percent. It prints 1.19 for the multiply-adds of the 3x3, with which the column does not add up to 100.
    weights = [layer for layer in summarize("mobilenet_v1").layers if layer.macs]
    kernels = {layer.name: layer.params - (layer.kind == "Linear") * 1000 for layer in weights}
    for kind, macs, params in [
        ("pointwise", 94.86, 74.59), ("depthwise", 3.06, 1.06), ("stem", 1.91, 0.02), ("classifier", 0.18, 24.33)
    ]:  # fmt: skip
        of_kind = [layer for layer in weights if layer.name.endswith(kind)]
        assert 100 * sum(layer.macs for layer in of_kind) / sum(layer.macs for layer in weights) == pytest.approx(
            macs, abs=0.005
        )
        found = 100 * sum(kernels[layer.name] for layer in of_kind) / sum(kernels.values())
        assert found == pytest.approx(params, abs=0.005)


def test_one_layer_of_table_3():
    # Side 14, 512 to 512 channels: 462 and 52.3 million multiply-adds, 2.36 and 0.27 million parameters.
    separable, full = layers_of(), layers_of(depthwise=False)
    pair = [separable["block8/depthwise"], separable["block8/pointwise"]]
    assert sum(layer.macs for layer in pair) == 14 * 14 * 512 * (9 + 512)
    assert sum(layer.params for layer in pair) == 512 * (9 + 512)
    assert full["block8/conv"].macs == 14 * 14 * 512 * 512 * 9
    assert full["block8/conv"].params == 512 * 512 * 9
    thin = layers_of(width=0.75)  # 29.6 million, 0.15 million
    assert thin["block8/depthwise"].macs + thin["block8/pointwise"].macs == 14 * 14 * 384 * (9 + 384)
    coarse = {layer.name: layer for layer in summarize(create_model("mobilenet_v1", width=0.75), resolution=160).layers}
    assert coarse["block8/depthwise"].macs + coarse["block8/pointwise"].macs == 10 * 10 * 384 * (9 + 384)  # 15.1 million


def test_conv_mobilenet():
    # Table 4: 4866 million multiply-adds, 29.3 million parameters. The former is of the convolutions alone.
    found = summarize(create_model("mobilenet_v1", depthwise=False))
    assert found.params == 29_294_088
    assert found.macs == 4_867_293_184
    assert round((found.macs - 1024 * 1000) / 1e6) == 4866
    assert [layer.output for layer in found.layers if layer.name.endswith("/conv")] == [
        (side, side, filters) for filters, side, _ in BLOCKS
    ]
    by_hand = sum(9 * a * b * side**2 for a, (b, side, _) in zip([32, *(row[0] for row in BLOCKS)], BLOCKS, strict=False))
    assert found.macs == by_hand + 27 * 32 * 112**2 + 1024 * 1000


def test_the_shallow_network():
    # Table 5: without the five layers of 14 x 14 x 512, 307 million multiply-adds and 2.9 million parameters.
    stages = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 1, 2), (1024, 2, 2))
    found, whole = (summarize(create_model("mobilenet_v1", **fields)) for fields in ({"stages": stages}, {}))
    assert (found.params, found.macs) == (2_887_976, 307_323_392)
    assert whole.macs - found.macs == 5 * 14 * 14 * 512 * (9 + 512)


def test_depth_scales_the_repeats():
    found = layers_of(depth=0.5)
    outputs = [layer.output for name, layer in found.items() if name.endswith("/pointwise")]
    assert outputs == [(112, 112, 64), (56, 56, 128), (28, 28, 256), *[(14, 14, 512)] * 3, (7, 7, 1024)]


# Values


def conv_same(x, kernel, stride, depthwise=False):
    """TensorFlow's "same" padding of an even map under a 3x3 kernel: (0, 1) with stride 2, (1, 1) with stride 1."""
    size = x.shape[1]
    x = np.pad(x, ((0, 0), (2 - stride, 1), (2 - stride, 1), (0, 0)))
    output = np.zeros((len(x), size // stride, size // stride, kernel.shape[-1]))
    for i in range(size // stride):
        for j in range(size // stride):
            patch = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            output[:, i, j] = np.einsum("bhwc,hwc->bc" if depthwise else "bhwc,hwcf->bf", patch, np.squeeze(kernel))
    return output


def test_values_by_hand():
    # Stem, a block with stride 2 and the classifier; batch statistics at their start, 0 and 1.
    network = create_model("mobilenet_v1", stages=((16, 1, 2),), stem_filters=8, num_classes=3)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    assert abs(params["block1"]["depthwise"]["kernel"]).max() > 0.5

    def norm_relu(x):
        return np.maximum(x / np.sqrt(1 + 1e-3), 0)

    x = norm_relu(conv_same(images, params["stem"]["kernel"], 2))
    x = norm_relu(conv_same(x, params["block1"]["depthwise"]["kernel"], 2, depthwise=True))
    x = norm_relu(x @ params["block1"]["pointwise"]["kernel"][0, 0])
    expected = x.mean((1, 2)) @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(network.apply(variables, images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"padding": "symmetric"}, {"activation": "relu6"}, {"norm_epsilon": 1e-1}, {"resolution": 32}], ids=str
)
def test_what_changes_the_function(fields):
    # Without any parameter of its own; the resolution is that of the images.
    network = create_model("mobilenet_v1", stages=((16, 1, 2),), num_classes=3)
    images = 20 * np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    outputs = [each.apply(variables, images) for each in (network, network.clone(**fields))]
    assert np.array_equal(*outputs) == ("resolution" in fields)


def test_dropout_only_in_training_and_by_its_rate():
    network = create_model("mobilenet_v1", stages=((16, 1, 2),), num_classes=3, dropout=0.999999)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    rngs = {"dropout": jax.random.key(0)}
    logits, _ = network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
    np.testing.assert_array_equal(logits, np.zeros((2, 3)))  # all dropped: the biases remain
    assert (network.apply(variables, images) != 0).all()
    kept, _ = network.clone(dropout=0.0).apply(variables, images, train=True, mutable=["batch_stats"])  # needs no stream
    assert (kept != 0).all()


def test_the_classifier_starts_small():
    # torchvision's MobileNets: deviation 0.01, biases 0. Of n normal numbers the deviation has one of 0.01 / sqrt(2 n).
    variables = create_model("mobilenet_v1", stages=((128, 1, 2),)).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    classifier = variables["params"]["classifier"]
    assert abs(classifier["kernel"].std() - 0.01) < 5 * 0.01 / np.sqrt(2 * classifier["kernel"].size)
    np.testing.assert_array_equal(classifier["bias"], 0)


@pytest.mark.parametrize("pixels", [32, 33, 61])
def test_any_size_from_32_up(pixels):
    network = create_model("mobilenet_v1")
    logits, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))
    assert logits.shape == (1, 1000)
