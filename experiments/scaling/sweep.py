"""One dimension alone, or all of them, at equal multiply-adds: width, depth, resolution and the compound rule; four networks.

    python -m cnnfamily.sweep --sweep=experiments/scaling/sweep.py           # the digits, small networks, two CPU cores
    python -m cnnfamily.sweep --sweep=experiments/scaling/sweep.py:cifar10 --config.data.source=npz:FILE   # on a GPU

Coefficients are solved for, from exact counts: those printed in EfficientNet's Table 7 miss its own budget by 13 to 20 %.
"""

import functools

from cnnfamily import scaling
from cnnfamily.models import create_model
from cnnfamily.summary import summarize

BASE = {name: f"experiments/scaling/config.py:{name}" for name in ("digits", "cifar10", "photographs")}
SIDE = {"digits": 32, "cifar10": 32, "photographs": 128}
# The width and depth from which each is scaled: small on the digits, as it is elsewhere.
NETWORKS = {
    "efficientnet_b0": (0.35, 0.5),
    "mobilenet_v1": (0.25, 1.0),
    "mobilenet_v2": (0.35, 1.0),
    "resnet20_cifar": (0.5, 1.0),
}
BUDGET = 2.0  # times the multiply-adds of the base


@functools.cache
def macs(network: str, width: float, depth: float, side: int) -> int:
    return summarize(create_model(network, width=width, depth=depth), resolution=side).macs


def scaled(network: str, width: float, depth: float, side: int) -> dict[str, tuple[float, float, int]]:
    """Width, depth and side of each way to spend the budget; depth in whole blocks and sides in whole pixels, as they come.

    Compound: depth and side by the rule at phi = 1, and the width that then meets the budget. Numbers of blocks are rounded up,
    so that a depth of 1.2 costs a small network more than 1.2, and phi itself could not meet it.
    """
    rule = scaling.compound(1.0, resolution=side)
    ways = {
        "width": lambda c: (width * c, depth, side),
        "depth": lambda c: (width, depth * c, side),
        "resolution": lambda c: (width, depth, round(side * c)),
        "compound": lambda c: (width * c, depth * rule["depth"], rule["resolution"]),
    }
    budget = BUDGET * macs(network, width, depth, side)
    found = {}
    for name, way in ways.items():
        solution = scaling.solve(lambda c, way=way: macs(network, *way(c)), budget, low=0.5, high=4.0, precision=0.01)
        found[name] = way(solution.coefficient)
    return found


def sweep(name: str):
    for network, (width, depth) in NETWORKS.items():
        width, depth = (width, depth) if name == "digits" else (1.0, 1.0)
        base = (width, depth, SIDE[name])
        for w, d, side in (base, *scaled(network, *base).values()):
            for seed in range(3):
                fields = {"model.name": network, "model.width": round(w, 4), "model.depth": round(d, 4)}
                yield {**fields, "data.resolution": side, "seed": seed}
