import math

import numpy as np
import pytest

from tatok_model.metrics.information import chain_orders, limit, mutual_information, redundancy, unigram_bits


def test_orders_are_permutations_that_a_seed_repeats():
    orders = chain_orders(16, seed=3)
    assert np.sort(orders, axis=1).tolist() == [list(range(16))] * 4
    assert orders.tolist() == chain_orders(16, seed=3).tolist()
    assert len({tuple(order) for order in orders.tolist()}) == 4


def test_redundancy_is_what_the_chain_saves():
    assert redundancy(np.array([100.0, 110.0]), np.array([[90.0, 92.0], [80.0, 82.0]])) == pytest.approx(19.0)


def test_mutual_information_comes_with_an_interval_over_images():
    random = np.random.default_rng(0)
    gains = random.normal(12, 4, size=(400, 1))
    blind = np.full((400, 4), 500.0)
    mutual, low, high = mutual_information(blind, blind - gains, seed=0)
    assert mutual == pytest.approx(gains.mean())
    assert low < mutual < high
    assert high - low == pytest.approx(2 * 1.96 * 4 / 20, rel=0.15)


def test_chains_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"chains are \(3, 4\) and \(2, 4\); expected the same images and orders"):
        mutual_information(np.zeros((3, 4)), np.zeros((2, 4)), 0)


def test_unigram_bits_are_those_of_the_counts():
    assert unigram_bits(np.array([[0, 1], [2, 3]]), 8) == pytest.approx(2 * 2)
    assert unigram_bits(np.array([[0, 0], [0, 0]]), 8) == 0
    assert limit(8, 1000) == pytest.approx(8 * math.log2(1000))
