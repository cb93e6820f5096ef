"""ResNet-56 on CIFAR-10, the recipe of ResNet-20.

python -m cnnfamily.train --config=configs/resnet56_cifar10.py --config.data.source=npz:cifar10.npz  # 93.03 % in the paper
python -m cnnfamily.train --config=configs/resnet56_cifar10.py:digits   # the embedded digits
python -m cnnfamily.train --config=configs/resnet56_cifar10.py:smoke    # a shrunken network, seconds
"""

from ml_collections import ConfigDict

from configs import resnet20_cifar10


def get_config(arg: str = "") -> ConfigDict:
    return resnet20_cifar10.make("resnet56_cifar", arg)
