"""The networks: one file a family, with the table of its variants at the end; this is all of them by name."""

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cnnfamily.errors import UsageError, unknown
from cnnfamily.models import (
    airbench,
    alexnet,
    efficientnet,
    googlenet,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    vgg,
)
from cnnfamily.models.initializers import outputs_unread

Path = tuple[str, ...]  # of a module, as linen names them

# name -> (module class, the fields in which this variant differs from the class's defaults)
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **lenet.VARIANTS,
    **alexnet.VARIANTS,
    **vgg.VARIANTS,
    **resnet.VARIANTS,
    **googlenet.VARIANTS,
    **mobilenet_v1.VARIANTS,
    **mobilenet_v2.VARIANTS,
    **mobilenet_v3.VARIANTS,
    **efficientnet.VARIANTS,
    **airbench.VARIANTS,
}
_NOT_CONFIG = ("parent", "name", "axis_name")  # linen's own, and what only the training loop knows
_MAY_BE_ZERO = (
    *("norm_group", "se_ratio", "se_reduction", "stem_padding"),
    *("dropout", "aux_dropout", "stochastic_depth", "norm_momentum"),
)
_BELOW_ONE = ("dropout", "aux_dropout", "stochastic_depth", "norm_momentum")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern such as "resnet*", sorted."""
    return sorted(fnmatch.filter(NETWORKS, pattern))


def model_config(name: str) -> ConfigDict:
    """Every field of a network with its value, and `name`: what `config.model` holds.

    Raises:
      UsageError: no network has this name; the nearest is suggested.
    """
    if name not in NETWORKS:
        raise unknown("model", name, list_models())
    network_class, row = NETWORKS[name]
    fields = [field for field in dataclasses.fields(network_class) if field.name not in _NOT_CONFIG]
    return ConfigDict({"name": name, **{field.name: row.get(field.name, field.default) for field in fields}})


def build(config: ConfigDict) -> nn.Module:
    """The linen module that `config` (as from `model_config`, and as `config.model` holds it) describes.

    Raises:
      UsageError: no such network or field (the nearest is suggested), or a value of another type.
    """
    values = {key: _frozen(value) for key, value in config.items()}
    name = values.pop("name", "")
    defaults = model_config(name)
    for key, value in values.items():
        if key not in defaults:
            raise unknown(f"field of {name}", key, sorted(defaults))
        if isinstance(defaults[key], float) and type(value) is int:
            values[key] = value = float(value)
        if not _like(value, defaults[key]):
            raise UsageError(f"{name}.{key}={value!r}: expected {type(defaults[key]).__name__}, as in {defaults[key]!r}")
        if type(value) in (int, float) and not (value >= 0 if key in _MAY_BE_ZERO else value > 0):
            raise UsageError(f"{name}.{key}={value}: expected {'0 or more' if key in _MAY_BE_ZERO else 'more than 0'}")
        if key in _BELOW_ONE and value >= 1:
            raise UsageError(f"{name}.{key}={value}: expected less than 1")
    if values.get("dtype", "float32") not in DTYPES:
        raise unknown("dtype", values["dtype"], DTYPES)
    network_class, row = NETWORKS[name]
    return network_class(**{**row, **values})


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The network `name` with some fields changed: `create_model("resnet50", num_classes=10)`.

    Raises:
      UsageError: as `build`.
    """
    return build(ConfigDict({"name": name, **overrides}))


def initialize(network: nn.Module, key: jax.Array, *, resolution: int = 0, modules: Iterable[Path] | None = None) -> dict:
    """Fresh variables `{"params", "batch_stats"}` for images of `resolution` pixels square (0: the network's own).

    The values of `network.init(key, images)`, without computing the forward pass; see `initializers`. With `modules`, paths
    such as `("head", "conv")`, those of these alone, and of our networks the others are not drawn.

    Raises:
      UsageError: the network refuses images of this size, or has no variables in one of `modules`.
    """
    variables, asked_for = {}, None if modules is None else {*modules}

    def keep_variables(images):
        with outputs_unread(lambda path: asked_for is None or path in asked_for):
            variables.update(network.init(key, images))  # known values, not tracers: the key is known

    def chosen(variables):
        flat = flatten_dict(variables)
        if asked_for is None:
            return flat
        paths = {path[1:-1] for path in flat}
        for path in sorted(asked_for - paths):
            raise unknown("module", "/".join(path), sorted("/".join(path) for path in paths))
        return {path: value for path, value in flat.items() if path[1:-1] in asked_for}

    images = image_shape(network, resolution)
    jax.eval_shape(keep_variables, images)
    found = chosen(variables)
    if any(isinstance(value, jax.core.Tracer) for value in found.values()):  # some layer does not use `parameter`
        found = chosen(jax.jit(network.init)(key, jnp.zeros(images.shape, images.dtype)))
    found = {"params": {}, "batch_stats": {}, **unflatten_dict(found)}
    return jax.device_put(found)  # `jnp.asarray` would compile a program for every shape (0.9 s for B0, Zen 3)


def variable_shapes(network: nn.Module, *, resolution: int = 0) -> dict:
    """What `initialize` gives, as `jax.ShapeDtypeStruct`s: nothing is computed or drawn.

    Raises:
      UsageError: the network refuses images of `resolution` pixels square (0: its own).
    """

    def init(key, image):
        with outputs_unread(lambda path: False):
            return network.init(key, image)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return {"params": {}, "batch_stats": {}, **jax.eval_shape(init, key, image_shape(network, resolution))}


def image_shape(network: nn.Module, resolution: int = 0) -> jax.ShapeDtypeStruct:
    """One image `[1, resolution, resolution, in_channels]` (0: the network's own), normalised: float32, or float64 in that."""
    resolution = resolution or network.resolution
    dtype = jnp.float64 if getattr(network, "dtype", None) == "float64" else jnp.float32
    return jax.ShapeDtypeStruct((1, resolution, resolution, network.in_channels), dtype)


def _frozen(value: Any) -> Any:
    """Lists (which JSON makes of tuples) as tuples: a linen module's fields must be hashable."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _like(value: Any, example: Any) -> bool:
    """Whether a value has the type of the example, an item of a tuple that of its first, and a row its types place by place."""
    if type(value) is not type(example):
        return False
    if not isinstance(value, tuple) or not example:
        return True
    if isinstance(example[0], tuple):
        types = [type(item) for item in example[0]]
        return bool(value) and all(isinstance(row, tuple) and [type(item) for item in row] == types for row in value)
    return bool(value) and all(type(item) is type(example[0]) for item in value)
