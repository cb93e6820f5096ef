"""Two virtual devices against one at the same global batch, and what they send: `python experiments/speed/devices.py`.

Each number of devices is a process of its own, which compiles once and then takes its turn: of each round it runs one burst of
steps, with memory as training has it. All-reduced bytes are counted from the compiled program: the operands of every all-reduce
and all-gather.
"""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time

from cnnfamily import memory

NETWORKS = (("resnet18", 0), ("efficientnet_b0", 0), ("efficientnet_b0", 8))  # and examples of a group of batch norm
BATCHES, SIDE, ROUNDS, IMAGES = (16, 64), 128, 7, 64  # of the last as many as a burst has at least
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}


def collective_bytes(hlo: str) -> dict[str, list[int]]:
    """For each kind of collective the bytes that each of its operations results in on one device."""
    found = {}
    for line in hlo.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = (BYTES[kind] * math.prod(map(int, dims.split(",") if dims else ())) for kind, dims in shapes)
            found.setdefault(match[2], []).append(sum(sizes))
    return found


def side(name: str, group: int, batch: int) -> None:
    """One number of devices (XLA_FLAGS says how many): a line when ready, then seconds for each line read."""
    from cnnfamily import benchmark, create_model

    program = benchmark.training(create_model(name, num_classes=100, norm_group=group), batch, resolution=SIDE)
    program.compile()
    for _ in range(2):
        program.step()
    params = program.arguments[0].params
    import jax

    sent = {"gradient": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), **collective_bytes(program.compiled.as_text())}
    sent["statistics"] = sum(leaf.nbytes for leaf in jax.tree.leaves(program.arguments[0].batch_stats))
    print(json.dumps(sent), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps_of(batch)):
            program.step()
        print(json.dumps(time.perf_counter() - start), flush=True)


def steps_of(batch: int) -> int:
    return -(-IMAGES // batch)


def compare(name: str, group: int, batch: int) -> None:
    sides = []
    for devices in (1, 2):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, name, str(group), str(batch)]
        sides.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    sent = [json.loads(side.stdout.readline()) for side in sides]
    seconds = ([], [])
    for _ in range(ROUNDS):
        for side, taken in zip(sides, seconds, strict=True):
            print(file=side.stdin, flush=True)
            taken.append(json.loads(side.stdout.readline()))
    for side in sides:
        side.communicate()
    ratios = sorted(one / two for one, two in zip(*seconds, strict=True))
    rates = [batch * steps_of(batch) / statistics.median(taken) for taken in seconds]
    reduced, gathered = (sent[1].get(kind, []) for kind in ("all-reduce", "all-gather"))
    print(
        f"| {name} | {batch} | {group or batch} | {rates[0]:.1f} | {rates[1]:.1f} "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {sent[1]['gradient']:,} "
        f"| {sum(reduced):,} in {len(reduced)} | {sum(gathered):,} in {len(gathered)} |",
        flush=True,
    )


def main() -> None:
    print(f"{SIDE} pixels, float32, {ROUNDS} rounds of {IMAGES} images, in turn\n")
    print("| network | batch | norm group | one device, images/s | two | two / one ", end="")
    print("| gradient, bytes | all-reduced | all-gathered |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, group), batch in itertools.product(NETWORKS, BATCHES):
        compare(name, group, batch)


if __name__ == "__main__":
    if sys.argv[1:]:
        memory.tune_malloc()  # as `cnnfamily.train` does
        side(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
