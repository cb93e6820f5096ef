"""Our networks beside Keras's, live: `pytest -m parity -n 0 tests/test_keras_parity.py` where keras and h5py are installed."""

import jax
import keras_parity
import pytest

pytestmark = [
    pytest.mark.parity,
    # The suite's warnings as errors are for our code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4  # of the largest logit, in float32; measured 1e-6 to 1.1e-5
EVEN, ODD = 96, 97


@pytest.fixture(autouse=True)
def _keras():
    pytest.importorskip("keras")
    with jax.numpy_dtype_promotion("standard"):  # jax's strict promotion too is for our code
        yield


@pytest.mark.parametrize(
    ("name", "width", "sizes"),
    [
        ("mobilenet_v1", 1.0, (224, EVEN)),
        ("mobilenet_v1", 0.5, (EVEN,)),
        ("mobilenet_v2", 1.0, (224, EVEN, ODD)),
        ("mobilenet_v2", 0.35, (EVEN,)),
        ("mobilenet_v3_small", 1.0, (224, EVEN, ODD)),
        ("mobilenet_v3_large", 1.0, (224, EVEN, ODD)),
        ("mobilenet_v3_large", 0.75, (EVEN,)),
        ("efficientnet_b0", 1.0, (224, EVEN, ODD)),
        # Not the deeper ones: on such weights B7 turns 1e-6 of its input into 2e-3 of the logits, in Keras itself.
        ("efficientnet_b1", 1.0, (ODD,)),
    ],
)
def test_logits_are_keras(tmp_path, name, width, sizes):
    """From all of Keras's formats; at an odd size too, where paddings differ from those at even ones."""
    alpha, overrides = ({"alpha": width}, {"width": width}) if width != 1 else ({}, {})
    for size, suffix in zip(sizes, keras_parity.SUFFIXES, strict=False):
        network = keras_parity.random_network(name, size, **alpha)
        file = keras_parity.save(network, tmp_path / f"x{suffix}")
        assert keras_parity.difference(name, file, network, size, **overrides) <= TOLERANCE


def test_logits_are_those_of_the_published_efficientnet(tmp_path):
    """Whose file has deviations for variances, which its model makes good by another division."""
    network = keras_parity.random_network("efficientnet_b0", 224)
    theirs = keras_parity.published("efficientnet_b0", network, tmp_path)
    assert keras_parity.difference("efficientnet_b0", tmp_path / "published.h5", theirs, 224) <= TOLERANCE


def test_the_layers_listed_are_keras(monkeypatch, tmp_path):
    """keras_keys.txt is what the installed Keras has."""
    import keras_keys

    listed = keras_keys.read_keys()
    monkeypatch.setattr(keras_keys, "FILE", tmp_path / "keys.txt")
    keras_keys.main()
    assert keras_keys.read_keys() == listed


def test_keras_pads_its_first_mobilenet_as_at_even_sizes(tmp_path):
    """At sides that are no multiples of 32 it differs from TensorFlow's "same", which is ours."""
    for size, agrees in ((64, True), (72, False)):
        network = keras_parity.random_network("mobilenet_v1", size, alpha=0.25)
        file = keras_parity.save(network, tmp_path / "x.h5")
        assert (keras_parity.difference("mobilenet_v1", file, network, size, width=0.25) <= TOLERANCE) == agrees
