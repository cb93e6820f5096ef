"""CIFAR-10 in the shortest time, after airbench94_muon.py of https://github.com/KellerJordan/cifar10-airbench.

python -m cnnfamily.train --config=configs/cifar10_fast.py --config.data.source=npz:cifar10.npz
python -m cnnfamily.train --config=configs/cifar10_fast.py:digits   # the embedded digits, minutes on a CPU
python -m cnnfamily.train --config=configs/cifar10_fast.py:smoke    # a shrunken network, seconds
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("airbench94")
    config.update(
        {
            "batch_size": 2000,
            "total_epochs": 8.0,
            "label_smoothing": 0.2,
            "data": {"source": "npz:cifar10.npz"},
            "augment": {"shift": 2, "flip_alternating": True},
            "optim": {
                "name": "muon",
                "learning_rate": 0.24,
                "momentum": 0.6,
                "beta2": 0.95,
                "adam_factor": 0.3,
                "weight_decay": 0.1,
                "schedule": "linear",
            },
            "evaluate": {"every_epochs": 8.0, "batch_size": 2000, "crops": 2},
            "log": {"every_steps": 25},
        }
    )
    return default.choose(config, arg, digits_epochs=8.0)
