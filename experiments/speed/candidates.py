"""Ways to make a training step faster or smaller, each beside the step as it is: `python experiments/speed/candidates.py`.

`[--models=NAME,...] [--dtype=bfloat16] [--batch=N] [--only=LABEL,...] [--out=FILE.json]`, on a machine with nothing else
running. Every candidate of a network is a process; all are asked in turn for a burst of steps (see `compare.py`), so ratios are
of the same minutes. A network that the file has is not measured again. On a CPU those that are a GPU's alone say so.

  as it is          the product's step
  recompute         norms and activations anew in the backward pass (`step.Objective`)
  recompute norms   batch statistics too
  recompute all     everything anew, the convolutions too
  shifted           depthwise convolutions as shifted products, which is what runs on a CPU, in place of cuDNN's
  pallas            depthwise convolutions and, with stride 1, their images' gradient as one kernel (`pallas_depthwise.py`)
  one pass          batch statistics as E[x^2] - E[x]^2, which loses digits: what it gains at most
  padded stem       a fourth channel of zeros for the three of an image
  four steps        in one call
  graphs            command buffers (CUDA graphs) that hold convolutions as well
  conv fusion       convolutions as cuDNN fusions
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import compare

from cnnfamily import disk

HERE = Path(__file__).resolve().parent
BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"  # JAX's own list and the last
CANDIDATES = {
    "as it is": {},
    "recompute": {"recompute": True},
    "recompute norms": {"recompute": True, "candidate": "recompute norms"},
    "recompute all": {"recompute": True, "candidate": "recompute all"},
    "shifted": {"candidate": "shifted"},
    "pallas": {"candidate": "pallas"},
    "one pass": {"candidate": "one pass"},
    "padded stem": {"candidate": "padded stem"},
    "four steps": {"steps_per_call": 4},
    "graphs": {"environment": {"XLA_FLAGS": f"--xla_gpu_enable_command_buffer={BUFFERS}"}},
    "conv fusion": {"environment": {"XLA_FLAGS": "--xla_gpu_experimental_enable_conv_fusion=true"}},
}
MODELS = ["resnet50", "efficientnet_b0", "mobilenet_v3_large"]


# What a process of `side.py` changes in the product before it traces the step


def shift_depthwise(backend: str) -> str | None:
    from cnnfamily.models import convolution, cpu_depthwise

    for product in ("output", "to_images", "to_kernel"):
        convolution.ELSEWHERE[product, "depthwise"] = getattr(cpu_depthwise, f"depthwise_{product}")
    return "a CPU has this form as it is" if backend == "cpu" else None


def depthwise_in_pallas(backend: str) -> str | None:
    import pallas_depthwise

    from cnnfamily.models import convolution

    if backend != "gpu":
        return "Triton is for GPUs"
    pallas_depthwise.check()
    convolution.ELSEWHERE["output", "depthwise"] = pallas_depthwise.output
    convolution.ELSEWHERE["to_images", "depthwise"] = pallas_depthwise.to_images


def take_moments_in_one_pass(backend: str) -> str | None:
    import jax.numpy as jnp

    from cnnfamily.models import batch_norm

    def moments(x, scale):
        mean = x.mean(axis=(1, 2, 3), keepdims=True)
        return mean, jnp.maximum(jnp.square(x).mean(axis=(1, 2, 3), keepdims=True) - jnp.square(mean), 0)

    batch_norm._moments = moments


def pad_the_stem(backend: str) -> str | None:
    import jax.numpy as jnp

    from cnnfamily.models import convolution

    plain = convolution._plain_output

    def padded(images, kernel, geometry):
        if images.shape[3] == 3 == kernel.shape[2]:
            images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)))
            kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))
        return plain(images, kernel, geometry)

    convolution._plain_output = padded
    convolution.ELSEWHERE |= dict.fromkeys([("output", "few"), ("output", "patches")], padded)


def keep_convolutions_alone(backend: str) -> str | None:
    from cnnfamily.models import convolution

    _keep(lambda policies: policies.save_only_these_names(convolution.KEPT))


def keep_nothing(backend: str) -> str | None:
    _keep(lambda policies: policies.nothing_saveable)


def _keep(choose: Callable) -> None:
    """Another policy in the place of the step's, which asks for one by the names that it keeps."""
    import jax

    policy = choose(jax.checkpoint_policies)
    jax.checkpoint_policies.save_only_these_names = lambda *names: policy


