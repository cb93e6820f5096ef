"""VGG-13 with batch normalisation: the recipe of `vgg16.py`.

python -m cnnfamily.train --config=configs/vgg13_bn.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/vgg13_bn.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/vgg13_bn.py          # ImageNet; torchvision's weights have 71.6 %
"""

from ml_collections import ConfigDict

from configs import vgg16


def get_config(arg: str = "") -> ConfigDict:
    return vgg16.make("vgg13_bn", arg)
