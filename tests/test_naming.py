"""Torch's names and layout of every array, against the lists in torchvision_keys.txt, which come from torchvision itself."""

import numpy as np
import pytest
from torchvision_keys import read_keys

from cnnfamily import naming
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model

KEYS = read_keys()


def shapes_in(name: str, scheme: str) -> dict[str, tuple[int, ...]]:
    return {key: leaf.torch_shape for key, leaf in naming.torch_leaves(create_model(name), scheme).items()}


ONE_A_FAMILY = ("alexnet", "vgg16", "vgg11_bn", "googlenet", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
ONE_A_FAMILY += ("mobilenet_v3_large", "mobilenet_v3_small", "resnext50_32x4d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ONE_A_FAMILY else [pytest.mark.full]) for name in sorted(KEYS)]
)
def test_names_and_shapes_are_torchvisions(name):
    """Of every network that torchvision has too; but its auxiliary classifiers, and its counters of batches."""
    has_auxiliary = getattr(create_model(name), "aux", False)
    expected = {
        key: shape
        for key, shape in KEYS[name].items()
        if not key.endswith(naming.COUNTER) and (has_auxiliary or not key.startswith("aux"))
    }
    assert shapes_in(name, "torchvision") == expected


def test_the_list_is_of_all_networks_that_torchvision_shares():
    assert len(KEYS) == 31
    assert len(KEYS["resnet18"]) == 122
    assert KEYS["resnet18"]["fc.weight"] == (1000, 512)
    assert KEYS["resnet18"]["bn1.num_batches_tracked"] == ()


def test_the_order_is_torchs():
    """A file written from here lists a network from its first layer to its last, as torch's does."""
    leaves = [key for key in KEYS["resnet50"] if not key.endswith(naming.COUNTER)]
    assert list(naming.torch_leaves(create_model("resnet50"), "torchvision")) == leaves


def test_timms_names_of_an_efficientnet():
    """The first stage has no expansion, so its projection is what elsewhere is the expansion: `conv_pw`."""
    shapes = shapes_in("efficientnet_b0", "timm")
    assert len(shapes) == 311
    expected = {
        "conv_stem.weight": (32, 3, 3, 3),
        "bn1.running_var": (32,),
        "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "blocks.0.0.bn1.weight": (32,),
        "blocks.0.0.se.conv_reduce.weight": (8, 32, 1, 1),
        "blocks.0.0.se.conv_expand.bias": (32,),
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
        "blocks.0.0.bn2.bias": (16,),
        "blocks.1.0.conv_pw.weight": (96, 16, 1, 1),
        "blocks.1.0.bn1.weight": (96,),
        "blocks.1.0.conv_dw.weight": (96, 1, 3, 3),
        "blocks.1.0.se.conv_reduce.weight": (4, 96, 1, 1),
        "blocks.1.0.conv_pwl.weight": (24, 96, 1, 1),
        "blocks.6.0.bn3.running_mean": (320,),
        "conv_head.weight": (1280, 320, 1, 1),
        "bn2.weight": (1280,),
        "classifier.weight": (1000, 1280),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert not [key for key in shapes if key.startswith("blocks.0.0.bn3")]


def test_timms_names_of_a_resnet():
    """Torchvision's own, and `se` of its SE-ResNet."""
    assert shapes_in("resnet50", "timm") == shapes_in("resnet50", "torchvision")
    assert shapes_in("se_resnet50", "timm")["layer4.2.se.fc1.weight"] == (128, 2048, 1, 1)


@pytest.mark.parametrize("convolution", [False, True])
def test_inputs_of_a_linear_layer_after_a_flatten_are_reordered(convolution):
    """The same numbers reach the same weights: torch flattens channels first, we channels last."""
    height, width, channels, units = 2, 3, 5, 7
    numbers = np.random.default_rng(0)
    maps = numbers.normal(size=(4, height, width, channels))
    kernel = numbers.normal(size=(height * width * channels, units))
    name = naming.TorchName("classifier.0", (height, width, channels), convolution)
    leaf = naming.Leaf(("params", "fc6", "kernel"), kernel.shape, name)
    weight = leaf.to_torch(kernel)
    assert weight.shape == ((units, channels, height, width) if convolution else (units, channels * height * width))
    theirs = maps.transpose(0, 3, 1, 2).reshape(4, -1) @ weight.reshape(units, -1).T
    np.testing.assert_allclose(theirs, maps.reshape(4, -1) @ kernel, rtol=1e-12)
    np.testing.assert_array_equal(leaf.from_torch(weight), kernel)


def test_kernels_change_their_layout():
    kernel = np.arange(3 * 3 * 2 * 8.0).reshape(3, 3, 2, 8)  # HWIO; a grouped kernel has fewer inputs, and no other rule
    leaf = naming.Leaf(("params", "stem", "kernel"), kernel.shape, naming.TorchName("conv1"))
    weight = leaf.to_torch(kernel)
    assert weight.shape == (8, 2, 3, 3)
    assert weight[5, 1, 0, 2] == kernel[0, 2, 1, 5]
    np.testing.assert_array_equal(leaf.from_torch(weight), kernel)


def test_a_network_that_nobody_published_is_one_line():
    with pytest.raises(UsageError, match=r"LeNet5 has no published weights: expected a network of AlexNet, .*ResNet, VGG"):
        naming.torch_leaves(create_model("lenet5"), "torchvision")
