"""MobileNetV3's two layer tables, its counts under every rule for the width, and its blocks and classifier by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, mobilenet_v3, variable_shapes
from cnnfamily.models.stochastic_depth import Drop
from cnnfamily.summary import summarize

# Howard et al. 2019, Tables 1 and 2 (version 5): side of the input, kernel, expanded filters, filters, SE, side of the output.
LARGE = [
    (112, 3, 16, 16, 0, 112), (112, 3, 64, 24, 0, 56), (56, 3, 72, 24, 0, 56), (56, 5, 72, 40, 1, 28), (28, 5, 120, 40, 1, 28),
    (28, 5, 120, 40, 1, 28), (28, 3, 240, 80, 0, 14), (14, 3, 200, 80, 0, 14), (14, 3, 184, 80, 0, 14), (14, 3, 184, 80, 0, 14),
    (14, 3, 480, 112, 1, 14), (14, 3, 672, 112, 1, 14), (14, 5, 672, 160, 1, 7), (7, 5, 960, 160, 1, 7), (7, 5, 960, 160, 1, 7),
]  # fmt: skip
SMALL = [
    (112, 3, 16, 16, 1, 56), (56, 3, 72, 24, 0, 28), (28, 3, 88, 24, 0, 28), (28, 5, 96, 40, 1, 14), (14, 5, 240, 40, 1, 14),
    (14, 5, 240, 40, 1, 14), (14, 5, 120, 48, 1, 14), (14, 5, 144, 48, 1, 14), (14, 5, 288, 96, 1, 7), (7, 5, 576, 96, 1, 7),
    (7, 5, 576, 96, 1, 7),
]  # fmt: skip

# (size, width, pixels, width rule) -> parameters, multiply-adds, from an analytic counter.
COUNTS = {
    ("large", 1.25, 224, "torchvision"): (8_164_744, 343_461_000),
    ("large", 1.0, 224, "torchvision"): (5_483_032, 216_589_760),
    ("large", 0.75, 224, "torchvision"): (3_377_576, 140_033_816),
    ("large", 0.5, 224, "torchvision"): (1_734_576, 64_962_192),
    ("large", 0.35, 224, "torchvision"): (997_064, 35_278_408),
    ("large", 0.75, 224, "hybrid"): (3_928_296, 140_584_216),
    ("large", 0.5, 224, "hybrid"): (2_682_416, 65_909_392),
    ("large", 0.35, 224, "hybrid"): (2_109_448, 36_389_960),
    ("large", 1.25, 224, "keras"): (8_255_784, 349_904_800),
    ("large", 1.0, 224, "keras"): (5_483_032, 216_589_760),
    ("large", 0.75, 224, "keras"): (3_993_528, 154_560_624),
    ("large", 0.5, 224, "keras"): (2_689_904, 73_663_088),
    ("large", 0.35, 224, "keras"): (2_132_216, 43_887_824),
    ("large", 1.0, 256, "torchvision"): (5_483_032, 281_663_360),
    ("large", 1.0, 192, "torchvision"): (5_483_032, 160_192_640),
    ("large", 1.0, 160, "torchvision"): (5_483_032, 112_472_000),
    ("large", 1.0, 128, "torchvision"): (5_483_032, 73_427_840),
    ("large", 1.0, 96, "torchvision"): (5_483_032, 43_060_160),
    ("small", 1.25, 224, "torchvision"): (3_644_912, 88_155_944),
    ("small", 1.0, 224, "torchvision"): (2_542_856, 56_510_400),
    ("small", 0.75, 224, "torchvision"): (1_653_920, 39_115_576),
    ("small", 0.5, 224, "torchvision"): (917_264, 18_970_736),
    ("small", 0.35, 224, "torchvision"): (558_744, 11_238_936),
    ("small", 0.75, 224, "hybrid"): (2_020_768, 39_482_168),
    ("small", 0.5, 224, "hybrid"): (1_577_232, 19_630_192),
    ("small", 0.35, 224, "hybrid"): (1_350_896, 12_030_424),
    ("small", 1.25, 224, "keras"): (3_645_312, 87_703_648),
    ("small", 1.0, 224, "keras"): (2_542_856, 56_510_400),
    ("small", 0.75, 224, "keras"): (2_041_872, 43_399_344),
    ("small", 0.5, 224, "keras"): (1_593_224, 24_188_688),
    ("small", 0.35, 224, "keras"): (1_350_344, 15_931_232),
    ("small", 1.0, 256, "torchvision"): (2_542_856, 73_175_040),
    ("small", 1.0, 192, "torchvision"): (2_542_856, 42_067_712),
    ("small", 1.0, 160, "torchvision"): (2_542_856, 29_846_976),
    ("small", 1.0, 128, "torchvision"): (2_542_856, 19_848_192),
    ("small", 1.0, 96, "torchvision"): (2_542_856, 12_071_360),
}


def layers_of(name, **fields):
    return {layer.name: layer for layer in summarize(create_model(f"mobilenet_v3_{name}", **fields)).layers}


def blocks_of(found):
    return list(dict.fromkeys(name.split("/")[0] for name in found if "_block" in name))


@pytest.mark.parametrize(("name", "rows", "hidden"), [("large", LARGE, 1280), ("small", SMALL, 1024)])
def test_layers(name, rows, hidden):
    found, previous = layers_of(name), 16
    assert found["stem"].output == (112, 112, 16)
    assert blocks_of(found) == [f"stage{i}_block1" for i in range(1, len(rows) + 1)]
    for i, (side, kernel, expanded, filters, has_se, side_out) in enumerate(rows, start=1):
        block = f"stage{i}_block1"
        assert (f"{block}/expand" in found) == (expanded != previous)
        if expanded != previous:
            assert found[f"{block}/expand"].output == (side, side, expanded)
        assert found[f"{block}/depthwise"].output == (side_out, side_out, expanded)
        assert found[f"{block}/depthwise"].params == kernel**2 * expanded
        assert (f"{block}/se/reduce" in found) == bool(has_se)
        if has_se:  # a quarter of the expanded filters in eights (18 are 24, 30 are 32); the convolutions have biases
            squeezed = {16: 8, 72: 24, 96: 24, 120: 32, 144: 40, 240: 64, 288: 72, 480: 120, 576: 144, 672: 168, 960: 240}[
                expanded
            ]
            assert found[f"{block}/se/reduce"].output == (1, 1, squeezed)
            assert found[f"{block}/se/expand"].params == squeezed * expanded + expanded
        assert found[f"{block}/project"].output == (side_out, side_out, filters)
        previous = filters
    assert found["head"].output == (7, 7, 6 * previous)  # 960 and 576
    assert (found["hidden"].output, found["hidden"].params) == ((hidden,), 6 * previous * hidden + hidden)
    assert found["classifier"].output == (1000,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("large", "RE RE RE RE RE RE HS HS HS HS HS HS HS HS HS"),
        ("small", "RE RE RE HS HS HS HS HS HS HS HS"),
    ],
)
def test_nonlinearities(name, expected):
    assert " ".join(row[4] for row in create_model(f"mobilenet_v3_{name}").stages) == expected


IN_THE_SUITE = [row for row in COUNTS if row[1] in (0.5, 1.0) and row[2:] == (224, "torchvision")]
OTHERS = [pytest.param(*row, marks=pytest.mark.full) for row in COUNTS if row not in IN_THE_SUITE]


@pytest.mark.parametrize(("name", "width", "pixels", "rule"), [*IN_THE_SUITE, *OTHERS])
def test_counts(name, width, pixels, rule):
    found = summarize(create_model(f"mobilenet_v3_{name}", width=width, resolution=pixels, width_rule=rule))
    assert (found.params, found.macs) == COUNTS[name, width, pixels, rule]


def test_the_papers_rule():
    # Table 9 in millions: 356, 217, 155, 69 and 40 (the last is 39.5 here). The small network's, 66 at width 1.0, follow from
    # no implementation (56.5).
    macs = [
        summarize(create_model("mobilenet_v3_large", width=width, width_rule="paper")).macs
        for width in (1.25, 1.0, 0.75, 0.5, 0.35)
    ]
    assert macs == [355_925_920, 216_589_760, 154_560_624, 69_247_600, 39_472_336]


@pytest.mark.parametrize(
    ("rule", "stem", "expanded", "hidden"),
    [("torchvision", 8, 40, 640), ("hybrid", 8, 40, 1280), ("paper", 8, 48, 1280), ("keras", 16, 48, 1280)],
)
def test_width_rules_by_hand(rule, stem, expanded, hidden):
    # Row 3 expands 24 to 72: half of 24 is rounded to 16, three times that is 48, but half of 72 is rounded to 40.
    found = layers_of("large", width=0.5, width_rule=rule)
    assert found["stem"].output[2] == stem
    assert found["stage3_block1/expand"].output[2] == expanded
    assert found["hidden"].output == (hidden,)
    assert layers_of("large", width=1.25, width_rule=rule)["hidden"].output == (1600,)


def test_depth_repeats_rows_without_their_stride():
    found = layers_of("small", depth=2.0)
    assert blocks_of(found) == [f"stage{i}_block{j}" for i in range(1, 12) for j in (1, 2)]
    assert [found[f"stage2_block{j}/project"].output for j in (1, 2)] == [(28, 28, 24)] * 2
    # The table's ratio of row 2 is 72 / 16 for its first block, 72 / 24 for the next.
    found = layers_of("small", depth=2.0, width_rule="paper")
    assert [found[f"stage2_block{j}/depthwise"].output[2] for j in (1, 2)] == [72, 72]


def test_squeeze_ratio():
    assert not any("/se/" in name for name in layers_of("large", se_ratio=0.0))
    assert layers_of("large", se_ratio=0.5)["stage4_block1/se/reduce"].output == (1, 1, 40)  # 36 in eights
    assert layers_of("large", se_ratio=0.001)["stage4_block1/se/reduce"].output == (1, 1, 8)


# Values


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


NONLINEARITIES = {"RE": lambda x: np.maximum(x, 0), "HS": lambda x: x * hard_sigmoid(x)}


def depthwise_by_hand(x, kernel, stride):
    """Torch's symmetric padding."""
    size, edge = -(-x.shape[1] // stride), (len(kernel) - 1) // 2
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    output = np.zeros((len(x), size, size, x.shape[3]))
    for i in range(size):
        for j in range(size):
            patch = x[:, i * stride : i * stride + len(kernel), j * stride : j * stride + len(kernel)]
            output[:, i, j] = np.einsum("bhwc,hwc->bc", patch, kernel[:, :, 0])
    return output


def norm_by_hand(x, variables, name):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * params["scale"] + params["bias"]


def block_by_hand(x, variables, nonlinearity, stride, *, shortcut=True):
    params = variables["params"]
    y = nonlinearity(norm_by_hand(x @ params["expand"]["kernel"][0, 0], variables, "expand_norm")) if "expand" in params else x
    y = nonlinearity(norm_by_hand(depthwise_by_hand(y, params["depthwise"]["kernel"], stride), variables, "depthwise_norm"))
    if "se" in params:
        reduce, expand = params["se"]["reduce"], params["se"]["expand"]
        hidden = np.maximum(y.mean((1, 2), keepdims=True) @ reduce["kernel"][0, 0] + reduce["bias"], 0)
        y = y * hard_sigmoid(hidden @ expand["kernel"][0, 0] + expand["bias"])
    y = norm_by_hand(y @ params["project"]["kernel"][0, 0], variables, "project_norm")
    return x + y if shortcut and stride == 1 and x.shape == y.shape else y


def drawn(tree):
    """Every number anew, the variances above 0."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    draw = np.random.default_rng(0)
    values = [draw.normal(size=leaf.shape) / 2 for _, leaf in leaves]
    values = [abs(x) + 0.1 if path[-1].key == "var" else x for (path, _), x in zip(leaves, values, strict=True)]
    return jax.tree.unflatten(structure, [value.astype(np.float32) for value in values])


STAGES = ((3, 8, 8, False, "RE", 2), (5, 24, 8, True, "HS", 2), (3, 16, 8, True, "RE", 1), (3, 16, 8, False, "HS", 1))


@pytest.fixture(scope="module")
def small():
    """A row of each kind, drawn at random; a map of 10x10 enters the second."""
    network = create_model("mobilenet_v3_small", stages=STAGES, stem_filters=8, hidden_units=16, num_classes=4)
    images = np.random.default_rng(1).normal(size=(2, 40, 40, 3)).astype(np.float32)
    return network, drawn(variable_shapes(network)), images


@pytest.mark.parametrize("fields", [{}, {"activation": "relu"}, {"shortcut": False}], ids=str)
def test_by_hand(small, fields):
    network, variables, images = small
    network = network.clone(**fields)
    nonlinearities = NONLINEARITIES | ({"HS": NONLINEARITIES["RE"]} if fields.get("activation") else {})
    logits, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0], np.float64) for name, values in updates["intermediates"].items()}
    assert maps["stage1"].shape == (2, 10, 10, 8)
    for i, (*_, nonlinearity, stride) in enumerate(STAGES[1:], start=2):
        block = {kind: variables[kind][f"stage{i}_block1"] for kind in ("params", "batch_stats")}
        assert ("se" in block["params"]) == STAGES[i - 1][3]
        expected = block_by_hand(
            maps[f"stage{i - 1}"], block, nonlinearities[nonlinearity], stride, shortcut=fields.get("shortcut", True)
        )
        np.testing.assert_allclose(maps[f"stage{i}"], expected, rtol=1e-4, atol=1e-4)
    params = variables["params"]
    head = nonlinearities["HS"](norm_by_hand(maps["stage4"] @ params["head"]["kernel"][0, 0], variables, "head_norm"))
    np.testing.assert_allclose(maps["head_output"], head, rtol=1e-4, atol=1e-4)
    hidden = nonlinearities["HS"](head.mean((1, 2)) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    expected = hidden @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fields", [{"padding": "same"}, {"norm_epsilon": 1e-1}], ids=str)
def test_what_changes_the_function_without_a_parameter(small, fields):
    network, variables, images = small
    assert abs(network.apply(variables, images) - network.clone(**fields).apply(variables, images)).max() > 1e-2


def test_batch_norm_as_in_torchvision():
    for name in ("mobilenet_v3_large", "mobilenet_v3_small"):  # epsilon 1e-3, momentum 0.01, that is 0.99 kept
        network = create_model(name)
        assert (network.norm_epsilon, network.norm_momentum, network.dropout) == (1e-3, 0.99, 0.2)


def test_shortcuts_only_at_stride_1():
    # With its last scale at 0 a block is its shortcut, or nothing. On a map of one pixel stride 2 does not change the shape.
    stages = ((3, 16, 16, False, "RE", 16), (3, 16, 16, False, "RE", 1), (3, 16, 16, False, "RE", 2))
    network = create_model("mobilenet_v3_small", stages=stages, num_classes=3, zero_init_last=True)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), images)
    variables["params"]["stage1_block1"]["project_norm"]["scale"] = np.ones(16, np.float32)
    _, updates = network.apply(variables, images, mutable=["intermediates"])
    maps = {name: np.asarray(values[0]) for name, values in updates["intermediates"].items()}
    assert maps["stage1"].shape == (1, 1, 1, 16)
    assert (maps["stage1"] != 0).all()
    np.testing.assert_array_equal(maps["stage2"], maps["stage1"])
    np.testing.assert_array_equal(maps["stage3"], np.zeros((1, 1, 1, 16)))


def test_every_row_counts_for_stochastic_depth(monkeypatch):
    asked = []

    def record(network, blocks, train, position):
        asked.append(blocks)
        return [Drop()] * blocks

    monkeypatch.setattr(mobilenet_v3, "drops", record)
    for name, depth in (("large", 1.0), ("small", 1.0), ("small", 2.0)):
        summarize(create_model(f"mobilenet_v3_{name}", depth=depth))
    assert asked == [15, 11, 22]


def test_dropout_stands_before_the_last_layer(small):
    network, variables, images = small
    rngs = {"dropout": jax.random.key(0)}
    dropped, _ = network.clone(dropout=0.999999).apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
    np.testing.assert_array_equal(dropped, np.broadcast_to(variables["params"]["classifier"]["bias"], (2, 4)))
    kept, _ = network.clone(dropout=0.0).apply(variables, images, train=True, mutable=["batch_stats"])  # needs no stream
    assert abs(kept - dropped).max() > 1e-2


def test_linear_layers_start_small():
    # torchvision: deviation 0.01, biases 0. Of n normal numbers the deviation has one of 0.01 / sqrt(2 n).
    network = create_model("mobilenet_v3_small", stages=STAGES[:1])
    params = network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for layer in (params["hidden"], params["classifier"]):
        assert abs(layer["kernel"].std() - 0.01) < 5 * 0.01 / np.sqrt(2 * layer["kernel"].size)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_a_row_is_read_as_it_is_written():
    rows = [list(row) for row in STAGES]  # what a config.json gives back
    assert create_model("mobilenet_v3_small", stages=rows).stages == STAGES
    with pytest.raises(UsageError, match="expected tuple"):
        create_model("mobilenet_v3_small", stages=((3, 8, 8, 1, "RE", 2),))
    with pytest.raises(UsageError, match="unknown nonlinearity 'HW'"):
        summarize(create_model("mobilenet_v3_small", stages=((3, 8, 8, True, "HW", 2),)))


@pytest.mark.parametrize("pixels", [32, 33, 61])
def test_any_size_from_32_up(pixels):
    network = create_model("mobilenet_v3_large")
    logits, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))
    assert logits.shape == (1, 1000)
