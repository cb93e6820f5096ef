"""Keras's files of weights, written here as Keras writes them; the lists in keras_keys.txt come from Keras itself."""

import collections
import io
import sys
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from keras_keys import read_keys

import cnnfamily
from cnnfamily import naming
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model
from cnnfamily.weight_files import read_weights

KEYS = read_keys()
PAIRS = [  # a module of ours, the layer of Keras's that has its arrays
    ("mobilenet_v1", "stem", "conv1"),
    ("mobilenet_v1", "block13/depthwise", "conv_dw_13"),
    ("mobilenet_v1", "block13/pointwise_norm", "conv_pw_13_bn"),
    ("mobilenet_v1", "classifier", "conv_preds"),
    ("mobilenet_v2", "stage1_block1/depthwise", "expanded_conv_depthwise"),
    ("mobilenet_v2", "stage6_block3/expand", "block_15_expand"),
    ("mobilenet_v2", "stage7_block1/project_norm", "block_16_project_BN"),
    ("mobilenet_v2", "head", "Conv_1"),
    ("mobilenet_v2", "classifier", "predictions"),
    ("mobilenet_v3_small", "stage1_block1/se/expand", "expanded_conv_squeeze_excite_conv_1"),
    ("mobilenet_v3_small", "stage4_block1/expand_norm", "expanded_conv_3_expand_bn"),
    ("mobilenet_v3_small", "stage4_block1/depthwise", "expanded_conv_3_depthwise"),
    ("mobilenet_v3_small", "head_norm", "conv_1_bn"),
    ("mobilenet_v3_small", "hidden", "conv_2"),
    ("mobilenet_v3_small", "classifier", "logits"),
    ("efficientnet_b0", "stage1_block1/se/reduce", "block1a_se_reduce"),
    ("efficientnet_b0", "stage6_block4/depthwise", "block6d_dwconv"),
    ("efficientnet_b0", "stage6_block4/depthwise_norm", "block6d_bn"),
    ("efficientnet_b0", "stage7_block1/project", "block7a_project_conv"),
    ("efficientnet_b0", "classifier", "predictions"),
]


def network_of(listed: str, **fields):
    """ "mobilenet_v2 width=0.35", with the fields that Keras has."""
    name, _, width = listed.partition(" width=")
    if width and "v3" in name:
        fields["width_rule"] = "keras"
    return create_model(name, **({"width": float(width)} if width else {}), **fields)


def arrays_of(listed: str) -> list[tuple[str, str, list[np.ndarray]]]:
    """(name, class, arrays) of each layer, with numbers of which no two arrays have the same."""
    numbers = np.random.default_rng(0)
    return [
        (name, kind, [np.asarray(numbers.uniform(0.5, 1, shape), np.float32) for shape in shapes])
        for name, kind, shapes in KEYS[listed]
    ]


def leaves_of(kind: str) -> tuple[str, ...]:
    norms = {"batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance")}
    norms["normalization"] = ("mean", "variance", "count")
    return norms.get(kind, ("kernel", "bias"))


def write_by_name(group, layers, suffix: str = "", depthwise: str = "kernel", at_once: int = 10**6):
    """The older format, that of the published files; `at_once`: names in one attribute."""
    names = ["input_1", *(name for name, _, _ in layers), "dropout"]  # those without weights are listed as well
    if len(names) > at_once:
        for i in range(0, len(names), at_once):
            group.attrs[f"layer_names{i // at_once}"] = [name.encode() for name in names[i : i + at_once]]
    else:
        group.attrs["layer_names"] = [name.encode() for name in names]
    for name in ("input_1", "dropout"):
        group.create_group(name).attrs["weight_names"] = np.zeros(0)
    for name, kind, arrays in sorted(layers):  # the groups' own order is no order of layers
        leaves = [depthwise if kind == "depthwise_conv2d" and leaf == "kernel" else leaf for leaf in leaves_of(kind)]
        weights = [f"{name}/{leaf}{suffix}" for leaf, _ in zip(leaves, arrays, strict=False)]
        group.create_group(name).attrs["weight_names"] = [weight.encode() for weight in weights]
        for weight, array in zip(weights, arrays, strict=True):
            group[name].create_dataset(weight, data=array)


