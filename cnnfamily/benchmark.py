"""Speed, memory and compile time of networks: `python -m cnnfamily.benchmark [MODEL ...] [--batch=N] [--by-layer] [--json]`.

A training step is the product's own (`step.train_step` with SGD and momentum, over all devices, the state donated), inference
is the network's function of normalised images, with `--mode=optimized` what `optimize_for_inference` makes of it, and
`--mode=onednn` is a training step with `config.onednn`. They get random uint8 images that lie on the device already: reading
data is no part of it. Every step is awaited, so a step's time holds its dispatch too.

images/s, ms    the batch over the median time of a step after two warm-up steps; ms with the lower and the upper quartile.
compile         seconds from the traced program to one that runs: into an empty compilation cache, and out of that cache, which
                neither optimized inference nor training by oneDNN uses.
memory          of the compiled program on one device: arguments + outputs - what they share + temporaries. Beside it, in the
                JSON, the allocator's own peak since the process began, where the device counts it (GPU, TPU).
matrix          share of the measured matrix ceiling: 2 FLOPs for each multiply-add of `summary` in inference and 6 in training
                (the backward pass has two products for each one of the forward pass), whatever the compiler makes of it.
bandwidth       share of the measured memory bandwidth: "bytes accessed" of the compiled program. That is the compiler's
                estimate, in which what stays in a cache counts as if it came from memory: the share may pass 100 %. Of
                optimized inference and training by oneDNN it leaves out what oneDNN reads and writes, which is most.

The ceilings are measured first, on all devices at once: the best of some large matrix products in the dtype, at the default
precision and accumulated in float32; and bytes read and written by x * a + y over arrays far larger than the caches.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jaxlib
import numpy as np
import optax
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec

from cnnfamily import errors, memory, models, parallel, profile_layers, programs
from cnnfamily import inference as optimized
from cnnfamily.ceilings import Ceilings, durations, measure_ceilings
from cnnfamily.data import augment
from cnnfamily.models import onednn
from cnnfamily.step import Objective, create_state, train_step
from cnnfamily.summary import summarize

DEFAULT = (
    *("lenet5", "alexnet", "vgg16", "resnet50", "googlenet"),
    *("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
)
TRAINING = ("train", "onednn")  # modes with a step; the others are inference
MODES = (*TRAINING, "infer", "optimized")
_NORMAL = (0.449, 0.226)  # mean and standard deviation over ImageNet's channels; random pixels need no exact ones
_WHOLE, _CUT = PartitionSpec(), PartitionSpec(parallel.AXIS)


@dataclasses.dataclass
class Program:
    """A network's training step or inference on one batch. `function` of `arguments` is compiled for all devices of `mesh`.

    `compile` it, then call `step` as often as wanted. In training the first argument is the state, which each step replaces.
    """

    network: nn.Module
    mode: str  # one of MODES
    batch: int  # examples on all devices together
    resolution: int  # pixels
    mesh: Mesh
    function: Callable
    arguments: list
    compiled: jax.stages.Compiled | None = None

    def tracing(self) -> contextlib.AbstractContextManager:
        """Where it has to be traced and compiled."""
        in_what = {"onednn": "training", "optimized": "inference"}.get(self.mode)
        return programs.by_onednn(in_what) if in_what else contextlib.nullcontext()

    @property
    def trains(self) -> bool:
        """Whether it is a training step, whose first argument and first output is the state."""
        return self.mode in TRAINING

    def lower(self) -> jax.stages.Lowered:
        """The program traced anew."""
        return self.function.lower(*self.arguments)

    def compile(self) -> None:
        with self.tracing():
            self.compiled = self.lower().compile()

    def step(self) -> jax.Array | tuple:
        """Runs once and waits for it: logits `[batch, num_classes]`, or the new state and the step's metrics."""
        outputs = jax.block_until_ready(self.compiled(*self.arguments))
        if self.trains:
            self.arguments[0] = outputs[0]
        return outputs


