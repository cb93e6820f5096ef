"""Table and figures of a study, from its results alone: `python -m cnnfamily.report experiments/STUDY [--results=FILE.jsonl]`.

Writes `table.md` (mean, spread, n, and the difference from the group of the first row, paired by seed, with its 95 % interval),
`accuracy.png` (error against multiply-adds, parameters and seconds) and `curves.png` beside `results.jsonl`; those of
`results-NAME.jsonl` have the name too.
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from cnnfamily import disk, errors
from cnnfamily.errors import UsageError
from cnnfamily.study import read_results

MARKERS, STYLES = "osv^DPX*<>", ("-", "--", ":", "-.")  # told apart in grey too


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    overrides: dict[str, Any]  # without the seed
    runs: list[dict[str, Any]]

    @property
    def series(self) -> str:
        """Groups that override the same keys, of the same network, are one line in a figure."""
        names = [key.rpartition(".")[2] for key in self.overrides if key != "model.name"]
        return " ".join(
            [*[str(self.overrides.get("model.name", ""))] * ("model.name" in self.overrides), " + ".join(names)]
        ).strip()

    @property
    def label(self) -> str:
        return ", ".join(_short(key, value) for key, value in self.overrides.items()) or "base"

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs]

    @property
    def errors(self) -> list[float]:
        """Test error of each run in percent."""
        return [100 * (1 - value) for value in self.values("top1")]


def _short(key: str, value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if key == "model.name" else f"{key.rpartition('.')[2]} {text}"


def load(file: Path) -> tuple[list[Group], list[dict[str, Any]]]:
    """The groups of a results file in the order of the sweep, each by seed, and the rows that failed.

    Raises:
      UsageError: there is none, or no row of it is done.
    """
    if not file.exists():
        found = ", ".join(sorted(path.name for path in file.parent.glob("results*.jsonl"))) if file.parent.is_dir() else ""
        raise UsageError(f"{file} does not exist; {found or 'no results'} there: python -m cnnfamily.sweep makes them")
    rows = read_results(file)
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] != "done"]
    if not done:
        raise UsageError(f"{file} has no row that is done, and {len(failed)} that failed: nothing to report")
    groups = {}
    for row in done:
        overrides = {key: value for key, value in row["overrides"].items() if key != "seed"}
        groups.setdefault(json.dumps(overrides, sort_keys=True), Group(overrides, [])).runs.append(row)
    for group in groups.values():
        group.runs.sort(key=lambda row: row["seed"])
    # Not in the order of the lines: several runners, or one that was stopped, write them in another.
    order = sorted(groups.values(), key=lambda group: min(group.values("row")))
    same = [key for key in order[0].overrides if len({json.dumps(group.overrides.get(key)) for group in order}) == 1]
    if len(order) > 1:  # what is the same in all tells nothing
        order = [Group({k: v for k, v in group.overrides.items() if k not in same}, group.runs) for group in order]
    return order, failed


def paired_difference(group: Group, base: Group) -> tuple[float, float, int]:
    """Mean difference of the accuracies in points, half of its 95 % interval (Student's t), and the number of common seeds.

    NaN where there are no seeds in common, and for the interval where there are fewer than two.
    """
    theirs = {run["seed"]: run["top1"] for run in base.runs}
    found = [100 * (run["top1"] - theirs[run["seed"]]) for run in group.runs if run["seed"] in theirs]
    if not found:
        return math.nan, math.nan, 0
    if len(found) == 1:
        return found[0], math.nan, 1
    half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.mean(found), float(half), len(found)


def table(groups: list[Group], failed: list[dict[str, Any]], base: Group) -> str:
    """Markdown."""
    keys = list(dict.fromkeys(key for group in groups for key in group.overrides))
    head = [*keys, "n", "top-1 [%]", "range", f"difference from {base.label}", "parameters", "multiply-adds", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group in groups:
        accuracies = [100 * value for value in group.values("top1")]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        mean, half, n = paired_difference(group, base)
        difference = "" if group is base or not n else f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")
        cells = [_cell(group.overrides.get(key, "")) for key in keys]
        cells += [str(len(accuracies)), f"{statistics.mean(accuracies):.2f}{spread}"]
        cells += [f"{min(accuracies):.2f} to {max(accuracies):.2f}", difference]
        cells += [
            f"{group.runs[0]['params']:,}",
            f"{group.runs[0]['macs']:,}",
            f"{statistics.median(group.values('seconds')):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = groups[0].runs[0]
    versions = ", ".join(
        f"{name} {version}" for name, version in first["versions"].items() if name in ("python", "jax", "flax")
    )
    text = (
        "\n".join(lines) + "\n\n± after an accuracy is the standard deviation over seeds, after a difference half of the 95 % "
    )
    text += f"interval of the paired difference (Student's t). {first['device']}; {versions}.\n"
    for row in failed:
        text += f"\nFailed: {row['overrides']}: {row['error']}\n"
    return text


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_accuracy(groups: list[Group], file: Path, title: str) -> None:
    """Error against multiply-adds, parameters and seconds of training: means, and bars from the smallest to the largest."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    series = list(dict.fromkeys(group.series for group in groups))
    axes_of = (("macs", "multiply-adds of one image"), ("params", "parameters"), ("seconds", "seconds of training"))
    for place, (key, label) in zip(axes, axes_of, strict=True):
        for i, name in enumerate(series):
            members = sorted((g for g in groups if g.series == name), key=lambda g: statistics.mean(g.values(key)))
            x = [statistics.median(group.values(key)) for group in members]
            middle = [statistics.mean(group.errors) for group in members]
            low = [mean - min(group.errors) for mean, group in zip(middle, members, strict=True)]
            high = [max(group.errors) - mean for mean, group in zip(middle, members, strict=True)]
            style = {"marker": MARKERS[i % len(MARKERS)], "linestyle": STYLES[i // 2 % len(STYLES)], "color": f"C{i}"}
            place.errorbar(x, middle, yerr=[low, high], capsize=3, markersize=6, label=name or "base", **style)
        every = [value for group in groups for value in group.values(key)]
        place.set(xscale="log" if max(every) > 8 * min(every) else "linear", xlabel=label)
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("test error [%], mean and range of seeds")
    if len(series) > 1:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(series), 4), fontsize="small"
        )
    figure.suptitle(title, fontsize="medium")
    _save(figure, file)


def draw_curves(groups: list[Group], file: Path, title: str) -> None:
    """Test error against the epoch, mean over seeds; between the smallest and the largest shaded."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        columns = list(zip(*(run["curve"] for run in group.runs), strict=False))
        epochs = [column[0][0] for column in columns]
        found = [[100 * (1 - top1) for _, top1 in column] for column in columns]
        style = {"marker": MARKERS[i % len(MARKERS)], "linestyle": STYLES[i // 10 % len(STYLES)], "color": f"C{i % 10}"}
        axes.plot(epochs, [statistics.mean(column) for column in found], markersize=4, label=group.label, **style)
        axes.fill_between(epochs, [min(c) for c in found], [max(c) for c in found], color=f"C{i % 10}", alpha=0.15)
    positive = all(value < 1 for group in groups for run in group.runs for _, value in run["curve"])
    axes.set(xlabel="epoch", ylabel="test error [%], mean and range of seeds", yscale="log" if positive else "linear")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    _save(figure, file)


def _save(figure, file: Path) -> None:
    with disk.writing(file), disk.replacing(file) as partial:
        figure.savefig(partial, dpi=110, format="png")


def report(folder: Path, results: str = "results.jsonl") -> list[Path]:
    """Writes table and figures of a study's results beside them, and returns their paths."""
    file = folder / results
    groups, failed = load(file)
    base = groups[0]
    suffix = file.stem.removeprefix("results")
    paths = [folder / f"table{suffix}.md", folder / f"accuracy{suffix}.png", folder / f"curves{suffix}.png"]
    runs = sum(len(group.runs) for group in groups)
    title = f"{folder.resolve().name}{suffix}: {runs} runs, {len(groups)} settings"
    with disk.writing(paths[0]):
        disk.write_whole(paths[0], table(groups, failed, base))
    draw_accuracy(groups, paths[1], title)
    draw_curves(groups, paths[2], title)
    return paths


def main(argv: list[str]) -> None:
    parser = errors.argument_parser("cnnfamily.report", __doc__)
    parser.add_argument("study", type=Path, metavar="FOLDER")
    parser.add_argument("--results", default="results.jsonl", metavar="FILE.jsonl")
    arguments = parser.parse_args(argv)
    if not arguments.study.is_dir():
        raise UsageError(f"{arguments.study} is not a folder; expected a study such as experiments/digits")
    paths = report(arguments.study, arguments.results)
    print(paths[0].read_text())
    print("wrote", ", ".join(map(str, paths)))


if __name__ == "__main__":
    errors.run_command(main)