def write_by_class(group, layers, root: str = "layers"):
    """Keras 3's format."""
    counts = collections.Counter()
    for name, kind, arrays in layers:
        place = group.create_group(f"{root}/{kind}_{counts[kind]}" if counts[kind] else f"{root}/{kind}").create_group("vars")
        place.attrs["name"] = name
        for i, array in enumerate(arrays):
            dataset = place.create_dataset(str(i), data=array)
            if array.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
        counts[kind] += 1
    group.create_dataset(f"{root}/dropout/seed_generator/vars/0", data=np.zeros(2, np.uint32))
    group.create_dataset("optimizer/vars/1", data=np.ones((3, 3, 3, 32), np.float32))


def write(file: Path, layers, layout: str = "") -> Path:
    """In the layout that the name implies, or another of .h5 files."""
    if file.suffix == ".keras":
        content = io.BytesIO()
        with h5py.File(content, "w") as group:
            write_by_class(group, layers)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", content.getvalue())
        return file
    with h5py.File(file, "w") as group:
        if file.name.endswith(".weights.h5"):
            write_by_class(group, layers, "_layer_checkpoint_dependencies" if layout == "TensorFlow 2.13" else "layers")
        elif layout == "whole model":
            write_by_name(group.create_group("model_weights"), layers)
            group.create_dataset("optimizer_weights/x", data=np.ones(3))
        elif layout == "TensorFlow":
            write_by_name(group, layers, ":0", "depthwise_kernel", at_once=20)
        else:
            write_by_name(group, layers)
    return file


def at(variables, path: str):
    for name in path.split("/"):
        variables = variables[name]
    return variables


@pytest.mark.parametrize(
    "listed", [pytest.param(name, marks=[pytest.mark.full] if "_b4" in name else []) for name in sorted(KEYS)]
)
def test_layers_and_shapes_are_keras(listed):
    """In Keras's order, class by class; but the normalisation of images, which is no layer of ours."""
    counts, expected = collections.Counter(), {}
    for _, kind, shapes in KEYS[listed]:
        name = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        leaves = ("weight", "bias", "running_mean", "running_var") if kind == "batch_normalization" else ("weight", "bias")
        for leaf, shape in zip(leaves, shapes, strict=False):
            if kind == "depthwise_conv2d":
                shape = (shape[2], 1, *shape[:2])
            elif len(shape) > 1:
                shape = (shape[-1], shape[-2], *shape[:-2])
            if kind != "normalization":
                expected[f"{name}.{leaf}"] = shape
    found = {key: leaf.torch_shape for key, leaf in naming.torch_leaves(network_of(listed), "keras").items()}
    assert found == expected
    order = [key.partition(".")[0] for key in found]
    assert list(dict.fromkeys(order)) == list(dict.fromkeys(key.partition(".")[0] for key in expected))


def test_the_list_has_every_family_of_keras():
    assert len(KEYS) == 8
    assert KEYS["mobilenet_v1"][0] == ("conv1", "conv2d", [(3, 3, 3, 32)])
    assert KEYS["efficientnet_b0"][0] == ("normalization", "normalization", [(3,), (3,), ()])


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_every_array_comes_to_its_place(tmp_path, name):
    """Kernels as they are, depthwise ones with their last axes swapped, and 1x1 convolutions over the mean as linear layers."""
    layers = arrays_of(name)
    theirs = {layer: (kind, arrays) for layer, kind, arrays in layers}
    _, variables = cnnfamily.load_pretrained(name, write(tmp_path / "x.h5", layers))
    for path, layer in [(path, layer) for network, path, layer in PAIRS if network == name]:
        kind, arrays = theirs[layer]
        params = at(variables["params"], path)
        if kind == "batch_normalization":
            statistics = at(variables["batch_stats"], path)
            found = [params["scale"], params["bias"], statistics["mean"], statistics["var"]]
        else:
            kernel = arrays[0].transpose(0, 1, 3, 2) if kind == "depthwise_conv2d" else arrays[0]
            arrays = [kernel.reshape(params["kernel"].shape) if path in ("classifier", "hidden") else kernel, *arrays[1:]]
            found = [params["kernel"], *([params["bias"]] if "bias" in params else [])]
        for ours, array in zip(found, arrays, strict=True):
            np.testing.assert_array_equal(ours, array, err_msg=path)


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("x.weights.h5", ""),
        ("x.keras", ""),
        ("x.weights.h5", "TensorFlow 2.13"),
        ("x.h5", "TensorFlow"),
        ("x.h5", "whole model"),
        ("x.hdf5", ""),
    ],
)
def test_every_layout_gives_the_same_arrays(tmp_path, file, layout):
    """Keras 3's two, those of TensorFlow's Keras (names in several attributes), a whole model's in the older format."""
    layers = arrays_of("mobilenet_v3_small")
    expected = read_weights(write(tmp_path / "plain.h5", layers))
    found = read_weights(write(tmp_path / file, layers, layout))
    assert found.keys() == expected.keys()
    assert len(found) == sum(len(arrays) for _, _, arrays in layers)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_half_precision_becomes_float32(tmp_path):
    """Keras marks bfloat16, which HDF5 does not know."""
    layers = [(name, kind, [x.astype(ml_dtypes.bfloat16) for x in arrays]) for name, kind, arrays in arrays_of("mobilenet_v1")]
    write(tmp_path / "x.weights.h5", layers)
    found = read_weights(tmp_path / "x.weights.h5")["conv2d.weight"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, layers[0][2][0].astype(np.float32).transpose(3, 2, 0, 1))


