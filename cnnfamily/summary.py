"""Parameters and multiply-adds of a network, from shapes alone: `python -m cnnfamily.summary [MODEL ...] [--layers] [--json]`.

Beside them stands what its paper prints, with the source (`published.py`).

The convention is that of the papers' tables: a parameter is anything trained (batch statistics are not); a multiply-add is one
weight of a convolution or linear layer used at one output position, padded positions included, biases, normalisation and
activations not.
"""

import dataclasses
import json
import math

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from cnnfamily import errors
from cnnfamily.models import create_model, list_models, variable_shapes
from cnnfamily.published import FIELDS, NOTHING, PUBLISHED


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that owns parameters: its path, kind, output shape `(height, width, channels)` or `(units,)`, and counts."""

    name: str
    kind: str
    output: tuple[int, ...]
    params: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Exact counts of a network for one image of `resolution` pixels square."""

    name: str
    resolution: int
    params: int
    macs: int
    layers: tuple[Layer, ...]


def summarize(network: str | nn.Module, *, resolution: int | None = None) -> Summary:
    """Counts parameters and multiply-adds without computing or allocating anything (`jax.eval_shape`).

    Args:
      network: a name, or a linen module with fields `resolution` and `in_channels`.
      resolution: side of the image in pixels; the network's own by default.
    """
    name = network if isinstance(network, str) else type(network).__name__
    network = create_model(network) if isinstance(network, str) else network
    resolution = resolution or network.resolution
    modules = {}  # path -> (kind, output shape), in the order of execution

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            modules[context.module.path] = type(context.module).__name__, getattr(output, "shape", ())[1:]
        return output

    with nn.intercept_methods(record):
        variables = variable_shapes(network, resolution=resolution)
    owned = {}
    for path, value in flatten_dict(variables["params"]).items():
        owned.setdefault(path[:-1], {})[path[-1]] = math.prod(value.shape)
    # A kernel that is measured and not trained is no parameter, but multiplies as others do.
    stats = flatten_dict(variables["batch_stats"])
    measured = {path[:-1]: math.prod(value.shape) for path, value in stats.items() if path[-1] == "kernel"}
    layers = []
    for path, (kind, output) in modules.items():
        if path in owned:
            # Every weight of a kernel is used once at each output position, whatever its groups or its sparsity.
            macs = math.prod(output[:-1]) * owned[path].get("kernel", measured.get(path, 0))
            layers.append(Layer("/".join(path), kind, output, sum(owned[path].values()), macs))
    total = sum(math.prod(value.shape) for value in jax.tree.leaves(variables["params"]))
    return Summary(name, resolution, total, sum(layer.macs for layer in layers), tuple(layers))


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.summary", __doc__)
    parser.add_argument("models", metavar="MODEL", nargs="*", help="names or patterns such as 'resnet*' (default: all)")
    parser.add_argument("--layers", action="store_true", help="one line for each layer")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    arguments = parser.parse_args(argv)
    names = []
    for pattern in arguments.models or ["*"]:
        names += list_models(pattern) or [pattern]  # a name that matches nothing is an error of create_model
    summaries = [summarize(name) for name in dict.fromkeys(names)]
    if arguments.json:
        print(json.dumps([_row(summary, layers=arguments.layers) for summary in summaries], indent=1))
        return
    print(f"{'':<54}{'published':>9}")
    print(f"{'network':<20}{'pixels':>7}{'parameters':>12}{'multiply-adds':>15}{'params':>9}{'macs':>7}{'top-1':>8}  source")
    for summary in summaries:
        params, macs, top1, source = PUBLISHED.get(summary.name, NOTHING)
        ours = f"{summary.name:<20}{summary.resolution:>7}{summary.params:>12,}{summary.macs:>15,}"
        print(f"{ours}{params:>9}{macs:>7}{top1:>8}  {source}")
        for layer in summary.layers if arguments.layers else ():
            shape = "x".join(map(str, layer.output))
            print(f"  {layer.name:<36}{layer.kind:<16}{shape:>14}{layer.params:>12,}{layer.macs:>16,}")


def _row(summary: Summary, *, layers: bool) -> dict:
    """What `--json` gives of a network: our counts, what is published as it is printed, and the layers if asked for."""
    row = dataclasses.asdict(summary)
    found = row.pop("layers")
    published = zip(FIELDS, PUBLISHED.get(summary.name, NOTHING), strict=True)
    return row | {f"published_{key}": value for key, value in published} | ({"layers": found} if layers else {})


if __name__ == "__main__":
    errors.run_command(main)
