"""Where a loss or gradient became non-finite: the step once more, with a flag for everything on its way."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import lax
from jax.sharding import Mesh

from cnnfamily import parallel
from cnnfamily.step import Objective, TrainState


def find(
    state: TrainState,
    batch: dict[str, jax.Array],
    store: dict[str, jax.Array],
    *,
    objective: Objective,
    axis_name: str = "data",
) -> dict[str, jax.Array]:
    """Of each part of a training step its place in the order of computation if it is not finite, else -1: int32 by name.

    For one device of the mapped axis, as `train_step`, on the arguments of the step in question: parameters, images, the output
    of every layer, the loss, and then the gradients from the last layer to the first. A branch that stochastic depth runs in
    a conditional is one with its block.
    """
    found = {}

    def note(name: str, *values) -> None:
        for value in values:
            if jnp.issubdtype(value.dtype, jnp.floating):
                found[name] = found.get(name, jnp.zeros((), bool)) | ~jnp.isfinite(value).all()

    for path, value in flatten_dict(state.params, sep="/").items():
        note(f"parameter {path}", value)
    found["images"] = jnp.zeros((), bool)
    gradients = {}
    for i in range(batch["position"].shape[0]):
        micro, roots = jax.tree.map(lambda x, i=i: x[i], batch), []

        def watch(call, arguments, keywords, context, roots=roots):
            output, module = call(*arguments, **keywords), context.module
            # What a conditional runs is a network of its own, whose values cannot leave the conditional.
            if context.method_name == "__call__" and module.path and module.scope.root is roots[0]:
                note("/".join(module.path), *jax.tree.leaves(output))
            return output

        def enter(call, arguments, keywords, context, roots=roots):
            roots.append(context.module.scope.root)
            return call(*arguments, **keywords)

        with nn.intercept_methods(watch), nn.intercept_methods(enter):
            loss, (_, _, choices) = objective(state.params, state, micro, store)
        note("images", choices["images"])
        note("loss", loss)
        # Apart from the forward pass: under differentiation the values that are watched could not leave it.
        gradient = jax.grad(objective, has_aux=True)(state.params, state, micro, store)[0]
        for path, value in flatten_dict(gradient, sep="/").items():
            gradients.setdefault(path, []).append(value)
    place = {name: i for i, name in enumerate(found)}

    def from_the_end(path: str) -> int:
        while path and path not in place:  # a layer inside a conditional stands where its block does
            path = path.rpartition("/")[0]
        return -place.get(path, 0)

    for path in sorted(gradients, key=from_the_end):
        note(f"gradient of {path}", *gradients[path])
    # The place is part of the value, for a compiled function returns its dictionary in alphabetic order.
    places = {name: jnp.where(bad, i, -1).astype(jnp.int32) for i, (name, bad) in enumerate(found.items())}
    return lax.pmax(places, axis_name)


def cause_of(
    state: TrainState, batch: dict[str, jax.Array], store: dict[str, jax.Array], *, objective: Objective, mesh: Mesh
) -> str:
    """The name of what `find` finds first on all devices of `mesh`, such as "stage1_block2/norm"; empty if all is finite.

    Compiles a program of its own, once, when a run has failed anyway.
    """
    mapped = parallel.map_over_devices(functools.partial(find, objective=objective), mesh, batch_axis=1, outputs=1)
    places = {name: int(place) for name, place in jax.device_get(mapped(state, batch, store)).items() if place >= 0}
    return min(places, key=places.get, default="")
