"""Writes keras_keys.txt: the layers of keras.applications's networks in Keras's order. `python tests/keras_keys.py`

Needs keras and a backend (KERAS_BACKEND=jax). A line for each layer with weights: its name, its class as in Keras's files, and
the shape of each array in Keras's order; "norm=C" for the four arrays of a normalisation over C channels.
"""

from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
BUILDS = {  # our name and fields -> Keras's
    "mobilenet_v1": ("MobileNet", {}),
    "mobilenet_v1 width=0.25": ("MobileNet", {"alpha": 0.25}),
    "mobilenet_v2": ("MobileNetV2", {}),
    "mobilenet_v2 width=0.35": ("MobileNetV2", {"alpha": 0.35}),
    "mobilenet_v3_small": ("MobileNetV3Small", {}),
    "mobilenet_v3_large width=0.75": ("MobileNetV3Large", {"alpha": 0.75}),
    "efficientnet_b0": ("EfficientNetB0", {}),
    "efficientnet_b4": ("EfficientNetB4", {}),
}
CLASSES = {
    "Conv2D": "conv2d",
    "DepthwiseConv2D": "depthwise_conv2d",
    "Dense": "dense",
    "BatchNormalization": "batch_normalization",
    "Normalization": "normalization",
}


def read_keys() -> dict[str, list[tuple[str, str, list[tuple[int, ...]]]]]:
    """Name of the network, with its width -> (name, class, shapes) of its layers."""
    networks, network = {}, ""
    for line in FILE.read_text().splitlines():
        if line.startswith(" "):
            name, kind, *texts = line.split()
            if texts[0].startswith("norm="):
                texts = [texts[0].removeprefix("norm=")] * 4
            shapes = [() if text == "scalar" else tuple(map(int, text.split("x"))) for text in texts]
            networks[network].append((name, kind, shapes))
        elif not line.startswith("#"):
            network = line
            networks[network] = []
    return networks


def main() -> None:
    import keras

    lines = [f"# keras {keras.__version__}; written by keras_keys.py, which reads it"]
    for name, (theirs, arguments) in BUILDS.items():
        lines.append(name)
        keras.utils.clear_session()  # it numbers layers without a name of their own over all networks it has made
        for layer in getattr(keras.applications, theirs)(weights=None, **arguments).layers:
            texts = ["x".join(map(str, weight.shape)) or "scalar" for weight in layer.weights]
            kind = CLASSES.get(type(layer).__name__)
            if kind == "batch_normalization":
                texts = [f"norm={texts[0]}"]
            if texts:
                lines.append(f" {layer.name} {kind} {' '.join(texts)}")
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
