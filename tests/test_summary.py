"""Parameters and multiply-adds, exact to the last one, and the command that prints them."""

import ast
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from cnnfamily import summary
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initializers, list_models
from cnnfamily.published import PUBLISHED
from cnnfamily.summary import summarize

# name -> parameters, multiply-adds at the network's own resolution. Where torchvision 0.29.1 has the network, parameters are
# its `num_params` and the multiply-adds round to its `_ops`. The others were computed by an analytic counter that reproduces
# both for every torchvision network.
NETWORKS = {
    "lenet5": (61_706, 416_520),
    "lenet5_1998": (60_000, 325_680),  # LeCun et al. 1998, section II-B; multiply-adds by hand in test_lenet.py
    "alexnet": (61_100_840, 714_188_480),
    "alexnet_2012": (60_965_224, 724_406_816),
    "vgg11": (132_863_336, 7_609_090_048),
    "vgg11_bn": (132_868_840, 7_609_090_048),
    "vgg13": (133_047_848, 11_308_466_176),
    "vgg13_bn": (133_053_736, 11_308_466_176),
    "vgg16": (138_357_544, 15_470_264_320),
    "vgg16_bn": (138_365_992, 15_470_264_320),
    "vgg19": (143_667_240, 19_632_062_464),
    "vgg19_bn": (143_678_248, 19_632_062_464),
    "googlenet": (6_624_904, 1_498_376_192),
    "googlenet_paper": (6_998_552, 1_582_671_872),
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "resnet50_v1": (25_557_032, 3_857_973_248),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "resnext101_32x8d": (88_791_336, 16_414_015_488),
    "resnext101_64x4d": (83_455_272, 15_460_270_080),
    "wide_resnet50_2": (68_883_240, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 22_753_050_624),
    "se_resnet18": (11_778_592, 1_814_160_384),
    "se_resnet34": (21_958_868, 3_663_918_592),
    "se_resnet50": (28_088_024, 4_091_699_200),
    "se_resnet101": (49_326_872, 7_806_148_608),
    "se_resnet152": (66_821_848, 11_520_204_800),
    # He et al. 2015, Table 6: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million.
    "resnet20_cifar": (269_722, 40_551_040),
    "resnet32_cifar": (464_154, 68_862_592),
    "resnet44_cifar": (658_586, 97_174_144),
    "resnet56_cifar": (853_018, 125_485_696),
    "resnet110_cifar": (1_727_962, 252_887_680),
    "resnet1202_cifar": (19_421_274, 2_829_238_912),
    "mobilenet_v1": (4_231_976, 568_740_352),
    "mobilenet_v2": (3_504_872, 300_774_272),
    "mobilenet_v3_large": (5_483_032, 216_589_760),
    "mobilenet_v3_small": (2_542_856, 56_510_400),
    # Tan and Le 2019, Table 2: 5.3M 0.39B, 7.8M 0.70B, 9.2M 1.0B, 12M 1.8B, 19M 4.2B, 30M 9.9B, 43M 19B, 66M 37B.
    "efficientnet_b0": (5_288_548, 385_814_752),
    "efficientnet_b1": (7_794_184, 686_802_832),
    "efficientnet_b2": (9_109_994, 993_561_872),
    "efficientnet_b3": (12_233_232, 1_827_141_392),
    "efficientnet_b4": (19_341_616, 4_393_771_024),
    "efficientnet_b5": (30_389_784, 10_266_384_752),
    "efficientnet_b6": (43_040_704, 19_067_593_536),
    "efficientnet_b7": (66_347_960, 37_745_884_192),
    # By hand. Kernels of 3x3: 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) = 1,967,616; the classifier's 2,560; biases of
    # the stem 24, of the norms 2 * (64 + 256 + 256). Multiply-adds: 31^2 * (2 * 2 * 3 * 24 + 13,824), 15^2 times
    # 36,864 + 147,456, 7^2 * 2 * 589,824, 3^2 * 589,824, and 2,560.
    "airbench94": (1_971_352, 118_147_360),
}

# (name, fields, pixels) -> the same, from the same counter.
CHANGED = {
    ("lenet5_1998", "output=linear", 32): (60_850, 326_520),
    ("alexnet_2012", "groups=1", 227): (62_378_344, 1_135_256_096),
    ("googlenet", "aux=True", 224): (13_004_888, 1_506_748_416),
    ("googlenet", "kernel=5", 224): (7_005_832, 1_582_671_872),
    ("googlenet_paper", "aux=True", 224): (13_378_280, 1_591_044_096),
    ("resnet20_cifar", "shortcut=B", 32): (272_474, 40_813_184),
    ("resnet32_cifar", "shortcut=B", 32): (466_906, 69_124_736),
    ("resnet44_cifar", "shortcut=B", 32): (661_338, 97_436_288),
    ("resnet56_cifar", "shortcut=B", 32): (855_770, 125_747_840),
    ("resnet110_cifar", "shortcut=B", 32): (1_730_714, 253_149_824),
    ("resnet1202_cifar", "shortcut=B", 32): (19_424_026, 2_829_501_056),
    ("airbench94", "whitening=False", 32): (1_971_352 + 288, 118_147_360),
    ("efficientnet_b2", "", 288): (9_109_994, 1_087_529_456),  # at which torchvision gives its `_ops`
    # Tan and Le 2019, Table 7: one dimension at a time, and all three (1.3 * 224 = 291.2 pixels).
    ("efficientnet_b0", "depth=4", 224): (20_091_856, 1_575_132_640),
    ("efficientnet_b0", "width=2", 224): (18_122_720, 1_449_958_848),
    ("efficientnet_b0", "", 448): (5_288_548, 1_537_537_408),
    ("efficientnet_b0", "depth=1.4 width=1.2", 291): (12_233_232, 1_800_091_280),
}