def test_fields_of_keras_are_set_and_said(tmp_path, capsys):
    file = write(tmp_path / "x.h5", arrays_of("mobilenet_v1"))
    network, _ = cnnfamily.load_pretrained("mobilenet_v1", file)
    assert (network.padding, network.norm_epsilon, network.activation) == ("same", 1e-3, "relu6")
    assert capsys.readouterr().err == f"{file} is Keras's: set activation='relu6'; images are pixels / 127.5 - 1\n"
    file = write(tmp_path / "v2.h5", arrays_of("mobilenet_v2"))
    network, _ = cnnfamily.load_pretrained("mobilenet_v2", file)
    assert (network.padding, network.norm_epsilon) == ("same", 1e-3)
    assert "set padding='same', norm_epsilon=0.001; images" in capsys.readouterr().err
    network, _ = cnnfamily.load_pretrained("mobilenet_v2", file, padding="same", norm_epsilon=1e-3)
    assert capsys.readouterr().err == f"{file} is Keras's: images are pixels / 127.5 - 1\n"


def test_fields_that_are_asked_for_stay(tmp_path, capsys):
    """An override, and a network that was built before; what Keras computes with is said all the same."""
    file = write(tmp_path / "x.h5", arrays_of("mobilenet_v2"))
    network, _ = cnnfamily.load_pretrained("mobilenet_v2", file, padding="symmetric")
    assert (network.padding, network.norm_epsilon) == ("symmetric", 1e-3)
    line = "Keras computes with padding='same', this network with 'symmetric'; pass padding='same'"
    assert line in capsys.readouterr().err
    network, _ = cnnfamily.load_pretrained(create_model("mobilenet_v2"), file)
    assert network == create_model("mobilenet_v2")
    assert line in capsys.readouterr().err


def test_widths_of_v3_go_by_keras_rule(tmp_path):
    file = write(tmp_path / "x.h5", arrays_of("mobilenet_v3_large width=0.75"))
    network, variables = cnnfamily.load_pretrained("mobilenet_v3_large", file, width=0.75)
    assert network.width_rule == "keras"
    assert variables["params"]["stem"]["kernel"].shape == (3, 3, 3, 16)


@pytest.mark.parametrize(
    ("variance", "divisor"),
    [((0.229, 0.224, 0.225), (0.229, 0.224, 0.225)), ((0.25, 0.04, 1.0), (0.5, 0.2, 1.0))],
)
def test_images_of_an_efficientnet_are_said(tmp_path, capsys, variance, divisor):
    """The published files hold deviations where the variance should be; others hold the variance."""
    (name, kind, _), *others = arrays_of("efficientnet_b0")
    normalization = [np.float32((0.485, 0.456, 0.406)), np.float32(variance), np.int64(0)]
    file = write(tmp_path / "x.weights.h5", [(name, kind, normalization), *others])
    cnnfamily.load_pretrained("efficientnet_b0", file)
    assert f"images are (pixels / 255 - [0.485, 0.456, 0.406]) / {list(divisor)}\n" in capsys.readouterr().err