CHANGES: dict[str, Callable[[str], str | None]] = {  # each gives the reason why there is nothing to measure, if so
    "shifted": shift_depthwise,
    "pallas": depthwise_in_pallas,
    "one pass": take_moments_in_one_pass,
    "padded stem": pad_the_stem,
    "recompute norms": keep_convolutions_alone,
    "recompute all": keep_nothing,
}


def table(study: dict) -> str:
    """Markdown: a row for each network and candidate."""
    lines = [["network", "candidate", "images/s", "of as it is", "temporary memory, MiB", "of as it is"]]
    lines.append(["---"] * len(lines[0]))
    for row in study["rows"]:
        base = row["sides"]["as it is"]
        for label, cell in row["sides"].items():
            speed, memory, share = "", "", ""
            if cell.get("images_per_second") and base.get("images_per_second"):
                ratios = sorted(a / b for a, b in zip(cell["images_per_second"], base["images_per_second"], strict=False))
                speed = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            if cell.get("temporary_bytes") and base.get("temporary_bytes"):
                memory = f"{cell['temporary_bytes'] / 2**20:,.0f}"
                share = f"{cell['temporary_bytes'] / base['temporary_bytes']:.2f}"
            lines.append([row["model"], label, compare.rate(cell), speed, memory, share])
    machine, versions = study["machine"], ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    head = f"Device {machine['device']}; {machine['processor']}, {machine['cores']} cores; {versions}; training, "
    head += "; ".join(sorted({f"{r['dtype']}, batch {r['batch']} at {r['resolution']} pixels" for r in study["rows"]}))
    return "\n".join([f"{head}.\n", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def jobs_of(job: dict, labels: list[str], gpu: bool) -> tuple[dict[str, dict], dict[str, dict]]:
    """What to measure, by label; and the cells of what only a GPU has, where there is none."""
    jobs = {label: job | {"side": "ours", **CANDIDATES[label]} for label in labels}
    left_out = {} if gpu else {label: {"not_measured": "a GPU's"} for label in labels if "environment" in jobs[label]}
    return {label: one for label, one in jobs.items() if label not in left_out}, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, type=lambda text: compare.listed(text, ()))
    parser.add_argument("--only", default=list(CANDIDATES), type=lambda text: compare.listed(text, tuple(CANDIDATES)))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=0, help="default: 16 on a CPU, 256 elsewhere")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a burst, about")
    parser.add_argument("--start-timeout", type=float, default=400.0, help="seconds to compile, and for a burst")
    parser.add_argument("--out", type=Path, help="default: results/candidates-cpu.json or -gpu.json; a table beside it")
    arguments = parser.parse_args()
    where = compare.describe(["ours"], {"ours": sys.executable})
    gpu = where["machine"]["device"] != "cpu"
    path = arguments.out or HERE / "results" / f"candidates-{'gpu' if gpu else 'cpu'}.json"
    study = compare.load(path, where)
    labels = ["as it is", *(label for label in arguments.only if label != "as it is")]
    for model in arguments.models:
        job = {"model": model, "dtype": arguments.dtype, "mode": "train", "batch": arguments.batch or (256 if gpu else 16)}
        job["resolution"] = arguments.resolution
        if any(all(row[key] == job[key] for key in compare.KEY) and set(labels) <= set(row["sides"]) for row in study["rows"]):
            continue
        jobs, cells = jobs_of(job, labels, gpu)
        cells = compare.measure(jobs, dict.fromkeys(jobs, sys.executable), arguments) | cells
        study["rows"] = [row for row in study["rows"] if any(row[key] != job[key] for key in compare.KEY)]
        study["rows"].append(job | {"rounds": arguments.rounds, "commit": compare.commit(), "sides": cells})
        disk.write_whole(path, json.dumps(study, indent=1) + "\n")
        disk.write_whole(path.with_suffix(".md"), table(study))
        print(f"{model}: " + "; ".join(f"{label} {compare.rate(cell)}" for label, cell in cells.items()), flush=True)


if __name__ == "__main__":
    main()
