"""LeNet-5 on the embedded digits: the quickest real run.

python -m cnnfamily.train --config=configs/lenet5_digits.py
python -m cnnfamily.train --config=configs/lenet5_digits.py:smoke
python -m cnnfamily.train --config=configs/lenet5_digits.py --config.model.name=lenet5_1998
"""

from ml_collections import ConfigDict

from configs import lenet5_mnist


def get_config(arg: str = "") -> ConfigDict:
    return lenet5_mnist.get_config(arg or "digits")
