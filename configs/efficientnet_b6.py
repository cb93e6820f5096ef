"""EfficientNet-B6, the recipe of B0 with this network's width, depth, resolution and dropout.

python -m cnnfamily.train --config=configs/efficientnet_b6.py:digits   # the embedded digits at 32 pixels
python -m cnnfamily.train --config=configs/efficientnet_b6.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/efficientnet_b6.py          # ImageNet at 528 pixels; the paper has 84.0 %
"""

from ml_collections import ConfigDict

from configs import efficientnet_b0


def get_config(arg: str = "") -> ConfigDict:
    return efficientnet_b0.make("efficientnet_b6", arg, digits_epochs=8.0)
