"""Our networks beside torchvision's and timm's, live: `pytest -m parity -n 0 tests/test_parity.py` where torch is installed."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from PIL import Image
from torchvision_keys import read_keys

import cnnfamily
from cnnfamily import convert, naming, predict, weights
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, list_models
from cnnfamily.weight_files import read_weights

pytestmark = [
    pytest.mark.parity,
    # jax's strict promotion and the suite's warnings as errors are for our code; these come from importing torch's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4  # of the largest logit, in float32; measured 1e-6 to 1e-5
ODD = 97
NETWORKS = sorted(set(read_keys()) & set(list_models()))
# The fields that make training deterministic, here and there: what is drawn differs from framework to framework.
STEADY = {"dropout": 0.0, "aux_dropout": 0.0, "stochastic_depth": 0.0, "aux": True}


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_num_threads(2)
    return module


@pytest.fixture(scope="module", autouse=True)
def _torchvision(torch):
    try:
        parity.import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_torchvisions(name):
    """At 224 pixels and at an odd size, where paddings differ."""
    theirs = parity.torch_network(name)
    for resolution in (224, ODD):
        assert parity.difference(name, theirs, resolution) <= TOLERANCE


PREACTIVATION = {"preactivation": True}  # two of timm's rows, which torchvision has not


@pytest.mark.parametrize(
    ("name", "timms", "fields"),
    [
        ("resnet50", "resnet50", {}),
        ("se_resnet50", "seresnet50", {}),
        ("efficientnet_b0", "efficientnet_b0", {}),
        ("resnet18", "resnetv2_18", PREACTIVATION),
        ("resnet50", "resnetv2_50", PREACTIVATION),
    ],
)
def test_logits_are_timms(name, timms, fields):
    pytest.importorskip("timm")
    theirs = parity.torch_network(timms, "timm")
    for resolution in (64, ODD):
        assert parity.difference(name, theirs, resolution, **fields) <= TOLERANCE


STEPS = ("alexnet", "vgg11_bn", "resnet18", "googlenet", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("x64")
def test_a_training_step_is_torchvisions(name, torch):
    """Loss (GoogLeNet's with its auxiliary classifiers), every gradient and the updated statistics, in float64: no luck.

    torch keeps the unbiased variance of a batch, n / (n - 1) times the one it normalises with; we keep the latter.
    """
    theirs = parity.torch_network(name).double().train()
    counts = {}
    for key, module in theirs.named_modules():
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        if isinstance(module, torch.nn.Hardsigmoid):  # torch's own gradient is 1/6 in float32 for float64 too
            module.forward = lambda x: torch.nn.functional.relu6(x + 3) / 6
        if hasattr(module, "running_var"):
            module.register_forward_pre_hook(lambda m, x, key=key: counts.update({key: x[0].numel() // x[0].shape[1]}))
    fields = {key: value for key, value in STEADY.items() if hasattr(create_model(name), key)}
    heads = name == "googlenet"
    network, variables = cnnfamily.load_pretrained(name, theirs.state_dict(), dtype="float64", **fields)
    images, labels = parity.images_of(64, batch=8).astype(np.float64), np.arange(8) * 100

    def loss_of(params):
        mutable = ["batch_stats", "aux_logits"]
        logits, updated = network.apply(variables | {"params": params}, images, train=True, mutable=mutable)
        losses = [
            -jnp.mean(jax.nn.log_softmax(x)[jnp.arange(8), labels])
            for x in (logits, *jax.tree.leaves(updated.get("aux_logits")))
        ]
        return losses[0] + 0.3 * sum(losses[1:]), updated.get("batch_stats", {})

    (loss, statistics), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    outputs = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    outputs = (outputs.logits, outputs.aux_logits1, outputs.aux_logits2) if heads else (outputs,)
    first, *others = (torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)) for logits in outputs)
    expected_loss = first + 0.3 * sum(others)
    expected_loss.backward()
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-9)
    ours = weights.state_dict(network, {"params": gradients, "batch_stats": statistics})
    for key, parameter in theirs.named_parameters():
        scale = np.abs(parameter.grad.numpy()).max()
        # A bias or kernel before a norm has no gradient but rounding.
        np.testing.assert_allclose(ours[key], parameter.grad.numpy(), rtol=0, atol=max(1e-8 * scale, 1e-10), err_msg=key)
    for module, norm in theirs.named_modules():
        if module in counts:
            np.testing.assert_allclose(ours[f"{module}.running_mean"], norm.running_mean.numpy(), rtol=1e-8, atol=1e-10)
            kept = (1 - norm.momentum) * before[f"{module}.running_var"]
            biased = kept + (norm.running_var - kept) * (counts[module] - 1) / counts[module]
            np.testing.assert_allclose(ours[f"{module}.running_var"], biased.numpy(), rtol=1e-8, err_msg=module)


def test_torch_takes_our_state_dict(torch):
    """Written from here and loaded there with all keys, the logits are the same."""
    theirs = parity.torch_network("resnet18")
    network, variables = cnnfamily.load_pretrained("resnet18", theirs.state_dict())
    other = parity.import_torchvision().models.resnet18()
    other.load_state_dict({key: torch.from_numpy(value) for key, value in weights.state_dict(network, variables).items()})
    images = torch.from_numpy(parity.images_of(64).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        assert torch.equal(theirs(images), other.eval()(images))


def test_the_top_five_of_an_image_file_are_torchvisions(tmp_path, torch):
    """From a `.pth` file and a JPEG by way of the command's function: the classes, their names and probabilities."""
    torchvision = parity.import_torchvision()
    theirs = parity.torch_network("resnet50")
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    photo = np.random.default_rng(0).normal(size=(9, 12, 3)).repeat(40, axis=0).repeat(40, axis=1)  # patches of colour
    Image.fromarray(np.uint8(np.clip(127 + 60 * photo, 0, 255))).save(tmp_path / "photo.jpg")
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    with torch.no_grad():
        probabilities = theirs(published.transforms()(Image.open(tmp_path / "photo.jpg"))[None]).softmax(1)[0]
    values, indices = probabilities.topk(5)
    (row,) = predict.predict_with_weights("resnet50.IMAGENET1K_V2", tmp_path / "resnet50.pth", [tmp_path / "photo.jpg"])
    assert [name for name, _ in row] == [published.meta["categories"][i] for i in indices]
    assert [share for _, share in row] == pytest.approx(values.tolist(), rel=1e-3)


def test_activations_of_hooks_agree_layer_by_layer(torch):
    """And a norm's epsilon that differs is found from them."""
    theirs = parity.torch_network("efficientnet_b0")
    network, variables = cnnfamily.load_pretrained("efficientnet_b0", theirs.state_dict())
    images = parity.images_of(64)
    recorded = {"input": images.transpose(0, 3, 1, 2).copy()}
    for name, module in theirs.named_modules():
        module.register_forward_hook(lambda m, x, y, name=name: recorded.update({name: y.detach().clone().numpy()}))
    with torch.no_grad():
        theirs(torch.from_numpy(recorded["input"]))
    (line,) = convert.explain(network, variables, recorded)
    assert line.startswith(f"all {len({leaf.torch for leaf in naming.torch_leaves(network, 'torchvision').values()})} layers")
    lines = list(convert.explain(network.clone(norm_epsilon=1e-3), variables, recorded))
    assert lines[0].startswith("features.0.1 differs")
    assert lines[1].startswith("with norm_epsilon=1e-05: all ")


class Code:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"model": d, "epoch": 3}, lambda d: {"state_dict": d}])
def test_files_of_torch_are_read(tmp_path, torch, wrap):
    tensors = parity.import_torchvision().models.resnet18().half().state_dict()
    torch.save(wrap({f"module.{key}": value for key, value in tensors.items()}), tmp_path / "x.pth")
    read = read_weights(tmp_path / "x.pth")
    assert read["conv1.weight"].dtype == np.float32
    np.testing.assert_array_equal(read["conv1.weight"], tensors["conv1.weight"].float().numpy())
    assert len(cnnfamily.load_pretrained("resnet18", tmp_path / "x.pth")[1]["params"]) == 11


def test_averaged_weights_are_taken_first(tmp_path, torch, capsys):
    torch.save({"model": {"a": torch.zeros(2)}, "model_ema": {"n_averaged": 5, "module.a": torch.ones(2)}}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth")["a"].tolist() == [1, 1]
    assert "holds model_ema, model: took model_ema" in capsys.readouterr().err


def test_bad_files_of_torch_are_one_line(tmp_path, torch):
    code, file = Code(), tmp_path / "x.pth"
    code.folder = str(tmp_path / "made")
    torch.save({"a": torch.ones(1000), "b": code}, file)
    with pytest.raises(UsageError, match="is damaged, or holds more than weights, which is not run: "):
        read_weights(file)
    file.write_bytes(pickle.dumps(code))
    with pytest.raises(UsageError, match="which is not run: "):
        read_weights(file)
    assert not (tmp_path / "made").exists()
    torch.save({"a": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-5], b"some text"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="is damaged") as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)
    torch.save([torch.ones(3)], file)
    with pytest.raises(UsageError, match="holds list; expected a state dict"):
        read_weights(file)
    torch.save({"a": torch.ones(3), "epoch": 3}, file)
    with pytest.raises(UsageError, match="epoch is int; expected a tensor"):
        read_weights(file)
