"""AlexNet: the maps of figure 2, what each of its fields changes, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initialize
from cnnfamily.summary import summarize


def maps(name, **fields):
    return {layer.name: layer.output for layer in summarize(create_model(name, **fields)).layers}


def test_maps_of_the_paper():
    """Section 3.5: 253,440 (printed; 55 x 55 x 96 is 290,400), 186,624, 64,896, 64,896, 43,264, 4096, 4096, 1000 neurons."""
    found = maps("alexnet_2012")
    assert found["conv1"] == (55, 55, 96)
    neurons = [int(np.prod(shape)) for shape in list(found.values())[1:]]
    assert neurons == [186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]


def test_maps_of_one_column():
    assert list(maps("alexnet").values())[:5] == [(55, 55, 64), (27, 27, 192), (13, 13, 384), (13, 13, 256), (13, 13, 256)]


def small(**fields):
    """A narrow one, its variables, and images of 64 pixels."""
    fields = {"width": 0.125, "hidden": 64, "num_classes": 10} | fields
    network = create_model("alexnet", **fields)
    return network, initialize(network, jax.random.key(0), resolution=64), jnp.ones((2, 64, 64, 3))


def test_groups_see_only_their_own_maps():
    params = small(groups=2, initialization="paper")[1]["params"]
    kernels = {name: value["kernel"].shape for name, value in params.items() if name.startswith("conv")}
    assert [kernels[f"conv{i}"][2] for i in range(1, 6)] == [3, 4, 24, 24, 16]  # of 3, 8, 24, 48 and 32 maps


def test_dropout_is_on_the_inputs_or_the_outputs_of_the_hidden_layers():
    """On the inputs the last thing before the classifier is an activation; on the outputs it is a dropout."""
    for place, zero in (("inputs", False), ("outputs", True)):
        network, variables, images = small(dropout_on=place, activation="sigmoid")
        _, seen = network.apply(
            variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "hidden1",
        )  # fmt: skip
        hidden1 = jax.nn.sigmoid(seen["intermediates"]["hidden1"]["__call__"][0])
        _, choices = network.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["choices"])
        first, second = choices["choices"]["dropout"]
        assert first.shape[1] == (hidden1.shape[1] if zero else 6 * 6 * 32)
        assert second.shape[1] == hidden1.shape[1]


def test_dropout_and_response_norm_change_what_they_should():
    network, variables, images = small()
    plain = network.apply(variables, images)
    with pytest.raises(Exception, match="dropout"):  # it needs the stream
        network.apply(variables, images, train=True)
    assert np.abs(small(response_norm=True)[0].apply(variables, images) - plain).max() > 0
    np.testing.assert_array_equal(small(dropout=0.0)[0].apply(variables, images, train=True), plain)


def test_it_starts_as_the_paper_says():
    """Section 5: deviation 0.01; ones in the second, fourth and fifth convolution and in the hidden layers."""
    params = small(initialization="paper")[1]["params"]
    biases = {name: float(value["bias"].mean()) for name, value in params.items()}
    ones = {"conv2", "conv4", "conv5", "hidden1", "hidden2"}
    assert biases == {name: float(name in ones) for name in params}
    assert np.std(params["hidden1"]["kernel"]) == pytest.approx(0.01, rel=0.02)
    torch = small()[1]["params"]
    assert abs(np.asarray(torch["conv2"]["kernel"])).max() == pytest.approx(1 / np.sqrt(8 * 25), rel=0.01)
    assert 0 < abs(np.asarray(torch["conv2"]["bias"])).max() <= 1 / np.sqrt(8 * 25)


def test_images_must_not_vanish():
    with pytest.raises(UsageError, match="62 x 70 pixels are smaller than this network can take: expected 63 x 63"):
        summarize_at(62, 70)


def summarize_at(*sides):
    network = create_model("alexnet")
    jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), jnp.zeros((1, *sides, 3)))
