"""The names that torch code gives to the parameters of these networks: torchvision's and timm's.

A family contributes one function `FAMILY(network, scheme, paths) -> {path: name}`: `paths` are the paths of the network's
modules in order of execution ("stage1_block1/branch/conv1"), a name is the torch module's ("layer1.0.conv1"), or a `TorchName`
for a linear layer whose inputs torch orders otherwise. Every module that owns parameters needs a name; a block may have one,
which then can be compared too (see `convert`). A scheme that does not have the network gets no names at all: {}.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from cnnfamily.errors import UsageError
from cnnfamily.models import efficientnet, resnet

SCHEMES = ("torchvision", "timm")
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
    return [scheme for scheme in SCHEMES if torch_names(network, scheme, paths)]


def torch_names(network: nn.Module, scheme: str, paths: list[str]) -> dict[str, TorchName]:
    """The torch name of each of these modules that has one."""
    if type(network) not in FAMILIES:
        known = ", ".join(sorted(family.__name__ for family in FAMILIES))
        raise UsageError(f"{type(network).__name__} has no published weights: expected a network of {known}")
    names = FAMILIES[type(network)](network, scheme, paths)
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
        image = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, network.in_channels), jnp.float32)
        variables = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image)
    kept = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(kept).items()}, [path for path in paths if path]


def _resnet(network: resnet.ResNet, scheme: str, paths: list[str]) -> dict[str, str]:
    """Both schemes alike: timm took over torchvision's names; `se` is timm's own, of its `seresnet50`."""
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
        if torchvision:  # a list of layers, which begins with the expansion if there is one
            i = int(expands)
            inside = {"expand": "0.0", "expand_norm": "0.1", "depthwise": f"{i}.0", "depthwise_norm": f"{i}.1"}
            i += network.se_ratio > 0
            inside |= {"se/reduce": f"{i}.fc1", "se/expand": f"{i}.fc2", "project": f"{i + 1}.0", "project_norm": f"{i + 1}.1"}
            prefix = f"features.{stage}.{block}.block."
        else:
            norms = ("bn1", "bn2", "bn3") if expands else ("", "bn1", "bn2")
            inside = dict(zip(("expand_norm", "depthwise_norm", "project_norm"), norms, strict=True))
            inside |= {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl" if expands else "conv_pw"}
            inside |= {"se/reduce": "se.conv_reduce", "se/expand": "se.conv_expand"}
            prefix = f"blocks.{stage - 1}.{block}."
        if match[3] in inside:
            names[path] = prefix + inside[match[3]]
    return names


# A family's class -> the function that gives its modules their torch names.
FAMILIES: dict[type[nn.Module], Callable[[nn.Module, str, list[str]], dict[str, str | TorchName]]] = {
    resnet.ResNet: _resnet,
    efficientnet.EfficientNet: _efficientnet,
}
