"""Weights of a file in a network and back; every fault of a file is one line."""

import functools
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import cnnfamily
from cnnfamily import naming, weights
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initialize, variable_shapes
from cnnfamily.weight_files import read_weights

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


@functools.cache
def network_of(name: str, **fields):
    """The network, and variables of which no two arrays are alike."""
    network = create_model(name, **fields)
    shapes, numbers = variable_shapes(network), np.random.default_rng(1)
    return network, jax.tree.map(lambda leaf: numbers.uniform(0.5, 1, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A file of ResNet-18's weights, and its arrays by name."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    network, variables = network_of("resnet18")
    weights.save_weights(file, network, variables)
    return file, cnnfamily.state_dict(network, variables)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scheme", naming.SCHEMES)
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "efficientnet_b0", "resnet20_cifar"),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("resnext50_32x4d", "se_resnet50")),
    ],
)
def test_a_file_gives_the_same_variables_back(tmp_path, name, scheme):
    """Bit for bit, in either scheme, which nobody has to name on reading."""
    network, variables = network_of(name)
    weights.save_weights(tmp_path / "x.safetensors", network, variables, scheme)
    again, read = cnnfamily.load_pretrained(name, tmp_path / "x.safetensors")
    assert again == network
    assert_equal(read, variables)


def test_a_state_dict_is_torchs(resnet18):
    _, tensors = resnet18
    _, variables = network_of("resnet18")
    kernel = variables["params"]["stage2_block1"]["shortcut"]["conv"]["kernel"]
    np.testing.assert_array_equal(tensors["layer2.0.downsample.0.weight"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(tensors["bn1.running_var"], variables["batch_stats"]["stem_norm"]["var"])
    assert tensors["bn1.num_batches_tracked"].dtype == np.int64
    assert len(tensors) == 122


def test_a_state_dict_in_memory_serves_as_a_file(resnet18):
    _, read = cnnfamily.load_pretrained("resnet18", resnet18[1])
    assert_equal(read, network_of("resnet18")[1])


def test_memory_that_changes_later_changes_nothing_here():
    """That of a torch network which goes on to train is aligned, and such memory JAX takes over on a CPU."""

    def aligned(x):
        whole = np.empty(x.nbytes + 64, np.uint8)
        first = -whole.ctypes.data % 64
        copied = whole[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
        copied[...] = x
        return copied

    network, variables = network_of("resnet20_cifar")
    state = {key: aligned(x) for key, x in cnnfamily.state_dict(network, variables).items()}
    read = cnnfamily.load_pretrained(network, state)[1]
    own, images = jax.tree.map(aligned, jax.device_get(initialize(network, jax.random.key(0)))), jnp.ones((1, 32, 32, 3))
    infer = cnnfamily.optimize_for_inference(network, own)
    before = np.array(infer(images))  # awaited
    for x in (*state.values(), *jax.tree.leaves(own)):
        x[...] = 7
    assert_equal(read, variables)
    np.testing.assert_array_equal(infer(images), before)
    given = cnnfamily.state_dict(network, read)
    for x in given.values():
        x[...] = 7  # as a torch network that takes over the memory would, in training
    assert_equal(read, variables)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_float32(tmp_path, resnet18, dtype):
    half = {key: value.astype(dtype) if value.dtype == np.float32 else value for key, value in resnet18[1].items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    _, variables = cnnfamily.load_pretrained("resnet18", tmp_path / "half.safetensors")
    stem = variables["params"]["stem"]["kernel"]
    assert stem.dtype == jnp.float32
    np.testing.assert_array_equal(stem, half["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0))


def test_another_number_of_classes_draws_the_classifier_anew(resnet18, capsys):
    file, tensors = resnet18
    _, variables = cnnfamily.load_pretrained("resnet18", file, num_classes=10)
    assert "fc.weight 1000x512 instead of 10x512: this classifier is drawn anew" in capsys.readouterr().err
    drawn = initialize(create_model("resnet18", num_classes=10), jax.random.key(0))["params"]["classifier"]
    assert_equal(variables["params"]["classifier"], drawn)
    np.testing.assert_array_equal(variables["params"]["stem_norm"]["scale"], tensors["bn1.weight"])
    without = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    assert_equal(cnnfamily.load_pretrained("resnet18", without, num_classes=10)[1], variables)
    assert "fc.weight missing: this classifier is drawn anew" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"2 of 102 arrays missing \(fc.weight, fc.bias\)$"):
        cnnfamily.load_pretrained("resnet18", without)


def test_another_number_of_classes_in_the_file_has_to_be_named():
    network, variables = network_of("resnet18", num_classes=7)
    tensors = cnnfamily.state_dict(network, variables)
    with pytest.raises(UsageError, match=r"2 of another shape \(fc.weight 7x512 instead of 1000x512.*; num_classes=7 reads it"):
        cnnfamily.load_pretrained("resnet18", tensors)
    assert_equal(cnnfamily.load_pretrained("resnet18", tensors, num_classes=7)[1], variables)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_input_channels_answer_as_before_where_channels_are_alike(resnet18, capsys, channels):
    """One channel: the kernel's sum over its inputs. More, when the three are alike: repeated and scaled by 3 / n."""
    tensors = dict(resnet18[1])
    if channels > 1:
        tensors["conv1.weight"] = np.repeat(tensors["conv1.weight"][:, :1], 3, axis=1)
    expected = cnnfamily.load_pretrained("resnet18", tensors)[1]["params"]["stem"]["kernel"]
    _, variables = cnnfamily.load_pretrained("resnet18", tensors, in_channels=channels)
    kernel = variables["params"]["stem"]["kernel"]
    assert kernel.shape == (7, 7, channels, 64)
    np.testing.assert_allclose(kernel.sum(2), expected.sum(2), rtol=1e-6)
    assert f"takes 3 channels: adapted to in_channels={channels}" in capsys.readouterr().err


def test_four_channels_repeat_in_turn(resnet18):
    weight = resnet18[1]["conv1.weight"]
    kernel = cnnfamily.load_pretrained("resnet18", resnet18[1], in_channels=4)[1]["params"]["stem"]["kernel"]
    np.testing.assert_allclose(kernel[:, :, 3], 0.75 * weight[:, 0].transpose(1, 2, 0), rtol=1e-6)


def test_weights_of_another_network_say_whose_they_look_like(resnet18):
    file, tensors = resnet18
    with pytest.raises(
        UsageError, match=r"^\S*resnet18.safetensors does not fit resnet34: 80 of 182 .*; it looks like resnet18$"
    ):
        cnnfamily.load_pretrained("resnet34", file)
    with pytest.raises(UsageError, match=r"does not fit efficientnet_b0: .*; it looks like resnet18$"):
        cnnfamily.load_pretrained("efficientnet_b0", tensors)
    with pytest.raises(UsageError, match=r"does not fit resnet18: 102 of 102 arrays missing .*, 1 left over \(a\)$"):
        cnnfamily.load_pretrained("resnet18", {"a": np.ones(3)})


def test_a_network_that_one_scheme_lacks_is_read_in_the_other(monkeypatch, resnet18):
    names = naming.FAMILIES[type(create_model("resnet18"))]
    without_timm = lambda network, scheme, paths: {} if scheme == "timm" else names(network, scheme, paths)  # noqa: E731
    monkeypatch.setitem(naming.FAMILIES, type(create_model("resnet18")), without_timm)
    assert_equal(cnnfamily.load_pretrained("resnet18", resnet18[0])[1], network_of("resnet18")[1])
    with pytest.raises(UsageError, match=r"it looks like resnet18$"):
        cnnfamily.load_pretrained("resnet34", resnet18[0])
    with pytest.raises(UsageError, match="of this ResNet has no name in timm"):
        cnnfamily.state_dict(*network_of("resnet18"), "timm")


def test_half_of_the_keys_are_not_enough(resnet18, monkeypatch):
    few = {name: weights.NETWORKS[name] for name in ("resnet18", "resnet34", "alexnet")}
    monkeypatch.setattr(weights, "NETWORKS", few)  # it looks through all of a family: seconds
    half = dict(list(resnet18[1].items())[:61])
    with pytest.raises(UsageError, match=r"resnet18: 51 of 102 arrays missing \(layer3.0.bn1.weight, .*\.\.\.\)$"):
        cnnfamily.load_pretrained("resnet18", half)


def test_one_key_too_many_is_refused(resnet18):
    with pytest.raises(UsageError, match=r"1 left over \(fc2.weight\)$"):
        cnnfamily.load_pretrained("resnet18", resnet18[1] | {"fc2.weight": np.ones((1, 1))})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.safetensors", None, "gone.safetensors does not exist; expected a .safetensors or .pth file"),
        ("folder.safetensors", "folder", "is a folder; expected"),
        ("empty.safetensors", b"", "empty.safetensors is damaged or no safetensors file: .*header"),
        ("text.safetensors", b"these are no weights at all", "text.safetensors is damaged or no safetensors file"),
        ("cut.safetensors", 1000, "cut.safetensors is damaged or no safetensors file"),
        ("short.safetensors", -5, "short.safetensors is damaged or no safetensors file"),
        ("weights.npz", b"PK", "ends in '.npz'; expected .safetensors, .pth, "),
    ],
)
def test_bad_files_are_one_line(tmp_path, resnet18, name, content, message):
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else resnet18[0].read_bytes()[:content])
    with pytest.raises(UsageError, match=message):
        cnnfamily.load_pretrained("resnet18", file)


def test_no_arrays_and_no_numbers_are_refused(tmp_path, resnet18):
    safetensors.numpy.save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="holds no arrays"):
        read_weights(tmp_path / "none.safetensors")
    broken = resnet18[1]["layer1.0.bn1.running_var"].copy()
    broken[3] = np.inf
    with pytest.raises(UsageError, match=r"layer1.0.bn1.running_var holds 1 values that are not finite"):
        cnnfamily.load_pretrained("resnet18", resnet18[1] | {"layer1.0.bn1.running_var": broken})
    with pytest.raises(UsageError, match=r"the state dict: x holds str of <U1; expected an array of numbers"):
        cnnfamily.load_pretrained("resnet18", {"x": "a"})


class Code:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    """With torch and without."""
    code, file = Code(), tmp_path / "code.pth"
    code.folder = str(tmp_path / "made")
    file.write_bytes(pickle.dumps(code))
    with pytest.raises(UsageError, match=r"code\.pth"):
        read_weights(file)
    assert not (tmp_path / "made").exists()


def test_without_torch_its_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"PK")
    with pytest.raises(UsageError, match="torch is not installed; install it, or convert"):
        read_weights(tmp_path / "x.pth")