def test_another_number_of_classes_draws_the_classifier_anew(tmp_path, capsys):
    """Of a file without the last layer too, as `include_top=False` leaves it."""
    layers, fields = arrays_of("mobilenet_v1 width=0.25"), {"width": 0.25, "num_classes": 7}
    _, whole = cnnfamily.load_pretrained("mobilenet_v1", write(tmp_path / "x.h5", layers), **fields)
    assert "conv2d_14.weight 1000x256x1x1 instead of 7x256x1x1: this classifier is drawn anew" in capsys.readouterr().err
    _, variables = cnnfamily.load_pretrained("mobilenet_v1", write(tmp_path / "no_top.h5", layers[:-1]), **fields)
    np.testing.assert_array_equal(variables["params"]["classifier"]["kernel"], whole["params"]["classifier"]["kernel"])
    np.testing.assert_array_equal(variables["params"]["block13"]["pointwise"]["kernel"], layers[-3][2][0])


def test_a_classifier_of_one_class_is_no_depthwise_convolution(tmp_path):
    """Though its kernel (1, 1, channels, 1) has the last axis of one, and the older format names no classes of layers."""
    *layers, (name, kind, (kernel, bias)) = arrays_of("mobilenet_v1 width=0.25")
    file = write(tmp_path / "x.h5", [*layers, (name, kind, [kernel[..., :1], bias[:1]])])
    _, variables = cnnfamily.load_pretrained("mobilenet_v1", file, width=0.25, num_classes=1)
    np.testing.assert_array_equal(variables["params"]["classifier"]["kernel"], kernel[0, 0, :, :1])


@pytest.mark.full  # it looks through all networks: the search itself is in test_weights.py
def test_weights_of_another_network_say_whose_they_look_like(tmp_path):
    file = write(tmp_path / "x.weights.h5", arrays_of("efficientnet_b0"))
    for name in ("efficientnet_b1", "resnet18", "mobilenet_v2"):
        with pytest.raises(UsageError, match=rf"does not fit {name}: .*; it looks like efficientnet_b0$"):
            cnnfamily.load_pretrained(name, file)


def test_without_h5py_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"h5py is not installed; pip install 'cnnfamily\[keras\]'$"):
        read_weights(tmp_path / "x.h5")


@pytest.mark.parametrize("name", ["x.h5", "x.weights.h5", "x.keras"])
def test_damaged_files_are_one_line(tmp_path, name):
    file = write(tmp_path / name, arrays_of("mobilenet_v1 width=0.25"))
    whole = file.read_bytes()
    for content in (b"", b"some text", whole[:1000], whole[: len(whole) // 2], whole[:-5000]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="is damaged or no file of Keras's: ") as caught:
            cnnfamily.load_pretrained("mobilenet_v1", file, width=0.25)
        assert "\n" not in str(caught.value)


def test_files_that_no_keras_wrote_are_one_line(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.ones(3)
    with pytest.raises(UsageError, match=r"x\.h5 holds no arrays"):
        read_weights(tmp_path / "x.h5")
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UsageError, match=r"no file of Keras's: .*model\.weights\.h5"):
        read_weights(tmp_path / "x.keras")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.attrs["layer_names"] = ["conv1"]
        file.create_group("conv1").attrs["weight_names"] = ["conv1/kernel"]
    with pytest.raises(UsageError, match=r"no file of Keras's: .*conv1/kernel"):
        read_weights(tmp_path / "y.h5")


def test_arrays_of_other_files_and_of_no_size_are_refused(tmp_path):
    """A link is not followed, and a small file cannot ask for terabytes."""
    other = write(tmp_path / "other.weights.h5", arrays_of("mobilenet_v1 width=0.25"))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["layers"] = h5py.ExternalLink(str(other), "layers")
    with pytest.raises(UsageError, match="holds no arrays"):
        read_weights(tmp_path / "link.h5")
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", (10**6, 10**6), np.float32, chunks=(1000, 1000))
    with pytest.raises(UsageError, match="declares 4000000000000 bytes"):
        read_weights(tmp_path / "large.h5")
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", (3,), np.float32, external=[(str(other), 0, 12)])
    with pytest.raises(UsageError, match="lies in another file"):
        read_weights(tmp_path / "outside.h5")