SLOW = ("resnet44_cifar", "resnet56_cifar", "resnet110_cifar")  # with another shortcut; as they are they are in NETWORKS


def slow(name, fields=""):
    return [pytest.mark.full] if "1202" in name or (name in SLOW and fields) else []


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow(name)) for name in NETWORKS])
def test_counts(name):
    found = summarize(name)
    assert (found.params, found.macs) == NETWORKS[name]
    assert sum(layer.params for layer in found.layers) == found.params
    assert sum(layer.macs for layer in found.layers) == found.macs


@pytest.mark.parametrize(("name", "fields", "pixels"), [pytest.param(*row, marks=slow(*row[:2])) for row in CHANGED])
def test_counts_of_changed_networks(name, fields, pixels):
    overrides = dict(field.split("=") for field in fields.split())
    words = ("A", "B", "linear")
    overrides = {key: value if value in words else ast.literal_eval(value) for key, value in overrides.items()}
    found = summarize(create_model(name, **overrides), resolution=pixels)
    assert (found.params, found.macs, found.resolution) == (*CHANGED[name, fields, pixels], pixels)


def test_networks_whose_counts_follow_from_anothers():
    for plain, residual in (("plain20_cifar", "resnet20_cifar"), ("plain56_cifar", "resnet56_cifar")):  # A has no parameters
        found = summarize(plain)
        assert (found.params, found.macs) == NETWORKS[residual]
    # The three projections of the residual networks, with their norms.
    for plain, residual in (("plain18", "resnet18"), ("plain34", "resnet34")):
        projections = [(64, 128, 28), (128, 256, 14), (256, 512, 7)]
        params = NETWORKS[residual][0] - sum(a * b + 2 * b for a, b, _ in projections)
        macs = NETWORKS[residual][1] - sum(a * b * side**2 for a, b, side in projections)
        found = summarize(plain)
        assert (found.params, found.macs) == (params, macs)
    # v1 runs the first 1x1 of three stages at half the side: a quarter of the positions.
    saved = sum(2**i * 256 * 2**i * 128 * (side**2 - (side // 2) ** 2) for i, side in enumerate((56, 28, 14)))
    for name in ("resnet101", "resnet152"):
        found = summarize(f"{name}_v1")
        assert (found.params, found.macs) == (NETWORKS[name][0], NETWORKS[name][1] - saved)


def test_no_registered_network_goes_uncounted():
    derived = {"plain18", "plain34", "plain20_cifar", "plain56_cifar", "resnet101_v1", "resnet152_v1"}
    assert set(NETWORKS) | derived == set(list_models())


def test_a_network_without_batch_statistics_or_classes_of_ours():
    class Tiny(nn.Module):
        resolution: int = 4
        in_channels: int = 2

        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (2, 2), padding="VALID", param_dtype=x.dtype)(x)

    found = summarize(Tiny())
    assert (found.name, found.params, found.macs) == ("Tiny", 2 * 2 * 2 * 3 + 3, 3 * 3 * 24)
    assert found.layers == (summary.Layer("Conv_0", "Conv", (3, 3, 3), 27, 216),)


def test_nothing_is_drawn(monkeypatch):
    def draw(kind, key, shape, dtype):
        assert isinstance(key, jax.core.Tracer)
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(initializers, "_random", draw)
    assert summarize("resnet18").params == NETWORKS["resnet18"][0]


def test_json_output(capsys):
    summary.main(["resnet18", "lenet5*", "resnet18", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["resnet18", "lenet5", "lenet5_1998"]
    assert rows[0] == {
        "name": "resnet18",
        "resolution": 224,
        "params": 11_689_512,
        "macs": 1_814_073_344,
        "published_params": "-",
        "published_macs": "1.8B",
        "published_top1": "-",
        "published_source": "He et al. 2015, Table 1",
    }
    assert [rows[1][f"published_{key}"] for key in ("params", "macs", "top1", "source")] == ["-"] * 4
    summary.main(["lenet5", "--json", "--layers"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["layers"][0] == {"name": "c1", "kind": "Conv", "output": [28, 28, 6], "params": 156, "macs": 117_600}


def test_text_output(capsys):
    summary.main(["lenet5", "--layers"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["lenet5", "32", "61,706", "416,520", "-", "-", "-", "-"]
    assert lines[-1].split() == ["classifier", "Linear", "10", "850", "840"]
    assert len(lines) == 3 + 5


def test_text_output_has_the_published_figures_in_120_columns(monkeypatch, capsys):
    summary.main(["resnet20_cifar"])
    found = capsys.readouterr().out.splitlines()[2]
    assert found.endswith("    0.27M      -   91.25  He et al. 2015, Table 6")
    largest = summary.Summary("", 1000, 999_999_999, 99_999_999_999, ())
    monkeypatch.setattr(summary, "summarize", lambda name: dataclasses.replace(largest, name=name))
    monkeypatch.setattr(summary, "list_models", lambda pattern: list(PUBLISHED))  # of the networks still to come too
    summary.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PUBLISHED)
    assert max(map(len, lines)) <= 120
    for line in lines[2:]:
        name, *_, source = line.split(maxsplit=7)  # else a column touches its neighbour
        assert source == PUBLISHED[name][3]


def test_errors():
    with pytest.raises(UsageError, match="unknown model 'resnet5'; did you mean 'resnet50'"):
        summary.main(["resnet5"])
    with pytest.raises(UsageError, match="unknown model 'nothing\\*'"):
        summary.main(["nothing*"])
    with pytest.raises(UsageError, match="--layer"):
        summary.main(["--layer"])  # no abbreviations
