"""Evaluation: `python -m cnnfamily.evaluate --workdir=DIR` gives a training run's last figures again.

`--model=NAME --weights=FILE --config=FILE.py [--config.KEY=VALUE ...]` evaluates published weights on the data of a config.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from cnnfamily import checkpoint, errors, interrupt, losses, models, optim, parallel, processes, runlog, weights
from cnnfamily import config as configs
from cnnfamily.data import feed
from cnnfamily.step import TrainState, create_state, eval_step

Evaluator = Callable[[dict, str], dict[str, float | int]]


def make_evaluator(
    network: nn.Module, test: feed.TestFeed, state: TrainState, stop: interrupt.StopRequest | None = None
) -> Evaluator:
    """A function of (variables, prefix) that evaluates the test split: `{prefix}loss`, `top1`, `top5`, `ece`, `examples`.

    Every example is seen once on any number of devices; the count is checked. Compiled here, for variables like `state`'s.
    A signal that `stop` hears of ends an evaluation after the batch at hand, with {}: of a large split it takes a minute.
    """
    stop = stop or interrupt.StopRequest()
    step = interrupt.agree(functools.partial(eval_step, network=network, view=test.view))
    mapped = parallel.map_over_devices(step, test.mesh, batch_axis=0, outputs=1)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def batches() -> Iterator[dict[str, jax.Array]]:
        return (stop.add(batch, test.mesh, batch_axis=0) for batch in test.batches())

    compiled = mapped.lower(variables, next(batches()), test.store).compile()

    def evaluate(variables: dict, prefix: str) -> dict[str, float | int]:
        sums = []
        for batch in batches():
            if stop.signum:
                return {}
            sums.append(stop.read(jax.device_get(compiled(variables, batch, test.store))))
        # On the host in float64, so that the figure of a large split does not depend on how it was cut.
        total = {name: np.sum([np.asarray(part[name], np.float64) for part in sums], axis=0) for name in sums[0]}
        expected = len(test.split)
        assert total["examples"] == expected, f"evaluated {total['examples']} examples, expected {expected}"
        return losses.evaluation_metrics(total, prefix)

    return evaluate


def evaluate_state(evaluator: Evaluator, state: TrainState) -> dict[str, float | int]:
    """`test_*` of the parameters and, where the state averages them, `ema_test_*` beside it; {} if a signal stopped either."""
    metrics = evaluator({"params": state.params, "batch_stats": state.batch_stats}, "test_")
    if not metrics or not state.ema:
        return metrics
    averaged = evaluator(state.ema, "ema_test_")
    return averaged and metrics | averaged


def fresh_state(config: ConfigDict, schedule: Callable | None = None) -> tuple[nn.Module, object, TrainState]:
    """The network, the optimizer and the state before the first step that a config describes.

    Raises:
      UsageError: the network cannot take the images of `config.data`.
    """
    network = models.build(config.model)
    optimizer = optim.make_optimizer(config.optim, schedule or (lambda step: 0.0))
    resolution = config.data.resolution or config.model.resolution
    key = jax.random.key(config.seed, impl="threefry2x32")
    variables = models.initialize(network, key, resolution=resolution)
    # As one program: operation by operation the zeros of every shape are compiled apart, 2.3 s for EfficientNet-B0 against 0.6.
    create = jax.jit(functools.partial(create_state, optimizer=optimizer, ema=config.ema.decay > 0))
    return network, optimizer, create(variables)


def load_run(workdir: str | Path, *, which: str = "newest") -> tuple[nn.Module, dict, ConfigDict]:
    """The network of a training run, its variables and its config: `network.apply(variables, images)`.

    The variables are the averaged ones where the run averaged, of the "newest" or the "best" checkpoint.

    Raises:
      UsageError: no run there, or no checkpoint yet, or none that is not damaged. Where one is left, a line on standard
        error says which was taken instead.
    """
    network, state, config = load_state(Path(workdir), which=which)
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    return network, variables, config


def load_state(workdir: Path, *, which: str) -> tuple[nn.Module, TrainState, ConfigDict]:
    """The network, whole training state and config of a run; errors as `load_run`."""
    config = runlog.read_config(workdir)
    runlog.read_manifest(workdir)  # without its digest of the config there is no telling whether that is the run's
    network, _, state = fresh_state(config)
    return network, checkpoint.restore_state(workdir / "checkpoints", state, which=which), config


def evaluate_run(workdir: str | Path, *, which: str = "newest") -> dict[str, float | int]:
    """The figures of a run's checkpoint on the test split of its own data set."""
    network, state, config = load_state(Path(workdir), which=which)
    mesh = parallel.data_mesh()
    state = parallel.replicate(state, mesh)
    evaluator = make_evaluator(network, feed.TestFeed(feed.load_data(config), config, mesh), state)
    return {"step": int(state.step), **evaluate_state(evaluator, state)}


def evaluate_weights(file: str, config: ConfigDict) -> dict[str, float | int]:
    """The figures of the weights in a file (as `load_pretrained` takes it) on the test split of a config's data.

    The network is that of `config.model`; errors as `load_pretrained`.
    """
    mesh = parallel.data_mesh()
    network, _, state = fresh_state(config)
    _, variables = weights.load_pretrained(network, file)
    state = parallel.replicate(state.replace(**variables, ema={}), mesh)
    evaluator = make_evaluator(network, feed.TestFeed(feed.load_data(config), config, mesh), state)
    return evaluate_state(evaluator, state)


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.evaluate", __doc__)
    parser.add_argument("--workdir", help="the directory of a training run")
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest")
    parser.add_argument("--model", metavar="NAME", help="a network with published weights")
    parser.add_argument("--weights", metavar="FILE", help=".safetensors, .pth, or hf:OWNER/REPO")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="whose data to evaluate the weights on")
    arguments, rest = parser.parse_known_args(argv)
    published = (arguments.model, arguments.weights, arguments.config)
    if any(published) if arguments.workdir else not all(published):
        parser.error("expected --workdir, or --model, --weights and --config")
    if arguments.workdir and rest:
        parser.error(f"unrecognized argument {rest[0]}")
    overrides = {"model.name": arguments.model} | configs.read_overrides(rest, "--model=, --weights=, --config=")
    with processes.session():
        if arguments.workdir:
            metrics = evaluate_run(arguments.workdir, which=arguments.checkpoint)
        else:
            metrics = evaluate_weights(arguments.weights, configs.load_config(arguments.config, overrides))
        if jax.process_index() == 0:
            print(json.dumps(metrics))


if __name__ == "__main__":
    errors.run_command(main)
