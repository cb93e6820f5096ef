"""VGG-19: the recipe of `vgg16.py`.

python -m cnnfamily.train --config=configs/vgg19.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/vgg19.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/vgg19.py          # ImageNet; torchvision's weights have 72.4 %
"""

from ml_collections import ConfigDict

from configs import vgg16


def get_config(arg: str = "") -> ConfigDict:
    return vgg16.make("vgg19", arg)
