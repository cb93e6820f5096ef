"""What stochastic depth saves: ResNet-110 on 32 x 32 images, p = 0.5 linear. `python experiments/speed/stochastic_depth.py`.

All forms in one process, compiled first, then one burst of steps of each in turn. Expected is the mean drop rate's share of the
step: a block that is dropped with rate p costs (1 - p) of its time, the stem and the head all of theirs. An epoch is 50,000
images. `--out=FILE.md` writes the table down.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compare
import jax

from cnnfamily import benchmark, create_model, disk, memory

BATCH, EPOCH = 128, 50_000
FORMS = ("none", "example", "subset", "batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet110_cifar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of a burst; default: 2 on a CPU, 50 elsewhere")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    steps = arguments.steps or (2 if jax.default_backend() == "cpu" else 50)
    programs = {}
    for form in FORMS:
        fields = {"stochastic_depth": 0.5, "stochastic_depth_form": form, "stochastic_depth_schedule": "l/L"}
        programs[form] = benchmark.training(create_model(arguments.model, **fields), BATCH)
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:  # XLA compiles outside of Python: four programs on four cores
        list(pool.map(benchmark.Program.compile, programs.values()))
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for program in programs.values():
        program.step()
    seconds = {form: [] for form in FORMS}
    for _ in range(arguments.rounds):
        for form, program in programs.items():
            start = time.perf_counter()
            for _ in range(steps):
                program.step()
            seconds[form].append((time.perf_counter() - start) / steps)
    device = jax.local_devices()[0].device_kind
    text = f"{arguments.model}, batch {BATCH}, float32, {arguments.rounds} rounds of {steps} steps, in turn; "
    text += f"{compare.processor() if device == 'cpu' else device}, JAX {jax.__version__}; "
    text += table(seconds, sum(create_model(arguments.model).stage_sizes))
    print(f"\n{text}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        disk.write_whole(arguments.out, text)


def table(seconds: dict[str, list[float]], blocks: int) -> str:
    expected = sum(0.5 * (i + 1) / blocks for i in range(blocks)) / blocks
    lines = [
        f"mean drop rate {expected:.3f}\n",
        "| form | ms a step | seconds an epoch | of none | saving | of what is expected |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for form in FORMS:
        ratios = sorted(mine / none for mine, none in zip(seconds[form], seconds["none"], strict=True))
        ratio, middle = statistics.median(ratios), statistics.median(seconds[form])
        cells = [form, f"{1e3 * middle:,.{0 if middle > 1 else 1}f}", f"{middle * EPOCH / BATCH:,.1f}"]
        cells += [f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", f"{1 - ratio:.1%}", f"{(1 - ratio) / expected:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    memory.tune_malloc()
    main()
