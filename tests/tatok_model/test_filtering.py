import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tatok_model.filtering import (
    calibrate,
    conditional_entropy,
    kept_counts,
    kept_mask_of,
    rank_in_rounds,
    round_bounds,
    surprisal,
    to_units,
)
from tatok_model.filtering_rules import RULES, UNITS, check_cut, check_threshold

units = st.lists(st.lists(st.integers(0, 20 * UNITS), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)
thresholds = {
    "relative": st.floats(0, 1),
    "residual": st.floats(0, 200),
    "marginal": st.floats(0, 30),
    "count": st.integers(0, 6).map(float),
}


def by_definition(h, rule, threshold):
    """The rules of DESIGN.md, one image, read aloud."""
    total, n = sum(h), len(h)
    if rule == "count":
        return int(threshold)
    if rule == "marginal":
        return next((t for t in range(n) if h[t] < threshold * UNITS), n)
    if rule == "relative":
        return n if threshold == 1 else next(t for t in range(n + 1) if sum(h[:t]) >= threshold * total)
    return next(t for t in range(n + 1) if total - sum(h[:t]) <= threshold * UNITS)


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data(), scores=units)
def test_every_rule_cuts_where_its_definition_says(rule, data, scores):
    threshold = data.draw(thresholds[rule])
    expected = [by_definition(row, rule, threshold) for row in scores.tolist()]
    assert kept_counts(scores, rule, threshold).tolist() == expected


@pytest.mark.parametrize(("rule", "direction"), [("relative", 1), ("count", 1), ("residual", -1), ("marginal", -1)])
@given(data=st.data(), scores=units)
def test_raising_a_threshold_moves_every_cut_one_way(rule, direction, data, scores):
    low, high = sorted((data.draw(thresholds[rule]), data.draw(thresholds[rule])))
    difference = kept_counts(scores, rule, high) - kept_counts(scores, rule, low)
    assert (difference * direction >= 0).all()


@given(scores=units)
def test_tau_1_keeps_all_and_tau_0_none(scores):
    assert kept_counts(scores, "relative", 1.0).tolist() == [6] * len(scores)
    assert kept_counts(scores, "relative", 0.0).tolist() == [0] * len(scores)


@given(scores=units, more=units)
def test_lengths_do_not_depend_on_the_other_images_of_the_batch(scores, more):
    together = torch.cat([scores, more])
    for rule, threshold in (("relative", 0.7), ("residual", 31.0), ("marginal", 8.0)):
        alone = kept_counts(scores, rule, threshold)
        assert kept_counts(together, rule, threshold)[: len(scores)].tolist() == alone.tolist()


def test_kept_sets_of_one_order_nest():
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    smaller, larger = kept_mask_of(order, torch.tensor([0, 3, 5])), kept_mask_of(order, torch.tensor([2, 3, 9]))
    assert (larger | ~smaller).all()
    assert smaller.sum(1).tolist() == [0, 3, 5]
    assert larger.sum(1).tolist() == [2, 3, 9]


def test_scores_are_bits():
    uniform = torch.zeros(2, 3, 8)
    three = torch.full((2, 3), 3.0)
    torch.testing.assert_close(conditional_entropy(uniform), three)
    torch.testing.assert_close(surprisal(uniform, torch.zeros(2, 3, dtype=torch.int64)), three)
    certain = torch.tensor([[0.0, 100.0]])
    assert conditional_entropy(certain).item() == pytest.approx(0)
    assert surprisal(certain, torch.tensor([0])).item() == pytest.approx(100 / math.log(2))


def test_scores_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.randn(4, 16).bfloat16()
        assert (
            conditional_entropy(logits).dtype
            == surprisal(logits, torch.zeros(4, dtype=torch.int64)).dtype
            == torch.float32
        )


def test_units_are_whole_and_never_negative():
    assert to_units(torch.tensor([-1e-7, 0.0, 1 / 2048 + 1e-6, 2.5])).tolist() == [0, 0, 1, 2560]


def test_one_round_sorts_and_ties_go_to_the_earlier_position():
    scores = torch.tensor([[3, 9, 3, 9, 1]])
    order, found = rank_in_rounds(lambda placed: scores, 1, 5, 1, scores.device)
    assert order.tolist() == [[1, 3, 0, 2, 4]]
    assert found.tolist() == [[9, 9, 3, 3, 1]]


def test_every_round_scores_what_is_open_anew():
    asked = []

    def score(placed):
        asked.append(placed.sum().item())
        return torch.arange(5).expand(1, 5) * (1 if len(asked) == 1 else -1) + 10

    order, _ = rank_in_rounds(score, 1, 5, 2, torch.device("cpu"))
    assert asked == [0, 2]
    assert order.tolist() == [[4, 3, 0, 1, 2]]


@given(st.integers(1, 300), st.data())
def test_rounds_share_the_positions_out_evenly(positions, data):
    rounds = data.draw(st.integers(1, positions))
    bounds = round_bounds(positions, rounds)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert sum(sizes) == positions
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("rounds", [0, 6])
def test_rounds_outside_their_range_are_refused(rounds):
    with pytest.raises(ValueError, match=f"rounds is {rounds}; expected 1 to 5"):
        rank_in_rounds(lambda placed: placed.long(), 1, 5, rounds, torch.device("cpu"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wanted", [0.0, 9.0, 20.0, 32.0])
def test_calibrate_finds_the_threshold_of_a_wanted_mean(rule, wanted):
    scores = torch.randint(0, 12 * UNITS, (500, 32), generator=torch.Generator().manual_seed(0)).sort(1, True).values
    threshold = calibrate(scores, rule, wanted)
    assert kept_counts(scores, rule, threshold).double().mean().item() == pytest.approx(wanted, abs=0.3)


def test_calibrating_for_the_impossible_is_refused():
    scores = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"5 tokens are wanted of 2 images; expected 0 to 4 of at least 1"):
        calibrate(scores, "residual", 5)
    with pytest.raises(ValueError, match="expected 0 to 4 of at least 1"):
        calibrate(scores[:0], "residual", 3)
    with pytest.raises(ValueError, match="rule is 'best'; expected one of relative"):
        calibrate(scores, "best", 3)


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("relative", 1.1, "a share from 0 to 1"),
        ("relative", -0.1, "a share from 0 to 1"),
        ("relative", math.nan, "a share from 0 to 1"),
        ("residual", -1.0, "at least 0 bits"),
        ("marginal", math.inf, "at least 0 bits"),
        ("count", 17.0, "0 to 16 whole tokens"),
        ("count", 2.5, "0 to 16 whole tokens"),
        ("cumulative", 0.5, "rule is 'cumulative'; expected one of relative, residual, marginal, count"),
    ],
)
def test_a_threshold_outside_its_range_is_refused(rule, threshold, expected):
    with pytest.raises(ValueError, match=expected):
        check_threshold(rule, threshold, 16)


def test_an_order_without_bits_is_cut_by_count_only():
    check_cut("grid", "count", 3, 16)
    with pytest.raises(ValueError, match="rule is 'residual'; expected count for the score 'grid'"):
        check_cut("grid", "residual", 3, 16)
    with pytest.raises(ValueError, match="score is 'best'; expected one of surprisal"):
        check_cut("best", "count", 3, 16)
