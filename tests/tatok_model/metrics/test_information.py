import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatok_model.metrics.scores import chain_orders, limit, mutual_information, partners, redundancy, unigram_bits


def test_orders_are_permutations_that_a_seed_repeats():
    orders = chain_orders(16, seed=3)
    assert np.sort(orders, axis=1).tolist() == [list(range(16))] * 4
    assert orders.tolist() == chain_orders(16, seed=3).tolist()
    assert len({tuple(order) for order in orders.tolist()}) == 4


@given(st.integers(2, 200), st.integers(0, 5))
def test_every_image_has_another_one_for_a_partner_and_is_one_itself(images: int, seed: int) -> None:
    found = partners(images, seed)
    assert sorted(found.tolist()) == list(range(images))
    assert (found != np.arange(images)).all()
    assert found.tolist() == partners(images, seed).tolist()


def test_partners_are_no_neighbours_as_a_rule():
    distance = np.abs(partners(1000, seed=0) - np.arange(1000))
    assert np.median(distance) > 200  # neighbours of a sorted split are of one class


def test_one_image_has_no_partner():
    with pytest.raises(ValueError, match="images is 1; expected at least 2"):
        partners(1, 0)


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


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        blind = 500 - random.exponential(10, size=(80, 1)) + random.normal(0, 1, size=(80, 4))
        _, low, high = mutual_information(500 + 0 * blind, blind, seed)
        covered += low <= 10 <= high
    assert 88 <= covered <= 99


def test_chains_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"chains are \(3, 4\) and \(2, 4\); expected the same images and orders"):
        mutual_information(np.zeros((3, 4)), np.zeros((2, 4)), 0)


def test_unigram_bits_are_those_of_the_counts():
    assert unigram_bits(np.array([[0, 1], [2, 3]]), 8) == pytest.approx(2 * 2)
    assert unigram_bits(np.array([[0, 0], [0, 0]]), 8) == 0
    assert limit(8, 1000) == pytest.approx(8 * math.log2(1000))
