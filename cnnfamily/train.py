"""Training: `python -m cnnfamily.train --config=configs/efficientnet_b0.py[:ARG] [--workdir=DIR] [--config.KEY=VALUE ...]`.

The same command again continues an unfinished run and says so of a finished one.
"""

if __name__ == "__main__":  # before the imports below, which a second start would do again
    from cnnfamily import memory

    memory.tune_malloc()

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cnnfamily import (
    boards,
    checkpoint,
    errors,
    interrupt,
    losses,
    memory,
    models,
    nonfinite,
    optim,
    parallel,
    processes,
    programs,
    runlog,
    untraced,
)
from cnnfamily import config as configs
from cnnfamily.data import feed
from cnnfamily.evaluate import evaluate_state, fresh_state, make_evaluator
from cnnfamily.models import onednn
from cnnfamily.progress import Clock, Report
from cnnfamily.step import Objective, largest_magnitude, train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its directory, its last step, and the metrics of its last evaluation."""

    workdir: Path
    step: int
    metrics: dict[str, Any]


def run_training(config: ConfigDict, workdir: str | Path, *, quiet: bool = False) -> Result:
    """Trains what `config` describes in `workdir`, or goes on where a run there stopped; what the command does.

    Raises:
      UsageError: the config, the data or the directory cannot be used.
      NonFiniteLoss: the loss became NaN or infinite; the last checkpoint is from before.
      Stopped: SIGINT or SIGTERM arrived; the state is saved.
    """
    workdir = Path(workdir)
    configs.check(config)
    runlog.check(workdir, config)
    if config.get("onednn") and (missing := onednn.missing(config.model.dtype)):
        raise errors.UsageError(
            f"config.onednn=True: {missing}; expected False (a run that began with True goes on where oneDNN can be had)"
        )
    report = Report(quiet=quiet)
    first_step = checkpoint.newest_step(workdir / "checkpoints") or 0
    evaluated = any(row["step"] == first_step for row in runlog.read_metrics(workdir) if "test_loss" in row)
    if evaluated and first_step == runlog.read_manifest(workdir)["total_steps"]:
        report.say(f"{workdir} is finished: {first_step} steps")
        if not (workdir / "curves.png").exists():  # it was killed before that
            runlog.draw_curves(workdir)
        return Result(workdir, first_step, last_evaluation(workdir))

    with contextlib.ExitStack() as stack:
        # Data and devices
        folder = stack.enter_context(programs.kept(config))
        aside = stack.enter_context(ThreadPoolExecutor(2))  # XLA compiles and loads outside of Python, which is free meanwhile
        by_onednn = config.get("onednn", False)  # then nothing can be kept

        @functools.cache
        def earlier(name):
            return untraced.Program(None if by_onednn else folder, aside, name, configs.to_json(config))

        for name in (feed.training_resolutions(config)[0.0], "evaluation"):  # read while data and state are made
            earlier(name)
        loggers = boards.chosen(config)
        mesh = parallel.data_mesh()
        data = feed.load_data(config)
        runlog.check_data(workdir, data)
        train = stack.enter_context(contextlib.closing(feed.TrainFeed(data, config, mesh)))
        test = stack.enter_context(contextlib.closing(feed.TestFeed(data, config, mesh)))
        total_steps = round(optim.duration(config, "total", train.steps_per_epoch))
        if total_steps < 1:
            raise errors.UsageError(
                f"total_epochs={config.total_epochs}, total_steps={config.total_steps}: expected 1 step or more"
            )
        given = data.fingerprint, data.mean, data.std, total_steps
        evaluate_every = max(1, round(config.evaluate.every_epochs * train.steps_per_epoch))

        # Network, optimizer, state, and the two programs
        schedule = optim.learning_rate_schedule(
            config.optim, total_steps=total_steps, steps_per_epoch=train.steps_per_epoch, batch_size=config.batch_size
        )
        learning_rate = jax.jit(schedule)  # for the log; operation by operation it would compile ten programs
        network, optimizer, state = fresh_state(config, schedule, None if first_step else data)
        for side in {*train.resolutions} - {feed.resolution_of(config)}:
            models.variable_shapes(network, resolution=side)  # raises where it refuses this size
        state = parallel.replicate(state, mesh)

        def objective_at(resolution):
            return Objective(
                network.clone(axis_name=parallel.AXIS),
                train.view(resolution),
                config.seed,
                train.mix,
                label_smoothing=config.label_smoothing,
                loss=losses.choose(config.loss),
                aux_weight=config.aux_weight,
            )

        @functools.cache  # one compilation a resolution
        def program(resolution):
            step_function = functools.partial(
                train_step,
                objective=objective_at(resolution),
                optimizer=optimizer,
                ema_decay=config.ema.decay,
                ema_warmup=config.ema.warmup,
            )
            update = parallel.map_over_devices(interrupt.agree(step_function), mesh, batch_axis=1, outputs=2, donate=True)
            with programs.by_onednn("training") if by_onednn else contextlib.nullcontext():
                compiled = earlier(resolution).compiled(update, state, batch, train.store, given=given)
                if by_onednn:  # the cache is off for all threads: so this one waits
                    compiled.exception()
            return compiled

        report.say(f"{config.model.name} on {data.name}, {mesh.size} {jax.devices()[0].device_kind}: {workdir}")
        stop = interrupt.StopRequest()
        with report.busy("compiling"):
            batch = stop.add(train.batch(first_step), mesh, batch_axis=1)
            first = program(train.resolution(first_step))
            if jax.process_count() > 1:  # their GPUs tell each other what they measure for a program: one after another
                first.result()
            evaluator = make_evaluator(
                network, test, state, stop, functools.partial(earlier("evaluation").compiled, given=given)
            )
            first.result()

        # Run directory: nothing is written before everything above has been accepted
        runlog.claim(workdir, config)
        stack.enter_context(stop)  # left last: a save that is under way is awaited inside it
        stack.enter_context(checkpoint.resumable(workdir))
        stack.enter_context(runlog.exclusive(workdir))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep))
        if (checkpoints.newest or 0) != first_step:  # before the log below drops what lies after first_step
            raise errors.UsageError(f"another process has trained in {workdir} meanwhile; the same command goes on from there")
        runlog.write_manifest(workdir, config=config, data=data, total_steps=total_steps, first_step=first_step)
        log = stack.enter_context(runlog.RunLog(workdir, from_step=first_step, boards=loggers))
        curves = stack.enter_context(runlog.Curves(workdir))
        stack.enter_context(report.live(first_step=first_step, total_steps=total_steps))
        pending = []  # metrics of the steps that have no line in the log yet
        if first_step:
            state, pending = checkpoints.restore(first_step, state)
            report.say(f"continues from step {first_step} of {total_steps}")

        def refuse_nonfinite(values, names, step, state):
            def why():  # a step whose loss or gradient is not finite has left the state as it was before
                at = int(state.step)
                objective = objective_at(train.resolution(at))
                return nonfinite.cause_of(state, train.batch(at), train.store, objective=objective, mesh=mesh)

            check_finite(values, names, step, checkpoints.newest, why)

        def evaluate_and_save(step, state):
            """The metrics of an evaluation, written down and saved with the state; {} if a signal stopped it."""
            metrics = evaluate_state(evaluator, state)
            memory.return_freed()
            if metrics:
                refuse_nonfinite(metrics, ("test_loss", "ema_test_loss"), step, state)
                log.write(step, step / train.steps_per_epoch, metrics)
                log.sync()
                if step == first_step:
                    checkpoints.discard(step)  # it was saved without a rank
                checkpoints.save(state, [], rank=metrics.get("ema_test_top1", metrics["test_top1"]))
                curves.changed()
            return metrics

        # Loop
        if first_step and not evaluated and (first_step % evaluate_every == 0 or first_step == total_steps):
            metrics = evaluate_and_save(first_step, state)  # a signal had stopped it
            if not metrics:
                raise errors.Stopped(f"stopped at step {first_step}; the same command goes on from there", stop.signum)
        clock = Clock(config.batch_size)
        for step in range(first_step + 1, total_steps + 1):
            with clock.waiting():
                batch = stop.add(train.batch(step - 1), mesh, batch_axis=1)
            processes.note(step, checkpoints.newest)
            resolution = train.resolution(step - 1)
            if step - 1 > first_step and resolution != train.resolution(step - 2):
                report.say(f"step {step}: images of {resolution} pixels, compiling")
            state, measured = program(resolution).result()(state, batch, train.store)
            values = {name: float(value) for name, value in stop.read(jax.device_get(measured)).items()}
            clock.count_step()
            epoch = step / train.steps_per_epoch
            refuse_nonfinite(values, ("loss", "grad_norm"), step, state)
            pending.append(values)
            report.update(step, epoch, values["loss"], values["top1"], clock.images_per_second)

            evaluates = step % evaluate_every == 0 or step == total_steps
            if evaluates or step % config.log.every_steps == 0:
                line = average(pending) | {"learning_rate": float(learning_rate(step - 1))}
                timing = clock.restart() | train.counts
                log.write(step, epoch, line, timing)
                pending = []
            metrics = evaluate_and_save(step, state) if evaluates else {}
            if metrics:
                report.say(describe(step, epoch, line, metrics, timing["images_per_second"]))
                clock.restart()
            signum = stop.signum  # once: a signal that comes after this line is the next step's
            due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if (due or signum) and not metrics:
                # The loss of the next step would tell; but the state is saved before there is one.
                refuse_nonfinite({"a parameter": float(largest_magnitude(state.params))}, ("a parameter",), step, state)
                log.sync()
                checkpoints.save(state, pending, rank=math.nan)
            if signum and not (metrics and step == total_steps):
                raise errors.Stopped(f"stopped and saved at step {step}; the same command goes on from there", signum)
    report.say(f"done: {workdir / 'curves.png'}")
    return Result(workdir, total_steps, metrics)


def check_finite(
    values: dict[str, float], names: tuple[str, ...], step: int, saved: int | None, cause: Callable[[], str]
) -> None:
    """Raises `NonFiniteLoss` if one of the values is not finite: before such a state can be saved or called the best."""
    for name in names:
        if not math.isfinite(values.get(name, 0.0)):
            first = cause()
            raise errors.NonFiniteLoss(
                f"{name} is {values[name]} at step {step}{first and f', first in {first}'}; "
                f"the last checkpoint is from step {saved or 0}; try a lower optim.learning_rate or optim.clip_norm=1.0"
            )


def average(pending: list[dict[str, float]]) -> dict[str, float]:
    """The training line of the steps since the last: means of their metrics."""
    names = {"loss": "train_loss", "top1": "train_top1", "grad_norm": "grad_norm"}
    return {line: math.fsum(values[name] for values in pending) / len(pending) for name, line in names.items()}


def describe(step: int, epoch: float, line: dict, metrics: dict, rate: float) -> str:
    """One line of text for an evaluation."""
    text = f"step {step}  epoch {epoch:.2f}  loss {line['train_loss']:.4f}  test loss {metrics['test_loss']:.4f}"
    text += f"  test top-1 {metrics['test_top1']:.2%}"
    if "ema_test_top1" in metrics:
        text += f"  averaged {metrics['ema_test_top1']:.2%}"
    return f"{text}  {rate:,.0f} images/s"


def last_evaluation(workdir: Path) -> dict[str, Any]:
    """The metrics of the last evaluation in a run's log."""
    rows = [row for row in runlog.read_metrics(workdir) if "test_loss" in row]
    return {key: value for key, value in rows[-1].items() if key not in ("step", "epoch")} if rows else {}


def default_workdir(config_path: str) -> Path:
    """`runs/CONFIG-NAME`, with the argument if there is one: `runs/efficientnet_b0-digits`."""
    file, _, argument = config_path.partition(":")
    return Path("runs") / (Path(file).stem + (f"-{argument}" if argument else ""))


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.train", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/CONFIG-NAME")
    arguments, rest = parser.parse_known_args(argv)
    config = configs.load_config(arguments.config, configs.read_overrides(rest, "--config=, --workdir="))
    with interrupt.Guard(), processes.session():
        run_training(config, arguments.workdir or default_workdir(arguments.config))


if __name__ == "__main__":
    errors.run_command(main)
