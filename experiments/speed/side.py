"""One side of the comparison of speeds, in a process of its own: `compare.py` starts it, asks it, and says what is compared.

`python experiments/speed/side.py JOB`, a JSON object. Writes one JSON line when ready, then answers each line `{"steps": n}`
with the seconds that n steps took, the last loss and, where the device counts it, the peak of its memory since the process
began; between two lines it does nothing. To `{"steps": n, "digest": true}` ours also tells the digest of its state. With the
job `{"side": ..., "describe": true}` it tells device and versions.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np

MEAN, DEVIATION = 0.45, 0.225  # of the pixels of photographs, about
LEARNING_RATE, MOMENTUM, AUXILIARY = 1e-3, 0.9, 0.3
PACKAGES = {"jax": ("jax", "jaxlib", "flax", "optax"), "torch": ("torch", "torchvision", "timm")}
OURS, TORCH = ("ours", "onednn"), ("eager", "compile")
JAX = (*OURS, "plain")
# Where timm's names differ from ours. Its networks have no dropout unless asked, unlike torchvision's and ours.
TIMM = {
    "mobilenet_v1": ("mobilenetv1_100", {}),
    "mobilenet_v2": ("mobilenetv2_100", {"drop_rate": 0.2}),
    "mobilenet_v3_small": ("mobilenetv3_small_100", {"drop_rate": 0.2}),
    "mobilenet_v3_large": ("mobilenetv3_large_100", {"drop_rate": 0.2}),
    "efficientnet_b0": ("efficientnet_b0", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
    "efficientnet_b4": ("efficientnet_b4", {"drop_rate": 0.4, "drop_path_rate": 0.2}),
}
Burst = Callable[[int], float]  # runs so many steps, awaits them, and returns the last loss (0 in inference)


class NotMeasured(Exception):
    """This side has no such mode."""


def batch_of(job: Namespace, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (job.batch, job.resolution, job.resolution, channels), dtype=np.uint8)
    return images, rng.integers(0, classes, job.batch).astype(np.int32)


def normalised(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255 - MEAN) / DEVIATION


# JAX: ours and plain


def on_jax(job: Namespace) -> Burst:
    import jax
    import plain

    import cnnfamily
    from cnnfamily import models

    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    network = cnnfamily.create_model(job.model, dtype=job.dtype, **({"aux": True} if job.model == "googlenet" else {}))
    variables = models.initialize(network, jax.random.key(0), resolution=job.resolution)
    images, labels = batch_of(job, network.in_channels, network.num_classes)
    if job.mode == "train":
        if job.side != "plain":
            return ours_training(job, network, variables, images, labels)
        return plain.training(network, variables, images, labels)
    if job.side == "onednn":
        raise NotMeasured("of training alone; inference that can has it under ours")
    if job.mode == "infer_folded" and (job.side == "plain" or not variables["batch_stats"]):
        raise NotMeasured("plain Flax folds nothing" if job.side == "plain" else "no batch norm")
    images = jax.device_put(normalised(images)).astype(job.dtype)
    if job.side == "ours" and (job.mode == "infer_folded" or not variables["batch_stats"]):
        return jax_inference(cnnfamily.optimize_for_inference(network, variables), images)
    variables, apply = jax.device_put(variables), jax.jit(network.apply)
    return jax_inference(lambda images: apply(variables, images), images)


def ours_training(job: Namespace, network, variables, images, labels) -> Burst:
    """The product's step; `candidates.py` asks for it changed: `candidate`, `recompute`, `steps_per_call`."""
    import jax
    import optax

    from cnnfamily import parallel, programs, step
    from cnnfamily.data.augment import normalize
    from cnnfamily.models import onednn

    if job.side == "onednn" and (missing := onednn.missing(job.dtype)):
        raise NotMeasured(missing)
    mesh, optimizer = parallel.local_mesh(), optax.sgd(LEARNING_RATE, MOMENTUM)
    index = np.arange(len(labels), dtype=np.int32)
    arrays = {"index": index, "position": index, "images": images, "labels": labels}
    batch = parallel.place({name: array[None] for name, array in arrays.items()}, mesh, batch_axis=1)
    objective = step.Objective(
        network.clone(axis_name=parallel.AXIS),
        lambda keys, images, store: normalize(images, MEAN, DEVIATION),
        seed=0,
        aux_weight=AUXILIARY,
        recompute=getattr(job, "recompute", False),
    )
    if hasattr(job, "candidate"):
        import candidates

        if why := candidates.CHANGES[job.candidate](jax.default_backend()):
            raise NotMeasured(why)
    update = partial(step.train_step, objective=objective, optimizer=optimizer)
    if (together := getattr(job, "steps_per_call", 1)) > 1:
        if jax.default_backend() == "cpu":
            raise NotMeasured("XLA leaves convolutions in a loop unoptimised on a CPU")
        update = several(update, together)
    update = parallel.map_over_devices(update, mesh, batch_axis=1, outputs=2, donate=True)
    state = parallel.replicate(step.create_state(variables, optimizer, ema=False), mesh)
    with programs.by_onednn("training") if job.side == "onednn" else contextlib.nullcontext():
        update = update.lower(state, batch, {}).compile()

    def burst(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = update(state, batch, {})
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def digest() -> str:
        found = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
            found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        return found.hexdigest()

    burst.temporary_bytes = getattr(update.memory_analysis(), "temp_size_in_bytes", None)
    burst.digest = digest
    return burst


def several(update: Callable, steps: int) -> Callable:
    """So many updates on the same batch in one call, with the metrics of the last."""
    import jax

    def updates(state, batch, store):
        state, metrics = jax.lax.scan(lambda state, _: update(state, batch, store), state, length=steps)
        return state, jax.tree.map(lambda x: x[-1], metrics)

    return updates


def jax_inference(infer: Callable, images) -> Burst:
    import jax

    # A CPU may run several calls at once, which torch does not; a GPU has them in a queue, as torch's.
    each = jax.block_until_ready if jax.default_backend() == "cpu" else lambda logits: logits

    def burst(steps: int) -> float:
        for _ in range(steps):
            logits = each(infer(images))
        jax.block_until_ready(logits)
        return 0.0

    return burst


# torch: eager and compile


def on_torch(job: Namespace) -> Burst:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(cores())
    if device == "cuda":
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
    images, labels = batch_of(job, *((1, 10) if job.model == "lenet5" else (3, 1000)))
    images = torch.tensor(normalised(images)).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    labels = torch.tensor(labels).long().to(device)
    model = torch_network(job.model).to(device, memory_format=torch.channels_last)
    cast = partial(torch.autocast, device, torch.bfloat16, enabled=job.dtype == "bfloat16")
    if job.mode != "train":
        settle(model, images)
        model = folded_in_torch(model, images) if job.mode == "infer_folded" else model
        # All of it in the dtype, as ours keeps its kernels: faster than autocast for most networks on a CPU.
        dtype, cast = getattr(torch, job.dtype), contextlib.nullcontext
        model, images = model.to(dtype), images.to(dtype)
    run = torch.compile(model) if job.side == "compile" else model
    await_device = torch.cuda.synchronize if device == "cuda" else lambda: None
    if job.mode == "train":
        return torch_training(model.train(), run, images, labels, cast, await_device)
    return torch_inference(run, images, cast, await_device)


def torch_training(model, run, images, labels, cast, await_device) -> Burst:
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)

    def burst(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with cast():
                outputs = run(images)
                logits, *auxiliaries = outputs if isinstance(outputs, tuple) else (outputs,)
                loss = cross_entropy(logits.float(), labels)
                for auxiliary in auxiliaries:
                    loss = loss + AUXILIARY * cross_entropy(auxiliary.float(), labels)
            loss.backward()
            optimizer.step()
        await_device()
        return loss.item()

    return burst


def torch_inference(run, images, cast, await_device) -> Burst:
    import torch

    def burst(steps: int) -> float:
        with torch.inference_mode():
            for _ in range(steps):
                with cast():
                    run(images)
            await_device()
        return 0.0

    return burst


def torch_network(name: str):
    """torchvision's network, else timm's, else ours of LeNet-5."""
    if name == "lenet5":
        return torch_lenet5()
    # googlenet: drawing torchvision's own initial values takes a minute; the rest as with its published weights and as ours.
    fields = {"init_weights": False, "aux_logits": True, "transform_input": True} if name == "googlenet" else {}
    torchvision = find_torchvision()
    if torchvision and name in torchvision.models.list_models():
        return torchvision.models.get_model(name, weights=None, **fields)
    try:
        import timm
    except ImportError:
        timm = None
    timm_name, fields = TIMM.get(name, (name, {}))
    if timm is None or timm_name not in timm.list_models():
        raise NotMeasured("neither torchvision nor timm here has it")
    return timm.create_model(timm_name, **fields)


def find_torchvision():
    """torchvision or None; beside a torch without its compiled operators by way of `torchvision_cpu`, as `tests/parity.py`."""
    try:
        with contextlib.suppress(ImportError):
            import torchvision_cpu  # noqa: F401
        import torchvision
    except (ImportError, RuntimeError):
        return None
    return torchvision


def torch_lenet5():
    from torch import nn

    def unit(channels: int, filters: int) -> tuple:
        return nn.Conv2d(channels, filters, 5), nn.ReLU(), nn.MaxPool2d(2)

    head = (nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*unit(1, 6), *unit(6, 16), *head)


def settle(model, images) -> None:
    """Gives the norms the statistics of the batch, then eval mode.

    With those of a fresh network depthwise layers let the maps vanish, and arithmetic with denormal numbers is slow.
    """
    import torch

    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        model.train()(images)
    model.eval()


def folded_in_torch(model, images):
    """Every batch norm folded into the convolution before it, and the logits compared with those before.

    By neighbours in each module, not by `torch.fx`, which knows neither timm's norms with an activation nor branches on shapes.
    """
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        raise NotMeasured("no batch norm")
    with torch.no_grad():
        before = model(images)
        for parent in list(model.modules()):
            for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
                if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, norm_name, getattr(norm, "act", torch.nn.Identity()))
        model.to(memory_format=torch.channels_last)
        difference = float((model(images) - before).abs().max() / before.abs().max())
    if not difference < 1e-2:  # TensorFloat-32 has a precision of 1e-3
        raise RuntimeError(f"folding changed the logits by {difference:.1e} of the largest")
    return model


