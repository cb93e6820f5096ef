"""The table and the figures of a study, from its results alone."""

import json
import math

import pytest
from PIL import Image

from cnnfamily import report
from cnnfamily.errors import UsageError


def row(number, overrides, top1, **fields):
    curve = [[1.0, top1 / 2], [2.0, top1]]
    return {
        "row": number, "hash": str(number), "status": "done", "overrides": overrides, "seed": overrides.get("seed", 0),
        "top1": top1, "loss": 0.1, "params": 1000, "macs": 2000, "seconds": 3.0, "images_per_second": 10.0, "curve": curve,
        "device": "1 cpu", "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
    } | fields  # fmt: skip


def write(folder, rows, name="results.jsonl"):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in rows))


def three_widths():
    found = {0.5: (0.90, 0.92, 0.94), 1.0: (0.93, 0.94, 0.98), 2.0: (0.95,)}
    number = iter(range(1, 100))
    return [
        row(next(number), {"model.width": width, "seed": seed, "total_epochs": 2.0}, top1, macs=int(1000 * width**2))
        for width, accuracies in found.items()
        for seed, top1 in enumerate(accuracies)
    ]


def test_means_spreads_and_paired_differences(tmp_path):
    """By hand: differences 3, 2 and 4 points: mean 3, deviation 1, t(2) = 4.3027 over the root of 3."""
    write(tmp_path, three_widths()[::-1])  # in another order than that of the sweep
    paths = report.report(tmp_path)
    lines = paths[0].read_text().splitlines()
    head = "| model.width | n | top-1 [%] | range | difference from width 0.5 | parameters | multiply-adds | seconds |"
    assert lines[0] == head
    assert lines[2] == "| 0.5 | 3 | 92.00 ± 2.00 | 90.00 to 94.00 |  | 1,000 | 250 | 3.0 |"
    assert lines[3] == "| 1 | 3 | 95.00 ± 2.65 | 93.00 to 98.00 | +3.00 ± 2.48 | 1,000 | 1,000 | 3.0 |"
    assert lines[4] == "| 2 | 1 | 95.00 | 95.00 to 95.00 | +5.00 | 1,000 | 4,000 | 3.0 |"
    assert 4.302652729749464 / math.sqrt(3) == pytest.approx(2.48, abs=0.005)
    for path in paths[1:]:
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_only_common_seeds_are_paired():
    one, two = (report.Group({}, [row(i, {"seed": s}, t) for i, (s, t) in enumerate(runs)]) for runs in (
        [(0, 0.5), (1, 0.6), (7, 0.9)], [(1, 0.5), (7, 0.7), (9, 0.1)]
    ))  # fmt: skip
    mean, half, n = report.paired_difference(one, two)
    assert (mean, n) == (pytest.approx(15.0), 2)
    assert half == pytest.approx(12.7062 * 5 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    mean, half, n = report.paired_difference(one, report.Group({}, [row(0, {"seed": 3}, 0.5)]))
    assert (math.isnan(mean), math.isnan(half), n) == (True, True, 0)


def test_failed_rows_are_named_below_the_table(tmp_path):
    failed = {
        "row": 9,
        "hash": "9",
        "status": "failed",
        "overrides": {"model.width": 9.0},
        "seed": 0,
        "error": "NonFiniteLoss: x",
    }
    write(tmp_path, [*three_widths(), failed])
    assert "Failed: {'model.width': 9.0}: NonFiniteLoss: x" in report.report(tmp_path)[0].read_text()


def groups_of(*overrides):
    return [report.Group(each, [row(i, each, 0.9)]) for i, each in enumerate(overrides)]


def test_lines_begin_at_the_first_of_a_network_and_have_what_changes_the_same():
    base = {"model.name": "resnet18", "model.width": 1.0, "data.resolution": 32}
    groups = groups_of(*(base | change for change in (
        {}, {"model.width": 1.5}, {"data.resolution": 48}, {"model.width": 2.0}, {"model.width": 1.5, "data.resolution": 48},
        {"model.name": "vgg11"}, {"model.name": "vgg11", "model.width": 2.0},
    )))  # fmt: skip
    found = report.panels(groups)
    assert list(found) == ["resnet18", "vgg11"]
    numbers = {name: [groups.index(group) for group in members] for name, members in found["resnet18"].items()}
    assert numbers == {"width": [0, 1, 3], "resolution": [0, 2], "width + resolution": [0, 4]}
    assert found["vgg11"] == {"width": groups[5:]}
    assert groups[1].label == "resnet18, width 1.5, resolution 32"


def test_a_line_of_a_grid_has_all_values_of_its_first_key():
    groups = groups_of(*({"model.width": w, "data.resolution": r} for r in (32, 48) for w in (0.5, 1.0, 2.0)))
    assert report.panels(groups) == {"": {"resolution 32": groups[:3], "resolution 48": groups[3:]}}


def test_what_is_left_out_of_overrides_is_no_grid():
    groups = groups_of({}, {"model.width": 2.0}, {"model.depth": 2.0}, {"model.width": 2.0, "model.depth": 2.0})
    lines = report.panels(groups)[""]
    assert {name: [groups.index(g) for g in members] for name, members in lines.items()} == {
        "width": [0, 1],
        "depth": [0, 2],
        "width + depth": [0, 3],
    }


def test_many_networks_share_a_panel():
    groups = groups_of(*({"model.name": f"resnet{i}"} for i in range(9)))
    assert report.panels(groups) == {"": {f"resnet{i}": [groups[i]] for i in range(9)}}


def test_differences_are_from_the_first_of_a_network(tmp_path):
    accuracies = {("resnet18", 1.0): 0.9, ("resnet18", 2.0): 0.95, ("vgg11", 1.0): 0.5, ("vgg11", 2.0): 0.6}
    write(
        tmp_path,
        [
            row(10 * i + seed, {"model.name": name, "model.width": width, "seed": seed}, top1 + 0.01 * seed)
            for i, ((name, width), top1) in enumerate(accuracies.items())
            for seed in range(2)
        ],
    )
    text = report.report(tmp_path)[0].read_text()
    assert "difference from the first of its network" in text
    cells = [line.split("|")[6].strip() for line in text.splitlines()[2:6]]
    assert cells == ["", "+5.00 ± 0.00", "", "+10.00 ± 0.00"]


def test_what_cannot_be_reported_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"results\.jsonl does not exist; no results there: python -m cnnfamily\.sweep"):
        report.main([str(tmp_path)])
    write(
        tmp_path,
        [{"row": 1, "hash": "1", "status": "failed", "overrides": {}, "seed": 0, "error": "x"}],
        "results-cifar10.jsonl",
    )
    with pytest.raises(UsageError, match=r"results\.jsonl does not exist; results-cifar10\.jsonl there"):
        report.main([str(tmp_path)])
    with pytest.raises(UsageError, match="has no row that is done, and 1 that failed: nothing to report"):
        report.main([str(tmp_path), "--results=results-cifar10.jsonl"])
    with pytest.raises(UsageError, match="is not a folder; expected a study"):
        report.main([str(tmp_path / "gone")])
