"""ResNet-110 with stochastic depth on CIFAR-10. Huang et al. 2016, https://arxiv.org/abs/1603.09382, and their code.

    python -m cnnfamily.train --config=configs/resnet110_stochastic_depth.py --config.data.source=npz:cifar10.npz
    python -m cnnfamily.train --config=configs/resnet110_stochastic_depth.py:digits   # the embedded digits
    python -m cnnfamily.train --config=configs/resnet110_stochastic_depth.py:smoke    # a shrunken network, seconds

The paper: 94.75 % with stochastic depth, 93.59 % without (config.model.stochastic_depth=0.0). As there, a block is dropped for
the whole batch and scaled at test; a dropped block costs no time. The other forms are "example" and "subset"
(config.model.stochastic_depth_form), the second of which saves time too. The paper keeps 5,000 images for validation to pick
the epoch, so that it trains on 45,000; these train on all.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("resnet110_cifar")
    config.update(
        {
            "batch_size": 128,
            "total_epochs": 500.0,
            "model": {
                "shortcut": "A_average",
                "stochastic_depth": 0.5,
                "stochastic_depth_form": "batch",
                "stochastic_depth_schedule": "l/L",
                "stochastic_depth_scaling": "test",
            },
            "data": {"source": "npz:cifar10.npz"},
            "augment": {"crop_padding": 4, "flip": True},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "schedule": "steps",
                "boundaries_epochs": (250.0, 375.0),
                "decay_factor": 0.1,
            },
            "evaluate": {"every_epochs": 10.0},
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
