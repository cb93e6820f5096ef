"""Small networks against the logits that torchvision's have with the same weights, without torch: see `golden_logits.py`."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from golden_logits import CASES, FILE, SIDES, images_of, weights_of

from cnnfamily import load_pretrained, naming
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, googlenet

GOLDEN = json.loads(FILE.read_text())["logits"]
TOLERANCE = 1e-4  # of the largest logit


def difference(case, **overrides):
    """max |ours - torchvision's| / max |torchvision's| at both sides."""
    name, fields = CASES[case]
    network = create_model(name, **fields | {"num_classes": 10} | overrides)
    leaves = naming.torch_leaves(create_model(name, **fields | {"num_classes": 10}), "torchvision")
    network, variables = load_pretrained(network, weights_of({key: leaf.torch_shape for key, leaf in leaves.items()}))
    found, apply = 0.0, jax.jit(network.apply)
    for side in SIDES:
        expected = np.array(GOLDEN[case][str(side)])
        ours = np.asarray(apply(variables, images_of(side)))
        found = max(found, float(np.abs(ours - expected).max() / np.abs(expected).max()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_torchvision(case):
    assert difference(case) <= TOLERANCE


def test_a_case_is_not_trivial():
    """Logits of the two images differ, and of the two sides: a constant would agree with anything."""
    for case, sides in GOLDEN.items():
        even, odd = (np.array(sides[str(side)]) for side in SIDES)
        for one, two in ((even[0], even[1]), (even, odd)):
            assert np.abs(one - two).max() > 0.02 * np.abs(even).max(), case


# What a wrong line would do: each is told from the right one by a golden case.
MUTATIONS = [
    *[("alexnet", {"activation": "relu6"}), ("alexnet", {"response_norm": True})],
    *[("vgg", {"activation": "silu"}), ("vgg_bn", {"norm_place": "after"}), ("vgg_bn", {"norm_epsilon": 1e-3})],
    *[("googlenet", {"last_pool": 3}), ("googlenet", {"norm_epsilon": 1e-5}), ("googlenet", {"transform_input": False})],
    *[("googlenet", {"response_norm": True}), ("googlenet", {"kernel": 5})],
    *[("resnet_basic", {"padding": "same"}), ("resnet_basic", {"width": 0.5}), ("resnet_basic", {"norm_epsilon": 1e-3})],
    *[("resnet_bottleneck", {"stride_on": "1x1"}), ("resnet_bottleneck", {"activation": "silu"})],
    *[("resnext", {"groups": 16, "group_width": 8}), ("resnext", {"se_reduction": 16})],
    *[("mobilenet_v2", {"activation": "relu"}), ("mobilenet_v2", {"linear_bottleneck": False})],
    *[("mobilenet_v2", {"padding": "same"}), ("mobilenet_v2", {"shortcut": False})],
    *[("mobilenet_v3", {"norm_epsilon": 1e-5}), ("mobilenet_v3", {"activation": "relu"}), ("mobilenet_v3", {"se_ratio": 0.5})],
    *[("efficientnet", {"padding": "same"}), ("efficientnet", {"norm_epsilon": 1e-3}), ("efficientnet", {"se_ratio": 0.5})],
    *[("efficientnet", {"activation": "relu"}), ("efficientnet_of_b5", {"norm_epsilon": 1e-5})],
]


SHAPES = (
    "kernel",
    "groups",
    "se_reduction",
    "se_ratio",
    "width",
)  # these already change the shape of an array, or their number


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "fields"), MUTATIONS, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_a_mutation_is_seen(case, fields):
    if next(iter(fields)) in SHAPES:
        with pytest.raises(UsageError, match="does not fit"):
            difference(case, **fields)
    else:
        assert difference(case, **fields) > 10 * TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("case", ["alexnet", "vgg"])
def test_another_order_of_the_flattened_inputs_is_seen(case, monkeypatch):
    monkeypatch.setattr(naming.Leaf, "from_torch", lambda leaf, x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T)
    assert difference(case) > 10 * TOLERANCE


@pytest.mark.full
def test_pools_without_ceil_mode_are_seen(monkeypatch):
    def inside(x, window, stride, padding=0):
        return nn.max_pool(x, (window,) * 2, (stride,) * 2, padding=((padding, padding),) * 2)

    monkeypatch.setattr(googlenet, "max_pool_to_the_edge", inside)
    assert difference("googlenet") > 10 * TOLERANCE
