"""ResNet-50 on ImageNet with a yes or no for each class. Wightman et al. 2021, "ResNet strikes back",
https://arxiv.org/abs/2110.00476, procedure A2 of table 2: 79.8 % top-1 after 300 epochs.

    python -m cnnfamily.train --config=configs/resnet50_a2.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/resnet50_a2.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/resnet50_a2.py:smoke    # a shrunken network, seconds

The gradient of this loss, a mean over 1,000 classes, is far below cross-entropy's, and LAMB, which scales each step by the
weights, does not mind: SGD at the rates of other recipes would. What differs: the batch, a multiple of the three repeats
(theirs 2,048); targets are the shares of what is mixed (theirs a yes for each); RandAugment is as in its paper, without timm's
noise on the magnitude.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("resnet50")
    config.update(
        {
            "batch_size": 2304,
            "total_epochs": 300.0,
            "loss": "binary_cross_entropy",
            "model": {"stochastic_depth": 0.05},
            "data": default.IMAGENET | {"resize": 236, "interpolation": "bicubic"},  # 0.95 of it are 224
            "augment": {
                "repeats": 3,
                "flip": True,
                "policy": "randaugment",
                "policy_magnitude": 7,
                "mixup": 0.1,
                "cutmix": 1.0,
            },
            "optim": {
                "name": "lamb",
                "learning_rate": 5e-3,
                "reference_batch": 0,
                "weight_decay": 0.02,
                "schedule": "cosine",
                "warmup_epochs": 5.0,
            },
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
