"""Where the time goes in the networks that are furthest behind torch: `python experiments/speed/furthest.py RESULTS.json`.

RESULTS is a file of `compare.py`. Of the networks in it, the three (`--count`) with the smallest ratio of our images/s in
training to torch's, each in its best dtype, are measured by `python -m cnnfamily.benchmark --by-layer` in that of our best.
Writes `profile-RESULTS.json`, with which the same command goes on after a stop, and a table beside it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import compare

from cnnfamily import disk

SHOWN = 12  # layers of each network in the table


def behind(study: dict) -> list[tuple[float, dict]]:
    """The ratio to torch and our best row of every network with both in training, the furthest behind first."""
    found, rows = [], [row for row in study["rows"] if row["mode"] == "train"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of = {row["dtype"]: row for row in rows if row["model"] == model}
        theirs = compare.best(of, compare.TORCH, list(of))
        fastest = max(of, key=lambda dtype: compare.best(of, ("ours",), [dtype]))
        if theirs and (ours := compare.best(of, ("ours",), [fastest])):
            found.append((ours / theirs, of[fastest]))
    return sorted(found, key=lambda one: one[0])


def profile(row: dict, seconds: float) -> dict:
    command = [sys.executable, "-m", "cnnfamily.benchmark", row["model"], "--mode=train", "--by-layer", "--json"]
    command += [
        f"--dtype={row['dtype']}",
        f"--batch={row['batch']}",
        f"--resolution={row['resolution']}",
        f"--seconds={seconds}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{row['model']}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def table(study: dict) -> str:
    text = []
    for name, one in study.items():
        (network,) = one["found"]["networks"]
        text.append(
            f"{name}, {network['dtype']}, batch {network['batch']} at {network['resolution']} pixels, "
            f"{one['found']['devices']}, JAX {one['found']['jax']}: {one['ratio']:.2f} of torch, "
            f"{network['milliseconds']:.2f} ms a step, "
            f"{network['matrix_share']:.1%} of the matrix ceiling and {network['bandwidth_share']:.1%} of the bandwidth\n"
        )
        lines = ["| layer | forward | backward |", "|---|---|---|"]
        layers = sorted(network["by_layer"], key=lambda layer: -layer["forward"] - layer["backward"])
        lines += [f"| {layer['name']} | {layer['forward']:.2%} | {layer['backward']:.2%} |" for layer in layers[:SHOWN]]
        rest = [sum(layer[part] for layer in layers[SHOWN:]) for part in ("forward", "backward")]
        text.append("\n".join([*lines, f"| {len(layers[SHOWN:])} others | {rest[0]:.2%} | {rest[1]:.2%} |"]) + "\n")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each")
    arguments = parser.parse_args()
    if not arguments.results.exists():
        raise SystemExit(f"{arguments.results} does not exist; expected a file that compare.py has written")
    path = arguments.results.with_name(f"profile-{arguments.results.name}")
    study = json.loads(path.read_text()) if path.exists() else {}
    chosen = behind(json.loads(arguments.results.read_text()))[: arguments.count]
    if not chosen:
        raise SystemExit(f"{arguments.results.name} has no network with ours and torch's in training; expected one")
    for share, row in chosen:
        if row["model"] in study:
            continue
        study[row["model"]] = {"ratio": round(share, 4), "commit": compare.commit(), "found": profile(row, arguments.seconds)}
        disk.write_whole(path, json.dumps(study, indent=1) + "\n")
        disk.write_whole(path.with_suffix(".md"), table(study))
        print(f"{row['model']}: {share:.2f} of torch", flush=True)


if __name__ == "__main__":
    main()