def test_without_the_hubs_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'cnnfamily\[hub\]'"):
        read_weights("hf:timm/resnet50.tv_in1k")


@pytest.mark.parametrize(
    "setting", [pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.full), {"HF_ENDPOINT": "http://no.such.host.invalid"}]
)
def test_without_a_network_the_hub_is_one_line_at_once(tmp_path, setting):
    """Its library alone tries six times in 23 s. A process of its own, as the settings are read on import."""
    pytest.importorskip("huggingface_hub")
    code = "import time; from cnnfamily import weight_files; start = time.time()\ntry: weight_files.read_weights('hf:a/b')\n"
    code += "except Exception as error: print(type(error).__name__, error); print(time.time() - start)"
    environment = os.environ | {"HF_HOME": str(tmp_path)} | setting
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    message, seconds = done.stdout.splitlines()
    assert message.startswith("UsageError hf:a/b is not in the cache and cannot be fetched: ")
    assert float(seconds) < 10


def test_a_cached_file_of_the_hub_needs_no_network(tmp_path, monkeypatch, resnet18):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, local_files_only: resnet18[0])
    _, variables = cnnfamily.load_pretrained("resnet18", "hf:timm/resnet18.tv_in1k")
    assert_equal(variables, network_of("resnet18")[1])
    with pytest.raises(UsageError, match="expected hf:OWNER/REPO"):
        read_weights("hf:resnet18")


