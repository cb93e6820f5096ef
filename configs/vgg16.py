"""VGG-16 on ImageNet. Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556, section 3.1.

    python -m cnnfamily.train --config=configs/vgg16.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/vgg16.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/vgg16.py:smoke    # a shrunken network, seconds

Torchvision's weights have 71.6 % top-1, the paper 73.0 % with dense evaluation. The paper divides the learning rate by 10 when
the validation accuracy stops rising, three times in 74 epochs; here at fixed epochs, of our choice. It starts the deeper
networks from a trained shallow one, as was needed before He et al. 2015, whose initial values these have. What is not here of
it: the test at several scales, and weight decay of biases.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    return make("vgg16", arg)


def make(name: str, arg: str) -> ConfigDict:
    """The paper's recipe for a column of its table, with or without batch normalisation."""
    config = default.get_config(name)
    config.update(
        {
            "batch_size": 256,
            "total_epochs": 74.0,
            "data": default.IMAGENET,
            "augment": {"crop_shorter": (256, 512), "flip": True, "light": 0.1},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.01,
                "reference_batch": 256,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 5e-4,
                "schedule": "steps",
                "boundaries_epochs": (25.0, 45.0, 60.0),
                "decay_factor": 0.1,
            },
        }
    )
    return default.choose(config, arg, digits_epochs=12.0)
