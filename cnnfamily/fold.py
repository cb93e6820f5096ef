"""Batch norm folded into the convolutions before it, for inference: fewer passes over the maps, and the same function."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cnnfamily.errors import UsageError
from cnnfamily.models import Path, image_shape, variable_shapes
from cnnfamily.models.batch_norm import BatchNorm
from cnnfamily.models.initializers import outputs_unread
from cnnfamily.models.layers import Conv


def fold_batch_norm(network: nn.Module, variables: dict) -> tuple[nn.Module, dict]:
    """A network without batch norm, and its variables, which in evaluation is the function of `network` with `variables`.

    A convolution of kernel w and the norm that follows it, with running mean m and variance v, scale g and bias b, are one
    convolution of kernel w g / sqrt(v + epsilon) and bias b - m g / sqrt(v + epsilon). What only training has, the auxiliary
    classifiers of GoogLeNet, is left out.

    Raises:
      UsageError: the network has no batch norm, or a norm that does not follow a convolution directly (pre-activation, or
        norm_place="after").
    """
    if not getattr(network, "batch_norm", False):
        raise UsageError(f"{type(network).__name__} with batch_norm={getattr(network, 'batch_norm', None)}: nothing to fold")
    absent = {"batch_norm": False, "zero_init_last": False, "aux": False}
    folded = network.clone(**{name: value for name, value in absent.items() if hasattr(network, name)})
    params = flatten_dict(variables["params"])
    stats = flatten_dict(variables["batch_stats"])
    for norm, (conv, epsilon) in _convolution_of_each_norm(network, variables).items():
        factor = params.pop((*norm, "scale")) / jnp.sqrt(stats[(*norm, "var")] + epsilon)
        params[(*conv, "kernel")] *= factor
        bias = params.get((*conv, "bias"), 0.0) - stats[(*norm, "mean")]
        params[(*conv, "bias")] = params.pop((*norm, "bias")) + bias * factor
    wanted = flatten_dict(variable_shapes(folded)["params"])
    found = {path: params[path] if path in params else jnp.zeros(shape.shape, shape.dtype) for path, shape in wanted.items()}
    return folded, {"params": unflatten_dict(found), "batch_stats": {}}


def _convolution_of_each_norm(network: nn.Module, variables: dict) -> dict[Path, tuple[Path, float]]:
    """For the path of each norm that of the convolution whose output it sees, and its epsilon, from an abstract evaluation."""
    made, found = {}, {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, Conv):
            made[id(output)] = context.module.path, output  # kept, so that its id is not given to another
        if context.method_name == "__call__" and isinstance(context.module, BatchNorm):
            if id(args[0]) not in made:
                name = "/".join(context.module.path)
                raise UsageError(f"batch norm {name!r} follows no convolution directly: it cannot be folded into one")
            found[context.module.path] = made[id(args[0])][0], context.module.epsilon
        return output

    # By the variables, so that those of another network are an error here.
    with nn.intercept_methods(record), outputs_unread(lambda path: True):
        jax.eval_shape(network.apply, variables, image_shape(network))
    return found