def test_fields_that_timm_computes_with_are_named(monkeypatch, capsys):
    """Loading the wrong ones would cost accuracy, and nothing else would tell."""
    network, variables = network_of("efficientnet_b0")
    tensors = cnnfamily.state_dict(network, variables, "timm")
    monkeypatch.setattr(weights, "read_weights", lambda file: tensors)
    cnnfamily.load_pretrained("efficientnet_b0", "hf:timm/efficientnet_b0.ra_in1k")
    assert not capsys.readouterr().err
    cnnfamily.load_pretrained("efficientnet_b0", "hf:timm/tf_efficientnet_b0.ns_jft_in1k", norm_epsilon=1e-3)
    assert "timm computes with padding='same', this network with 'symmetric'" in capsys.readouterr().err


def test_a_network_with_loaded_weights_computes(resnet18):
    network, variables = cnnfamily.load_pretrained(create_model("resnet18"), resnet18[0])
    logits = jax.jit(network.apply)(variables, IMAGES)
    expected = jax.jit(network.apply)(network_of("resnet18")[1], IMAGES)
    np.testing.assert_array_equal(logits, expected)


def test_what_cannot_be_written_is_one_line(tmp_path):
    network, variables = network_of("resnet18")
    with pytest.raises(UsageError, match=r"unknown scheme 'keras'; known: torchvision, timm"):
        cnnfamily.state_dict(network, variables, "keras")
    with pytest.raises(UsageError, match=r"variables: params/stem/kernel is missing; expected \(7, 7, 3, 64\)"):
        cnnfamily.state_dict(network, {"params": {}})
    with pytest.raises(UsageError, match=r"variables: params/classifier/kernel is of shape \(512, 7\); expected \(512, 1000\)"):
        cnnfamily.state_dict(network, network_of("resnet18", num_classes=7)[1])
    with pytest.raises(UsageError, match=r"ends in '.pth'; expected .safetensors"):
        weights.save_weights(tmp_path / "x.pth", network, variables)
    with pytest.raises(UsageError, match=r"x.safetensors cannot be written: .*No such file or directory"):
        weights.save_weights(tmp_path / "no" / "x.safetensors", network, variables)
    with pytest.raises(UsageError, match=r"unknown field of ResNet 'num_clases'; did you mean 'num_classes'"):
        cnnfamily.load_pretrained(network, {}, num_clases=3)


@pytest.mark.full
def test_a_googlenet_of_other_kernels_is_told_so():
    """Its input transform takes three channels only, which must not get in the way of finding the first convolution."""
    arrays = weights.state_dict(network := create_model("googlenet"), initialize(network, jax.random.key(0)))
    with pytest.raises(UsageError, match=r"does not fit GoogLeNet: 9 of another shape \(inception3a"):
        cnnfamily.load_pretrained(create_model("googlenet", kernel=5), arrays)