def training(
    network: nn.Module,
    batch: int,
    *,
    resolution: int = 0,
    mesh: Mesh | None = None,
    recompute: bool = False,
    mode: str = "train",
) -> Program:
    """The product's training step: SGD with momentum 0.9 on one batch of random uint8 images and labels.

    Args:
      batch: examples on all devices together.
      resolution: side of the images in pixels; 0: the network's own.
      mesh: as from `parallel.data_mesh`, which it is by default.
      recompute: the field of `step.Objective`.
      mode: "train", or "onednn" for convolutions by oneDNN.

    Raises:
      UsageError: the batch cannot be divided over the devices, the network cannot take such images, or there is no oneDNN.
    """
    if mode == "onednn" and (missing := onednn.missing(network.dtype)):
        raise errors.UsageError(f"training by oneDNN: {missing}")
    resolution, mesh = _accepted(network, batch, resolution, mesh)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    variables = models.initialize(network, jax.random.key(0), resolution=resolution)
    state = jax.jit(functools.partial(create_state, optimizer=optimizer, ema=False))(variables)
    objective = Objective(network.clone(axis_name=parallel.AXIS), _view, seed=0, recompute=recompute)
    update = functools.partial(train_step, objective=objective, optimizer=optimizer)
    function = parallel.map_over_devices(update, mesh, batch_axis=1, outputs=2, donate=True)
    arrays = {"images": _images(network, batch, resolution), "labels": np.arange(batch, dtype=np.int32) % network.num_classes}
    arrays |= {name: np.arange(batch, dtype=np.int32) for name in ("index", "position")}
    examples = parallel.place({name: array[None] for name, array in arrays.items()}, mesh, batch_axis=1)
    return Program(network, mode, batch, resolution, mesh, function, [parallel.replicate(state, mesh), examples, {}])


def inference(network: nn.Module, batch: int, *, resolution: int = 0, mesh: Mesh | None = None, mode: str = "infer") -> Program:
    """Logits of one batch of random uint8 images, normalised inside the program; `mode` "infer" or "optimized".

    Other arguments and errors as `training`.
    """
    resolution, mesh = _accepted(network, batch, resolution, mesh)
    images = _images(network, batch, resolution)
    variables = models.initialize(network, jax.random.key(0), resolution=resolution)
    if mode == "optimized":
        network, variables = optimized.prepare(network, variables)

    def infer(variables, images):
        return network.apply(variables, augment.normalize(images, *_NORMAL))

    mapped = jax.shard_map(infer, mesh=mesh, in_specs=(_WHOLE, _CUT), out_specs=_CUT, check_vma=False)
    images = parallel.place({"images": images}, mesh, batch_axis=0)["images"]
    return Program(network, mode, batch, resolution, mesh, jax.jit(mapped), [parallel.replicate(variables, mesh), images])


def _view(keys: jax.Array, images: jax.Array, store: dict) -> jax.Array:
    return augment.normalize(images, *_NORMAL)


