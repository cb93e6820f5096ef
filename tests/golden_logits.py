"""Logits of small networks, by torchvision itself: `python tests/golden_logits.py` writes golden_logits.json.

Needs torch and torchvision. Weights are drawn by name (`weights_of`), so that nothing but logits and versions is kept. Each
case is a torchvision network in small and the fields that make ours the same.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("golden_logits.json")
SIDES = (64, 75)  # an even and an odd one, at which paddings differ

# case -> (our name, our fields)
CASES = {
    "alexnet": ("alexnet", {}),
    "vgg": ("vgg11", {"stage_sizes": (1, 2, 1), "width": 0.25, "hidden": 512}),
    "vgg_bn": ("vgg11_bn", {"stage_sizes": (1, 1), "width": 0.25, "hidden": 512}),
    "googlenet": ("googlenet", {}),
    "resnet_basic": ("resnet18", {"stage_sizes": (1, 1, 1, 1)}),
    "resnet_bottleneck": ("resnet50", {"stage_sizes": (2, 1)}),
    "resnext": ("resnext50_32x4d", {"stage_sizes": (1, 1)}),
    "mobilenet_v2": ("mobilenet_v2", {"stages": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))}),
    "mobilenet_v3": (
        "mobilenet_v3_small",
        {"stages": ((3, 16, 16, True, "RE", 2), (3, 72, 24, False, "RE", 2), (5, 96, 40, True, "HS", 2))},
    ),
    "efficientnet": (
        "efficientnet_b0",
        {"stages": ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 1, 2, 5)), "head_filters": 160},
    ),
    "efficientnet_of_b5": (
        "efficientnet_b5",
        {"stages": ((1, 16, 1, 1, 3), (6, 24, 1, 2, 5)), "width": 1.0, "depth": 1.0, "head_filters": 96},
    ),
}


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """An array for each name: kernels that keep the variance, scales about 1, statistics that are not those of a fresh norm."""
    found = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            value = generator.uniform(0.5, 2.0, shape)
        elif len(shape) > 1:
            value = generator.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("weight"):
            value = generator.uniform(0.5, 1.5, shape)
        else:
            value = 0.2 * generator.standard_normal(shape)
        found[name] = value.astype(np.float32)
    return found


def images_of(side: int) -> np.ndarray:
    """`[2, side, side, 3]` float32."""
    return np.random.default_rng(side).standard_normal((2, side, side, 3), np.float32)


def torch_networks(models, torch) -> dict:
    """The cases as torchvision's classes make them."""
    nn, bottleneck = torch.nn, models.resnet.Bottleneck

    def vgg(layers, batch_norm):
        network = models.vgg.VGG(models.vgg.make_layers(layers, batch_norm), num_classes=10)
        inputs = 49 * [layer for layer in layers if layer != "M"][-1]
        steps = [nn.Linear(inputs, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout()]
        network.classifier = nn.Sequential(*steps, nn.Linear(128, 10))
        return network

    def row(*values):  # inputs, kernel, expanded, outputs, squeeze, activation, stride, dilation, width
        return models.mobilenetv3.InvertedResidualConfig(*values, 1, 1.0)

    def stage(*values):  # expansion, kernel, stride, inputs, outputs, repeats
        return models.efficientnet.MBConvConfig(*values)

    of_b5 = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    v3 = [row(16, 3, 16, 16, True, "RE", 2), row(16, 3, 72, 24, False, "RE", 2), row(24, 5, 96, 40, True, "HS", 2)]
    b0 = [stage(1, 3, 1, 32, 16, 1), stage(6, 3, 2, 16, 24, 2), stage(6, 5, 2, 24, 40, 1)]
    b5 = [stage(1, 3, 1, 32, 16, 1), stage(6, 5, 2, 16, 24, 1)]
    small = {"num_classes": 10}

    class TwoStages(models.resnet.ResNet):
        """Without the last two stages, which torchvision's constructor always makes."""

        def __init__(self, sizes, **fields):
            super().__init__(bottleneck, [*sizes, 1, 1], **fields)
            self.layer3 = self.layer4 = nn.Identity()
            self.fc = nn.Linear(512, 10)

    return {
        "alexnet": models.AlexNet(**small),
        "vgg": vgg([16, "M", 32, 32, "M", 64, "M"], False),
        "vgg_bn": vgg([16, "M", 32, "M"], True),
        "googlenet": models.GoogLeNet(**small, aux_logits=False, transform_input=True, init_weights=False),
        "resnet_basic": models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], **small),
        "resnet_bottleneck": TwoStages([2, 1]),
        "resnext": TwoStages([1, 1], groups=32, width_per_group=4),
        "mobilenet_v2": models.MobileNetV2(**small, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]),
        "mobilenet_v3": models.MobileNetV3(v3, 1024, **small),
        "efficientnet": models.EfficientNet(b0, 0.2, **small),
        "efficientnet_of_b5": models.EfficientNet(b5, 0.2, **small, norm_layer=of_b5),
    }


def main() -> None:
    import parity
    import torch

    torchvision = parity.import_torchvision()
    golden = {"versions": {"torch": torch.__version__, "torchvision": torchvision.__version__}, "logits": {}}
    for case, network in torch_networks(torchvision.models, torch).items():
        weights = weights_of({name: tuple(value.shape) for name, value in network.state_dict().items()})
        missing, left = network.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=False)
        assert not left
        assert all(name.endswith("num_batches_tracked") for name in missing)
        golden["logits"][case] = {}
        with torch.no_grad():
            for side in SIDES:
                logits = network.eval()(torch.from_numpy(images_of(side).transpose(0, 3, 1, 2).copy())).numpy()
                golden["logits"][case][str(side)] = [[float(f"{x:.7g}") for x in row] for row in logits.astype(np.float64)]
        print(case, float(np.abs(logits).max()), len(weights), flush=True)
    FILE.write_text(
        json.dumps(golden, indent=None, separators=(",", ":")).replace('"},"', '"},\n"').replace('},"', '},\n"') + "\n"
    )


if __name__ == "__main__":
    main()
