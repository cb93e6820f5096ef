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
    def network(self) -> str:
        """As the study sets it, or ""."""
        return self.overrides.get("model.name", "")

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


def families(groups: list[Group]) -> dict[str, list[Group]]:
    """The groups of each network, the first of which is what the others of it are compared with."""
    found = {}
    for group in groups:
        found.setdefault(group.network, []).append(group)
    return found


def lines_of(family: list[Group]) -> dict[str, list[Group]]:
    """The lines of a figure among the groups of one network.

    Where every value of each key meets every one of the others, as in a grid of widths and resolutions, a line has all of the
    first key. Else a line begins at the first group and has those that change the same keys of it.
    """

    def value(group: Group, key: str) -> str:
        return json.dumps(group.overrides.get(key))

    base, *others = family
    keys = dict.fromkeys(key for group in family for key in group.overrides if key != "model.name")
    values = {key: {value(group, key) for group in family} for key in keys}
    keys = [key for key in keys if len(values[key]) > 1]
    everywhere = all(key in group.overrides for key in keys for group in family)
    if len(keys) > 1 and everywhere and math.prod(len(values[key]) for key in keys) == len(family):
        found = {}
        for group in family:
            found.setdefault(", ".join(_short(key, group.overrides[key]) for key in keys[1:]), []).append(group)
        return found
    found = {}
    for group in others:
        changed = (key.rpartition(".")[2] for key in keys if value(group, key) != value(base, key))
        found.setdefault(" + ".join(changed), [base]).append(group)
    return found or {"": [base]}


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


def table(groups: list[Group], failed: list[dict[str, Any]]) -> str:
    """Markdown; differences are from the first group, or where there are several of each network, from its first."""
    members = families(groups)
    many = 1 < len(members) < len(groups)
    name = "the first of its network" if many else groups[0].label
    keys = list(dict.fromkeys(key for group in groups for key in group.overrides))
    head = [*keys, "n", "top-1 [%]", "range", f"difference from {name}", "parameters", "multiply-adds", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group in groups:
        accuracies = [100 * value for value in group.values("top1")]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        base = members[group.network][0] if many else groups[0]
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


def panels(groups: list[Group]) -> dict[str, dict[str, list[Group]]]:
    """Title -> the lines of a panel: one for each of a few networks that are changed, or one for all."""
    members = families(groups)
    if 1 < len(members) < min(len(groups), 7):
        return {network: lines_of(family) for network, family in members.items()}
    if len(members) == 1:
        return {"": lines_of(groups)}
    return {"": {network or "base": family for network, family in members.items()}}


def draw_accuracy(groups: list[Group], file: Path, title: str) -> None:
    """Error against multiply-adds, parameters and seconds of training: means, and bars from the smallest to the largest."""
    import matplotlib.figure
    import matplotlib.ticker

    shown = panels(groups)
    names = list(dict.fromkeys(name for lines in shown.values() for name in lines))
    figure = matplotlib.figure.Figure(figsize=(11, 1.2 + 2.8 * len(shown)), layout="constrained")
    axes_of = (("macs", "multiply-adds of one image"), ("params", "parameters"), ("seconds", "seconds of training"))
    handles = {}
    for row, (network, lines) in zip(figure.subplots(len(shown), 3, sharey="row", squeeze=False), shown.items(), strict=True):
        for axes, (key, label) in zip(row, axes_of, strict=True):
            for name, members in lines.items():
                members = sorted(members, key=lambda group: statistics.median(group.values(key)))
                x = [statistics.median(group.values(key)) for group in members]
                middle = [statistics.mean(group.errors) for group in members]
                low = [mean - min(group.errors) for mean, group in zip(middle, members, strict=True)]
                high = [max(group.errors) - mean for mean, group in zip(middle, members, strict=True)]
                handles[name] = axes.errorbar(x, middle, yerr=[low, high], capsize=3, markersize=6, **_style(names.index(name)))
            every = [statistics.median(group.values(key)) for members in lines.values() for group in members]
            axes.set(xscale="log" if max(every) > 8 * min(every) else "linear", xlabel=label)
            if key != "seconds" and axes.get_xscale() == "linear":
                axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
                axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
            axes.grid(alpha=0.3, which="both")
        means = [statistics.mean(group.errors) for members in lines.values() for group in members]
        if max(means) > 8 * min(means) > 0:
            row[0].set_yscale("log", nonpositive="clip")  # a run without errors has no lower end of its bar
        row[0].set_ylabel(f"{network}\ntest error [%]".strip())
    if names != [""]:
        columns = min(len(names), 4)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize="small")
    figure.suptitle(f"{title}; mean and range of seeds", fontsize="medium")
    _save(figure, file)


def draw_curves(groups: list[Group], file: Path, title: str) -> None:
    """Test error against the epoch, mean over seeds; between the smallest and the largest shaded."""
    import matplotlib.figure
    import matplotlib.ticker

    shown = families(groups) if len(panels(groups)) > 1 else {"": groups}
    rows = -(-len(shown) // 2)
    figure = matplotlib.figure.Figure(figsize=(9 if len(shown) == 1 else 13, 1 + 3.6 * rows), layout="constrained")
    places = figure.subplots(rows, min(len(shown), 2), squeeze=False).ravel()
    for axes, (network, family) in zip(places, shown.items(), strict=False):
        for i, group in enumerate(family):
            columns = list(zip(*(run["curve"] for run in group.runs), strict=False))
            epochs = [column[0][0] for column in columns]
            found = [[100 * (1 - top1) for _, top1 in column] for column in columns]
            label = ", ".join(_short(key, v) for key, v in group.overrides.items() if key != "model.name" or not network)
            middle = [statistics.mean(column) for column in found]
            axes.plot(epochs, middle, **_style(i), markersize=4, label=label or "base")
            axes.fill_between(epochs, [min(c) for c in found], [max(c) for c in found], color=f"C{i % 10}", alpha=0.15)
        axes.set(xlabel="epoch", ylabel="test error [%]", title=network)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        if min(min(line.get_ydata()) for line in axes.get_lines()) > 0:
            axes.set_yscale("log", nonpositive="clip")
        axes.grid(alpha=0.3, which="both")
        if len(shown) > 1:
            axes.legend(fontsize="x-small")
    if len(shown) == 1:
        figure.legend(loc="outside right upper", fontsize="x-small")
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}; mean and range of seeds", fontsize="medium")
    _save(figure, file)


def _style(i: int) -> dict[str, str]:
    return {"marker": MARKERS[i % len(MARKERS)], "linestyle": STYLES[i % len(STYLES)], "color": f"C{i % 10}"}


def _save(figure, file: Path) -> None:
    with disk.writing(file), disk.replacing(file) as partial:
        figure.savefig(partial, dpi=110, format="png")


def report(folder: Path, results: str = "results.jsonl") -> list[Path]:
    """Writes table and figures of a study's results beside them, and returns their paths."""
    file = folder / results
    groups, failed = load(file)
    suffix = file.stem.removeprefix("results")
    paths = [folder / f"table{suffix}.md", folder / f"accuracy{suffix}.png", folder / f"curves{suffix}.png"]
    runs = sum(len(group.runs) for group in groups)
    title = f"{folder.resolve().name}{suffix}: {runs} runs, {len(groups)} settings"
    with disk.writing(paths[0]):
        disk.write_whole(paths[0], table(groups, failed))
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
