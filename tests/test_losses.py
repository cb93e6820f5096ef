"""The loss and the evaluation's sums against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily.errors import UsageError
from cnnfamily.losses import CALIBRATION_BINS, choose, cross_entropy, evaluation_metrics, evaluation_sums, hits, smooth


def test_smoothing():
    found = smooth(jnp.array([1, 3]), 4, 0.2)
    np.testing.assert_allclose(found, [[0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], rtol=1e-6)
    np.testing.assert_array_equal(smooth(jnp.array([0]), 3, 0.0), [[1, 0, 0]])
    assert smooth(jnp.array([0]), 3, 0.1, jnp.bfloat16).dtype == jnp.bfloat16


def test_cross_entropy():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 3  # a constant changes nothing
    targets = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    expected = [np.log(2), -0.5 * np.log(0.1) - 0.5 * np.log(0.8)]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-6)
    np.testing.assert_array_equal(cross_entropy(jnp.array([[1e4, 0.0]]), jnp.array([[0.0, 1.0]])), [1e4])  # no overflow


def test_binary_cross_entropy():
    logits = jnp.log(jnp.asarray([[3.0, 1.0, 1 / 4], [1.0, 1.0, 1.0]]))  # probabilities 3/4, 1/2, 1/5
    targets = jnp.asarray([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    expected = [-(np.log(3 / 4) + np.log(1 / 2) + np.log(4 / 5)) / 3, np.log(2)]
    np.testing.assert_allclose(choose("binary_cross_entropy")(logits, targets), expected, rtol=1e-6)
    with pytest.raises(UsageError, match="unknown loss 'bce'"):
        choose("bce")


def test_hits():
    logits = jnp.array([[0.1, 0.5, 0.3, 0.2]] * 4)
    labels = jnp.arange(4)
    assert hits(logits, labels, 1).tolist() == [False, True, False, False]
    assert hits(logits, labels, 2).tolist() == [False, True, True, False]
    assert hits(logits, labels, 3).tolist() == [False, True, True, True]
    assert hits(logits, labels, 5).tolist() == [True] * 4  # fewer than five classes


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equal_logits_earn_no_more_than_chance(k):
    # A network that has collapsed to one output must score k in ten.
    labels = jnp.arange(10)
    assert hits(jnp.zeros((10, 10)), labels, k).tolist() == [label < k for label in range(10)]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_rows_leave_no_trace(garbage):
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    labels, mask = np.array([0, 3, 6, 2, 5]), np.array([True, True, False, True, False])
    expected = evaluation_sums(jnp.asarray(logits[mask]), jnp.asarray(labels[mask]), jnp.ones(3, bool))
    logits[~mask] = garbage
    found = evaluation_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    assert int(found["examples"]) == 3


# Four examples of two classes: confidence, and whether the first class, which has it, is the label.
CONFIDENCE, CORRECT = np.array([0.9, 0.92, 0.7, 0.55]), np.array([True, False, True, False])


def four_sums():
    logits = jnp.asarray(np.log(np.stack([CONFIDENCE, 1 - CONFIDENCE], 1)), jnp.float32)
    return jax.device_get(evaluation_sums(logits, jnp.asarray(~CORRECT, jnp.int32), jnp.ones(4, bool)))


def test_calibration_bins():
    sums = four_sums()
    assert CALIBRATION_BINS == 15
    count, confidence, correct = sums["calibration"]
    # Bins of 1/15: 0.9 and 0.92 lie in number 13 (0.867 to 0.933), 0.7 in 10 (0.667 to 0.733), 0.55 in 8 (0.533 to 0.6).
    np.testing.assert_array_equal(count[[13, 10, 8]], [2, 1, 1])
    np.testing.assert_allclose(confidence[[13, 10, 8]], [1.82, 0.7, 0.55], rtol=1e-6)
    np.testing.assert_array_equal(correct[[13, 10, 8]], [1, 1, 0])
    assert count.sum() == 4


def test_metrics():
    metrics = evaluation_metrics(four_sums(), "ema_test_")
    loss = -np.log([0.9, 0.08, 0.7, 0.45]).mean()
    # |1 - 1.82| + |1 - 0.7| + |0 - 0.55|, over 4. Binned singly the first two would give 0.1 + 0.92.
    ece = (0.82 + 0.3 + 0.55) / 4
    expected = {"loss": loss, "top1": 0.5, "top5": 1.0, "ece": ece, "examples": 4}
    assert metrics == pytest.approx({f"ema_test_{key}": value for key, value in expected.items()}, rel=1e-5)
    assert all(type(value) in (int, float) for value in metrics.values())


def test_a_certain_prediction_falls_in_the_last_bin():
    sums = evaluation_sums(jnp.array([[100.0, 0.0]]), jnp.array([0]), jnp.ones(1, bool))
    assert sums["calibration"][:, -1].tolist() == [1, 1, 1]
