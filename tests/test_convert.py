"""Conversion of weights between schemes, and the search for the convention in which two networks differ."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from cnnfamily import convert, naming, weights
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initialize
from cnnfamily.models.layers import Conv, Linear
from cnnfamily.weight_files import read_weights

IMAGES = np.random.default_rng(0).normal(size=(2, 33, 64, 3)).astype(np.float32)
SMALL = {
    "efficientnet_b0": {"width": 0.25, "stages": ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3))},
    "resnet50": {"width": 0.125, "stage_sizes": (1, 1)},
}


@functools.cache
def network_of(name: str):
    """A small network, and random variables with statistics that are not the identity."""
    network = create_model(name, num_classes=5, **SMALL[name])
    variables = initialize(network, jax.random.key(0), resolution=32)
    numbers = np.random.default_rng(1)
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: np.asarray(leaf + numbers.uniform(0, 0.1, leaf.shape), np.float32), variables["batch_stats"]
    )
    return network, variables


def recorded(network: nn.Module, variables, images: np.ndarray = IMAGES, scheme: str = "torchvision") -> dict:
    """What hooks on a torch network with these fields would give."""
    outputs = convert.layer_outputs(network, variables, images, scheme)
    return {"input": images.transpose(0, 3, 1, 2), **outputs}


def test_outputs_are_by_torchs_names_in_order():
    network, variables = network_of("resnet50")
    outputs = convert.layer_outputs(network, variables, IMAGES, "torchvision")
    names = list(outputs)
    assert names[:5] == ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]
    assert names[-2:] == ["layer2.0", "fc"]
    assert outputs["conv1"].shape == (2, 8, 17, 32)
    np.testing.assert_array_equal(outputs["fc"], jax.jit(network.apply)(variables, IMAGES))


@pytest.mark.parametrize(
    ("name", "fields", "layer"),
    [
        pytest.param("efficientnet_b0", {"padding": "same"}, "features.0.0", marks=pytest.mark.full),
        pytest.param("efficientnet_b0", {"norm_epsilon": 1e-3}, "features.0.1", marks=pytest.mark.full),
        pytest.param("efficientnet_b0", {"activation": "relu"}, "features.1.0.block.0.0", marks=pytest.mark.full),
        pytest.param("resnet50", {"stride_on": "1x1"}, "layer2.0.conv1", marks=pytest.mark.full),
    ],
)
def test_the_field_that_differs_is_found(name, fields, layer):
    network, variables = network_of(name)
    lines = list(convert.explain(network, variables, recorded(network.clone(**fields), variables)))
    assert lines[0].startswith(f"{layer} differs by ")
    (field, value) = next(iter(fields.items()))
    assert lines[1].startswith(f"with {field}={value!r}: all ")
    assert len(lines) == 2


@pytest.mark.full
def test_two_differences_are_found_one_after_the_other():
    network, variables = network_of("resnet50")
    theirs = recorded(network.clone(stride_on="1x1"), variables, IMAGES[..., ::-1])
    theirs["input"] = theirs["input"][:, ::-1]
    lines = list(convert.explain(network, variables, theirs))
    assert [line.split(" differs")[0] for line in lines[:2]] == ["conv1", "with images in BGR: layer2.0.conv1"]
    assert lines[2].startswith("with stride_on='1x1': all ")


def test_networks_that_agree_are_said_to():
    network, variables = network_of("resnet50")
    theirs = recorded(network, variables, scheme="timm")
    assert list(convert.explain(network, variables, theirs, "timm")) == [f"all {len(theirs) - 1} layers agree to 0.0e+00"]


@pytest.mark.full
def test_what_no_convention_explains_is_said():
    network, variables = network_of("resnet50")
    theirs = recorded(network, variables)
    theirs["layer2.0.conv2"] = np.full_like(theirs["layer2.0.conv2"], np.nan)
    lines = list(convert.explain(network, variables, theirs))
    assert lines[0].startswith("layer2.0.conv2 differs by nan of its largest value; the ")
    assert lines[1].startswith("none of 12 changes explains it: padding='same', norm_epsilon=0.001, ")


class Flat(nn.Module):
    """A convolution and a linear layer over its flattened map."""

    num_classes: int = 4
    in_channels: int = 3
    resolution: int = 6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images):
        x = Conv(5, 3, name="conv")(images)
        return Linear(self.num_classes, name="fc")(x.reshape(len(x), -1))


def test_the_order_of_a_flatten_is_found(monkeypatch):
    names = {"conv": "features.0", "fc": naming.TorchName("classifier", (6, 6, 5))}
    monkeypatch.setitem(naming.FAMILIES, Flat, lambda network, scheme, paths: names)
    network = Flat()
    variables = initialize(network, jax.random.key(0))
    tensors = weights.state_dict(network, variables)
    assert tensors["classifier.weight"].shape == (4, 180)
    theirs = recorded(network, variables, IMAGES[:, :6, :6])
    # A file whose author flattened as we do, read by the rule for torch's.
    stored = tensors | {"classifier.weight": np.asarray(variables["params"]["fc"]["kernel"]).T}
    _, read = weights.load_pretrained(network, stored)
    lines = list(convert.explain(network, read, theirs))
    assert lines[0].startswith("classifier differs by ")
    assert (
        lines[1]
        == f"with linear kernels whose inputs are (height, width, channels) in the file: {'all 2 layers agree to'} 0.0e+00"
    )


def test_a_file_is_converted_and_compared(tmp_path, capsys):
    """The command; resnet18 whole, as it takes a network by its name."""
    network = create_model("resnet18", num_classes=5)
    variables = initialize(network, jax.random.key(0))
    weights.save_weights(tmp_path / "a.safetensors", network, variables)
    np.savez(tmp_path / "a.npz", **recorded(network, variables, IMAGES[:, :32, :32]))
    files = [f"--weights={tmp_path / 'a.safetensors'}", f"--output={tmp_path / 'b.safetensors'}"]
    convert.main(["--model=resnet18", "--num_classes=5", *files, "--scheme=timm", f"--activations={tmp_path / 'a.npz'}"])
    written, compared = capsys.readouterr().out.splitlines()
    assert written.endswith("b.safetensors: resnet18 by timm's names")
    assert compared == "all 49 layers agree to 0.0e+00"
    before, after = (read_weights(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert before.keys() == after.keys()
    assert all((before[key] == after[key]).all() for key in before)


def test_schemes_convert_into_each_other(tmp_path):
    network, variables = network_of("efficientnet_b0")
    timm = weights.state_dict(network, variables, "timm")
    read = weights.load_pretrained(network, timm)[1]
    assert "conv_stem.weight" in timm
    ours = weights.state_dict(network, variables)
    again = weights.state_dict(network, read)
    assert list(ours) == list(again)
    assert all((ours[key] == again[key]).all() for key in ours)


def test_bad_activations_are_one_line(tmp_path):
    network, variables = network_of("resnet50")
    with pytest.raises(UsageError, match="the activations lack an array 'input'"):
        list(convert.explain(network, variables, {"conv1": IMAGES}))
    with pytest.raises(UsageError, match=r"hold x; expected torch's names of layers in torchvision"):
        list(convert.explain(network, variables, {"input": IMAGES.transpose(0, 3, 1, 2), "x": IMAGES}))
    with pytest.raises(UsageError, match="expected --output or --activations"):
        convert.main(["--model=resnet18", "--weights=x"])
    with pytest.raises(UsageError, match=r"does not exist; expected an \.npz file"):
        convert.read_activations(tmp_path / "gone.npz")
    np.save(tmp_path / "one.npy", IMAGES)
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("one.npy", "text.npz"):
        with pytest.raises(UsageError, match=r"is damaged or no .npz file"):
            convert.read_activations(tmp_path / name)
