"""Compares our networks with Keras's on random weights: `python tests/keras_parity.py [NAME ...] [--sizes 224 96 97]`.

Needs keras and h5py. Prints the largest difference of the logits beside the largest logit; each size reads another of Keras's
formats.
"""

import argparse
import contextlib
import functools
import io
import os
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np

import cnnfamily

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
NETWORKS = {
    "mobilenet_v1": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_small": "MobileNetV3Small",
    "mobilenet_v3_large": "MobileNetV3Large",
    **{f"efficientnet_b{i}": f"EfficientNetB{i}" for i in range(8)},
}
SUFFIXES = (".weights.h5", ".keras", ".h5")


def draw(name: str, shape) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def keras_network(name: str, size: int, **arguments):
    """Keras's network for images of this size, which gives logits."""
    import keras

    build = getattr(keras.applications, NETWORKS[name])
    return build(**{"weights": None, "input_shape": (size, size, 3), "classifier_activation": None} | arguments)


def has_random_weights(network):
    """Weights that keep activations near 1, and batch statistics that differ from theirs, so that no norm is the identity.

    Every array is drawn from its own name. The last norm of a branch is drawn smaller, as in `parity`.
    """
    norms = [layer for layer in network.layers if type(layer).__name__ == "BatchNormalization"]
    for layer in network.layers:
        if type(layer).__name__ == "Dropout":
            layer.rate = 0.0
        for weight in layer.weights:
            leaf, noise = weight.path.rpartition("/")[2], draw(weight.path, weight.shape)
            scale = 0.3 if layer.name.lower().endswith("project_bn") else 1.0
            if leaf == "kernel":
                depthwise = type(layer).__name__ == "DepthwiseConv2D"
                weight.assign(noise * (2 / np.prod(weight.shape[: 2 if depthwise else -1])) ** 0.5)
            elif leaf in ("gamma", "beta", "bias"):
                weight.assign(scale * (0.2 * noise + (leaf == "gamma")))
            elif leaf in ("mean", "variance"):  # of images; the published files have deviations in the variance's place
                weight.assign(MEAN if leaf == "mean" else STD)
                layer.finalize_state()
    for norm in norms:
        norm.kept, norm.momentum = norm.momentum, 0.0  # what one batch leaves then are its own statistics
    images = np.random.default_rng(0).uniform(0, 255, (4, *network.input_shape[1:])).astype(np.float32)
    state = [[weight.value for weight in weights] for weights in (network.trainable_variables, network.non_trainable_variables)]
    _, updated = jax.jit(functools.partial(network.stateless_call, training=True))(*state, images)
    for weight, value in zip(network.non_trainable_variables, updated, strict=True):
        weight.assign(value)
    for norm in norms:
        norm.momentum, var = norm.kept, np.asarray(norm.moving_variance)
        mean = np.asarray(norm.moving_mean) + 0.3 * var**0.5 * draw(norm.moving_mean.path, var.shape)
        norm.moving_mean.assign(mean)
        # A channel that is nearly dead would amplify rounding: none has less than a tenth of the mean variance.
        norm.moving_variance.assign(var * np.exp(0.3 * draw(norm.moving_variance.path, var.shape)) + 0.1 * var.mean())
    return network


def images_of(name: str, size: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The input of our network and of Keras's, whose EfficientNet and V3 prepare pixels of 0 to 255 themselves."""
    pixels = np.random.default_rng(size).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    if name.startswith("efficientnet"):
        return (pixels / 255 - MEAN) / STD, pixels
    scaled = pixels / np.float32(127.5) - 1
    return scaled, pixels if "v3" in name else scaled


def save(network, file: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):  # Keras calls its older format a legacy, on every use
        (network.save_weights if file.name.endswith(".weights.h5") else network.save)(file)
    return file


def logits_of(network, images: np.ndarray) -> np.ndarray:
    return np.asarray(network.predict_on_batch(images))


def difference(name: str, file: Path, theirs, size: int, **overrides) -> float:
    """max |ours - theirs| / max |theirs| of the logits in float32, with the file's weights in our network.

    `theirs` is Keras's network, whose weights are carried over to one for images of this size.
    """
    network, variables = cnnfamily.load_pretrained(name, file, **overrides)
    ours, images = images_of(name, size)
    found, expected = np.asarray(jax.jit(network.apply)(variables, ours)), logits_of(theirs, images)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def at_size(name: str, network, size: int, folder: Path, **arguments):
    """The network with the same weights for images of another size.

    EfficientNet at its own size as with its published weights, which adds a division: they are downloaded from this file
    instead. Keras refuses that at other sizes, so there the variance becomes what it is called.
    """
    import keras

    if name.startswith("efficientnet") and size == cnnfamily.create_model(name).resolution:
        file, module = save(network, folder / "published.h5"), keras.src.applications.efficientnet.file_utils
        kept, module.get_file = module.get_file, lambda *_, **__: str(file)
        try:
            return keras_network(name, size, weights="imagenet")
        finally:
            module.get_file = kept
    other = keras_network(name, size, **arguments)
    other.set_weights(network.get_weights())
    for layer in other.layers:
        if type(layer).__name__ == "Normalization":
            layer.weights[1].assign(STD**2)
            layer.finalize_state()
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96, 97])
    arguments = parser.parse_args()
    for name in arguments.names or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            network = has_random_weights(keras_network(name, 96))
            files = [save(network, Path(folder) / f"x{suffix}") for suffix in SUFFIXES]
            found = []
            for size, file in zip(arguments.sizes, files, strict=False):
                error = difference(name, file, at_size(name, network, size, Path(folder)), size)
                found.append(f"{size}: {error:.1e}")
        print(f"{name:<24}{'  '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
