"""ResNet-20 on CIFAR-10. He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2.

python -m cnnfamily.train --config=configs/resnet20_cifar10.py --config.data.source=npz:cifar10.npz  # 91.25 % in the paper
python -m cnnfamily.train --config=configs/resnet20_cifar10.py:digits   # the embedded digits, minutes on a CPU
python -m cnnfamily.train --config=configs/resnet20_cifar10.py:smoke    # a shrunken network, seconds
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    return make("resnet20_cifar", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The paper's recipe for a CIFAR ResNet: 64,000 steps of 128, learning rate 0.1 divided by 10 at 32,000 and 48,000.

    The paper keeps 5,000 of the 50,000 training images for validation while it tunes; its figures and these are with all.
    """
    config = default.get_config(name)
    config.update(
        {
            "batch_size": 128,
            "total_epochs": 0.0,
            "total_steps": 64_000,
            "data": {"source": "npz:cifar10.npz"},
            "augment": {"crop_padding": 4, "flip": True},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "steps",
                "boundaries_steps": (32_000, 48_000),
                "decay_factor": 0.1,
            },
            "evaluate": {"every_epochs": 5.0},
        }
    )
    if name == "resnet110_cifar":
        # The paper starts ResNet-110 at 0.01 until the training error is below 80 %, about 400 steps; here the learning rate
        # rises linearly over as many.
        config.optim.warmup_steps = 400
    return default.choose(config, arg, digits_epochs=24.0)
