"""torchvision's table of preprocessing and some pixels of its own, written to golden_preprocessing.json beside this file.

python tests/golden_preprocessing.py    # where torch, torchvision and this package are installed
"""

import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

FILE = Path(__file__).with_suffix(".json")
# Network, weights, (width, height): shrunk and enlarged, both ways round, odd sides.
CASES = (
    ("resnet50", "IMAGENET1K_V1", (500, 375)),
    ("resnet50", "IMAGENET1K_V2", (333, 501)),
    ("vgg16", "IMAGENET1K_FEATURES", (45, 31)),
    ("efficientnet_b1", "IMAGENET1K_V1", (97, 333)),
    ("efficientnet_b1", "IMAGENET1K_V2", (1001, 700)),
    ("efficientnet_b7", "IMAGENET1K_V1", (60, 50)),
)


def synthetic_image(width: int, height: int) -> np.ndarray:
    """uint8 `[height, width, 3]` by whole-number arithmetic: a ramp, stripes, and a pattern that changes at every pixel."""
    y, x = np.indices((height, width))
    return np.stack([255 * x // (width - 1), (7 * y + 3 * x) % 256, x * y % 251], -1).astype(np.uint8)


def some_pixels(output: np.ndarray) -> list[list[float]]:
    """Of `[crop, crop, 3]`: the corners, the centre, and one between."""
    crop = len(output)
    places = [(0, 0), (0, crop - 1), (crop - 1, 0), (crop - 1, crop - 1), (crop // 2, crop // 2), (crop // 3, crop * 3 // 4)]
    return [[float(value) for value in output[place]] for place in places]


def main() -> None:
    import torch
    import torchvision

    from cnnfamily.data.preprocessing import WEIGHTS

    table, pixels = {}, {}
    for network in WEIGHTS:
        for weights in torchvision.models.get_model_weights(network):
            preset = weights.transforms()
            values = *preset.resize_size, *preset.crop_size, preset.interpolation.value, preset.mean, preset.std
            table[f"{network}.{weights.name}"] = values
    for network, weights, size in CASES:
        preset = torchvision.models.get_model_weights(network)[weights].transforms()
        output = preset(Image.fromarray(synthetic_image(*size))).permute(1, 2, 0).numpy()
        pixels[f"{network}.{weights}"] = {"size": size, "pixels": some_pixels(output)}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    parts = [f'"versions": {json.dumps(versions)}']
    for name, rows in {"table": table, "pixels": pixels}.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        parts.append(f'"{name}": {{\n{lines}\n}}')
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
