"""Published weights in and out of a network: torch's names and layout, in torchvision's or timm's scheme, and Keras's
files (see `naming`, `keras_files`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cnnfamily import disk, keras_files, naming
from cnnfamily.errors import UsageError, unknown, warn
from cnnfamily.models import NETWORKS, create_model, initialize
from cnnfamily.models.layers import parameter_dtype_of
from cnnfamily.weight_files import HUB, read_weights, tidy

# What a network may leave out: classifiers of torchvision's GoogLeNet, the normalisation of images in Keras's EfficientNet.
AUXILIARY = ("aux1.", "aux2.", "normalization.")


def load_pretrained(
    network: str | nn.Module, file: str | Path | Mapping[str, Any], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the weights of a file: `network.apply(variables, images)`.

    Where `num_classes` is given here and the file has another number, the classifier is drawn anew (from key 0). A first
    convolution over three channels is adapted to `in_channels`, so that it answers as before where all channels are alike: for
    one channel the kernel is summed over its inputs, for others they are repeated in turn and scaled by 3 / in_channels. A line
    on standard error says so.

    A file says nothing about fields: timm's own EfficientNets all have `norm_epsilon=1e-5`, those whose names begin with `tf_`
    `norm_epsilon=1e-3, padding="same"`; networks here are torchvision's. Keras's MobileNets and EfficientNets are all
    `norm_epsilon=1e-3, padding="same"`, V1 with `activation="relu6"`, V3 with `width_rule="keras"`: of a network given by its
    name a Keras file sets these where no override does, and a line says so, and what images the network expects.

    Args:
      network: a name, or a network; one with published weights.
      file: a `.safetensors` or `.pth` file, one of Keras's (`.h5`, `.weights.h5`, `.keras`), `hf:OWNER/REPO[/FILE]` on the
        Hugging Face Hub, or a state dict.
      overrides: fields of the network.

    Raises:
      UsageError: no such file, a damaged one, or one that does not hold this network's weights, all of them and no others.
    """
    named = isinstance(network, str)
    if named:
        name, network = network, create_model(network, **overrides)
    else:
        name = type(network).__name__
        for field in overrides:
            if field not in network.__dataclass_fields__:
                raise unknown(f"field of {name}", field, sorted(network.__dataclass_fields__))
        network = network.clone(**overrides)
    source = "the state dict" if isinstance(file, Mapping) else str(file)
    tensors = tidy(file, source) if isinstance(file, Mapping) else read_weights(file)
    unset = {}
    if named and keras_files.FIRST in tensors:
        unset = {field: value for field, value in keras_files.fields_of(network).items() if field not in overrides}
        unset = {field: value for field, value in unset.items() if getattr(network, field) != value}
        network = network.clone(**unset)  # before the arrays are looked at: a width rule decides on their shapes
    fits = [_fit(network, scheme, tensors, "num_classes" in overrides) for scheme in naming.schemes_of(network)]
    fit = min(fits, key=lambda fit: fit.faults)
    if fit.faults:
        raise UsageError(f"{source} does not fit {name}: {fit.describe()}{_resembling(tensors, name, fit)}")
    for note in fit.notes:
        warn(f"{source}: {note}")
    if fit.scheme == "keras":
        warn(f"{source} is Keras's: {_text_of(unset)}images are {keras_files.images_of(network, tensors)}")
    _warn_of_fields(network, source, fit.scheme)
    if fit.fresh:
        modules = [leaf.path[1:-1] for leaf in fit.fresh]
        drawn = flatten_dict(initialize(network, jax.random.key(0), modules=modules))
        fit.values.update({leaf.path: drawn[leaf.path] for leaf in fit.fresh})
    dtype = parameter_dtype_of(network.dtype)
    # Copied: on a CPU JAX shares the memory of a NumPy array that is aligned, as those of a torch network are, which may train
    # on. Not by `jnp.array`, which compiles a program for every shape.
    values = {path: jax.device_put(np.array(x, dtype, order="C")) for path, x in fit.values.items()}
    return network, {"batch_stats": {}} | unflatten_dict(values)


