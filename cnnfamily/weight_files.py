"""Files of weights as arrays by name: safetensors, torch's own, Keras's, and those on the Hugging Face Hub."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from cnnfamily import keras_files
from cnnfamily.errors import UsageError, one_line, warn

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first: they are what is published
HUB = "hf:"


def read_weights(file: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` or `.pth` file, or of `hf:OWNER/REPO[/FILE]`, by name; half precisions become float32.

    No code in a file is run: of a `.pth` file torch unpickles tensors and containers alone (`weights_only=True`), of a `.keras`
    file the weights alone are read. Those of Keras (`.weights.h5` and `.h5` too) come by `keras_files`'s names.

    Raises:
      UsageError: no such file, a damaged one, one that holds no weights or a number that is not finite; no library for it.
    """
    path = _download(str(file)) if str(file).startswith(HUB) else Path(file)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{file} {found}; expected a .safetensors or .pth file, Keras's .h5 or .keras, or hf:OWNER/REPO")
    known = (".safetensors", *TORCH_SUFFIXES, *keras_files.SUFFIXES)
    if path.suffix not in known:
        raise UsageError(f"{file} ends in {path.suffix!r}; expected {', '.join(known)}")
    if path.suffix == ".safetensors":
        try:
            tensors = safetensors.numpy.load_file(path)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"{file} is damaged or no safetensors file: {error}") from error
    elif path.suffix in keras_files.SUFFIXES:
        tensors = keras_files.read_keras(path, str(file))
    else:
        tensors = _read_torch(path, str(file))
    return tidy(tensors, str(file))


def tidy(tensors: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """A state dict as numpy arrays, half precisions as float32; refuses what is no array and what is not finite."""
    arrays = {}
    for key, value in tensors.items():
        try:
            array = np.asarray(value)
        except (TypeError, RuntimeError, ValueError) as error:  # a tensor that requires gradients, or in bfloat16
            raise UsageError(f"{source}: {key} is no array: {error}") from error
        if array.dtype.kind in "fV" and array.dtype.itemsize < 4:  # "V": bfloat16 is no kind of numpy's own
            array = array.astype(np.float32)
        if array.dtype.kind not in "fiub":
            raise UsageError(f"{source}: {key} holds {type(value).__name__} of {array.dtype}; expected an array of numbers")
        if not np.isfinite(array).all():
            raise UsageError(f"{source}: {key} holds {np.sum(~np.isfinite(array))} values that are not finite")
        arrays[key] = array
    if not arrays:
        raise UsageError(f"{source} holds no arrays; expected a network's weights by name")
    return arrays


def _read_torch(path: Path, source: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UsageError(
            f"{source} is torch's format, and torch is not installed; install it, or convert the file to .safetensors "
            f"where it is (python -m cnnfamily.convert)"
        ) from None
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of a damaged file torch raises RuntimeError, EOFError, UnpicklingError, KeyError and more
        reason = one_line(str(error)).split(". ")[0][:200] or type(error).__name__
        raise UsageError(f"{source} is damaged, or holds more than weights, which is not run: {reason}") from error
    inner = [name for name in NESTED if isinstance(found, Mapping) and isinstance(found.get(name), Mapping)]
    if len(inner) > 1:
        warn(f"{source} holds {', '.join(inner)}: took {inner[0]}")
    found = found[inner[0]] if inner else found
    if not isinstance(found, Mapping):
        raise UsageError(f"{source} holds {type(found).__name__}; expected a state dict, tensors by name")
    tensors = {str(key): value for key, value in found.items() if key != "n_averaged"}  # torch's AveragedModel counts there
    if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        odd = next(key for key, value in tensors.items() if not isinstance(value, torch.Tensor))
        raise UsageError(f"{source}: {odd} is {type(tensors[odd]).__name__}; expected a tensor")
    if all(key.startswith("module.") for key in tensors):  # saved from DataParallel or AveragedModel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    half = (torch.float16, torch.bfloat16)
    return {key: (value.float() if value.dtype in half else value).detach().numpy() for key, value in tensors.items()}


def _download(source: str) -> Path:
    """The file of `hf:OWNER/REPO[/FILE]` in the Hub's own cache (`HF_HOME`); what is there already needs no network."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UsageError(f"{source}: the Hub's library is not installed; pip install 'cnnfamily[hub]'") from None
    parts = source.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UsageError(f"{source}: expected hf:OWNER/REPO or hf:OWNER/REPO/FILE, such as hf:timm/resnet50.tv_in1k")
    repo, name = "/".join(parts[:2]), parts[2] if len(parts) == 3 else "model.safetensors"
    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(huggingface_hub.hf_hub_download(repo, name, local_files_only=True))
    try:
        # Asked once and without another try: hf_hub_download itself tries six times before it says that there is no network.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name), timeout=10)
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        reason = "no such file in it" if isinstance(error, EntryNotFoundError) else "no such repository, or it is private"
        raise UsageError(f"{source}: {reason}; expected one such as hf:timm/resnet50.tv_in1k") from error
    except Exception as error:  # its HTTP client has had three libraries in as many years, each with errors of its own
        reason = one_line(str(error)).split(". ")[0][:200] or type(error).__name__
        raise UsageError(f"{source} is not in the cache and cannot be fetched: {reason}") from error
