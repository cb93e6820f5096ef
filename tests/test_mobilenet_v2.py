"""MobileNetV2's layer table, its counts at every published width and resolution, and its blocks by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.models import create_model, mobilenet_v2, variable_shapes
from cnnfamily.models.stochastic_depth import Drop
from cnnfamily.summary import summarize

# Sandler et al. 2018, Table 2: expansion, filters and blocks of each row, and the side of its output.
ROWS = [(1, 16, 1, 112), (6, 24, 2, 56), (6, 32, 3, 28), (6, 64, 4, 14), (6, 96, 3, 14), (6, 160, 3, 7), (6, 320, 1, 7)]

# (width, pixels) -> parameters, multiply-adds, from an analytic counter. The multiply-adds are those in millions of the
# authors' 22 checkpoints (slim/nets/mobilenet/README.md), which count parameters without batch norm and with 1001 classes.
COUNTS = {
    (1.4, 224): (6_108_776, 582_195_824),
    (1.3, 224): (5_386_792, 509_374_560),
    (1.0, 224): (3_504_872, 300_774_272),
    (1.0, 192): (3_504_872, 221_316_608),
    (1.0, 160): (3_504_872, 154_083_200),
    (1.0, 128): (3_504_872, 99_074_048),
    (1.0, 96): (3_504_872, 56_289_152),
    (0.75, 224): (2_636_424, 209_069_792),
    (0.75, 192): (2_636_424, 153_941_888),
    (0.75, 160): (2_636_424, 107_295_200),
    (0.75, 128): (2_636_424, 69_129_728),
    (0.75, 96): (2_636_424, 39_445_472),
    (0.5, 224): (1_968_680, 97_131_840),
    (0.5, 192): (1_968_680, 71_701_760),
    (0.5, 160): (1_968_680, 50_184_000),
    (0.5, 128): (1_968_680, 32_578_560),
    (0.5, 96): (1_968_680, 18_885_440),
    (0.35, 224): (1_677_128, 59_285_808),
    (0.35, 192): (1_677_128, 43_896_512),
    (0.35, 160): (1_677_128, 30_874_800),
    (0.35, 128): (1_677_128, 20_220_672),
    (0.35, 96): (1_677_128, 11_934_128),
}


def layers_of(**fields):
    return {layer.name: layer for layer in summarize(create_model("mobilenet_v2", **fields)).layers}


def blocks_of(found):
    return list(dict.fromkeys(name.split("/")[0] for name in found if "_block" in name))


def test_layers():
    found = layers_of()
    assert found["stem"].output == (112, 112, 32)
    previous, side = 32, 112
    for i, (expansion, filters, repeats, side_out) in enumerate(ROWS, start=1):
        for j in range(1, repeats + 1):
            block, expanded = f"stage{i}_block{j}", expansion * previous
            assert (f"{block}/expand" in found) == (expansion > 1)
            if expansion > 1:
                assert found[f"{block}/expand"].output == (side, side, expanded)
            assert found[f"{block}/depthwise"].output == (side_out, side_out, expanded)
            assert found[f"{block}/depthwise"].params == 9 * expanded
            assert found[f"{block}/project"].output == (side_out, side_out, filters)
            previous, side = filters, side_out
    assert blocks_of(found) == [f"stage{i}_block{j}" for i, row in enumerate(ROWS, 1) for j in range(1, row[2] + 1)]
    assert found["head"].output == (7, 7, 1280)
    assert (found["classifier"].output, found["classifier"].params) == ((1000,), 1280 * 1000 + 1000)


OTHER_SIZES = [pytest.param(*row, marks=pytest.mark.full) for row in COUNTS if row[1] != 224]


@pytest.mark.parametrize(("width", "pixels"), [*(row for row in COUNTS if row[1] == 224), *OTHER_SIZES])
def test_counts(width, pixels):
    found = summarize(create_model("mobilenet_v2", width=width, resolution=pixels))
    assert (found.params, found.macs) == COUNTS[width, pixels]


def test_parameters_as_the_authors_count_them():
    # slim prints 3.47 million: no scales and biases of norms, 1001 classes.
    found = summarize(create_model("mobilenet_v2", num_classes=1001))
    assert sum(layer.params for layer in found.layers if layer.kind != "BatchNorm") == 3_472_041


def test_widths_do_not_thin_the_head():
    assert [layers_of(width=width)["head"].output[2] for width in (0.35, 0.75, 1.0, 1.4)] == [1280, 1280, 1280, 1792]


def test_depth_scales_the_repeats():
    blocks = blocks_of(layers_of(depth=0.5))
    repeats = [1, 1, 2, 2, 2, 2, 1]
    assert blocks == [f"stage{i}_block{j}" for i, count in enumerate(repeats, 1) for j in range(1, count + 1)]


# Values


def depthwise_by_hand(x, kernel, stride):
    """Torch's symmetric padding under a 3x3 kernel."""
    size = -(-x.shape[1] // stride)
    x, output = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((len(x), size, size, x.shape[3]))
    for i in range(size):
        for j in range(size):
            patch = x[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            output[:, i, j] = np.einsum("bhwc,hwc->bc", patch, kernel[:, :, 0])
    return output


def block_by_hand(x, variables, stride, *, linear=True, shortcut=True):
    params, stats = variables

    def norm(x, name):
        mean, var = stats[name]["mean"], stats[name]["var"]
        return (x - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]

    def relu6(x):
        return np.clip(x, 0, 6)

    y = relu6(norm(x @ params["expand"]["kernel"][0, 0], "expand_norm")) if "expand" in params else x
    y = relu6(norm(depthwise_by_hand(y, params["depthwise"]["kernel"], stride), "depthwise_norm"))
    y = norm(y @ params["project"]["kernel"][0, 0], "project_norm")
    y = y if linear else relu6(y)
    return x + y if shortcut and stride == 1 and x.shape == y.shape else y


def drawn(tree, seed=0):
    """Every number anew, the variances above 0."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    draw = np.random.default_rng(seed)
    values = [
        abs(x) + 0.1 if path[-1].key == "var" else x for path, x in ((path, draw.normal(size=x.shape)) for path, x in leaves)
    ]
    return jax.tree.unflatten(structure, [value.astype(np.float32) for value in values])


@pytest.fixture(scope="module")
def small():
    """Two rows, with and without expansion, stride 2 and 1, drawn at random; a map of 18x18 enters the second."""
    network = create_model("mobilenet_v2", stages=((1, 8, 1, 1), (3, 8, 2, 2)), stem_filters=8, num_classes=4)
    images = np.random.default_rng(1).normal(size=(2, 36, 36, 3)).astype(np.float32)
    return network, drawn(variable_shapes(network)), images


@pytest.mark.parametrize(
    "fields", [{}, {"linear_bottleneck": False}, {"shortcut": False}, {"linear_bottleneck": False, "shortcut": False}], ids=str
)
def test_blocks_by_hand(small, fields):
    network, variables, images = small
    network = network.clone(**fields)
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0], np.float64) for name, values in updates["intermediates"].items()}
    switches = {"linear": fields.get("linear_bottleneck", True), "shortcut": fields.get("shortcut", True)}

    def block(x, name, stride):
        return block_by_hand(x, (variables["params"][name], variables["batch_stats"][name]), stride, **switches)

    assert (variables["params"]["stage1_block1"].keys() | {"expand", "expand_norm"}) == variables["params"][
        "stage2_block1"
    ].keys()
    expected = block(block(maps["stage1"], "stage2_block1", 2), "stage2_block2", 1)
    assert maps["stage1"].shape[1] == 18
    assert expected.shape == (2, 9, 9, 8)
    np.testing.assert_allclose(maps["stage2"], expected, rtol=1e-4, atol=1e-3)
    assert (maps["stage1"].min() < 0) == network.linear_bottleneck


def test_values_by_hand_to_the_logits(small):
    network, variables, images = small
    logits, updates = network.apply(variables, images, mutable=["intermediates"])
    params, stats = variables["params"], variables["batch_stats"]["head_norm"]
    x = np.asarray(updates["intermediates"]["stage2"][0], np.float64) @ params["head"]["kernel"][0, 0]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["head_norm"]["scale"] + params["head_norm"]["bias"]
    x = np.clip(x, 0, 6).mean((1, 2))
    expected = x @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fields", [{"padding": "same"}, {"activation": "relu"}, {"norm_epsilon": 1e-1}], ids=str)
def test_what_changes_the_function_without_a_parameter(small, fields):
    network, variables, images = small
    assert abs(network.apply(variables, images) - network.clone(**fields).apply(variables, images)).max() > 1e-2


def test_shortcuts_only_at_stride_1_and_between_equal_channels():
    # With its last scale at 0 a block is its shortcut, or nothing. On a map of one pixel stride 2 does not change the shape.
    stages = ((1, 32, 1, 16), (1, 32, 1, 1), (1, 32, 1, 2), (6, 24, 1, 1))
    network = create_model("mobilenet_v2", stages=stages, num_classes=3)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    for block in ("stage2_block1", "stage3_block1", "stage4_block1"):
        variables["params"][block]["project_norm"]["scale"] = np.zeros_like(variables["params"][block]["project_norm"]["scale"])
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0]) for name, values in updates["intermediates"].items()}
    assert maps["stage1"].shape == (1, 1, 1, 32)
    assert (maps["stage1"] != 0).all()
    np.testing.assert_array_equal(maps["stage2"], maps["stage1"])
    np.testing.assert_array_equal(maps["stage3"], np.zeros((1, 1, 1, 32)))
    np.testing.assert_array_equal(maps["stage4"], np.zeros((1, 1, 1, 24)))


def test_zero_init_last_starts_a_block_as_the_identity():
    stages = ((1, 16, 1, 1), (6, 16, 1, 1))
    network = create_model("mobilenet_v2", stages=stages, num_classes=3, zero_init_last=True)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    scales = {name: block["project_norm"]["scale"].max() for name, block in variables["params"].items() if "_block" in name}
    assert scales == {"stage1_block1": 0, "stage2_block1": 0}


def test_every_block_counts_for_stochastic_depth(monkeypatch):
    asked = []

    def record(network, blocks, train, position):
        asked.append(blocks)
        return [Drop()] * blocks

    monkeypatch.setattr(mobilenet_v2, "drops", record)
    for depth in (1.0, 2.0):
        summarize(create_model("mobilenet_v2", depth=depth))
    assert asked == [17, 34]  # blocks without a shortcut too, and depth scales them


def test_training_needs_no_stream_that_it_does_not_use(small):
    network, variables, images = small
    train = network.clone(dropout=0.0)
    logits, _ = train.apply(variables, images, train=True, mutable=["batch_stats"])
    rngs = dict.fromkeys(("stochastic_depth", "dropout"), jax.random.key(0))
    dropped, _ = network.clone(dropout=0.999999).apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
    bias = variables["params"]["classifier"]["bias"]
    np.testing.assert_array_equal(dropped, np.broadcast_to(bias, (2, 4)))
    assert abs(logits - dropped).max() > 1e-2
    deep = network.clone(dropout=0.0, stochastic_depth=0.999, stochastic_depth_schedule="l/L")
    assert abs(deep.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])[0] - logits).max() > 1e-2


@pytest.mark.parametrize("pixels", [32, 33, 61])
def test_any_size_from_32_up(pixels):
    network = create_model("mobilenet_v2")
    logits, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))
    assert logits.shape == (1, 1000)
