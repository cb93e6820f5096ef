"""Keras's files of weights: `.weights.h5` and `.keras` as Keras 3 saves them, and the older `.h5` of keras.applications.

A layer is known by its class and its number in the order of execution, "depthwise_conv2d_3". So Keras 3 names it in a file,
and in that order Keras reads the older files, which have layers by names that changed from release to release.

Keras pads V1 at every size as at even ones, so it computes what padding "same" does where sides are multiples of 32; the others
do so at every size that their model was built for, and where it was built for none as at even ones.
"""

import collections
import io
import itertools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import linen as nn

from cnnfamily.errors import UsageError, one_line
from cnnfamily.models import efficientnet, mobilenet_v1, mobilenet_v2, mobilenet_v3

NETWORKS = {  # that keras.applications has too -> the class of their last layers; a convolution is one over the mean
    mobilenet_v1.MobileNetV1: "conv2d",
    mobilenet_v2.MobileNetV2: "dense",
    mobilenet_v3.MobileNetV3: "conv2d",
    efficientnet.EfficientNet: "dense",
}
SUFFIXES = (".h5", ".hdf5", ".keras")
FIRST = "conv2d.weight"  # of the first convolution, which all of its networks have and torch names otherwise
LARGEST = 1 << 32  # bytes of one array: a small file can declare terabytes
STD = (0.229, 0.224, 0.225)  # of ImageNet's pixels
LEAVES = {  # the arrays of a layer, in Keras's order, by torch's names where torch has them
    "conv2d": ("weight", "bias"),
    "depthwise_conv2d": ("weight", "bias"),
    "dense": ("weight", "bias"),
    "batch_normalization": ("weight", "bias", "running_mean", "running_var"),
    "normalization": ("mean", "variance", "count"),  # of images, inside Keras's EfficientNet
}


def read_keras(path: Path, source: str) -> dict[str, np.ndarray]:
    """The arrays by names such as "conv2d_7.weight", in torch's layout as those of other files.

    Raises:
      UsageError: h5py is not installed; a damaged file, or one that no Keras wrote.
    """
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{source} is Keras's format, and h5py is not installed; pip install 'cnnfamily[keras]'") from None
    try:
        content = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("model.weights.h5").file_size > LARGEST:
                    raise UsageError(f"{source} declares more than {LARGEST} bytes of weights")
                content = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content, "r") as file:
            datasets = {}
            # Visiting does not follow links, which may lead to other files.
            file.visititems(lambda name, item: datasets.update({name: item}) if isinstance(item, h5py.Dataset) else None)
            layers = list(_layers_by_name(file, datasets) or _layers_by_class(datasets))
            return {key: value for layer, arrays in layers for key, value in _in_torchs_layout(layer, arrays)}
    except UsageError:
        raise
    except Exception as error:  # of damaged files h5py raises OSError, KeyError, RuntimeError and more, zipfile its own
        reason = one_line(str(error))[:200] or type(error).__name__
        raise UsageError(f"{source} is damaged or no file of Keras's: {reason}") from error


def _layers_by_name(file: Any, datasets: dict[str, Any]) -> Iterator[tuple[str, list[np.ndarray]]] | None:
    """Of the older format: attributes list the layers and their arrays; the class follows from the shapes."""
    root = file.get("model_weights", file)  # a whole model, or its weights alone
    if not _attribute(root, "layer_names"):
        return None
    prefix, counts = root.name.strip("/"), collections.Counter()

    def layers():
        for layer in _attribute(root, "layer_names"):
            names = _attribute(root[layer], "weight_names")
            arrays = [_read(datasets[f"{prefix}/{layer}/{name}".lstrip("/")]) for name in names]
            if arrays:
                kind = _class_of([array.shape for array in arrays])
                yield numbered(kind, counts[kind]), arrays
                counts[kind] += 1

    return layers()


