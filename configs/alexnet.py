"""AlexNet (one column) on ImageNet, by the recipe of the paper of 2012. Krizhevsky et al. 2012, section 5,
https://papers.nips.cc/paper/4824.

    python -m cnnfamily.train --config=configs/alexnet.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/alexnet.py:digits   # the embedded digits at 68 pixels
    python -m cnnfamily.train --config=configs/alexnet.py:smoke    # a shrunken network, seconds

Torchvision's weights have 56.5 % top-1, the paper's network (`alexnet_2012`) 59.3 %. The paper divides the learning rate by 10
when the validation error stops falling, three times in about 90 epochs; here at fixed epochs, of our choice. What is not here
of it: weight decay of biases. `python -m cnnfamily.evaluate --crops=10` tests as the paper does.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    return make("alexnet", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The paper's recipe for either form."""
    config = default.get_config(name)
    config.update(
        {
            "batch_size": 128,
            "total_epochs": 90.0,
            "data": default.IMAGENET | {"resize": 256},
            "augment": {"crop_shorter": (256, 256), "flip": True, "light": 0.1},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.01,
                "reference_batch": 128,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 5e-4,
                "schedule": "steps",
                "boundaries_epochs": (30.0, 60.0, 80.0),
                "decay_factor": 0.1,
            },
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
