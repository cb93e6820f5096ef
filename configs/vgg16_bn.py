"""VGG-16 with batch normalisation: the recipe of `vgg16.py`.

python -m cnnfamily.train --config=configs/vgg16_bn.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/vgg16_bn.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/vgg16_bn.py          # ImageNet; torchvision's weights have 73.4 %
"""

from ml_collections import ConfigDict

from configs import vgg16


def get_config(arg: str = "") -> ConfigDict:
    return vgg16.make("vgg16_bn", arg)
