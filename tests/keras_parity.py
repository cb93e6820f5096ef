"""Compares our networks with Keras's on random weights: `python tests/keras_parity.py [NAME ...] [--sizes 224 96 97]`.

Needs keras and h5py. Prints the largest difference of the logits beside the largest logit; each size reads another of Keras's
formats. On such weights the deep EfficientNets amplify rounding, Keras's own too: compare them with `--dtype=float64`.
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import cnnfamily

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
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


def random_network(name: str, size: int, **arguments):
    """Keras's network with weights that keep activations near 1, and batch statistics that differ from theirs.

    Every array is drawn from its own name. The last norm of a branch is drawn smaller, as in `parity`: else rounding would be
    amplified, Keras's own too.
    """
    import keras

    network = keras_network(name, size, **arguments)
    for layer in network.layers:
        for weight in layer.weights:
            leaf, noise = weight.path.rpartition("/")[2], draw(weight.path, weight.shape)
            scale = 0.3 if layer.name.lower().endswith("project_bn") else 1.0
            if leaf == "kernel":
                depthwise = type(layer).__name__ == "DepthwiseConv2D"
                weight.assign(noise * (2 / np.prod(weight.shape[: 2 if depthwise else -1])) ** 0.5)
            elif leaf in ("gamma", "beta", "bias"):
                weight.assign(scale * (0.2 * noise + (leaf == "gamma")))
    set_variance(network, STD**2)
    call = keras.layers.BatchNormalization.call

    def with_statistics(norm, inputs, **_):
        """About those of the inputs, which come from norms before this one that are set already."""
        mean, var = inputs.mean((0, 1, 2)), inputs.var((0, 1, 2))
        mean += 0.3 * var**0.5 * draw(norm.moving_mean.path, var.shape)
        # A channel that is nearly dead would amplify rounding: none has less than a tenth of the mean variance.
        var = var * np.exp(0.3 * draw(norm.moving_variance.path, var.shape)) + 0.1 * var.mean()
        for statistic, value in ((norm.moving_mean, mean), (norm.moving_variance, var)):
            statistic.assign(value.astype(np.float32))  # as our reader has it, in float64 too
        return call(norm, inputs, training=False)

    state = [[weight.value for weight in weights] for weights in (network.trainable_variables, network.non_trainable_variables)]
    with mock.patch.object(keras.layers.BatchNormalization, "call", with_statistics):
        _, updated = jax.jit(network.stateless_call)(*state, images_of(name, size, batch=8)[1])
    for weight, value in zip(network.non_trainable_variables, updated, strict=True):
        weight.assign(value)
    return network


def set_variance(network, variance: np.ndarray) -> None:
    """Of the images, beside their mean, in the network's layer for that, where it has one."""
    for layer in network.layers:
        if type(layer).__name__ == "Normalization":
            for weight, value in zip(layer.weights, (MEAN, variance), strict=False):
                weight.assign(value)
            layer.finalize_state()


def images_of(name: str, size: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The input of our network and of Keras's, whose EfficientNet and V3 prepare pixels of 0 to 255 themselves.

    Ours is prepared in Keras's type, for a difference of rounding here would be amplified as well.
    """
    import keras

    numbers, places = np.random.default_rng(size), np.arange(size) * 8 // size
    # Squares of colour under noise: of noise alone all images look alike to deep layers, whose norms then divide by next to
    # nothing and amplify rounding.
    pixels = 0.8 * numbers.uniform(0, 255, (batch, 8, 8, 3))[:, places][:, :, places]
    pixels = (pixels + 0.2 * numbers.uniform(0, 255, (batch, size, size, 3))).astype(np.float32)
    prepared = pixels.astype(keras.config.floatx())
    if name.startswith("efficientnet"):
        mean, std = MEAN.astype(prepared.dtype), STD.astype(prepared.dtype)
        return (prepared / 255 - mean) / std, pixels
    scaled = prepared / 127.5 - 1
    return scaled, pixels if "v3" in name else scaled


def save(network, file: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):  # Keras calls its older format a legacy, on every use
        (network.save_weights if file.name.endswith(".weights.h5") else network.save)(file)
    return file


def logits_of(network, images: np.ndarray) -> np.ndarray:
    return np.asarray(network.predict_on_batch(images))


def difference(name: str, file: Path, theirs, size: int, **overrides) -> float:
    """max |ours - theirs| / max |theirs| of the logits, with the file's weights in our network."""
    network, variables = cnnfamily.load_pretrained(name, file, **overrides)
    ours, images = images_of(name, size)
    found, expected = np.asarray(jax.jit(network.apply)(variables, ours)), logits_of(theirs, images)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def published(name: str, network, folder: Path):
    """Keras's EfficientNet as with its published weights, downloaded from a file written here with those of the network.

    That has deviations where the variance should be, and the network divides by their roots once more.
    """
    import keras

    set_variance(network, STD)
    file = save(network, folder / "published.h5")
    set_variance(network, STD**2)
    with mock.patch.object(keras.src.applications.efficientnet.file_utils, "get_file", return_value=str(file)):
        return keras_network(name, cnnfamily.create_model(name).resolution, weights="imagenet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96, 97])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args()
    import keras

    keras.config.set_floatx(arguments.dtype)
    jax.config.update("jax_enable_x64", arguments.dtype == "float64")
    # Keras's norms calculate in the `result_type` of their input and float32, which for float64 is float32, as for any type.
    exact = mock.patch.object(keras.src.backend, "result_type", return_value="float64")
    for name in arguments.names or NETWORKS:
        with tempfile.TemporaryDirectory() as folder, exact if arguments.dtype == "float64" else contextlib.nullcontext():
            found = []
            for size, suffix in zip(arguments.sizes, itertools.cycle(SUFFIXES), strict=False):
                network = random_network(name, size)
                file = save(network, Path(folder) / f"x{suffix}")
                found.append(f"{size}: {difference(name, file, network, size, dtype=arguments.dtype):.1e}")
        print(f"{name:<24}{'  '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
