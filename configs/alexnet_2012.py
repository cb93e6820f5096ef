"""AlexNet as in the paper of 2012, in two groups with response normalisation: the recipe of `alexnet.py`.

python -m cnnfamily.train --config=configs/alexnet_2012.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/alexnet_2012.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/alexnet_2012.py          # ImageNet; 59.3 % in the paper, one network

On the digits it starts with torch's initialisation: with the paper's it needs more steps than there are (see `default.digits`).
"""

from ml_collections import ConfigDict

from configs import alexnet


def get_config(arg: str = "") -> ConfigDict:
    return alexnet.make("alexnet_2012", arg)
