"""GoogLeNet as in the paper, with 5x5 convolutions and no batch normalisation: the recipe of `googlenet.py`.

python -m cnnfamily.train --config=configs/googlenet_paper.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/googlenet_paper.py:smoke    # a shrunken network, seconds
python -m cnnfamily.train --config=configs/googlenet_paper.py          # ImageNet; the paper has 89.9 % top-5 with one crop
"""

from ml_collections import ConfigDict

from configs import googlenet


def get_config(arg: str = "") -> ConfigDict:
    return googlenet.make("googlenet_paper", arg)
