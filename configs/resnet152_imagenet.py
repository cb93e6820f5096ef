"""ResNet-152 on ImageNet: the recipe of ResNet-50.

python -m cnnfamily.train --config=configs/resnet152_imagenet.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/resnet152_imagenet.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/resnet152_imagenet.py          # ImageNet; torchvision's first weights have 78.3 %
"""

from ml_collections import ConfigDict

from configs import resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return resnet50_imagenet.make("resnet152", arg)
