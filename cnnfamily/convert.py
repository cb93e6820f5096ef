"""Weights from one scheme of names to another, and where two networks part: `python -m cnnfamily.convert --model=NAME ...`.

`--weights=FILE --output=FILE.safetensors [--scheme=timm]` converts. `--weights=FILE --activations=FILE.npz` runs the network on
the array `input` `[batch, channels, height, width]` of that file, compares every layer whose output it holds by the name of the
torch module (as forward hooks give them, cloned, in eval mode), and names the first that differs and what would explain it.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cnnfamily import errors, naming
from cnnfamily.models.layers import ACTIVATIONS
from cnnfamily.weights import load_pretrained, save_weights

TOLERANCE = 1e-4  # of a layer's largest value; rounding stays below a tenth of it, every convention goes far above
# Fields in which two implementations of one network differ and which leave every shape of its parameters as it is.
FIELDS = {
    "padding": ("symmetric", "same"),
    "norm_epsilon": (1e-5, 1e-3),
    "activation": tuple(ACTIVATIONS),
    "stride_on": ("3x3", "1x1"),
}


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two networks part: the first layer that differs, and how far those before it agree."""

    layer: str  # "" where all agree
    error: float  # largest difference over the layer's largest value
    agreeing: int
    largest: float  # error of those that agree

    def describe(self) -> str:
        """`layer1.0.conv2 differs by 0.3 of its largest value; the 5 layers before it agree to 1e-06`."""
        if not self.layer:
            return f"all {self.agreeing} layers agree to {self.largest:.1e}"
        before = f"the {self.agreeing} layers before it agree to {self.largest:.1e}" if self.agreeing else "no layer before it"
        return f"{self.layer} differs by {self.error:.2g} of its largest value; {before}"


def layer_outputs(network: nn.Module, variables: Mapping[str, Any], images: np.ndarray, scheme: str) -> dict[str, np.ndarray]:
    """The output of every module that has a torch name, by that name and in torch's layout, in order of execution."""

    @jax.jit
    def run(variables, images):
        outputs = {}

        def record(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.method_name == "__call__" and hasattr(output, "shape"):
                outputs["/".join(context.module.path)] = output
            return output

        with nn.intercept_methods(record):
            network.apply(variables, images)
        order.extend(outputs)
        return outputs

    order = []  # jit sorts a dict's keys
    outputs = run(variables, images)
    names = naming.torch_names(network, scheme, order)
    found = {names[path].name: np.asarray(outputs[path]) for path in order if path in names}
    return {name: output.transpose(0, 3, 1, 2) if output.ndim == 4 else output for name, output in found.items()}


def first_divergence(ours: dict[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> Divergence:
    """Compares in the order of `ours` the layers that both have."""
    agreeing, largest = 0, 0.0
    for name, output in ours.items():
        if name in theirs:
            expected = theirs[name]
            error = np.inf
            if output.size == expected.size:  # torch's pooled maps keep sides of 1
                scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
                error = float(np.abs(output - expected.reshape(output.shape)).max() / scale)
            if not error <= TOLERANCE:  # NaN differs too
                return Divergence(name, error, agreeing, largest)
            agreeing, largest = agreeing + 1, max(largest, error)
    return Divergence("", 0.0, agreeing, largest)


def explain(
    network: nn.Module, variables: Mapping[str, Any], theirs: Mapping[str, np.ndarray], scheme: str = "torchvision"
) -> Iterator[str]:
    """Lines that say where the network differs from recorded activations, and which change of convention brings it further.

    Changes are tried one at a time, the one that brings it furthest is kept, and the search goes on from there.

    Raises:
      UsageError: the activations lack `input` or any layer of the network.
    """
    if "input" not in theirs or theirs["input"].ndim != 4:
        raise errors.UsageError("the activations lack an array 'input' of [batch, channels, height, width]")
    images = theirs["input"].transpose(0, 2, 3, 1)

    def compare(network, variables) -> Divergence:
        return first_divergence(layer_outputs(network, variables, images, scheme), theirs)

    at = compare(network, variables)
    if not at.layer and not at.agreeing:
        known = ", ".join([name for name in theirs if name != "input"][:5]) or "no layer"
        raise errors.UsageError(f"the activations hold {known}; expected torch's names of layers in {scheme}")
    yield at.describe()
    while at.layer:
        tried = []
        for label, change in _changes(network, scheme):
            changed = change(variables)
            tried.append((compare(*changed), label, changed))
        better = [trial for trial in tried if not trial[0].layer or trial[0].agreeing > at.agreeing]
        if not better:
            yield f"none of {len(tried)} changes explains it: {', '.join(label for _, label, _ in tried)}"
            return
        # The furthest; of equals the closest, as 1e-5 and 1e-3 may both pass where the variance is large.
        at, label, (network, variables) = min(better, key=lambda trial: (-trial[0].agreeing, trial[0].largest))
        yield f"with {label}: {at.describe()}"


def _changes(network: nn.Module, scheme: str) -> Iterator[tuple[str, Callable]]:
    """A label and a function of the variables to (network, variables) for every convention that could be another."""
    for field, values in FIELDS.items():
        for value in values:
            if getattr(network, field, value) != value:
                other = network.clone(**{field: value})
                yield f"{field}={value!r}", functools.partial(lambda other, variables: (other, variables), other)
    leaves = [leaf for leaf in naming.torch_leaves(network, scheme).values() if leaf.path[-1] == "kernel"]
    if any(leaf.torch.inputs for leaf in leaves):

        def as_stored(leaf: naming.Leaf, kernel: np.ndarray) -> np.ndarray:
            return leaf.to_torch(kernel).reshape(kernel.shape[::-1]).T if leaf.torch.inputs else kernel

        yield "linear kernels whose inputs are (height, width, channels) in the file", _changed(network, leaves, as_stored)
    yield "images in BGR", _changed(network, leaves[:1], lambda leaf, kernel: kernel[:, :, ::-1])


def _changed(network: nn.Module, leaves: list[naming.Leaf], change: Callable) -> Callable:
    def apply(variables):
        values = flatten_dict({**variables})
        return network, unflatten_dict(values | {leaf.path: change(leaf, np.asarray(values[leaf.path])) for leaf in leaves})

    return apply


def read_activations(file: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise errors.UsageError(f"{file} does not exist; expected an .npz file of activations") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:  # TypeError: of an .npy file
        raise errors.UsageError(f"{file} is damaged or no .npz file: {error}") from error


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.convert", __doc__)
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--weights", required=True, metavar="FILE", help=".safetensors, .pth, or hf:OWNER/REPO")
    parser.add_argument("--output", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--scheme", choices=naming.SCHEMES, default="torchvision", help="whose names to write or compare")
    parser.add_argument("--activations", metavar="FILE", help="an .npz file of torch's outputs to compare with")
    parser.add_argument("--num_classes", type=int, metavar="N", help="where the file has not the network's own number")
    arguments = parser.parse_args(argv)
    if not (arguments.output or arguments.activations):
        parser.error("expected --output or --activations")
    overrides = {"num_classes": arguments.num_classes} if arguments.num_classes is not None else {}
    network, variables = load_pretrained(arguments.model, arguments.weights, **overrides)
    if arguments.output:
        save_weights(arguments.output, network, variables, arguments.scheme)
        print(f"wrote {arguments.output}: {arguments.model} by {arguments.scheme}'s names")
    if arguments.activations:
        for line in explain(network, variables, read_activations(arguments.activations), arguments.scheme):
            print(line)


if __name__ == "__main__":
    errors.run_command(main)