# The process


def peak_bytes(side: str) -> dict[str, int]:
    """The most of the device's memory that the process has held at once, by the allocator's own count; {} on a CPU."""
    if side in JAX:
        import jax

        found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import torch

        found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {} if found is None else {"peak_bytes": found}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe(side: str) -> dict:
    """Device ("cpu", or a GPU's name) and versions of what this side runs on."""
    packages = {"python": platform.python_version()}
    for name in PACKAGES["jax" if side in JAX else "torch"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    if side in JAX:
        import jax

        device = "cpu" if jax.default_backend() == "cpu" else jax.local_devices()[0].device_kind
    else:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "cores": cores(), "versions": packages}


def reason(error: BaseException) -> str:
    """An error in few words and without the folders of this machine."""
    return re.sub(r"(?<![\w.+-])/(?:[\w.+-]+/)+", "", " ".join(f"{type(error).__name__}: {error}".split()))[:160]


def answer(job: Namespace, say: Callable[[dict], None]) -> None:
    """Gets ready, and answers to the end of stdin."""
    start = time.perf_counter()
    burst = (on_jax if job.side in JAX else on_torch)(job)
    burst(1)
    memory = {"temporary_bytes": burst.temporary_bytes} if hasattr(burst, "temporary_bytes") else {}
    say({"ready": round(time.perf_counter() - start, 1), **memory})
    for line in sys.stdin:
        # Not timed: after a pause the pages that a step had freed cost more to fault in again. MobileNetV2's first step after
        # 3 seconds had half the images/s of the next, and nearly as many where the C library keeps what is freed.
        burst(1)
        asked = json.loads(line)
        start = time.perf_counter()
        loss = burst(asked["steps"])
        found = {"seconds": time.perf_counter() - start, "loss": loss if math.isfinite(loss) else "not finite"}
        found |= {"digest": burst.digest()} if asked.get("digest") else {}
        say(found | peak_bytes(job.side))


def run(job: Namespace, say: Callable[[dict], None]) -> None:
    if job.side != "plain":
        return answer(job, say)
    import plain

    with plain.layers_replaced():  # for as long as it answers, for jit traces late
        answer(job, say)


def main() -> None:
    job = Namespace(**json.loads(sys.argv[1]))
    if job.side in OURS:
        from cnnfamily import memory

        memory.tune_malloc()
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(what: dict) -> None:
        print(json.dumps(what), file=pipe, flush=True)

    try:
        if getattr(job, "describe", False):
            return say(describe(job.side))
        run(job, say)
    except NotMeasured as error:
        say({"not_measured": str(error)})
    except Exception as error:
        say({"failed": reason(error)})
        raise


if __name__ == "__main__":
    main()
