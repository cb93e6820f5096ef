"""The names that torch code gives to the parameters of these networks, torchvision's and timm's, and Keras's.

A family contributes one function `FAMILY(network, scheme, paths) -> {path: name}`: `paths` are the paths of the network's
modules in order of execution ("stage1_block1/branch/conv1"), a name is the torch module's ("layer1.0.conv1"), or a `TorchName`
for a linear layer whose inputs torch orders otherwise. Every module that owns parameters needs a name; a block may have one,
which then can be compared too (see `convert`). A scheme that does not have the network gets no names at all: {}. Keras's
names need no such function: they are the classes of layers, counted (see `keras_files`, which also turns its layout to
torch's).
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from cnnfamily import keras_files
from cnnfamily.errors import UsageError
from cnnfamily.models import (
    alexnet,
    efficientnet,
    googlenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    variable_shapes,
    vgg,
)
from cnnfamily.scaling import round_filters, round_repeats

SCHEMES = ("torchvision", "timm")  # to write and compare
READABLE = (*SCHEMES, "keras")
COUNTER = "num_batches_tracked"  # torch counts the updates of batch statistics; here nothing depends on it
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@dataclasses.dataclass(frozen=True)
class TorchName:
    """A linear layer after a flatten: `inputs` is the (height, width, channels) of what it flattens.

    Here that is flattened with the channels last, in torch with the channels first. `convolution`: torch keeps the kernel as
    that of a convolution over the whole map, as timm's VGG does.
    """

    name: str
    inputs: tuple[int, int, int] | None = None
    convolution: bool = False


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a network: where it is in `variables`, of what shape, and how torch holds it."""

    path: tuple[str, ...]  # ("params", "stem", "kernel")
    shape: tuple[int, ...]
    torch: TorchName  # of the module

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.to_torch(np.broadcast_to(np.float32(0), self.shape)).shape

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """HWIO to OIHW, of every grouping alike; a linear kernel (inputs, units) to (units, inputs)."""
        if self.path[-1] != "kernel":
            return value
        if value.ndim == 4:
            return value.transpose(3, 2, 0, 1)
        if self.torch.inputs:
            value = value.reshape(*self.torch.inputs, -1).transpose(3, 2, 0, 1)
            return value if self.torch.convolution else value.reshape(len(value), -1)
        return value.T

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_torch`."""
        if self.path[-1] != "kernel":
            return value
        if self.torch.inputs:
            height, width, channels = self.torch.inputs
            return value.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, len(value))
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def torch_leaves(network: nn.Module, scheme: str) -> dict[str, Leaf]:
    """Every array of the network under its torch name, in order of execution; without torch's counters.

    Raises:
      UsageError: the network's family has no published weights, or a module of this network has no torch name.
    """
    shapes, paths = _shapes(network)
    names = torch_names(network, scheme, paths)
    leaves = {}
    for path, shape in shapes.items():
        owner = "/".join(path[1:-1])
        if owner not in names or path[-1] not in LEAVES:
            raise UsageError(f"{'/'.join(path[1:])} of this {type(network).__name__} has no name in {scheme}")
        leaves[f"{names[owner].name}.{LEAVES[path[-1]]}"] = Leaf(path, shape, names[owner])
    assert len(leaves) == len(shapes), "two arrays with one torch name"
    order = {pair: i for i, pair in enumerate((path, name) for path in paths for name in LEAVES)}
    return dict(sorted(leaves.items(), key=lambda item: order["/".join(item[1].path[1:-1]), item[1].path[-1]]))


def schemes_of(network: nn.Module) -> list[str]:
    """The schemes that have this network; errors as `torch_leaves`."""
    _, paths = _shapes(network)
    return [scheme for scheme in READABLE if torch_names(network, scheme, paths)]


def torch_names(network: nn.Module, scheme: str, paths: list[str]) -> dict[str, TorchName]:
    """The torch name of each of these modules that has one; in the scheme "keras" its class and number there."""
    if type(network) not in FAMILIES:
        known = ", ".join(sorted(family.__name__ for family in FAMILIES))
        raise UsageError(f"{type(network).__name__} has no published weights: expected a network of {known}")
    names = _keras(network, paths) if scheme == "keras" else FAMILIES[type(network)](network, scheme, paths)
    return {path: TorchName(name) if isinstance(name, str) else name for path, name in names.items()}


@functools.lru_cache(maxsize=32)  # one network is asked for in two schemes
def _shapes(network: nn.Module) -> tuple[dict[tuple[str, ...], tuple[int, ...]], list[str]]:
    """The shape of every array by its path, and the paths of all modules in order of execution."""
    paths = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        paths["/".join(context.module.path)] = None
        return output

    with nn.intercept_methods(record):
        variables = variable_shapes(network)
    kept = {name: variables[name] for name in ("params", "batch_stats")}
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(kept).items()}, [path for path in paths if path]


def _resnet(network: resnet.ResNet, scheme: str, paths: list[str]) -> dict[str, str | TorchName]:
    """Both schemes alike: timm took over torchvision's names; `se` is timm's own, of its `seresnet50`."""
    if network.preactivation:
        return _resnet_v2(network, paths) if scheme == "timm" and not network.se_reduction else {}
    names = {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}
    inside = {"branch/se/reduce": "se.fc1", "branch/se/expand": "se.fc2"}
    inside |= {"shortcut/conv": "downsample.0", "shortcut/norm": "downsample.1", "": ""}
    for i in (1, 2, 3):
        inside |= {f"branch/conv{i}": f"conv{i}", f"branch/norm{i}": f"bn{i}"}
    for path in paths:
        if match := re.fullmatch(r"stage(\d+)_block(\d+)/?(.*)", path):
            stage, block, rest = match.groups()
            if rest in inside:
                names[path] = f"layer{stage}.{int(block) - 1}.{inside[rest]}".rstrip(".")
    return names


def _resnet_v2(network: resnet.ResNet, paths: list[str]) -> dict[str, str | TorchName]:
    """timm's of its `resnetv2_50`, whose classifier is a convolution over the mean."""
    widened = round_filters(network.filters * 2 ** (len(network.stage_sizes) - 1), network.width)
    classifier = TorchName("head.fc", (1, 1, 4 * widened if network.block == "bottleneck" else widened), convolution=True)
    names = {"stem": "stem.conv", "head_norm": "norm", "classifier": classifier}
    for path in paths:
        if match := re.fullmatch(r"stage(\d+)_block(\d+)/(norm|shortcut/conv|branch/conv\d|branch/norm\d)", path):
            stage, block, rest = match.groups()
            rest = {"norm": "norm1", "shortcut/conv": "downsample.conv"}.get(rest, rest.removeprefix("branch/"))
            names[path] = f"stages.{int(stage) - 1}.blocks.{int(block) - 1}.{rest}"
    return names


def _torchvision_block(expands: bool, squeezes: bool) -> dict[str, str]:
    """Of an inverted residual: a list of layers, which begins with the expansion if there is one."""
    i = int(expands)
    inside = {"expand": "0.0", "expand_norm": "0.1", "depthwise": f"{i}.0", "depthwise_norm": f"{i}.1"}
    i += squeezes
    return inside | {"se/reduce": f"{i}.fc1", "se/expand": f"{i}.fc2", "project": f"{i + 1}.0", "project_norm": f"{i + 1}.1"}


def _timm_block(expands: bool) -> dict[str, str]:
    """Of an inverted residual; without expansion the projection is what elsewhere is the expansion, `conv_pw`."""
    norms = ("bn1", "bn2", "bn3") if expands else ("", "bn1", "bn2")
    inside = dict(zip(("expand_norm", "depthwise_norm", "project_norm"), norms, strict=True))
    inside |= {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl" if expands else "conv_pw"}
    return inside | {"se/reduce": "se.conv_reduce", "se/expand": "se.conv_expand"}


def _efficientnet(network: efficientnet.EfficientNet, scheme: str, paths: list[str]) -> dict[str, str]:
    torchvision = scheme == "torchvision"
    last = len(network.stages) + 1
    if torchvision:
        names = {"stem": "features.0.0", "stem_norm": "features.0.1", "classifier": "classifier.1"}
        names |= {"head": f"features.{last}.0", "head_norm": f"features.{last}.1"}
    else:
        names = {"stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2", "classifier": "classifier"}
    for path in paths:
        match = re.fullmatch(r"stage(\d+)_block(\d+)/?(.*)", path)
        if not match:
            continue
        stage, block = int(match[1]), int(match[2]) - 1
        expands = f"stage{stage}_block{block + 1}/expand" in paths
        if torchvision:
            inside, prefix = _torchvision_block(expands, network.se_ratio > 0), f"features.{stage}.{block}.block."
        else:
            inside, prefix = _timm_block(expands), f"blocks.{stage - 1}.{block}."
        if match[3] in inside:
            names[path] = prefix + inside[match[3]]
    return names


def _alexnet(network: alexnet.AlexNet, scheme: str, paths: list[str]) -> dict[str, str | TorchName]:
    """torchvision's; timm has no AlexNet."""
    if scheme != "torchvision":
        return {}
    maps = (6, 6, round_filters(network.filters[-1], network.width))
    names = {f"conv{i}": f"features.{layer}" for i, layer in enumerate((0, 3, 6, 8, 10), start=1)}
    return names | {"hidden1": TorchName("classifier.1", maps), "hidden2": "classifier.4", "classifier": "classifier.6"}


def _vgg(network: vgg.VGG, scheme: str, paths: list[str]) -> dict[str, str | TorchName]:
    """torch counts activations and pools as well; in timm the hidden layers are convolutions over the whole map."""
    names, layer, stage = {}, 0, "1"
    for path in paths:
        if match := re.fullmatch(r"stage(\d+)_conv\d+(_norm)?", path):
            layer += match[1] != stage  # a pool lies between
            stage = match[1]
            names[path] = f"features.{layer}"
            # An activation follows, behind the norm if there is one.
            layer += 1 if network.batch_norm and not match[2] else 2
    maps = (network.pooled, network.pooled, round_filters(vgg.FILTERS[len(network.stage_sizes) - 1], network.width))
    if scheme == "torchvision":
        return names | {"hidden1": TorchName("classifier.0", maps), "hidden2": "classifier.3", "classifier": "classifier.6"}
    point = (1, 1, round_filters(network.hidden, network.width))
    names |= {"hidden1": TorchName("pre_logits.fc1", maps, True), "hidden2": TorchName("pre_logits.fc2", point, True)}
    return names | {"classifier": "head.fc"}


def _googlenet(network: googlenet.GoogLeNet, scheme: str, paths: list[str]) -> dict[str, str | TorchName]:
    """torchvision's; timm has no GoogLeNet."""
    if scheme != "torchvision":
        return {}
    branches = {"branch2_reduce": "branch2.0", "branch2": "branch2.1", "branch3_reduce": "branch3.0", "branch3": "branch3.1"}
    branches |= {"branch1": "branch1", "branch4": "branch4.1"}
    names = {"classifier": "fc"}
    for path in paths:
        first, _, rest = path.partition("/")
        if first.startswith("inception") and rest:
            branch, _, layer = rest.partition("/")
            rest = f"{branches[branch]}/{layer}".rstrip("/")
        elif first.startswith("aux"):
            rest = {"hidden": "fc1", "classifier": "fc2"}.get(rest, rest)
        if path != "classifier":
            names[path] = f"{first}/{rest}".rstrip("/").replace("/norm", "/bn").replace("/", ".")
    for head in {path.partition("/")[0] for path in paths if path.startswith("aux")}:
        names[f"{head}/hidden"] = TorchName(f"{head}.fc1", (4, 4, 128))
    return names


def _mobilenet_v1(network: mobilenet_v1.MobileNetV1, scheme: str, paths: list[str]) -> dict[str, str]:
    """timm's; torchvision has no MobileNetV1."""
    if scheme != "timm":
        return {}
    names = {"stem": "conv_stem", "stem_norm": "bn1", "classifier": "classifier"}
    inside = {"depthwise": "conv_dw", "depthwise_norm": "bn1", "pointwise": "conv_pw", "pointwise_norm": "bn2"}
    stages = (1, 2, 2, 6, 2)  # blocks of the same filters
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(stages) for block in range(count)]
    return names | {
        f"block{i + 1}/{ours}": f"{place}.{torch}" for i, place in enumerate(places) for ours, torch in inside.items()
    }


def _mobilenet_v2(network: mobilenet_v2.MobileNetV2, scheme: str, paths: list[str]) -> dict[str, str]:
    blocks = list(dict.fromkeys(path.partition("/")[0] for path in paths if path.startswith("stage")))
    if scheme == "torchvision":
        names = {"stem": "features.0.0", "stem_norm": "features.0.1", "classifier": "classifier.1"}
        names |= {"head": f"features.{len(blocks) + 1}.0", "head_norm": f"features.{len(blocks) + 1}.1"}
    else:
        names = {"stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2", "classifier": "classifier"}
    for i, block in enumerate(blocks):
        expands = f"{block}/expand" in paths
        if scheme == "torchvision":
            first = int(expands)
            inside = {"expand": "0.0", "expand_norm": "0.1", "depthwise": f"{first}.0", "depthwise_norm": f"{first}.1"}
            inside |= {"project": f"{first + 1}", "project_norm": f"{first + 2}"}
            prefix = f"features.{i + 1}.conv."
        else:
            inside, (stage, number) = _timm_block(expands), re.findall(r"\d+", block)
            prefix = f"blocks.{int(stage) - 1}.{int(number) - 1}."
        names |= {f"{block}/{ours}": prefix + torch for ours, torch in inside.items()}
    return names


def _mobilenet_v3(network: mobilenet_v3.MobileNetV3, scheme: str, paths: list[str]) -> dict[str, str | TorchName]:
    blocks = list(dict.fromkeys(path.partition("/")[0] for path in paths if path.startswith("stage")))
    filters = [row[2] for row in network.stages for _ in range(round_repeats(1, network.depth))]
    if scheme == "torchvision":
        names = {"stem": "features.0.0", "stem_norm": "features.0.1", "hidden": "classifier.0", "classifier": "classifier.3"}
        names |= {"head": f"features.{len(blocks) + 1}.0", "head_norm": f"features.{len(blocks) + 1}.1"}
    else:  # in stages of the same filters; the head is their last, and the hidden layer a convolution over the mean
        stages = len(set(filters))
        hidden = 6 * round_filters(filters[-1], network.width)
        names = {
            "stem": "conv_stem",
            "stem_norm": "bn1",
            "head": f"blocks.{stages}.0.conv",
            "head_norm": f"blocks.{stages}.0.bn1",
        }
        names |= {"hidden": TorchName("conv_head", (1, 1, hidden), True), "classifier": "classifier"}
    for i, block in enumerate(blocks):
        expands = f"{block}/expand" in paths
        if scheme == "torchvision":
            inside, prefix = _torchvision_block(expands, f"{block}/se" in paths), f"features.{i + 1}.block."
        else:
            inside, stage = _timm_block(expands), len(set(filters[: i + 1])) - 1
            prefix = f"blocks.{stage}.{i - filters.index(filters[i])}."
        names |= {f"{block}/{ours}": prefix + torch for ours, torch in inside.items()}
    return names


def _keras(network: nn.Module, paths: list[str]) -> dict[str, str | TorchName]:
    """The class of each layer and its number among those of its class, in order of execution: "depthwise_conv2d_3"."""
    if type(network) not in keras_files.NETWORKS:
        return {}
    shapes, names, counts = _shapes(network)[0], {}, collections.Counter()
    for path in paths:
        kernel = shapes.get(("params", *path.split("/"), "kernel"))
        if ("params", *path.split("/"), "scale") in shapes:
            kind = "batch_normalization"
        elif kernel is None:
            continue
        elif len(kernel) == 2:
            kind = keras_files.NETWORKS[type(network)]
        else:
            kind = "depthwise_conv2d" if path.endswith("depthwise") else "conv2d"
        names[path] = keras_files.numbered(kind, counts[kind])
        if kind == "conv2d" and len(kernel) == 2:
            names[path] = TorchName(names[path], (1, 1, kernel[0]), convolution=True)
        counts[kind] += 1
    return names


# A family's class -> the function that gives its modules their torch names.
FAMILIES: dict[type[nn.Module], Callable[[nn.Module, str, list[str]], dict[str, str | TorchName]]] = {
    alexnet.AlexNet: _alexnet,
    vgg.VGG: _vgg,
    resnet.ResNet: _resnet,
    googlenet.GoogLeNet: _googlenet,
    mobilenet_v1.MobileNetV1: _mobilenet_v1,
    mobilenet_v2.MobileNetV2: _mobilenet_v2,
    mobilenet_v3.MobileNetV3: _mobilenet_v3,
    efficientnet.EfficientNet: _efficientnet,
}
