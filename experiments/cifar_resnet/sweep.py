"""The ResNets of He et al. 2015, section 4.2, and ResNet-110 with stochastic depth (Huang et al. 2016), by their papers.

    python -m cnnfamily.sweep --sweep=experiments/cifar_resnet/sweep.py[:NAME] --config.data.source=npz:FILE

    (none)                  64,000 steps; 20 layers with three seeds, 32, 44, 56 and 110 with one
    short                   the same networks and seeds in 6,400 steps
    stochastic_depth        500 epochs; the three forms, and without
    stochastic_depth_short  the same in 16.4 epochs, which are 6,400 steps
    smoke, stochastic_depth_smoke   64 steps of shrunken networks on fake images

A short form is the paper's schedule with every duration and boundary multiplied; the learning rates stay. Only the warm-up of
ResNet-110 keeps its 400 steps: it waits for the network to begin to learn, which does not come sooner in a shorter run.
"""

HE, HUANG = "configs/resnet20_cifar10.py", "configs/resnet110_stochastic_depth.py"
BASE = {
    "paper": HE,
    "short": HE,
    "stochastic_depth": HUANG,
    "stochastic_depth_short": HUANG,
    "smoke": f"{HE}:smoke",
    "stochastic_depth_smoke": f"{HUANG}:smoke",
}
STEPS, BOUNDARIES = 64_000, (32_000, 48_000)  # He et al.
EPOCHS, BOUNDARIES_EPOCHS = 500.0, (250.0, 375.0)  # Huang et al.
STEPS_AN_EPOCH = 50_000 / 128
# Of the paper's duration. 6,400 steps of Huang et al.'s 195,312, so that the two short forms cost the same.
SHARE = {
    "short": 0.1,
    "stochastic_depth_short": 6_400 / (EPOCHS * STEPS_AN_EPOCH),
    "smoke": 0.001,
    "stochastic_depth_smoke": 0.032,
}
SEEDS = {20: 3, 32: 1, 44: 1, 56: 1, 110: 1}
FORMS = ("none", "batch", "example", "subset")  # without first: the paper's 6.41 %, with which the others are compared


def sweep(name: str):
    share = SHARE.get(name, 1.0)
    small = {"model.width": 0.25} if name.endswith("smoke") else {}
    if name.startswith("stochastic_depth"):
        for form in FORMS:
            yield {
                "model.stochastic_depth_form": form,
                "total_epochs": round(EPOCHS * share, 3),
                "optim.boundaries_epochs": tuple(round(epoch * share, 3) for epoch in BOUNDARIES_EPOCHS),
                "evaluate.every_epochs": max(1.0, round(10 * share, 1)) if share < 1 else 10.0,
            }
        return
    for depth, seeds in SEEDS.items():
        for seed in range(seeds):
            fields = {"model.name": f"resnet{depth}_cifar", **small} | ({"model.stage_sizes": (1, 1)} if small else {})
            yield {
                **fields,
                "total_epochs": 0.0,
                "total_steps": round(STEPS * share),
                "optim.boundaries_steps": tuple(round(step * share) for step in BOUNDARIES),
                "optim.warmup_steps": (4 if small else 400) if depth == 110 else 0,
                "evaluate.every_epochs": 5.0 if share == 1 else 2.0,
                "seed": seed,
            }
