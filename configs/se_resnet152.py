"""SE-ResNet-152 on ImageNet: the recipe of SE-ResNet-50.

python -m cnnfamily.train --config=configs/se_resnet152.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/se_resnet152.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/se_resnet152.py          # ImageNet, once it is prepared (README)
"""

from ml_collections import ConfigDict

from configs import se_resnet50


def get_config(arg: str = "") -> ConfigDict:
    return se_resnet50.make("se_resnet152", arg)
