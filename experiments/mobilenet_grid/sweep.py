"""MobileNetV1's grid of four widths by four resolutions (Howard et al. 2017, tables 6 and 7), on the digits or on a GPU.

python -m cnnfamily.sweep --sweep=experiments/mobilenet_grid/sweep.py --jobs=2      # the digits, two CPU cores
python -m cnnfamily.sweep --sweep=experiments/mobilenet_grid/sweep.py:photographs --config.data.source=folder:PATH
"""

BASE = {name: f"experiments/scaling/config.py:{name}" for name in ("digits", "cifar10", "photographs")}
WIDTHS = (1.0, 0.75, 0.5, 0.25)
SIDES = {
    "digits": (56, 48, 40, 32),
    "cifar10": (56, 48, 40, 32),
    "photographs": (224, 192, 160, 128),
}  # the paper's, or a quarter
# On the digits half of its blocks, for thirteen without shortcuts hardly begin to learn in so few steps; and three epochs, as
# after six all of the sixteen are near 99 %.
SHORT = {"model.depth": 0.5, "total_epochs": 3.0, "optim.warmup_epochs": 1.0}


def sweep(name: str):
    fields = {"model.name": "mobilenet_v1"} | (SHORT if name == "digits" else {})
    for seed in range(3):  # outermost, so that two runs at once compile two programs, and the later seeds none
        for side in SIDES[name]:
            for width in WIDTHS:
                yield {**fields, "model.width": width, "data.resolution": side, "seed": seed}
