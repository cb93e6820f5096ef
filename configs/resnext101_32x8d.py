"""ResNeXt-101, 32 groups of 8 on ImageNet: the recipe of ResNet-50.

python -m cnnfamily.train --config=configs/resnext101_32x8d.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/resnext101_32x8d.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/resnext101_32x8d.py          # ImageNet; torchvision's first weights have 79.3 %
"""

from ml_collections import ConfigDict

from configs import resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return resnet50_imagenet.make("resnext101_32x8d", arg)
