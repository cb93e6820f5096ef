"""What `optimize_for_inference` gains over a jitted network with batch norm folded. `python experiments/speed/optimized.py`.

Both in one process, compiled first, then a burst of calls of each in turn on the same normalised images, in the network's
dtype. Beside it the largest difference of their logits, as a share of the largest logit, and the seconds that each took to
trace and compile. `--out=FILE.md` writes the table down.
"""

import argparse
import statistics
import time
from pathlib import Path

import compare
import jax
import numpy as np

from cnnfamily import ceilings, create_model, disk, fold_batch_norm, memory, models, optimize_for_inference
from cnnfamily.models import onednn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(compare.MODELS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a burst, about")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = jax.local_devices()[0].device_kind
    device = compare.processor() if device == "cpu" else device
    text = f"{device}, JAX {jax.__version__}, batch {arguments.batch}, {arguments.rounds} rounds in turn; "
    text += "medians (smallest to largest).\n\n"
    text += "| network | dtype | folded, images/s | optimized | ratio by round | difference | compiled in, s | optimized |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    print(text, end="", flush=True)
    for dtype in arguments.dtypes.split(","):
        if reason := onednn.missing(dtype):
            print(f"no oneDNN for {dtype}: {reason}", flush=True)
        for name in arguments.models.split(","):
            text += (line := row(name, dtype, arguments) + "\n")
            print(line, end="", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        disk.write_whole(arguments.out, text)


def row(name: str, dtype: str, arguments: argparse.Namespace) -> str:
    network = create_model(name, dtype=dtype)
    variables = models.initialize(network, jax.random.key(0), resolution=network.resolution)
    side = network.resolution
    images = np.random.default_rng(0).normal(size=(arguments.batch, side, side, network.in_channels))
    images = jax.device_put(images.astype(np.float32)).astype(dtype)
    infer = optimize_for_inference(network, variables)
    folded, without = fold_batch_norm(network, variables) if variables["batch_stats"] else (network, variables)
    apply = jax.jit(folded.apply)
    calls, compiling, logits = {"folded": lambda: apply(without, images), "optimized": lambda: infer(images)}, {}, {}
    for form, call in calls.items():
        start = time.perf_counter()
        logits[form] = np.asarray(call(), np.float64)
        compiling[form] = time.perf_counter() - start
    rates = {form: [] for form in calls}
    for _ in range(arguments.rounds):
        for form, call in calls.items():
            times = ceilings.durations(lambda call=call: jax.block_until_ready(call()), seconds=arguments.seconds)
            rates[form].append(arguments.batch / times.mean())
    ratios = [ours / before for before, ours in zip(rates["folded"], rates["optimized"], strict=True)]
    difference = abs(logits["optimized"] - logits["folded"]).max() / abs(logits["folded"]).max()
    cells = [name, dtype, *(spread(rates[form], 0) for form in calls), spread(ratios, 2), f"{difference:.0e}"]
    return f"| {' | '.join([*cells, *(f'{compiling[form]:.1f}' for form in calls)])} |"


def spread(values: list[float], digits: int) -> str:
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    memory.tune_malloc()
    main()
