"""One dimension alone, or all of them, at equal multiply-adds: width, depth, resolution and the compound rule; four networks.

    python -m cnnfamily.sweep --sweep=experiments/scaling/sweep.py           # the digits, small networks, two CPU cores
    python -m cnnfamily.sweep --sweep=experiments/scaling/sweep.py:cifar10 --config.data.source=npz:FILE   # on a GPU

`:cifar10_short` has a third of the epochs and one seed.

Coefficients are solved for, from exact counts: those printed in EfficientNet's Table 7 miss its own budget by 13 to 20 %.
"""

import functools
import math

from cnnfamily import scaling
from cnnfamily.models import create_model
from cnnfamily.summary import summarize

BASE = {name: f"experiments/scaling/config.py:{name}" for name in ("digits", "cifar10", "photographs")}
BASE |= dict.fromkeys(("cifar10_short", "cifar10_smoke"), BASE["cifar10"])
SIDE = {"cifar10": 32, "cifar10_short": 32, "cifar10_smoke": 32, "photographs": 128}
# Of the short forms: one seed, 10 epochs in place of 30; and two settings of one network to try that it runs.
SHORT = {"cifar10_short": {"total_epochs": 10.0}, "cifar10_smoke": {"total_epochs": 1.0, "optim.warmup_epochs": 0.5}}
# What each is scaled from on the digits: width, depth and side. At 32 pixels three of them have maps of one pixel at the end.
SMALL = {
    "efficientnet_b0": (0.35, 0.5, 48),
    "mobilenet_v1": (0.35, 0.5, 48),
    "mobilenet_v2": (0.35, 0.5, 48),
    "resnet20_cifar": (0.75, 0.5, 32),
}
# The budget, in multiply-adds of the base, and phi; with 2 and 1, whole blocks and filters in eights leave little choice.
BUDGET, PHI = 3.0, math.log2(3.0)


@functools.cache
def macs(network: str, width: float, depth: float, side: int) -> int:
    return summarize(create_model(network, width=width, depth=depth, num_classes=10), resolution=side).macs


def scaled(network: str, width: float, depth: float, side: int, high: float) -> dict[str, tuple[float, float, int]]:
    """Width, depth and side of each way to spend the budget; depth in whole blocks and sides in whole pixels, as they come.

    Compound: depth and side by the rule, and the width that then meets the budget. Numbers of blocks are rounded up,
    so that a depth of 1.2 costs a small network more than 1.2, and phi itself could not meet it.
    """
    rule = scaling.compound(PHI, resolution=side)
    ways = {
        "width": lambda c: (width * c, depth, side),
        "depth": lambda c: (width, depth * c, side),
        "resolution": lambda c: (width, depth, round(side * c)),
        "compound": lambda c: (width * c, depth * rule["depth"], rule["resolution"]),
    }
    budget = BUDGET * macs(network, width, depth, side)
    found = {}
    for name, way in ways.items():
        low = 0.5 if name == "compound" else 1.0  # whole blocks may cost so much that the width has to give way
        solution = scaling.solve(lambda c, way=way: macs(network, *way(c)), budget, low=low, high=high, precision=0.01)
        found[name] = way(solution.coefficient)
    return found


def sweep(name: str):
    if name == "cifar10_smoke":
        for width in (0.25, 0.5):
            yield {"model.name": "resnet20_cifar", "model.width": width, "data.resolution": 32, **SHORT[name]}
        return
    for network, small in SMALL.items():
        # Of a small network with blocks that are nearly free it may take many; 16 times a whole one take minutes to count.
        base, high = (small, 16.0) if name == "digits" else ((1.0, 1.0, SIDE[name]), 4.0)
        for width, depth, side in (base, *scaled(network, *base, high).values()):
            for seed in range(1 if name in SHORT else 3):
                fields = {"model.name": network, "model.width": round(width, 4), "model.depth": round(depth, 4)}
                yield {**fields, "data.resolution": side, "seed": seed, **SHORT.get(name, {})}
