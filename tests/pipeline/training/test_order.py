import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.order import BLOCK, WINDOW, SampleOrder, epoch_order, keyed_uniform


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_sample_once(rows, seed, epoch, local):
    assert np.array_equal(np.sort(epoch_order(rows, seed, epoch, local)), np.arange(rows))


def test_epochs_and_seeds_differ():
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70))
def test_batches_are_the_epochs_one_after_another(rows, batch):
    order = SampleOrder(rows, seed=3, global_batch_size=batch)
    steps = -(-3 * rows // batch)
    seen = np.concatenate([order.global_batch(step)[0] for step in range(steps)])[: 3 * rows]
    expected = np.concatenate([epoch_order(rows, 3, epoch) for epoch in range(3)])
    assert np.array_equal(seen, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5))
def test_any_number_of_workers_sees_the_same_global_batches(batch, world, step):
    order = SampleOrder(50, seed=1, global_batch_size=batch)
    parts = [order.part(step, rank, world) for rank in range(world)]
    for whole, divided in zip(order.global_batch(step), zip(*parts, strict=True), strict=True):
        assert np.array_equal(np.concatenate(divided), whole)
    assert {len(samples) for samples, _ in parts} <= {batch // world, batch // world + 1}


def test_a_step_does_not_depend_on_the_steps_before_it():
    fresh, used = (SampleOrder(50, seed=1, global_batch_size=16) for _ in range(2))
    for step in range(9):
        used.global_batch(step)
    assert np.array_equal(fresh.global_batch(9)[0], used.global_batch(9)[0])


def test_a_local_order_stays_within_its_window():
    order = epoch_order(BLOCK * WINDOW * 4, seed=0, epoch=0, local=True)
    first_window = order[: BLOCK * WINDOW]
    assert len(np.unique(first_window // BLOCK)) == WINDOW
    assert not np.array_equal(np.sort(first_window), np.arange(BLOCK * WINDOW))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="rows is 0; expected at least 1"):
        SampleOrder(0, seed=0, global_batch_size=4)


def test_keyed_numbers_depend_on_their_keys_alone():
    samples, epochs = np.arange(1000), np.zeros(1000, dtype=np.int64)
    alone = keyed_uniform(7, epochs[500:501], samples[500:501])
    assert keyed_uniform(7, epochs, samples)[500] == alone[0]
    for other in (keyed_uniform(8, epochs, samples), keyed_uniform(7, epochs + 1, samples)):
        assert abs(np.corrcoef(other, keyed_uniform(7, epochs, samples))[0, 1]) < 0.15


def test_keyed_numbers_are_uniform():
    numbers = keyed_uniform(0, np.zeros(20000, dtype=np.int64), np.arange(20000))
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-squared with 19 degrees of freedom: p below 1e-5