def _images(network: nn.Module, batch: int, resolution: int) -> np.ndarray:
    shape = (batch, resolution, resolution, network.in_channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _accepted(network: nn.Module, batch: int, resolution: int, mesh: Mesh | None) -> tuple[int, Mesh]:
    """The resolution and the mesh, after the checks that need no computing."""
    resolution, mesh = resolution or network.resolution, mesh or parallel.data_mesh()
    if batch < 1 or batch % mesh.size:
        raise errors.UsageError(f"--batch={batch}: expected a positive multiple of the {mesh.size} devices")
    models.variable_shapes(network, resolution=resolution)  # raises where it refuses this size
    return resolution, mesh


@contextlib.contextmanager
def empty_compilation_cache() -> Iterator[None]:
    """JAX's cache of compiled programs in an empty temporary directory, for every program; afterwards all is as before."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with tempfile.TemporaryDirectory(prefix="cnnfamily_cache_") as folder:
        settings["jax_compilation_cache_dir"] = folder
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # it looks at the settings once
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def compile_seconds(program: Program) -> dict[str, float]:
    """Compiles a program and says in how many seconds: tracing it, compiling it cold, and once more with a filled cache."""
    with empty_compilation_cache(), program.tracing():
        jax.clear_caches()
        start = time.perf_counter()
        lowered = program.lower()
        traced = time.perf_counter()
        program.compiled = lowered.compile()
        cold = time.perf_counter()
        jax.clear_caches()
        lowered = program.lower()
        again = time.perf_counter()
        lowered.compile()
        cached = time.perf_counter()
    return {"trace_seconds": traced - start, "compile_seconds_cold": cold - traced, "compile_seconds_cached": cached - again}


def measure(
    program: Program, ceiling: Ceilings, *, steps: int = 0, seconds: float = 5.0, by_layer: bool = False
) -> dict[str, object]:
    """All figures of a program, which it compiles: what `--json` gives of a network and mode, as the module's docstring says.

    Args:
      steps: to time; 0: as many as fit in `seconds`, and at least 3.
      by_layer: adds `by_layer`, a list of `profile_layers.LayerTime`.
    """
    network, mode = program.network, program.mode
    counts = summarize(network, resolution=program.resolution)
    compiling = compile_seconds(program)
    times = durations(program.step, steps=steps, seconds=seconds)
    low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    flops = (6 if program.trains else 2) * counts.macs * program.batch
    accessed = program.compiled.cost_analysis().get("bytes accessed", 0.0) * program.mesh.size
    device = program.mesh.devices.flat[0]
    row = {
        "network": type(network).__name__,
        "mode": mode,
        "dtype": network.dtype,
        "batch": program.batch,
        "resolution": program.resolution,
        "params": counts.params,
        "macs": counts.macs,
        "steps": len(times),
        "images_per_second": program.batch / median,
        "milliseconds": 1e3 * median,
        "milliseconds_low": 1e3 * low,
        "milliseconds_high": 1e3 * high,
        **compiling,
        "program_bytes": _program_bytes(program.compiled),
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "bytes_accessed": accessed,
        "matrix_share": flops / median / ceiling.flops_per_second,
        "bandwidth_share": accessed / median / ceiling.bytes_per_second,
    }
    if by_layer:
        layers = [layer.name for layer in counts.layers]
        found = profile_layers.by_layer(program.step, program.compiled.as_text(), row["network"], layers)
        row["by_layer"] = [dataclasses.asdict(layer) for layer in found]
    return row


def _program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Memory of one device that a compiled program needs, or None where the backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    shared = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + shared + found.temp_size_in_bytes


HEAD = (
    f"{'':<46}{'ms a step':>30}{'compile, s':>15}{'memory':>9}{'share of ceiling':>18}\n"
    f"{'network':<19}{'':<10}{'pixels':>6}{'images/s':>11}{'median':>10}{'quartiles':>20}{'cold':>8}{'cached':>7}"
    f"{'MiB':>9}{'matrix':>8}{'bandwidth':>10}"
)


def text_row(row: dict) -> str:
    """The line of the table for what `measure` found, and below it a line for each layer if there are any."""
    needed = "-" if row["program_bytes"] is None else f"{row['program_bytes'] / 2**20:,.0f}"
    quartiles = f"{row['milliseconds_low']:,.2f} - {row['milliseconds_high']:,.2f}"
    text = (
        f"{row['name']:<19}{row['mode']:<10}{row['resolution']:>6}{row['images_per_second']:>11,.1f}"
        f"{row['milliseconds']:>10,.2f}{quartiles:>20}{row['compile_seconds_cold']:>8.2f}{row['compile_seconds_cached']:>7.2f}"
        f"{needed:>9}{row['matrix_share']:>8.1%}{row['bandwidth_share']:>10.1%}"
    )
    layers = row.get("by_layer")
    if layers is None:
        return text
    if not layers:
        return f"{text}\n  by layer: the profiler recorded no instruction"
    return "\n".join([text, f"  {'share of the time':<40}{'forward':>9}{'backward':>10}", *map(_layer_line, layers)])


def _layer_line(layer: dict) -> str:
    return f"  {layer['name']:<40}{layer['forward']:>9.2%}{layer['backward']:>10.2%}"


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    patterns = arguments.models or DEFAULT
    names = [name for pattern in patterns for name in models.list_models(pattern) or [pattern]]
    networks = {name: models.create_model(name, dtype=arguments.dtype) for name in names}
    mesh = parallel.data_mesh()
    for network in networks.values():  # all of them before the first is measured
        _accepted(network, arguments.batch, arguments.resolution, mesh)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    head = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "devices": devices, "dtype": arguments.dtype}
    head["batch"] = arguments.batch
    ceiling = measure_ceilings(arguments.dtype, mesh)
    if not arguments.json:
        measured = f"{ceiling.flops_per_second / 1e9:,.1f} GFLOP/s and {ceiling.bytes_per_second / 1e9:,.1f} GB/s measured"
        print(", ".join(f"{key} {value}" for key, value in head.items()) + f": {measured}\n{HEAD}", flush=True)
    rows = []
    for name, network in networks.items():
        for mode in ("train", "infer") if arguments.mode == "both" else (arguments.mode,):
            prepare = training if mode in TRAINING else inference
            program = prepare(network, arguments.batch, resolution=arguments.resolution, mesh=mesh, mode=mode)
            options = {"steps": arguments.steps or 0, "seconds": arguments.seconds, "by_layer": arguments.by_layer}
            rows.append({"name": name, **measure(program, ceiling, **options)})
            if not arguments.json:
                print(text_row(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({**head, **dataclasses.asdict(ceiling), "networks": rows}, indent=1))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = errors.argument_parser("cnnfamily.benchmark", __doc__)
    parser.add_argument("models", metavar="MODEL", nargs="*", help=f"names or patterns (default: {' '.join(DEFAULT)})")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="examples on all devices together (default: 16)")
    parser.add_argument("--resolution", type=int, default=0, metavar="N", help="pixels (default: the network's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of timing for each program (default: 5)")
    length.add_argument("--steps", type=int, metavar="N", help="to time, instead of seconds")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--by-layer", action="store_true", help="the share of the time that each layer takes")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args(argv)
    if arguments.resolution < 0 or (arguments.steps is not None and arguments.steps < 1) or not arguments.seconds > 0:
        parser.error("--steps and --seconds: expected more than 0, --resolution: 0 or more")
    return arguments


if __name__ == "__main__":
    memory.tune_malloc()
    errors.run_command(main)
