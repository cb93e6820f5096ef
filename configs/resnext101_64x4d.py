"""ResNeXt-101, 64 groups of 4 on ImageNet: the recipe of ResNet-50.

python -m cnnfamily.train --config=configs/resnext101_64x4d.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/resnext101_64x4d.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/resnext101_64x4d.py          # ImageNet; torchvision's first weights have 83.2 %
"""

from ml_collections import ConfigDict

from configs import resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return resnet50_imagenet.make("resnext101_64x4d", arg)
