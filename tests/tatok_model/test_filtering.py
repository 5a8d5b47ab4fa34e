import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tatok_model.filtering import (
    bisect,
    calibrate,
    conditional_entropy,
    kept_counts,
    kept_mask_of,
    rate_bits,
    surprisal,
    to_units,
)
from tatok_model.filtering_rules import RULES, SCORES, UNITS, check_cut, check_threshold, fixes_length, keeps_all
from tatok_model.ranking import rank_in_rounds, round_bounds

RULES_OF_UNITS = [rule for rule in RULES if rule != "quality"]  # test_quality.py has that one, a residual told in dB
RESOLUTIONS = [UNITS, 2**16, 2**20]

units = st.lists(st.lists(st.integers(0, 20 * UNITS), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)
thresholds = {
    "relative": st.floats(0, 1),
    "residual": st.floats(0, 200),
    "marginal": st.floats(0, 30),
    "count": st.integers(0, 6).map(float),
}


def by_definition(h, rule, threshold, resolution=UNITS):
    """The rules of DESIGN.md, one image, read aloud."""
    total, n = sum(h), len(h)
    if rule == "count":
        return int(threshold)
    if rule == "marginal":
        return next((t for t in range(n) if h[t] < threshold * resolution), n)
    if rule == "relative":
        return n if threshold == 1 else next(t for t in range(n + 1) if sum(h[:t]) >= threshold * total)
    return next(t for t in range(n + 1) if total - sum(h[:t]) <= threshold * resolution)


@pytest.mark.parametrize("rule", RULES_OF_UNITS)
@given(data=st.data(), scores=units, resolution=st.sampled_from(RESOLUTIONS))
def test_every_rule_cuts_where_its_definition_says(rule, data, scores, resolution):
    threshold = data.draw(thresholds[rule])
    expected = [by_definition(row, rule, threshold, resolution) for row in scores.tolist()]
    assert kept_counts(scores, rule, threshold, resolution).tolist() == expected


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_a_score_equal_to_the_threshold_is_kept_and_a_rest_equal_to_it_may_be_left(resolution):
    scores = torch.tensor([[4, 2, 1, 1]]) * resolution
    assert kept_counts(scores, "marginal", 2.0, resolution).tolist() == [2]
    assert kept_counts(scores, "marginal", 2.0 + 1 / resolution, resolution).tolist() == [1]
    assert kept_counts(scores, "residual", 2.0, resolution).tolist() == [2]
    assert kept_counts(scores, "residual", 2.0 - 1 / resolution, resolution).tolist() == [3]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("rule", ["residual", "marginal"])
def test_thresholds_are_in_the_unit_of_the_score_whatever_its_resolution(rule, resolution):
    scores = torch.randint(0, 12 * UNITS, (40, 32), generator=torch.Generator().manual_seed(0)).sort(1, True).values
    finer = scores * (resolution // UNITS)
    for threshold in (0.0, 0.5, 3.0, 6.25, 50.0):
        assert torch.equal(kept_counts(finer, rule, threshold, resolution), kept_counts(scores, rule, threshold))
    assert calibrate(finer, rule, 9.0, resolution) == pytest.approx(calibrate(scores, rule, 9.0), abs=0.01)


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
    assert to_units(torch.tensor([-1.0, 2**-17 + 1e-7, 2.5]), 2**16).tolist() == [0, 1, 163840]


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


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("rule", RULES_OF_UNITS)
@pytest.mark.parametrize("wanted", [0.0, 9.0, 20.0, 32.0])
def test_calibrate_finds_the_threshold_of_a_wanted_mean(rule, wanted, resolution):
    scores = torch.randint(0, 12 * UNITS, (500, 32), generator=torch.Generator().manual_seed(0)).sort(1, True).values
    threshold = calibrate(scores, rule, wanted, resolution)
    assert kept_counts(scores, rule, threshold, resolution).double().mean().item() == pytest.approx(wanted, abs=0.3)


@given(st.floats(-40, 40), st.booleans())
def test_bisection_finds_where_a_monotone_measure_has_the_wanted_value(root, grows):
    wanted = root**3 if grows else -(root**3)
    found = bisect(lambda value: value**3 if grows else -(value**3), wanted, -50.0, 50.0, grows)
    assert found == pytest.approx(root, abs=1e-4)


def test_bisection_beyond_the_ends_gives_the_nearer_end():
    for wanted, end in ((-1.0, 2.0), (99.0, 3.0)):
        assert bisect(lambda value: value, wanted, 2.0, 3.0, grows=True) == pytest.approx(end)
    assert bisect(lambda value: -value, 0.0, 2.0, 3.0, grows=False) == pytest.approx(2.0)


def test_bisection_takes_the_nearer_side_of_a_jump():
    for wanted, value in ((0.4, 0), (0.6, 1)):
        assert int(bisect(lambda value: float(value >= 1.3), wanted, 0.0, 2.0, grows=True) >= 1.3) == value


def test_every_step_of_a_bisection_halves_where_it_looks():
    asked = []

    def measure(value):
        asked.append(value)
        return value

    found = bisect(measure, 0.3, 0.0, 1.0, grows=True, steps=4)
    assert asked[:4] == [0.5, 0.25, 0.375, 0.3125]
    assert abs(found - 0.3) <= 1 / 16


def test_what_the_kept_tokens_cost_at_a_level_is_computed_by_hand():
    """Ratios to theta of 8, 4, 2 and 1/2: 3 + 2 + 1 bits for each pair of the 6 numbers that a score adds up."""
    scores = torch.tensor([[4.0, 2.0, 1.0, 0.25]] * 5).mul(2**16).long()
    found = rate_bits(scores, torch.tensor([0, 1, 2, 3, 4]), 0.5, 2**16, 6)
    assert found.tolist() == pytest.approx([0, 9, 15, 18, 18])
    assert found.dtype == torch.float64


def test_where_nothing_is_kept_the_rate_is_0():
    scores = torch.full((3, 4), 7 * 2**20)
    assert rate_bits(scores, torch.zeros(3, dtype=torch.int64), 0.001, 2**20, 192).tolist() == [0.0] * 3


def test_a_step_below_theta_that_rounds_have_kept_costs_nothing():
    scores = torch.tensor([[4.0, 0.25, 0.0, 2.0]]).mul(1024).long()
    assert rate_bits(scores, torch.tensor([4]), 0.5, 1024, 2).tolist() == pytest.approx([3 + 2])


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@given(st.floats(0.05, 20), st.floats(0.05, 20), st.floats(0.01, 0.99))
def test_two_gaussian_components_cost_the_closed_form_of_their_rate_distortion_function(resolution, a, b, share):
    """Variances a >= b: at D < 2 b both are coded, 1/2 log2(a b / (D/2)^2); beyond, a alone, 1/2 log2(a / (D - b))."""
    large, small = max(a, b), min(a, b)
    distortion = share * (large + small)
    if distortion < 2 * small:
        theta, expected = distortion / 2, math.log2(large * small / (distortion / 2) ** 2) / 2
    else:
        theta, expected = distortion - small, math.log2(large / (distortion - small)) / 2
    scores = to_units(torch.tensor([[large, small]], dtype=torch.float64), resolution)
    counts = kept_counts(scores, "marginal", theta, resolution)
    off = 1 / (resolution * min(small, theta))  # scores are rounded to whole units
    assert rate_bits(scores, counts, theta, resolution, 1).item() == pytest.approx(expected, abs=2 * off + 1e-9)


def test_calibrating_for_the_impossible_is_refused():
    scores = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"5 tokens are wanted of 2 images; expected 0 to 4 of at least 1"):
        calibrate(scores, "residual", 5)
    with pytest.raises(ValueError, match="expected 0 to 4 of at least 1"):
        calibrate(scores[:0], "residual", 3)
    with pytest.raises(ValueError, match="rule is 'best'; expected one of relative"):
        calibrate(scores, "best", 3)


def test_decibels_are_not_cut_by_without_a_line():
    scores = torch.ones(2, 4, dtype=torch.int64)
    sentence = r"rule is 'quality'; expected Ranking\.counts, which knows the line that predicts dB"
    with pytest.raises(ValueError, match=sentence):
        kept_counts(scores, "quality", 20.0)
    with pytest.raises(ValueError, match=sentence):
        calibrate(scores, "quality", 3)


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("relative", 1.1, "a share from 0 to 1"),
        ("relative", -0.1, "a share from 0 to 1"),
        ("relative", math.nan, "a share from 0 to 1"),
        ("residual", -1.0, "at least 0, in the score's unit, for the rule residual"),
        ("residual", math.nan, "at least 0, in the score's unit, for the rule residual"),
        ("marginal", math.inf, "at least 0, in the score's unit, for the rule marginal"),
        ("quality", 0, "threshold is 0; expected more than 0 dB for the rule quality"),
        ("quality", -3.5, r"threshold is -3\.5; expected more than 0 dB for the rule quality"),
        ("quality", math.inf, "more than 0 dB"),
        ("quality", math.nan, "more than 0 dB"),
        ("count", 17.0, "0 to 16 whole tokens"),
        ("count", 2.5, "0 to 16 whole tokens"),
        ("cumulative", 0.5, "rule is 'cumulative'; expected one of relative, residual, marginal, count, quality"),
    ],
)
def test_a_threshold_outside_its_range_is_refused(rule, threshold, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        check_threshold(rule, threshold, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", ["grid", "random"])
@pytest.mark.parametrize(("rule", "threshold"), [("relative", 1.0), ("residual", 3), ("marginal", 0), ("quality", 20)])
def test_an_order_without_scores_is_cut_by_count_only(score, rule, threshold):
    check_cut(score, "count", 3, 16)
    sentence = f"rule is '{rule}'; expected count for the score '{score}', whose steps have no scores"
    with pytest.raises(ValueError, match=sentence):
        check_cut(score, rule, threshold, 16)


@pytest.mark.parametrize("score", ["surprisal", "entropy", "pixel_entropy"])
def test_bits_do_not_predict_decibels(score):
    sentence = f"rule is 'quality'; expected the score distortion or error, not '{score}', to predict dB from"
    with pytest.raises(ValueError, match=sentence):
        check_cut(score, "quality", 20, 16)


def test_a_score_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="score is 'best'; expected one of distortion, error, surprisal, entropy"):
        check_cut("best", "count", 3, 16)


@pytest.mark.parametrize(("score", "rule"), [(name, rule) for name in ("distortion", "error") for rule in RULES])
def test_squared_errors_are_cut_by_every_rule(score, rule):
    check_cut(score, rule, 1, 16)


def test_every_score_says_its_unit_and_how_fine_its_steps_are():
    assert {name: (score.unit, score.resolution) for name, score in SCORES.items() if score.unit} == {
        "distortion": ("squared distance", 65536),
        "error": ("squared error", 1048576),
        "surprisal": ("bits", 1024),
        "entropy": ("bits", 1024),
        "pixel_entropy": ("bits", 1024),
    }
    assert [name for name, score in SCORES.items() if score.in_signal] == ["distortion", "error"]
    assert [name for name, score in SCORES.items() if score.asks_entropy_model] == [
        "distortion",
        "surprisal",
        "entropy",
    ]


@pytest.mark.parametrize(("unit", "largest"), [("distortion", 4.0), ("error", 1.0), ("entropy", 20.0)])
def test_the_largest_steps_are_whole_numbers_that_float32_holds(unit, largest):
    """Between unit vectors, between pixels, and of a codebook of a million entries."""
    resolution = SCORES[unit].resolution
    units = to_units(torch.tensor([largest, largest - 1 / resolution]), resolution)
    assert units.tolist() == [int(largest * resolution), int(largest * resolution) - 1]
    assert ((units / resolution).float().double() * resolution).tolist() == units.tolist()


def test_decibels_fix_no_length():
    assert not fixes_length("quality", 20)
    assert not keeps_all("quality", 20)
