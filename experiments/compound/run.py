"""What EfficientNet's formula gives beside what was published, from exact counts: `python experiments/compound/run.py`.

Writes `formula.md` (B0 to B7: published coefficients and the formula's), `budget.md` (one dimension alone, or all, at the
budget of the paper's Table 7: printed coefficients and solved ones) and `grid.md` (the grid search's candidates at phi = 1 with
real counts). Nothing is trained.
"""

import itertools
from pathlib import Path

from cnnfamily import scaling
from cnnfamily.models import create_model
from cnnfamily.summary import summarize

HERE = Path(__file__).parent
BASE = "efficientnet_b0"
TABLE_7 = {"depth": (4.0, 1.0, 1.0), "width": (1.0, 2.0, 1.0), "resolution": (1.0, 1.0, 2.0)}  # depth, width, resolution
BUDGET = {"depth": 1.8e9, "width": 1.8e9, "resolution": 1.9e9, "compound": 1.8e9}  # as the paper prints them


def counts(depth: float, width: float, resolution: int):
    return summarize(create_model(BASE, depth=depth, width=width), resolution=resolution)


def formula() -> str:
    lines = [
        "| network | phi | published depth, width, side | parameters | multiply-adds "
        "| formula's depth, width, side | parameters | multiply-adds | over 2^phi of B0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = counts(1.0, 1.0, 224).macs
    for phi, (name, (width, depth, resolution, _)) in enumerate(scaling.PUBLISHED.items()):
        published, fields = counts(depth, width, resolution), scaling.compound(phi)
        ours = counts(fields["depth"], fields["width"], fields["resolution"])
        text = f"{fields['depth']:.2f}, {fields['width']:.2f}, {fields['resolution']}"
        lines.append(
            f"| {name[-2:].upper()} | {phi} | {depth}, {width}, {resolution} | {published.params:,} | {published.macs:,} "
            f"| {text} | {ours.params:,} | {ours.macs:,} "
            f"| {published.macs / base / 2**phi:.2f}, {ours.macs / base / 2**phi:.2f} |"
        )
    return "\n".join(lines) + "\n"


def budget() -> str:
    lines = [
        "| scaled | printed coefficient | multiply-adds it gives | the paper's | solved | multiply-adds | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    ways = {
        "depth": lambda c: counts(c, 1.0, 224).macs,
        "width": lambda c: counts(1.0, c, 224).macs,
        "resolution": lambda c: counts(1.0, 1.0, round(224 * c)).macs,
    }
    for name, macs_of in ways.items():
        depth, width, side = TABLE_7[name]
        printed = counts(depth, width, round(224 * side)).macs
        found = scaling.solve(macs_of, BUDGET[name], low=1.0, high=8.0)
        lines.append(
            f"| {name} | {max(TABLE_7[name]):g} | {printed:,} | {BUDGET[name]:,.0f} | {found.coefficient:.3f} | {found.macs:,} "
            f"| {found.error:+.1%} |"
        )

    def compound(phi: float) -> int:
        fields = scaling.compound(phi)
        return counts(fields["depth"], fields["width"], fields["resolution"]).macs

    printed = counts(1.4, 1.2, round(224 * 1.3)).macs
    found = scaling.solve(compound, BUDGET["compound"], low=0.1, high=4.0)
    fields = scaling.compound(found.coefficient)
    lines.append(
        f"| all three | 1.4, 1.2, 1.3 | {printed:,} | {BUDGET['compound']:,.0f} "
        f"| phi {found.coefficient:.3f}: {fields['depth']:.2f}, {fields['width']:.2f}, {fields['resolution'] / 224:.2f} "
        f"| {found.macs:,} | {found.error:+.1%} |"
    )
    return "\n".join(lines) + "\n"


def grid() -> str:
    """All (alpha, beta, gamma) in steps of 0.05 whose product alpha * beta^2 * gamma^2 lies within 5 % of 2."""
    lines = ["| alpha | beta | gamma | product | multiply-adds over B0's |", "|---|---|---|---|---|"]
    base = counts(1.0, 1.0, 224).macs
    steps = [1 + 0.05 * i for i in range(21)]
    for alpha, beta, gamma in itertools.product(steps, repeat=3):
        product = alpha * beta**2 * gamma**2
        if abs(product / 2 - 1) <= 0.05:
            ratio = counts(alpha, beta, round(224 * gamma)).macs / base
            lines.append(f"| {alpha:.2f} | {beta:.2f} | {gamma:.2f} | {product:.3f} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, make in (("formula", formula), ("budget", budget), ("grid", grid)):
        text = make()
        (HERE / f"{name}.md").write_text(text)
        print(text)
