"""cnnfamily: the classic convolutional networks in JAX and Flax, exact to their papers, trained by one loop.

    models/      the networks: layers.py, one file a family; convolution.py chooses how a convolution is computed;
                 cpu_forms.py, cpu_depthwise.py, batch_norm.py and pooling.py have gradients of their own
    data/        sources.py (what images), batches.py (which, when), augment.py (changed how), feed.py (onto the devices);
                 known.py (the well-known sets); preprocessing.py (what images go through before published weights)
    step.py      the mathematics of one update; losses.py, optim.py and rng.py belong to it
    train.py     the loop; parallel.py (devices), processes.py and interrupt.py (how several start and all end), checkpoint.py,
                 runlog.py, disk.py, nonfinite.py and progress.py serve it
    weights.py   published weights in and out; naming.py has torch's names, convert.py finds where two networks part
    sweep.py     runs the rows of a study.py, here or by slurm.py; report.py makes table and figures of them
    benchmark.py speed, memory and where a step's time goes (profile_layers.py, ceilings.py); programs.py keeps compiled ones,
                 untraced.py finds those of the command again without tracing
    inference.py a network as it infers fastest: fold.py takes batch norm out of it, models/onednn.py computes its convolutions;
                 models/onednn_forms.py those of training that asks for it
    evaluate.py  figures of a run; summary.py counts, published.py what papers print; scaling.py width, depth and resolution;
                 config.py reads configs/

Imports run one way: models know nothing of training, and the step knows no disk.
"""

import importlib
import time

STARTED = time.time()  # before any other module of ours, and what they import: see untraced.py

# Public name -> module. Resolved on first use: `import cnnfamily` stays quick, and `python -m cnnfamily.summary` does not find
# its own module imported already.
_PUBLIC = {
    "list_models": "models",
    "model_config": "models",
    "build": "models",
    "create_model": "models",
    "summarize": "summary",
    "load_config": "config",
    "run_training": "train",
    "load_run": "evaluate",
    "preprocess": "data.preprocessing",
    "imagenet_classes": "data.preprocessing",
    "load_pretrained": "weights",
    "fold_batch_norm": "fold",
    "optimize_for_inference": "inference",
    "state_dict": "weights",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cnnfamily' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cnnfamily.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
