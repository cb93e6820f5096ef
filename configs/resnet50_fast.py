"""ResNet-50 on ImageNet in 16 epochs with images that grow, after FFCV's rn50_16_epochs.yaml
(https://github.com/libffcv/ffcv-imagenet), which has 73.8 % top-1.

    python -m cnnfamily.train --config=configs/resnet50_fast.py          # ImageNet, once it is prepared (README)
    python -m cnnfamily.train --config=configs/resnet50_fast.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/resnet50_fast.py:smoke    # a shrunken network, seconds

160 pixels for 12 epochs, then 192, and 256 in evaluation, the image and its mirror image. Theirs rises by the line from 160 at
epoch 11 to 192 at 13, rounded to multiples of 32, which is the same. What is not here: the blur before strides.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("resnet50")
    config.update(
        {
            "batch_size": 4096,  # 512 on each of 8 devices
            "total_epochs": 16.0,
            "label_smoothing": 0.1,
            "model": {"zero_init_last": True, "norm_group": 512},
            "data": default.IMAGENET
            | {"resolution": 256, "resize": 293, "train_resolutions": (160, 192), "train_boundaries_epochs": (12.0,)},
            "augment": {"flip": True},
            "optim": {
                "name": "sgd",
                "learning_rate": 1.7,
                "reference_batch": 4096,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "linear",
                "warmup_epochs": 2.0,
            },
            "evaluate": {"crops": 2},
        }
    )
    return default.choose(config, arg, digits_epochs=16.0)
