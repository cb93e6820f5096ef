"""The data and the recipe of the scaling studies: `--config=experiments/scaling/config.py:NAME`, see README.md.

`digits` is for two CPU cores; `cifar10` wants `--config.data.source=npz:FILE`, `photographs` wants
`--config.data.source=folder:PATH`, and both a GPU.
"""

from ml_collections import ConfigDict

from cnnfamily.errors import unknown
from configs import default

NAMES = ("digits", "cifar10", "photographs")


def get_config(arg: str) -> ConfigDict:
    if arg not in NAMES:
        raise unknown("data of the scaling studies", arg, NAMES)
    config = default.get_config("mobilenet_v2")
    default.digits(config, epochs=6.0)
    # Sixteen a step and not 64: of 534 steps deeper networks make something, of 132 nothing, at the same cost.
    config.update({"batch_size": 16, "evaluate": {"every_epochs": 2.0}, "log": {"every_steps": 1437 // 16}})
    if arg == "cifar10":
        config.update(
            {
                "batch_size": 128,
                "total_epochs": 30.0,
                "data": {"source": "npz:cifar10.npz"},
                "augment": {"shift": 0, "crop_padding": 4, "flip": True},
                "log": {"every_steps": 100},
            }
        )
    if arg == "photographs":
        config.update(
            {
                "batch_size": 64,
                "total_epochs": 30.0,
                "data": {"source": "folder:photographs", "resolution": 128, "fit": "crop"},
                "augment": {"shift": 0, "flip": True},
                "log": {"every_steps": 50},
            }
        )
    return config
