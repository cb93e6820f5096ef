"""How wide does LeNet-5 have to be for the digits? The smallest study, to copy; a minute on two CPU cores.

python -m cnnfamily.sweep --sweep=experiments/lenet_width/sweep.py --jobs=2
"""

BASE = "configs/lenet5_digits.py"


def sweep():
    for seed in range(3):
        for width in (0.25, 0.5, 1.0, 2.0):
            yield {"model.width": width, "seed": seed, "total_epochs": 5.0}
