import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.interpolate import PchipInterpolator

from tatok_model.metrics.rate_distortion import (
    bd_rate,
    bootstrap_mean_interval,
    efficient_points,
    spearman,
    spearman_interval,
)

RATE = np.array([100.0, 180.0, 300.0, 520.0, 900.0, 1500.0])
PSNR = np.array([18.2, 20.1, 21.7, 23.9, 25.2, 27.8])


@st.composite
def rising_curves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """5 to 9 points from 15 dB to 30 dB, both ends included."""
    steps = st.lists(st.floats(0.05, 1), min_size=4, max_size=8)
    rates = draw(steps)
    parts = draw(st.lists(st.floats(0.05, 1), min_size=len(rates), max_size=len(rates)))
    psnr = 15 + 15 * np.concatenate([[0], np.cumsum(parts)]) / sum(parts)
    psnr[-1] = 30
    return np.exp(4 + np.concatenate([[0], np.cumsum(rates)])), psnr


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.25])
def test_a_curve_at_a_multiple_of_the_rate_differs_by_that_factor(factor):
    assert bd_rate(RATE, PSNR, factor * RATE, PSNR) == pytest.approx(100 * (factor - 1))


@given(rising_curves(), rising_curves())
def test_the_delta_rate_is_that_of_scipys_cubics(a, b):
    low, high = 15, 30
    means = [PchipInterpolator(psnr, np.log(rate)).integrate(low, high) / (high - low) for rate, psnr in (a, b)]
    assert bd_rate(*a, *b) == pytest.approx(100 * math.expm1(means[1] - means[0]), rel=1e-7, abs=1e-7)


def test_only_the_overlap_is_compared():
    psnr = PSNR + 1.3  # ends are no points of the other curve
    low, high = psnr[0], PSNR[-1]
    means = [PchipInterpolator(p, np.log(RATE)).integrate(low, high) / (high - low) for p in (PSNR, psnr)]
    assert bd_rate(RATE, PSNR, RATE, psnr) == pytest.approx(100 * math.expm1(means[1] - means[0]))


@given(rising_curves(), rising_curves())
def test_swapping_the_curves_inverts_the_ratio(a, b):
    there, back = bd_rate(*a, *b), bd_rate(*b, *a)
    assert there is not None
    assert back is not None
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)


def test_fewer_than_four_points_in_the_overlap_are_undefined():
    assert bd_rate(RATE[:4], PSNR[:4], RATE[:4], PSNR[:4]) == pytest.approx(0)
    assert bd_rate(RATE[:3], PSNR[:3], RATE, PSNR) is None
    assert bd_rate(RATE, PSNR, RATE, PSNR + 4.0) is None  # enough points, too few in common
    assert bd_rate(RATE, PSNR, RATE, PSNR + 40) is None
    assert bd_rate(np.array([]), np.array([]), RATE, PSNR) is None


def test_points_in_any_order_and_beaten_points_change_nothing():
    rate = np.concatenate([RATE, RATE[:1], [310.0, 520.0, 2000.0, 0.0]])[::-1]
    psnr = np.concatenate([PSNR, PSNR[:1], [21.7, 23.0, 26.0, 12.0]])[::-1]  # repeated, tied twice, worse, no rate
    np.testing.assert_allclose(efficient_points(rate, psnr), [np.log(RATE), PSNR])
    assert bd_rate(RATE, PSNR, rate, psnr) == pytest.approx(0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(10, 20)), max_size=12))
def test_efficient_points_rise_and_none_of_the_curve_beats_them(points):
    rate, psnr = np.array(points, dtype=float).reshape(-1, 2).T
    log_rate, kept = efficient_points(rate, psnr)
    assert (np.diff(log_rate) > 0).all()
    assert (np.diff(kept) > 0).all()
    for r, p in zip(log_rate, kept, strict=True):
        better = (rate > 0) & (np.log(np.maximum(rate, 1e-9)) <= r) & (psnr >= p)
        assert set(zip(rate[better], psnr[better], strict=True)) == {(round(math.exp(r)), p)}


def test_curves_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"rate is \(6,\) and psnr \(5,\); expected \(P,\) both"):
        bd_rate(RATE, PSNR[:5], RATE, PSNR)
    with pytest.raises(ValueError, match="expected finite numbers"):
        bd_rate(RATE, PSNR, RATE, np.where(PSNR > 27, np.inf, PSNR))
    with pytest.raises(ValueError, match="expected finite numbers"):
        bd_rate(RATE, PSNR, -RATE, PSNR)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_scipys_with_ties(pairs):
    x, y = np.array(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        expected = stats.spearmanr(x, y).statistic
    assert spearman(x, y) == pytest.approx(expected, nan_ok=True)


def test_only_the_order_of_values_matters_to_spearman():
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_the_interval_of_spearman_is_scipys_bootstrap():
    draw = np.random.default_rng(1)
    x = draw.normal(size=300)
    y = np.round(x + draw.normal(size=300), 1)
    low, high = spearman_interval(x, y, seed=0, draws=2000)

    def statistic(a, b):
        return stats.spearmanr(a, b).statistic

    expected = stats.bootstrap(
        (x, y), statistic, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=draw
    ).confidence_interval
    assert low < spearman(x, y) < high
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_equal_seeds_give_equal_intervals_and_a_higher_level_a_wider_one():
    x = np.random.default_rng(2).normal(size=(2, 100))
    first = spearman_interval(*x, seed=5, draws=200)
    assert spearman_interval(*x, seed=5, draws=200) == first
    assert spearman_interval(*x, seed=6, draws=200) != first
    narrow = spearman_interval(*x, seed=5, draws=200, level=0.5)
    assert first[0] < narrow[0] < narrow[1] < first[1]


def test_a_constant_side_has_no_correlation_and_no_interval():
    assert math.isnan(spearman(np.full(9, 40), np.arange(9)))
    assert all(map(math.isnan, spearman_interval(np.full(9, 40), np.arange(9), seed=0)))


def test_draws_that_happen_to_be_constant_are_left_out():
    low, high = spearman_interval(np.array([0, 1]), np.array([0, 1]), seed=0, draws=50)
    assert (low, high) == (1, 1)


def test_the_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(4, 2, size=2000)
    low, high = bootstrap_mean_interval(values, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_mean_of_equal_values_is_certain():
    assert bootstrap_mean_interval(np.full(5, 2.5), seed=0) == (2.5, 2.5)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2)), np.array([1, math.nan])])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="finite numbers of at least 1 image"):
        bootstrap_mean_interval(values, seed=0)


def test_correlations_of_what_does_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"x is \(3,\) and y \(2,\); expected"):
        spearman(np.arange(3), np.arange(2))
    with pytest.raises(ValueError, match="at least 2 images"):
        spearman_interval(np.arange(1), np.arange(1), seed=0)
    with pytest.raises(ValueError, match="not-a-number"):
        spearman(np.array([1, math.nan]), np.arange(2))


@pytest.mark.parametrize(("draws", "level"), [(0, 0.95), (10, 0), (10, 1.0)])
def test_draws_and_level_have_ranges(draws, level):
    with pytest.raises(ValueError, match=f"draws is {draws} and level {level}; expected"):
        bootstrap_mean_interval(np.arange(4), seed=0, draws=draws, level=level)
