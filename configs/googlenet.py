"""GoogLeNet with batch normalisation, as torchvision has it, on ImageNet. Szegedy et al. 2014, section 6,
https://arxiv.org/abs/1409.4842.

    python -m cnnfamily.train --config=configs/googlenet.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/googlenet.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/googlenet.py:smoke    # a shrunken network, seconds

Torchvision's weights have 69.8 % top-1; the paper (`googlenet_paper`) 89.9 % top-5 with one crop. From the paper: momentum 0.9,
the learning rate 4 % lower every 8 epochs, averaged weights, auxiliary classifiers at 0.3 of the loss. It gives no learning
rate, batch or number of epochs: ours. Its changes of colour it does
not state: 0.4 here. What is not here of it: the test on 144 crops.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    return make("googlenet", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The paper's recipe for either form."""
    config = default.get_config(name)
    config.update(
        {
            "batch_size": 256,
            "total_epochs": 250.0,
            "aux_weight": 0.3,
            "model": {"aux": True},
            "data": default.IMAGENET,
            "augment": {"flip": True, "jitter": 0.4},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.01,
                "reference_batch": 32,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "exponential",
                "warmup_epochs": 5.0,
                "decay_factor": 0.96,
                "decay_epochs": 8.0,
            },
            "ema": {"decay": 0.9999, "warmup": True},
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
