"""Where the time of a compiled program goes, by the network's layers; what `benchmark --by-layer` prints.

JAX's profiler says how long every instruction ran, and the compiled program's text from which module each one came. XLA fuses
neighbours into one instruction, whose time goes whole to the layer that the compiler names: a batch norm and the activation
after it are one, and so may be the end of a block and the start of the next. Instructions overlap on several threads, so the
durations add up to more than the wall clock; their shares of the sum are what counts.
"""

import collections
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

UPDATE, INPUTS, UNKNOWN = "(update)", "(inputs and loss)", "(not attributed)"

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Shares, from 0 to 1, of a program's time: in the layer's forward and in its backward pass.

    `name` is the path of a layer as in `summary.summarize`; of a module that holds layers ("stage2_block1", for what it does
    between them, such as adding the shortcut; the class's name for the network itself); or, in parentheses, of what belongs to
    no module: the update (optimizer, sums over devices, the norm of the gradient), the inputs and the loss, and what could not
    be attributed, because the compiler made it and does not say from what. For these all is in `forward`.
    """

    name: str
    forward: float
    backward: float


def by_layer(step: Callable[[], object], hlo: str, network: str, layers: Iterable[str], *, steps: int = 3) -> list[LayerTime]:
    """Records `steps` calls of `step`, and gives the shares of their time, largest first; they sum to 1.

    Args:
      step: runs the compiled program once and waits for it; it should have run before.
      hlo: the program's text, `compiled.as_text()`.
      network: the class of the network, by which its modules' paths begin in the text.
      layers: paths of its layers.

    Returns:
      Nothing if the profiler recorded no instruction of the program, as where its times are those of whole graphs.
    """
    with tempfile.TemporaryDirectory(prefix="cnnfamily_trace_") as folder:
        record(step, folder, steps)
        durations = read_durations(folder, hlo.split(",", 1)[0].removeprefix("HloModule "))
    return attribute(durations, operation_names(hlo), network, layers)


def record(step: Callable[[], object], folder: str | Path, steps: int) -> None:
    """Calls `step` with the profiler on, which writes into `folder`. Without Python's own events: they would slow it down."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        for _ in range(steps):
            step()
    finally:
        jax.profiler.stop_trace()


def read_durations(folder: str | Path, module: str) -> dict[str, float]:
    """Nanoseconds by HLO instruction, summed over steps, devices and threads, of the program `module` that `record` saw.

    An instruction that runs others, such as a loop, counts without them.
    """
    total = collections.Counter()
    with warnings.catch_warnings():
        # jaxlib 0.12 warns at the first event that it reads, and ends the process where warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        for file in sorted(Path(folder).rglob("*.xplane.pb")):
            planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
            # Beside a GPU's kernels stand the host's launches of the same instructions; a CPU's are on the host's plane.
            for plane in [plane for plane in planes if plane.name.startswith("/device:")] or planes:
                for line in plane.lines:
                    total.update(_own_times(_instructions(line, module)))
    return dict(total)


def _instructions(line, module: str) -> list[tuple[float, float, str]]:
    """(start, end, instruction) of a line's events that ran one of `module`, outer before inner."""
    found = []
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats and stats.get("hlo_module", module) == module:
            instruction = stats["hlo_op"].partition("__onednn$")[0]  # XLA puts the name of a call to oneDNN behind it
            found.append((event.start_ns, event.start_ns + event.duration_ns, instruction))
    return sorted(found, key=lambda event: (event[0], -event[1]))


def _own_times(events: list[tuple[float, float, str]]) -> dict[str, float]:
    """Time by name of (start, end, name), outer before inner, each without what lies inside it."""
    total, around = collections.Counter(), []
    for start, end, name in events:
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            end = min(end, around[-1][0])
            total[around[-1][1]] -= end - start
        total[name] += end - start
        around.append((end, name))
    return total


def operation_names(hlo: str) -> dict[str, str]:
    """The operation in JAX, as "jit(train_step)/jvp(ResNet)/stem/...", from which each instruction of an HLO text came.

    An instruction without one takes that of the computation it calls, the last one inside; failing that, that of the first
    instruction that uses it: the compiler puts some in another order of dimensions and labels only what puts them back. Those
    still without are left out.
    """
    names, called, inside, users, computation = {}, {}, {}, {}, ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            instruction = match[1]
            inside.setdefault(computation, []).append(instruction)
            if operation := _OPERATION.search(line):
                names[instruction] = operation[1]
            elif call := _CALLED.search(line):
                called[instruction] = call[1]
            for operand in _OPERAND.findall(line, match.end()):
                users.setdefault(operand, []).append(instruction)

    def within(computation):
        for instruction in reversed(inside.get(computation, ())):
            if name := names.get(instruction) or (instruction in called and within(called[instruction])):
                return name
        return ""

    names |= {instruction: name for instruction, computation in called.items() if (name := within(computation))}
    for instructions in inside.values():
        for instruction in reversed(instructions):  # users stand below
            if instruction not in names:
                known = [names[user] for user in users.get(instruction, ()) if user in names]
                names |= {instruction: known[0]} if known else {}
    return names


def attribute(durations: dict[str, float], operations: dict[str, str], network: str, layers: Iterable[str]) -> list[LayerTime]:
    """Shares by layer, largest first, from durations by instruction and the operations of `operation_names`."""
    modules = set()
    for parts in (layer.split("/") for layer in layers):
        modules |= {"/".join(parts[:length]) for length in range(1, len(parts) + 1)}
    times = {}
    for instruction, duration in durations.items():
        name, backward = locate(operations.get(instruction, ""), network, modules)
        times.setdefault(name, [0.0, 0.0])[backward] += duration
    total = sum(map(sum, times.values()))
    rows = [LayerTime(name, forward / total, backward / total) for name, (forward, backward) in times.items()]
    return sorted(rows, key=lambda row: -(row.forward + row.backward))


def locate(operation: str, network: str, modules: set[str]) -> tuple[str, bool]:
    """The row of `LayerTime` to which an operation belongs, and whether to its backward pass.

    Of the names after the network's those count that lead from one module to one inside it; the others are functions and
    primitives, or the body of a condition, which repeats the module's path.
    """
    parts = operation.split("/")
    cores = [re.split(r"[()]+", part.rstrip(")"))[-1] for part in parts]  # transpose(jvp(ResNet)): ResNet
    if network not in cores:
        updates = operation.startswith("jit(train_step)/") and "jvp(" not in operation
        return (UPDATE if updates else INPUTS if operation else UNKNOWN), False
    path = ""
    for part in parts[cores.index(network) + 1 :]:
        inner = f"{path}/{part}".lstrip("/")
        path = inner if inner in modules else path
    return path or network, "transpose(" in operation