def _class_of(shapes: list[tuple[int, ...]]) -> str:
    if len(shapes[0]) == 4:
        # (height, width, channels, 1); a single filter has only a classifier of one class, which is 1x1.
        return "depthwise_conv2d" if shapes[0][3] == 1 and shapes[0][0] > 1 else "conv2d"
    if len(shapes[0]) == 2:
        return "dense"
    return "batch_normalization" if len(shapes) == 4 else "normalization"


def _layers_by_class(datasets: dict[str, Any]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Of Keras 3: `layers/CLASS_NUMBER/vars/INDEX`; TensorFlow 2.13 wrote other words for `layers`."""
    layers = collections.defaultdict(dict)
    for name, dataset in datasets.items():
        if match := re.fullmatch(r"(?:layers|_layer_checkpoint_dependencies)/([^/]+)/vars/(\d+)", name):
            layers[match[1]][int(match[2])] = dataset
    return ((layer, [_read(arrays[i]) for i in sorted(arrays)]) for layer, arrays in layers.items())


def _attribute(group: Any, name: str) -> list[str]:
    """The strings of an attribute, which Keras cuts into NAME0, NAME1, ... where it is long."""
    parts = itertools.takewhile(lambda part: part in group.attrs, (f"{name}{i}" for i in itertools.count()))
    parts = [name] if name in group.attrs else list(parts)
    return [text.decode() if isinstance(text, bytes) else str(text) for part in parts for text in group.attrs[part]]


def _read(dataset: Any) -> np.ndarray:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} lies in another file")
    if dataset.nbytes > LARGEST:
        raise ValueError(f"{dataset.name} declares {dataset.nbytes} bytes")
    value = dataset[()]
    return value.view(ml_dtypes.bfloat16) if dataset.attrs.get("dtype") == "bfloat16" else value


def _in_torchs_layout(layer: str, arrays: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """HWIO to OIHW, a depthwise (height, width, channels, 1) to (channels, 1, height, width), a linear (I, O) to (O, I)."""
    kind = re.sub(r"_\d+$", "", layer)
    for i, array in enumerate(arrays):
        leaves = LEAVES.get(kind, ())
        if array.ndim == 4:
            array = array.transpose((2, 3, 0, 1) if kind == "depthwise_conv2d" else (3, 2, 0, 1))
        yield f"{layer}.{leaves[i] if i < len(leaves) else i}", array.T if array.ndim == 2 else array


def numbered(kind: str, number: int) -> str:
    """Keras's name for the layer of a class: "conv2d", "conv2d_1", "conv2d_2", ..."""
    return f"{kind}_{number}" if number else kind


def fields_of(network: nn.Module) -> dict[str, Any]:
    """The fields with which keras.applications computes this network; {} of those that it lacks."""
    if type(network) not in NETWORKS:
        return {}
    fields = {"padding": "same", "norm_epsilon": 1e-3}
    if isinstance(network, mobilenet_v1.MobileNetV1):
        fields["activation"] = "relu6"
    if isinstance(network, mobilenet_v3.MobileNetV3) and network.width != 1:
        fields["width_rule"] = "keras"
    return fields


def images_of(network: nn.Module, tensors: Mapping[str, np.ndarray]) -> str:
    """What Keras makes of pixels from 0 to 255 before the first convolution, in the model (EfficientNet, V3) or before it."""
    if not isinstance(network, efficientnet.EfficientNet):
        return "pixels / 127.5 - 1"
    if not {"normalization.mean", "normalization.variance"} <= tensors.keys():
        return "pixels / 255, normalised as in the Keras model: this file does not say how"
    mean, variance = (tensors[f"normalization.{leaf}"].ravel().astype(np.float64) for leaf in ("mean", "variance"))
    # The published files have deviations in the variance's place, and their model divides by the roots once more.
    published = variance.shape == (3,) and np.allclose(variance, STD, rtol=0, atol=5e-4)
    std = variance if published else np.sqrt(np.maximum(variance, 0))
    return f"(pixels / 255 - {mean.round(4).tolist()}) / {std.round(4).tolist()}"
