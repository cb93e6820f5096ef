"""VGG-19 with batch normalisation: the recipe of `vgg16.py`.

python -m cnnfamily.train --config=configs/vgg19_bn.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/vgg19_bn.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/vgg19_bn.py          # ImageNet; torchvision's weights have 74.2 %
"""

from ml_collections import ConfigDict

from configs import vgg16


def get_config(arg: str = "") -> ConfigDict:
    return vgg16.make("vgg19_bn", arg)
