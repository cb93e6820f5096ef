"""ResNet-101 on ImageNet: the recipe of ResNet-50.

python -m cnnfamily.train --config=configs/resnet101_imagenet.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/resnet101_imagenet.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/resnet101_imagenet.py          # ImageNet; torchvision's first weights have 77.4 %
"""

from ml_collections import ConfigDict

from configs import resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return resnet50_imagenet.make("resnet101", arg)
