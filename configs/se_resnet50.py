"""SE-ResNet-50 on ImageNet. Hu et al. 2018, https://arxiv.org/abs/1709.01507, section 5: batch 1024 at a learning rate of 0.6,
divided by 10 every 30 epochs, 100 epochs; the rest is the recipe of ResNet-50.

    python -m cnnfamily.train --config=configs/se_resnet50.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/se_resnet50.py:smoke    # a shrunken network, seconds
    python -m cnnfamily.train --config=configs/se_resnet50.py          # ImageNet; the paper has 77.7 %
"""

from ml_collections import ConfigDict

from configs import default, resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return make("se_resnet50", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The paper's recipe for one of 18 to 152."""
    config = resnet50_imagenet.make(name, "")
    config.update(
        {
            "total_epochs": 100.0,
            "model": {"zero_init_last": False},
            "optim": {"learning_rate": 0.6, "reference_batch": 1024, "boundaries_epochs": (30.0, 60.0, 90.0)},
        }
    )
    return default.choose(config, arg, digits_epochs=16.0)
