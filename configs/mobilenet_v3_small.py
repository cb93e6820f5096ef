"""MobileNetV3-Small, the recipe of MobileNetV3-Large with this network.

    python -m cnnfamily.train --config=configs/mobilenet_v3_small.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/mobilenet_v3_small.py:smoke    # a shrunken network, seconds
    python -m cnnfamily.train --config=configs/mobilenet_v3_small.py          # ImageNet

`:digits` gives 98.6 % of the 360 test digits (seed 0 alone) after 24 epochs.

Torchvision's weights have 67.67 % top-1 on ImageNet, the paper 67.4 %.
"""

from ml_collections import ConfigDict

from configs import mobilenet_v3_large


def get_config(arg: str = "") -> ConfigDict:
    return mobilenet_v3_large.make("mobilenet_v3_small", arg)
