"""EfficientNet-B7, the recipe of B0 with this network's width, depth, resolution and dropout.

python -m cnnfamily.train --config=configs/efficientnet_b7.py:digits   # the embedded digits at 32 pixels
python -m cnnfamily.train --config=configs/efficientnet_b7.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/efficientnet_b7.py          # ImageNet at 600 pixels; the paper has 84.4 %
"""

from ml_collections import ConfigDict

from configs import efficientnet_b0


def get_config(arg: str = "") -> ConfigDict:
    return efficientnet_b0.make("efficientnet_b7", arg, digits_epochs=8.0)
