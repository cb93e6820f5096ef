"""ResNet-50 on ImageNet by torchvision's recipe of 2021, that of its second weights: 80.86 % top-1 after 600 epochs.
https://github.com/pytorch/vision/issues/3995, "New Recipe (with FixRes mitigations)", with repeated augmentation.

    python -m cnnfamily.train --config=configs/resnet50_2021.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/resnet50_2021.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/resnet50_2021.py:smoke    # a shrunken network, seconds

For a yes or no for each class in place of cross-entropy, with the optimizer that goes with it, see `resnet50_a2.py`.
What differs: the partner in mixup and cutmix is drawn anew for each image, theirs once a batch; the averages move every step by
1 - (1 - 0.00109)^(1/32), theirs every 32 steps by 0.00109, which is their 2e-5 times 1024 * 32 / 600; warm-up begins at 0, not
at 1 %.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("resnet50")
    config.update(
        {
            "batch_size": 1024,
            "total_epochs": 600.0,
            "label_smoothing": 0.1,
            "model": {"norm_group": 128},
            "data": default.IMAGENET | {"train_resolutions": (176,), "resize": 232},
            "augment": {
                "repeats": 4,
                "flip": True,
                "policy": "trivialaugment",
                "erasing": 0.1,
                "mixup": 0.2,
                "cutmix": 1.0,
            },
            "optim": {
                "name": "sgd",
                "learning_rate": 0.5,
                "reference_batch": 1024,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 2e-5,
                "schedule": "cosine",
                "warmup_epochs": 5.0,
            },
            "ema": {"decay": 0.999966, "warmup": False},
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
