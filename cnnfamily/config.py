"""Configs: Python files that return an `ml_collections.ConfigDict`, flat overrides on top, and the checks before a run."""

import ast
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cnnfamily import disk
from cnnfamily.errors import UsageError, unknown
from cnnfamily.models import model_config

REPOSITORY = Path(__file__).resolve().parent.parent
# Not of the network but of the data, the machine and the length of a run: they stay when config.model.name is set to another.
_KEPT_FIELDS = ("num_classes", "dtype", "norm_group", "norm_momentum")
# Of how a run is carried out and not of what it computes: with another value it goes on, and is the same row of a study.
_OF_NO_RESULT = ("keep_programs",)
# Keys that came after results were committed, off: so a row from before, which has none, keeps its hash.
LATER = {"augment.flip_alternating": False, "onednn": False}


def load_config(path: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of `"FILE.py[:ARG]"` with flat overrides such as `{"model.width": 1.4}`; locked.

    FILE is looked for from the working directory, then in the repository. An override may be a value or, as from the command
    line, its text. Overriding `model.name` takes the fields of that network, but for what belongs to the data and the run.

    Raises:
      UsageError: no such file, argument, key or network (the nearest is suggested), or a value of another type.
    """
    name, _, argument = path.partition(":")
    try:
        file = next((found for found in (Path(name), REPOSITORY / name) if found.is_file()), None)
    except (OSError, ValueError):  # too long for a name, or not one at all
        file = None
    if file is None:
        raise unknown("config file", name, _known_configs())
    config = _get_config(file.resolve(), argument)
    override(config, overrides or {})
    return config.lock()


def read_overrides(arguments: Iterable[str], options: str) -> dict[str, str]:
    """Flat overrides from `--config.KEY=VALUE`; anything else is a `UsageError` that names the command's own options too."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UsageError(f"argument {argument!r}: expected {options} or --config.KEY=VALUE")
        overrides[key] = value
    return overrides


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets flat `{"group.key": value}` in place, each value in the type that its key has; `model.name` first."""
    for key, value in sorted(overrides.items(), key=lambda item: item[0] != "model.name"):
        group, parts = config, key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(group, ConfigDict) or part not in group:
                kind = f"field of {config.model.name}" if parts[0] == "model" and depth else "config key"
                known = sorted(group) if isinstance(group, ConfigDict) else []
                raise unknown(kind, part if depth and kind != "config key" else key, _prefixed(parts[:depth], known, kind))
            group, parent = group[part], group
        if isinstance(group, ConfigDict):
            raise UsageError(f"config.{key}={value!r}: it is a group; expected one of its keys: {', '.join(sorted(group))}")
        value = _typed(key, value, group)
        if key == "model.name" and value != config.model.name:
            fields = model_config(value)
            with config.unlocked():
                kept = {field: config.model[field] for field in _KEPT_FIELDS if field in fields and field in config.model}
                fields.update(kept)
                config.model = fields
        else:
            parent[parts[-1]] = value


def _prefixed(parts: list[str], names: Iterable[str], kind: str) -> list[str]:
    return list(names) if kind != "config key" else [".".join([*parts, name]) for name in names]


def _typed(key: str, value: Any, present: Any) -> Any:
    """`value` in the type of the key's present value; text (from a command line) is read as that type."""
    kind = type(present)
    found = value
    if isinstance(value, str) and kind is not str:
        try:
            found = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found = value
    if kind is tuple and isinstance(found, int | float | str) and found != value:
        found = (found,)
    if kind is tuple and isinstance(found, list):
        found = tuple(found)
    if kind is float and type(found) is int:
        found = float(found)
    if kind is int and type(found) is float and found.is_integer():  # 1e3
        found = int(found)
    if type(found) is not kind:
        raise UsageError(f"config.{key}={value!r}: expected {kind.__name__}, as in {present!r}")
    if kind is float and not math.isfinite(found):
        raise UsageError(f"config.{key}={value!r}: expected a finite number")
    if kind is tuple and not key.startswith("model.") and not all(type(item) in (int, float) for item in found):
        raise UsageError(f"config.{key}={value!r}: expected numbers, such as (1, 2)")
    return found


def _get_config(file: Path, argument: str) -> ConfigDict:
    """Runs `get_config(argument)` of a config file; the root of its repository and ours are on the path for its imports."""
    for root in (str(file.parent.parent), str(REPOSITORY)):
        if root not in sys.path:
            sys.path.insert(0, root)
    # Several may have one stem; among the modules, `untraced` sees which files there are.
    name = f"cnnfamily_config_{file.stem}_{disk.digest(str(file))[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"config file {file.name}: expected a Python file (.py)")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument)
    except UsageError:
        raise
    except Exception as error:  # whatever a user's file may do; `--debug` shows where
        if not hasattr(module, "get_config") and isinstance(error, AttributeError):
            raise UsageError(f"config file {file}: expected a function get_config(arg) that returns a ConfigDict") from error
        raise UsageError(f"config file {file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config file {file}: get_config returned {type(config).__name__}, expected a ConfigDict")
    return config


def check(config: ConfigDict) -> None:
    """Refuses numbers that no run can have; what depends on the data or the network is checked where that is known.

    Raises:
      UsageError: naming the key, its value and what was expected.
    """
    below_one = ("label_smoothing", "ema.decay", "optim.beta2", "optim.momentum")
    lowest = {"data.workers": -1}
    positive = (
        *("batch_size", "accumulate_steps", "augment.repeats", "evaluate.every_epochs", "evaluate.batch_size"),
        *("checkpoint.keep", "log.every_steps"),
    )
    for key, value in flatten(config).items():
        if key.startswith("model.") or type(value) not in (int, float):
            continue
        for refused, expected in (
            (value < lowest.get(key, 0), f"{lowest.get(key, 0)} or more"),
            (key == "seed" and value >= 2**31, "less than 2**31"),
            (key in below_one and value >= 1, "less than 1"),
            (key in positive and value == 0, "more than 0"),
        ):
            if refused:
                raise UsageError(f"config.{key}={value}: expected {expected}")
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UsageError(
            "config.model.dtype=float64: expected JAX_ENABLE_X64=1 in the environment, without which it is float32"
        )


def _known_configs() -> list[str]:
    return sorted(f"configs/{file.name}" for file in (REPOSITORY / "configs").glob("*.py") if file.stem != "__init__")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"group.key": value}` of a config or of its JSON, tuples as lists, so that the two compare equal."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config without what cannot change a result: two runs with the same one are the same run."""
    flat = flatten(config)
    return {key: value for key, value in flat.items() if key not in _OF_NO_RESULT and LATER.get(key) != value}


def to_json(config: ConfigDict) -> str:
    """A config as JSON text; `from_json` gives it back equal, types included."""
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, locked; `ValueError` for what is none."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, expected an object")
    return ConfigDict(restore(found)).lock()
