"""Width, depth and resolution: the published table, the compound formula, the rounding rules, and a solver for a budget.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, https://arxiv.org/abs/1905.11946:
depth alpha^phi, width beta^phi, resolution gamma^phi with alpha * beta^2 * gamma^2 close to 2, so that phi doublings of the
multiply-adds are spent on all three at once.
"""

import dataclasses
import math
from collections.abc import Callable

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # depth, width, resolution: the grid search at phi = 1, section 3.3

# width, depth, resolution, dropout: the coefficients of the authors' code (efficientnet_builder.py); the paper prints none.
# They follow the formula only roughly: see `compound`.
PUBLISHED = {
    "efficientnet_b0": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5),
}


def compound(
    phi: float, *, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA, resolution: int = 224
) -> dict[str, float | int]:
    """Fields of a network scaled by phi: `depth` alpha^phi, `width` beta^phi, and `resolution` gamma^phi times the base's."""
    return {"depth": alpha**phi, "width": beta**phi, "resolution": round(resolution * gamma**phi)}


def round_filters(filters: float, width: float = 1.0, divisor: int = 8) -> int:
    """`filters * width` as the nearest multiple of `divisor`, never below it nor more than 10 % below the product.

    The rule of the MobileNet and EfficientNet code (`make_divisible`, `round_filters`).
    """
    scaled = filters * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float = 1.0) -> int:
    """Blocks in a stage: `repeats * depth` rounded up (EfficientNet's `round_repeats`)."""
    return math.ceil(repeats * depth)


@dataclasses.dataclass(frozen=True)
class Solution:
    """A coefficient, the multiply-adds it gives, and their relative distance from the budget."""

    coefficient: float
    macs: int
    error: float


def solve(
    macs_of: Callable[[float], int], budget: float, *, low: float = 0.1, high: float = 10.0, precision: float = 1e-3
) -> Solution:
    """The coefficient in [low, high] whose multiply-adds come nearest to `budget`, by bisection.

    `macs_of` must not decrease. It is a staircase (filters come in eights, blocks and pixels whole), so the answer is the
    better side of the step at the budget: look at `error`.

        solve(lambda width: summarize(create_model("efficientnet_b0", width=width)).macs, 2 * 385_814_752)

    Raises:
      ValueError: the budget lies outside what `low` and `high` give.
    """
    below, above = (low, macs_of(low)), (high, macs_of(high))
    if not below[1] <= budget <= above[1]:
        raise ValueError(
            f"a budget of {budget:,.0f} multiply-adds is out of reach: "
            f"coefficient {low} gives {below[1]:,} and {high} gives {above[1]:,}"
        )
    while above[0] - below[0] > precision * below[0] and below[1] != above[1]:
        middle = (below[0] + above[0]) / 2
        macs = macs_of(middle)
        if macs <= budget:
            below = (middle, macs)
        else:
            above = (middle, macs)
    coefficient, macs = min(below, above, key=lambda side: abs(side[1] - budget))
    return Solution(coefficient, macs, (macs - budget) / budget)
