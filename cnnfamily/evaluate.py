"""Evaluation: `python -m cnnfamily.evaluate --workdir=DIR` gives a training run's last figures again.

`--model=NAME --weights=FILE --config=FILE.py [--config.KEY=VALUE ...]` evaluates published weights on the data of a config.
`--crops=10` averages over views of an image, `--average=N` takes the mean of a run's newest checkpoints, and
`--recalibrate=N` measures the statistics of batch norm anew on so many training images.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from cnnfamily import checkpoint, errors, interrupt, losses, models, optim, parallel, processes, programs, runlog, weights
from cnnfamily import config as configs
from cnnfamily.data import feed, sources
from cnnfamily.step import TrainState, create_state, eval_step, take

Evaluator = Callable[[dict, str], dict[str, float | int]]


def make_evaluator(
    network: nn.Module,
    test: feed.TestFeed,
    state: TrainState,
    stop: interrupt.StopRequest | None = None,
    compiled_by: Callable | None = None,
) -> Evaluator:
    """A function of (variables, prefix) that evaluates the test split: `{prefix}loss`, `top1`, `top5`, `ece`, `examples`,
    and `bad_images` if any were replaced.

    Every example is seen once on any number of devices; the count is checked. Compiled here, for variables like `state`'s.
    A signal that `stop` hears of ends an evaluation after the batch at hand, with {}: of a large split it takes a minute.
    `compiled_by` as `untraced.Program.compiled`; JAX alone without.
    """
    stop = stop or interrupt.StopRequest()
    step = interrupt.agree(functools.partial(eval_step, network=network, view=test.view, mirrored=test.mirrored))
    mapped = parallel.map_over_devices(step, test.mesh, batch_axis=0, outputs=1)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def batches() -> Iterator[dict[str, jax.Array]]:
        return (stop.add(batch, test.mesh, batch_axis=0) for batch in test.batches())

    arguments = variables, next(batches()), test.store
    compiled = compiled_by(mapped, *arguments).result() if compiled_by else mapped.lower(*arguments).compile()

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
        counts = {f"{prefix}{name}": count for name, count in test.counts.items()}
        return losses.evaluation_metrics(total, prefix) | counts

    return evaluate


def evaluate_state(evaluator: Evaluator, state: TrainState) -> dict[str, float | int]:
    """`test_*` of the parameters and, where the state averages them, `ema_test_*` beside it; {} if a signal stopped either."""
    metrics = evaluator({"params": state.params, "batch_stats": state.batch_stats}, "test_")
    if not metrics or not state.ema:
        return metrics
    averaged = evaluator(state.ema, "ema_test_")
    return averaged and metrics | averaged


def fresh_state(
    config: ConfigDict, schedule: Callable | None = None, data: sources.Dataset | None = None
) -> tuple[nn.Module, object, TrainState]:
    """The network, the optimizer and the state before the first step that a config describes.

    Of a network that measures something on training images before it trains, `start_from`, only where `data` is given.

    Raises:
      UsageError: the network cannot take the images of `config.data`.
    """
    network = models.build(config.model)
    optimizer = optim.make_optimizer(config.optim, schedule or (lambda step: 0.0))
    key = jax.random.key(config.seed, impl="threefry2x32")
    variables = models.initialize(network, key, resolution=feed.resolution_of(config))
    if data and hasattr(network, "start_from"):
        variables = network.start_from(variables, feed.sample(data))
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


def load_state(workdir: Path, *, which: str, average: int = 1) -> tuple[nn.Module, TrainState, ConfigDict]:
    """The network, whole training state and config of a run; errors as `load_run`.

    With `average` the parameters, statistics and their averages are the means over so many of the newest checkpoints.
    """
    config = runlog.read_config(workdir)
    runlog.read_manifest(workdir)  # without its digest of the config there is no telling whether that is the run's
    network, _, state = fresh_state(config)
    if average == 1:
        return network, checkpoint.restore_state(workdir / "checkpoints", state, which=which), config
    states = checkpoint.restore_newest(workdir / "checkpoints", state, average)
    means = {
        name: jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(getattr(state, name) for state in states))
        for name in ("params", "batch_stats", "ema")
    }
    return network, states[0].replace(**means), config


def evaluate_run(
    workdir: str | Path, *, which: str = "newest", average: int = 1, crops: int = 0, recalibrate: int = 0
) -> dict[str, float | int]:
    """The figures of a run's checkpoint on the test split of its own data set.

    Args:
      average: so many of the newest checkpoints give their mean; `checkpoint.keep` says how many there are.
      crops: views of an image, 1, 2 or 10; 0: as in the run (see `evaluate.crops`).
      recalibrate: training images on which the statistics of batch norm are measured anew; 0: none.
    """
    network, state, config = load_state(Path(workdir), which=which, average=average)
    metrics = _evaluate(network, state, config, crops, recalibrate, workdir=Path(workdir))
    return {"step": int(state.step), **metrics}


def evaluate_weights(file: str, config: ConfigDict, *, crops: int = 0, recalibrate: int = 0) -> dict[str, float | int]:
    """The figures of the weights in a file (as `load_pretrained` takes it) on the test split of a config's data.

    The network is that of `config.model`; errors as `load_pretrained`.
    """
    network, _, state = fresh_state(config)
    _, variables = weights.load_pretrained(network, file)
    return _evaluate(network, state.replace(**variables, ema={}), config, crops, recalibrate)


def _evaluate(
    network: nn.Module,
    state: TrainState,
    config: ConfigDict,
    crops: int,
    recalibrate: int,
    workdir: Path | None = None,
) -> dict[str, float | int]:
    config, mesh = config.copy_and_resolve_references(), parallel.data_mesh()
    with config.unlocked():
        config.evaluate.crops = crops or config.evaluate.crops
    data = feed.load_data(config)
    if workdir:
        runlog.check_data(workdir, data)
    state = parallel.replicate(state, mesh)
    if recalibrate:
        with contextlib.closing(feed.TestFeed(data, config, mesh, of_training=recalibrate)) as training:
            state = recalibrated(network, state, training)
    with contextlib.closing(feed.TestFeed(data, config, mesh)) as test:
        return evaluate_state(make_evaluator(network, test, state), state)


def recalibrated(network: nn.Module, state: TrainState, images: feed.TestFeed) -> TrainState:
    """A state whose batch statistics, averaged ones too, are the means over the batches of `images`, seen as in an evaluation.

    After training at another resolution (Touvron et al. 2019, https://arxiv.org/abs/1906.06423) or averaging of weights
    (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407) those that training left belong to other weights or images.

    Raises:
      UsageError: the network has no batch norm, or scales its branches in evaluation alone.
    """
    if not state.batch_stats:
        raise errors.UsageError("--recalibrate: this network has no batch norm; expected one with batch_norm=True, or none")
    if getattr(network, "stochastic_depth", 0.0) and network.stochastic_depth_scaling == "test":
        raise errors.UsageError(
            "--recalibrate: stochastic_depth_scaling='test' scales branches in evaluation, and statistics are measured as in "
            "training; expected 'train'"
        )
    # The new statistics alone, and nothing dropped: as in the evaluation to come.
    fields = {"norm_momentum": 0.0, "norm_group": 0, "dropout": 0.0, "stochastic_depth": 0.0, "aux_dropout": 0.0}
    fields = {name: value for name, value in fields.items() if hasattr(network, name)}
    measuring = network.clone(**fields, axis_name=parallel.AXIS)

    def measure(variables, batch, store):
        pixels = images.view(take(store, batch, "images"), store)
        updates = measuring.apply(variables, pixels, train=True, mutable=["batch_stats"])[1]
        return jax.lax.pmean(updates["batch_stats"], parallel.AXIS)

    mapped = parallel.map_over_devices(measure, images.mesh, batch_axis=0, outputs=1)

    def statistics(variables):
        found = [jax.device_get(mapped(variables, batch, images.store)) for batch in images.batches(full=True)]
        means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64).astype(leaves[0].dtype), *found)
        return parallel.replicate(means, images.mesh)

    batch_stats = statistics({"params": state.params, "batch_stats": state.batch_stats})
    ema = state.ema and state.ema | {"batch_stats": statistics(state.ema)}
    return state.replace(batch_stats=batch_stats, ema=ema)


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.evaluate", __doc__)
    parser.add_argument("--workdir", help="the directory of a training run")
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest")
    parser.add_argument("--model", metavar="NAME", help="a network with published weights")
    parser.add_argument("--weights", metavar="FILE", help=".safetensors, .pth, or hf:OWNER/REPO")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="whose data to evaluate the weights on")
    parser.add_argument("--crops", type=int, default=0, choices=(1, 2, 10), help="views of an image; default: the config's")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="the mean of the N newest checkpoints")
    parser.add_argument("--recalibrate", type=int, default=0, metavar="N", help="batch norm anew on N training images")
    arguments, rest = parser.parse_known_args(argv)
    published = (arguments.model, arguments.weights, arguments.config)
    if any(published) if arguments.workdir else not all(published):
        parser.error("expected --workdir, or --model, --weights and --config")
    if arguments.workdir and rest:
        parser.error(f"unrecognized argument {rest[0]}")
    if arguments.average < 1 or arguments.recalibrate < 0:
        parser.error(f"--average={arguments.average} and --recalibrate={arguments.recalibrate}: expected 1 or more, 0 or more")
    if arguments.average > 1 and (arguments.model or arguments.checkpoint == "best"):
        parser.error("--average takes the newest checkpoints of a run: expected --workdir, and no --checkpoint=best")
    options = {"crops": arguments.crops, "recalibrate": arguments.recalibrate}
    overrides = {"model.name": arguments.model} | configs.read_overrides(rest, "--model=, --weights=, --config=")
    with processes.session():
        run = arguments.workdir and Path(arguments.workdir)
        config = runlog.read_config(run) if run else configs.load_config(arguments.config, overrides)
        with programs.kept(config):
            if arguments.workdir:
                metrics = evaluate_run(arguments.workdir, which=arguments.checkpoint, average=arguments.average, **options)
            else:
                metrics = evaluate_weights(arguments.weights, config, **options)
        if jax.process_index() == 0:
            print(json.dumps(metrics))


if __name__ == "__main__":
    errors.run_command(main)
