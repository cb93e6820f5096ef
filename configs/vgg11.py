"""VGG-11: the recipe of `vgg16.py`.

python -m cnnfamily.train --config=configs/vgg11.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/vgg11.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/vgg11.py          # ImageNet; torchvision's weights have 69.0 %
"""

from ml_collections import ConfigDict

from configs import vgg16


def get_config(arg: str = "") -> ConfigDict:
    return vgg16.make("vgg11", arg)