def state_dict(network: nn.Module, variables: Mapping[str, Any], scheme: str = "torchvision") -> dict[str, np.ndarray]:
    """The variables by torch's names and in torch's layout, copied, as `load_state_dict` of the torch network takes them.

    Raises:
      UsageError: the network has no names in this scheme, or the variables are not this network's.
    """
    if scheme not in naming.SCHEMES:
        raise unknown("scheme", scheme, naming.SCHEMES)
    values, tensors = flatten_dict({**variables}), {}
    for key, leaf in naming.torch_leaves(network, scheme).items():
        value = values.get(leaf.path)
        if value is None or value.shape != leaf.shape:
            found = "missing" if value is None else f"of shape {value.shape}"
            raise UsageError(f"variables: {'/'.join(leaf.path)} is {found}; expected {leaf.shape}")
        # Contiguous, because safetensors writes others in a wrong order; copied, because NumPy only views what JAX holds.
        tensors[key] = np.array(leaf.to_torch(np.asarray(value)), order="C")
        if leaf.path[-1] == "var":
            tensors[f"{key.rpartition('.')[0]}.{naming.COUNTER}"] = np.zeros((), np.int64)
    return tensors


def save_weights(file: str | Path, network: nn.Module, variables: Mapping[str, Any], scheme: str = "torchvision") -> None:
    """Writes the variables to a `.safetensors` file that torchvision or timm, and `load_pretrained`, can read."""
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UsageError(f"{file} ends in {file.suffix!r}; expected .safetensors")
    tensors = state_dict(network, variables, scheme)
    with disk.writing(file, (OSError, safetensors.SafetensorError)), disk.replacing(file) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})  # as torch's own files say


@dataclasses.dataclass
class _Fit:
    """What came of reading a state dict as a network's in one scheme."""

    scheme: str
    common: int = 0  # keys that both have
    values: dict[tuple[str, ...], np.ndarray] = dataclasses.field(default_factory=dict)
    fresh: list[naming.Leaf] = dataclasses.field(default_factory=list)  # to be drawn anew
    notes: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    left_over: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    hint: str = ""

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.left_over) + len(self.misshapen)

    def describe(self) -> str:
        """`2 of 122 arrays missing (fc.weight, fc.bias), 1 left over (head.weight)`."""
        kinds = {
            f"of {self.common + len(self.missing)} arrays missing": self.missing,
            "left over": self.left_over,
            "of another shape": self.misshapen,
        }
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3] + ['...'] * (len(keys) > 3))})" for what, keys in kinds.items() if keys
        ]
        return ", ".join(parts) + self.hint


