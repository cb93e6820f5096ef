"""EfficientNet-B0 to B3 and ResNet-50 on the flowers at 128 pixels, for a GPU, see README.md.

python -m cnnfamily.sweep --sweep=experiments/flowers/sweep.py --config.data.source=folder:FOLDER

The recipe of `config.py` for 30 epochs; all networks with the first seed before any with the second. `:smoke` takes one epoch
of two shrunken networks at 64 pixels.
"""

NETWORKS = ("efficientnet_b0", "resnet50", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3")
BASE = dict.fromkeys(("full", "smoke"), "experiments/flowers/config.py:efficientnet_b0")


def sweep(name: str):
    if name == "smoke":
        for network in NETWORKS[:2]:
            fields = {"model.name": network, "total_epochs": 1.0, "optim.warmup_epochs": 0.5, "batch_size": 16}
            fields |= {"data.resolution": 64, "data.resize": 64, "model.width": 0.25}
            yield fields | ({"model.stochastic_depth": 0.0, "model.depth": 0.3} if network != "resnet50" else {})
        return
    for seed in range(3):
        for network in NETWORKS:
            # Setting the name takes that network's own rate, which the recipe has not.
            yield {"model.name": network, "model.stochastic_depth": 0.0, "total_epochs": 30.0, "seed": seed}
