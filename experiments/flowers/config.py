"""One recipe for all networks on the flowers at 128 pixels: `--config=experiments/flowers/config.py:NETWORK`, see README.md."""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str) -> ConfigDict:
    config = default.get_config(arg)
    config.update(
        {
            "batch_size": 64,
            "total_epochs": 5.0,
            "label_smoothing": 0.1,
            "model": {"num_classes": 5, "norm_momentum": 0.9, "stochastic_depth": 0.0},
            "data": {"source": "folder:flowers", "resolution": 128, "fit": "crop", "resize": 128},
            "augment": {"flip": True, "crop_scale": (0.35, 1.0)},
            "optim": {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.05, "clip_norm": 1.0, "warmup_epochs": 1.0},
            "evaluate": {"batch_size": 256},
            "log": {"every_steps": 9},
        }
    )
    return config
