"""The choice of images is a pure function of (seed, step), and evaluation sees every example once."""

import itertools

import numpy as np
import pytest

from cnnfamily.data.batches import epoch_order, eval_batches, mirrored, steps_per_epoch, train_indices
from cnnfamily.errors import UsageError


def test_an_epoch_is_a_permutation_and_each_is_another():
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == np.int32
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_the_order_is_known():
    # A stored run continues with the order it began with, so a change here breaks every resume.
    assert epoch_order(0, 0, 10).tolist() == [5, 1, 6, 3, 4, 8, 9, 7, 2, 0]
    assert epoch_order(3, 7, 10).tolist() == [1, 7, 8, 6, 0, 3, 2, 5, 9, 4]


def test_the_order_cannot_be_changed_in_the_cache():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        train_indices(0, 0, 10, 4)[0] = 1


def test_steps_walk_through_each_epoch_and_leave_out_its_tail():
    n, batch_size = 23, 5
    assert steps_per_epoch(n, batch_size) == 4
    left_out = []
    for epoch in range(3):
        taken = np.concatenate([train_indices(9, 4 * epoch + step, n, batch_size) for step in range(4)])
        assert taken.dtype == np.int32
        np.testing.assert_array_equal(taken, epoch_order(9, epoch, n)[:20])
        left_out.append(frozenset(range(n)) - frozenset(taken.tolist()))
    assert len(set(left_out)) == 3


def test_a_step_does_not_depend_on_the_steps_before_it():
    forwards = [train_indices(2, step, 17, 4).copy() for step in range(12)]
    epoch_order.cache_clear()
    for step in reversed(range(12)):
        np.testing.assert_array_equal(train_indices(2, step, 17, 4), forwards[step])
        np.testing.assert_array_equal(train_indices(2, np.int32(step), 17, 4), forwards[step])


def test_repeats_stand_far_apart_and_an_epoch_sees_so_many_fewer():
    steps = [train_indices(2, step, 24, 8, 4) for step in range(6)]
    for step, index in enumerate(steps):
        first = step % 3 * 2
        np.testing.assert_array_equal(index.reshape(4, 2), [epoch_order(2, step // 3, 24)[first : first + 2]] * 4)
    with pytest.raises(UsageError, match=r"augment\.repeats=3; expected a divisor of batch_size=8"):
        train_indices(0, 0, 24, 8, 3)


def test_images_are_mirrored_in_every_other_epoch_first_by_a_coin():
    index = np.random.default_rng(0).permutation(1000)
    epochs = [mirrored(0, epoch, index, 1000) for epoch in range(4)]
    for earlier, later in itertools.pairwise(epochs):
        assert earlier.dtype == np.bool_
        np.testing.assert_array_equal(later, ~earlier)
    assert 420 < epochs[0].sum() < 580
    np.testing.assert_array_equal(mirrored(0, 2, index[::-1][:7], 1000), epochs[0][::-1][:7])  # whatever else is in the batch
    assert 300 < (mirrored(1, 0, index, 1000) ^ epochs[0]).sum() < 700
    # A stored run continues with the coins it began with, so a change here breaks every resume.
    assert np.flatnonzero(mirrored(0, 0, np.arange(10), 10)).tolist() == [0, 1, 2, 6, 7]
    assert np.flatnonzero(mirrored(3, 1, np.arange(10), 10)).tolist() == [0, 1, 2, 6, 8, 9]


def test_a_batch_of_the_whole_set():
    assert sorted(train_indices(0, 5, 7, 7).tolist()) == list(range(7))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_covers_every_example_once(n, batch_size):
    batches = list(eval_batches(n, batch_size))
    assert len(batches) == -(-n // batch_size)
    for index, mask in batches:
        assert (index.dtype, mask.dtype) == (np.int32, np.bool_)
        assert index.shape == mask.shape == (batch_size,)
        assert (index[~mask] == 0).all()
    assert np.concatenate([index[mask] for index, mask in batches]).tolist() == list(range(n))


def test_evaluation_by_hand():
    (_, first), (index, mask) = eval_batches(5, 3)
    assert first.tolist() == [True, True, True]
    assert index.tolist() == [3, 4, 0]
    assert mask.tolist() == [True, True, False]


def test_batch_sizes_that_are_refused():
    with pytest.raises(UsageError, match="batch_size=11; expected 1 to 10, for there are 10 training images"):
        train_indices(0, 0, 10, 11)
    with pytest.raises(UsageError, match="batch_size=0"):
        train_indices(0, 0, 10, 0)
    with pytest.raises(UsageError, match="batch_size=0"):
        next(eval_batches(10, 0))
