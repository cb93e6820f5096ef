"""Wide ResNet-101-2 on ImageNet: the recipe of ResNet-50.

python -m cnnfamily.train --config=configs/wide_resnet101_2.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/wide_resnet101_2.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/wide_resnet101_2.py          # ImageNet; torchvision's first weights have 78.8 %
"""

from ml_collections import ConfigDict

from configs import resnet50_imagenet


def get_config(arg: str = "") -> ConfigDict:
    return resnet50_imagenet.make("wide_resnet101_2", arg)
