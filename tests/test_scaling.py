"""The published coefficients, the formula, the rounding rules and the solver."""

import pytest

from cnnfamily import scaling
from cnnfamily.models import create_model
from cnnfamily.scaling import compound, round_filters, round_repeats, solve
from cnnfamily.summary import summarize


def test_published_table():
    # https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet/efficientnet_builder.py, efficientnet_params
    width, depth, resolution, dropout = zip(*scaling.PUBLISHED.values(), strict=True)
    assert list(scaling.PUBLISHED) == [f"efficientnet_b{i}" for i in range(8)]
    assert width == (1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
    assert depth == (1.0, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6, 3.1)
    assert resolution == (224, 240, 260, 300, 380, 456, 528, 600)
    assert dropout == (0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5)


def test_compound_formula():
    assert (scaling.ALPHA, scaling.BETA, scaling.GAMMA) == (1.2, 1.1, 1.15)  # section 3.3
    assert 1.9 < scaling.ALPHA * scaling.BETA**2 * scaling.GAMMA**2 < 2
    assert compound(0) == {"depth": 1.0, "width": 1.0, "resolution": 224}
    assert compound(1) == {"depth": 1.2, "width": 1.1, "resolution": 258}  # 224 * 1.15 = 257.6
    assert compound(2) == pytest.approx({"depth": 1.44, "width": 1.21, "resolution": 296})  # 296.24
    assert compound(3, alpha=2, beta=1, gamma=1.5, resolution=32) == {"depth": 8, "width": 1, "resolution": 108}


@pytest.mark.parametrize(
    ("filters", "width", "divisor", "expected"),
    [
        (32, 1.0, 8, 32),
        (32, 1.1, 8, 32),  # 35.2: nearest 32, 9 % below
        (40, 1.1, 8, 48),  # 44: half way goes up
        (16, 1.4, 8, 24),  # 22.4: nearest 24
        (192, 1.1, 8, 208),  # 211.2
        (1280, 2.0, 8, 2560),
        (12, 1.0, 8, 16),
        (11.9, 1.0, 8, 16),  # nearest 8 would be 33 % below: the rule of 10 %
        (18, 1.0, 8, 24),  # nearest 16 is 11 % below
        (17.5, 1.0, 8, 16),  # 8.6 % below
        (3, 1.0, 8, 8),  # never below the divisor
        (6, 1.5, 1, 9),
        (6, 0.25, 1, 2),
        (6, 0.01, 1, 1),
    ],
)
def test_round_filters(filters, width, divisor, expected):
    rounded = round_filters(filters, width, divisor)
    assert (rounded, type(rounded)) == (expected, int)


@pytest.mark.parametrize(("repeats", "depth", "expected"), [(3, 1.0, 3), (3, 1.1, 4), (4, 1.4, 6), (1, 3.1, 4), (3, 0.34, 2)])
def test_round_repeats(repeats, depth, expected):
    assert round_repeats(repeats, depth) == expected


def test_solve_a_smooth_function():
    found = solve(lambda width: round(1e9 * width**2), 2e9, precision=1e-5)
    assert found.coefficient == pytest.approx(2**0.5, rel=1e-5)
    assert found.macs == round(1e9 * found.coefficient**2)
    assert found.error == pytest.approx((found.macs - 2e9) / 2e9)


@pytest.mark.parametrize(("budget", "macs"), [(240, 200), (260, 300), (300, 300), (100, 100), (1000, 1000)])
def test_solve_takes_the_better_side_of_a_step(budget, macs):
    found = solve(lambda depth: 100 * int(depth), budget, low=1.0, high=10.0)
    assert found.macs == 100 * int(found.coefficient) == macs
    assert found.error == pytest.approx((macs - budget) / budget)


@pytest.mark.parametrize("budget", [0.5, 101])
def test_solve_a_budget_out_of_reach(budget):
    with pytest.raises(ValueError, match=r"out of reach: coefficient 1 gives 1 and 10 gives 100"):
        solve(lambda width: int(width**2), budget, low=1, high=10)


def test_solve_the_width_of_a_network():
    def macs_of(width):
        return summarize(create_model("resnet20_cifar", width=width)).macs

    budget = 2 * 40_551_040
    found = solve(macs_of, budget, low=1.0, high=2.0, precision=0.01)
    assert found.macs == macs_of(found.coefficient)
    assert abs(found.error) < 0.05
    assert 1.25 < found.coefficient < 1.6  # near the square root of 2
