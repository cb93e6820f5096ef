"""ResNet-50 (v1.5) on ImageNet in 90 epochs. He et al. 2015, https://arxiv.org/abs/1512.03385, with the linear scaling and
the zero-initialised last scales of Goyal et al. 2017, https://arxiv.org/abs/1706.02677; its warm-up is as long as theirs, but
from 0.

    python -m cnnfamily.train --config=configs/resnet50_imagenet.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/resnet50_imagenet.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/resnet50_imagenet.py:smoke    # a shrunken network, seconds

Torchvision's first weights, of a recipe close to this, have 76.13 % top-1. The
forms of the paper without files of their own, with the stride on the first convolution and without shortcuts, train with
`--config.model.name=resnet50_v1` or `plain34`.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    return make("resnet50", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The recipe for a residual network."""
    config = default.get_config(name)
    config.update(
        {
            "batch_size": 1024,
            "total_epochs": 90.0,
            "model": {"zero_init_last": True, "norm_group": 32},
            "data": default.IMAGENET,
            "augment": {"flip": True},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.1,
                "reference_batch": 256,
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "schedule": "steps",
                "boundaries_epochs": (30.0, 60.0, 80.0),
                "decay_factor": 0.1,
                "warmup_epochs": 5.0,
            },
        }
    )
    return default.choose(config, arg, digits_epochs=16.0)
