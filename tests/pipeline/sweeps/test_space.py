import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import BadInput
from pipeline.sweeps.space import corner_points, points, read_cuts, read_space

RANGES = {
    "train.learning_rate": {"log_uniform": ["1e-4", 0.01]},  # YAML reads 1e-4 as text
    "losses.l1": {"uniform": [0, 1]},
    "tokenizer.entropy_layers": {"int": ["1e0", 3]},
    "tokenizer.size": {"choice": ["nano", "tiny"]},
}


def test_a_grid_is_walked_once_and_in_order():
    found = points(
        read_space({"tokenizer.global_tokens": [2, 4], "tokenizer.codebook_size": [8, 16]}), samples=5, seed=0
    )
    assert [list(point.values()) for point in found] == [[2, 8], [2, 16], [4, 8], [4, 16]]


@given(seed=st.integers(0, 1000))
def test_draws_lie_inside_their_ranges(seed):
    found = points(read_space({"tokenizer.global_tokens": [2, 4], **RANGES}), samples=3, seed=seed)
    assert len(found) == 6
    for point in found:
        assert list(point) == ["tokenizer.global_tokens", *RANGES]
        assert 1e-4 <= point["train.learning_rate"] <= 0.01
        assert 0 <= point["losses.l1"] <= 1
        assert point["tokenizer.entropy_layers"] in (1, 2, 3)
        assert point["tokenizer.size"] in ("nano", "tiny")


def test_equal_seeds_draw_equally_and_others_do_not():
    domains = read_space(RANGES)
    assert points(domains, 4, seed=1) == points(domains, 4, seed=1) != points(domains, 4, seed=2)


def test_draws_of_a_logarithmic_range_are_as_many_in_every_decade():
    (domain,) = read_space({"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}})
    source = random.Random(0)
    low = sum(domain.draw(source) < 1e-3 for _ in range(1000))
    assert 450 < low < 550


def test_corners_use_every_value_and_both_ends():
    found = corner_points(read_space({"tokenizer.global_tokens": [2, 4, 8], "losses.l1": {"uniform": [0, 1]}}))
    assert {point["tokenizer.global_tokens"] for point in found} == {2, 4, 8}
    assert {point["losses.l1"] for point in found} == {0, 1}


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"global_tokens": [1]}, "sweep.space has the key 'global_tokens'; expected section.key"),
        ({"data.image_size": [32]}, "sweep.space has 'data.image_size'; expected no key of data"),
        ({"evaluate.max_images": [8, 9]}, "expected no key of evaluate, which all trials share"),
        ({"generator.size": ["nano"]}, "expected no key of generator, which all trials share"),
        ({"train.seed": []}, r"sweep.space has train.seed: \[\]; expected at least one value"),
        ({"train.seed": [1, 2, 1]}, r"sweep.space has train.seed: \[1, 2, 1\]; expected different values"),
        ({"losses.l1": {"uniform": [0, float("inf")]}}, r"expected \[low, high\] with low below high"),
        ({"train.seed": 3}, "sweep.space has train.seed: 3; expected a list, or one of choice"),
        ({"train.seed": {"normal": [0, 1]}}, "expected a list, or one of choice, uniform, log_uniform, int"),
        ({"train.seed": {"choice": []}}, "expected choice with a list of at least one value"),
        ({"losses.l1": {"uniform": [1, 0]}}, r"\{uniform: \[1, 0\]\}; expected \[low, high\] with low below high"),
        ({"losses.l1": {"uniform": [1, 1]}}, r"expected \[low, high\] with low below high"),
        ({"losses.l1": {"uniform": ["a", True]}}, r"expected \[low, high\] with low below high"),
        ({"losses.l1": {"log_uniform": [0, 1]}}, "expected a low above 0"),
        ({"train.seed": {"int": [0, 1.5]}}, "expected whole numbers"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space, sentence):
    with pytest.raises(BadInput, match=sentence):
        read_space(space)


def test_cuts_are_lists_or_ranges(configure):
    cuts = read_cuts(
        configure("sweep.cuts={relative: {range: [0.2, 1, 5]}, count: {range: [1, 16, 4]}, residual: [5]}")
    )
    assert cuts["relative"] == pytest.approx((0.2, 0.4, 0.6, 0.8, 1))
    assert cuts["relative"][-1] == 1  # a sum of steps could miss it
    assert cuts["count"] == (1, 6, 11, 16)
    assert cuts["residual"] == (5,)


def test_without_cuts_those_of_evaluation_are_taken(configure):
    assert read_cuts(configure("sweep.cuts={}", "evaluate.thresholds=[0.5, 1]")) == {"relative": (0.5, 1)}


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ("{}", "sweep.cuts and evaluate.thresholds are empty"),
        ("{relative: []}", r"sweep.cuts has relative: \[\]; expected a list of numbers"),
        ("{relative: [much]}", "expected a list of numbers"),
        ("{relative: [0.5, .nan]}", "expected a list of numbers"),
        ("{relative: {range: [1, 0, 3]}}", r"expected \[low, high, count\] with low below high and count from 2"),
        ("{relative: {range: [0, 1, 1]}}", "count from 2"),
        ("{relative: {range: 5}}", "count from 2"),
    ],
)
def test_cuts_that_cannot_be_are_refused(configure, cuts, sentence):
    with pytest.raises(BadInput, match=sentence):
        read_cuts(configure(f"sweep.cuts={cuts}"))