def _fit(network: nn.Module, scheme: str, tensors: dict[str, np.ndarray], new_classifier: bool = False) -> _Fit:
    """Reads the arrays into the network's places as far as names and shapes allow, and records where they do not."""
    fit, leaves, following = _Fit(scheme), naming.torch_leaves(network, scheme), {}

    def follows(leaf: naming.Leaf, field: str) -> bool:
        """Whether the leaf's shape depends on this field; so a classifier is known, and a first convolution."""
        if field not in following:
            changed = {field: getattr(network, field) + 1}
            if getattr(network, "transform_input", False):  # GoogLeNet's, of three channels only; it has no arrays
                changed["transform_input"] = False
            other = naming.torch_leaves(network.clone(**changed), scheme)
            following[field] = set(leaves.values()) - set(other.values())
        return leaf in following[field]

    for key, leaf in leaves.items():
        value, shape = tensors.get(key), leaf.torch_shape
        fit.common += value is not None
        if value is not None and value.shape != shape and value.ndim == 4 and follows(leaf, "in_channels"):
            value = _adapt_channels(value, shape, fit.notes)
        if value is not None and value.shape == shape:
            fit.values[leaf.path] = leaf.from_torch(value)
            continue
        found = "missing" if value is None else f"{_text(value.shape)} instead of {_text(shape)}"
        if (value is None or value.shape[1:] == shape[1:]) and follows(leaf, "num_classes"):
            if new_classifier:
                fit.fresh.append(leaf)
                if key.endswith("weight"):
                    fit.notes.append(f"{key} {found}: this classifier is drawn anew")
                continue
            if value is not None:
                fit.hint = f"; num_classes={value.shape[0]} reads it"
        if value is None:
            fit.missing.append(key)
        else:
            fit.misshapen.append(f"{key} {found}")
    ignored = [prefix for prefix in AUXILIARY if not any(key.startswith(prefix) for key in leaves)]
    fit.left_over = [
        key for key in tensors if key not in leaves and not key.endswith(naming.COUNTER) and not key.startswith((*ignored,))
    ]
    return fit


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _adapt_channels(kernel: np.ndarray, shape: tuple[int, ...], notes: list[str]) -> np.ndarray:
    """A kernel (O, 3, H, W) for another number of input channels; others as they are."""
    channels = shape[1]
    if kernel.shape[1] != 3 or (kernel.shape[0], *kernel.shape[2:]) != (shape[0], *shape[2:]):
        return kernel
    notes.append(f"the first convolution takes 3 channels: adapted to in_channels={channels}")
    if channels == 1:
        return kernel.sum(axis=1, keepdims=True)
    return kernel[:, np.arange(channels) % 3] * np.asarray(3 / channels, kernel.dtype)


def _resembling(tensors: dict[str, np.ndarray], name: str, fit: _Fit) -> str:
    """`; it looks like resnet18`: the other network whose arrays these are, but for a tenth of them at most."""
    tenth = len(tensors) // 10
    if fit.faults <= tenth:
        return ""
    families = {}
    for other, (family, _) in NETWORKS.items():
        published = "cifar" not in other and "plain" not in other
        if family in naming.FAMILIES and published and other.removesuffix("_v1") not in families.get(family, []):
            families.setdefault(family, []).append(other)  # resnet50_v1 has the arrays of resnet50

    arrays = {(key, value.shape) for key, value in tensors.items() if not key.endswith(naming.COUNTER)}
    keys = {key for key, _ in arrays}

    def expected(other: str) -> list[set[tuple[str, tuple[int, ...]]]]:
        candidate = create_model(other)
        leaves = (naming.torch_leaves(candidate, scheme) for scheme in naming.schemes_of(candidate))
        return [{(key, leaf.torch_shape) for key, leaf in each.items()} for each in leaves]

    def common(other: str) -> int:
        return max(len(keys & {key for key, _ in each}) for each in expected(other))

    # By names alone the family, then by shapes the variant: tracing all the networks would take ten times as long.
    shared, family = max(((common(names[0]), family) for family, names in families.items()), key=lambda pair: pair[0])
    for other in families[family] if shared > tenth else ():
        if other != name and min(len(arrays ^ each) for each in expected(other)) <= tenth:
            return f"; it looks like {other}"
    return ""


def _text_of(fields: dict[str, Any]) -> str:
    return "set " + ", ".join(f"{field}={value!r}" for field, value in fields.items()) + "; " if fields else ""


def _warn_of_fields(network: nn.Module, source: str, scheme: str) -> None:
    """A line where Keras or timm computes with other fields than the network's, which would only cost accuracy."""
    if scheme == "keras":
        owner, theirs = "Keras", keras_files.fields_of(network)
    elif source.startswith(f"{HUB}timm/"):
        owner, theirs = "timm", {"padding": "symmetric", "norm_epsilon": 1e-5}
        if "/tf_" in source:
            theirs = {"padding": "same", "norm_epsilon": 1e-3}
    else:
        return
    for field, value in theirs.items():
        ours = getattr(network, field, value)
        if ours != value:
            warn(f"{source}: {owner} computes with {field}={value!r}, this network with {ours!r}; pass {field}={value!r}")
