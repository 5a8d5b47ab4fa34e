"""Comparing rate-distortion curves, and how sure a number over images is. Arithmetic in numpy, no images.

Shapes: P points of a curve, B images.
"""

import math
from collections.abc import Callable

import numpy as np

MIN_POINTS = 4  # of each curve within the overlap; a cubic through fewer says little
LEVEL = 0.95  # of the intervals
DRAWS = 1000


def bd_rate(rate_a: np.ndarray, psnr_a: np.ndarray, rate_b: np.ndarray, psnr_b: np.ndarray) -> float | None:
    """Bjontegaard delta rate: how many percent more bits b spends than a for the same PSNR; negative: b saves bits.

    The mean difference of log rate over the PSNR that both curves reach, log rate being a piecewise cubic (PCHIP, which
    does not overshoot) of PSNR. Points come in any order and curves need not be monotone: `efficient_points` are what
    counts of each. The overlap runs from the larger of the two lowest to the smaller of the two highest PSNR, both
    included; points beyond it only shape the cubics.

    Args:
        rate_a: (P,) bits or tokens, at least 0.
        psnr_a: (P,) dB.
        rate_b: (P',) in the unit of `rate_a`.
        psnr_b: (P',) dB.

    Returns:
        Percent of a's rate; None, undefined, unless each curve has at least four efficient points within the overlap.

    Raises:
        ValueError: rate and PSNR of a curve differ in shape, or hold NaN, infinity or a negative rate.

    Source: Bjontegaard, VCEG-M33 (2001), with the piecewise cubics of JCTVC-L1100 in place of one polynomial.
    """
    (log_a, psnr_a), (log_b, psnr_b) = efficient_points(rate_a, psnr_a), efficient_points(rate_b, psnr_b)
    if min(len(psnr_a), len(psnr_b)) < MIN_POINTS:
        return None
    low, high = max(psnr_a[0], psnr_b[0]), min(psnr_a[-1], psnr_b[-1])
    if any(np.count_nonzero((psnr >= low) & (psnr <= high)) < MIN_POINTS for psnr in (psnr_a, psnr_b)):
        return None
    difference = _pchip_mean(psnr_b, log_b, low, high) - _pchip_mean(psnr_a, log_a, low, high)
    return 100 * math.expm1(difference)


def efficient_points(rate: np.ndarray, psnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve that no other point beats: log rate and PSNR, both strictly rising; errors as `bd_rate`.

    A point goes when another one has at most its rate and at least its PSNR; of equal points one stays. Points of rate
    0 go too, because they have no log rate.
    """
    rate, psnr = np.asarray(rate, dtype=np.float64), np.asarray(psnr, dtype=np.float64)
    if rate.ndim != 1 or rate.shape != psnr.shape:
        raise ValueError(f"rate is {rate.shape} and psnr {psnr.shape}; expected (P,) both")
    if not (np.isfinite(rate).all() and np.isfinite(psnr).all() and (rate >= 0).all()):
        raise ValueError(
            f"the curve is {list(zip(rate.tolist(), psnr.tolist(), strict=True))}; expected finite numbers"
        )
    rate, psnr = rate[rate > 0], psnr[rate > 0]
    order = np.lexsort((-psnr, rate))  # by rate, at one rate the best first
    rate, psnr = rate[order], psnr[order]
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], psnr]))[:-1]
    return np.log(rate[psnr > best_before]), psnr[psnr > best_before]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of (B,) numbers, equal ones having the mean of their ranks: from -1 to 1.

    NaN if all of `x` or all of `y` are equal, because nothing then can be said.

    Raises:
        ValueError: the shapes differ, there are fewer than two images, or a value is NaN.
    """
    levels_x, levels_y = _levels(x, y)
    return _correlation(_ranks(levels_x), _ranks(levels_y))


def spearman_interval(
    x: np.ndarray, y: np.ndarray, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap over images for `spearman`: its bounds; arguments as `bootstrap_mean_interval`.

    Draws in which one side is constant have no correlation and are left out; both bounds are NaN if that is all of
    them. Raises as `spearman`, or where `draws` or `level` is outside its range.
    """
    levels_x, levels_y = _levels(x, y)

    def statistic(chosen: np.ndarray) -> float:
        return _correlation(_ranks(levels_x[chosen]), _ranks(levels_y[chosen]))

    return _bootstrap(statistic, len(levels_x), seed, draws, level)


def bootstrap_mean_interval(
    values: np.ndarray, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap over images for a mean: its lower and upper bound. Differences of pairs give a paired test.

    Args:
        values: (B,) numbers.
        seed: equal seeds give equal intervals.
        draws: how often B images are drawn with replacement.
        level: the share of draws within the interval.

    Raises:
        ValueError: `values` is not (B,) of at least one image and finite, or `draws` or `level` is outside its range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values are {values.shape}; expected (B,) finite numbers of at least 1 image")
    return _bootstrap(lambda chosen: float(values[chosen].mean()), len(values), seed, draws, level)


def _pchip_mean(x: np.ndarray, y: np.ndarray, low: float, high: float) -> float:
    """Mean over [low, high] of the monotone piecewise cubic through (x, y): Fritsch and Butland's slopes."""
    width, rise = np.diff(x), np.diff(y) / np.diff(x)
    before, after = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    inner = (before + after) / (before / rise[:-1] + after / rise[1:])  # rising everywhere: no slope is 0
    first = _end_slope(width[0], width[1], rise[0], rise[1])
    last = _end_slope(width[-1], width[-2], rise[-1], rise[-2])
    slopes = np.concatenate([[first], inner, [last]])
    # Two Gauss points a piece integrate a cubic exactly.
    knots = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    middle, half = (knots[1:] + knots[:-1]) / 2, np.diff(knots) / 2
    total = sum((half * _hermite(x, y, slopes, middle + side * half)).sum() for side in (-(3**-0.5), 3**-0.5))
    return float(total) / (high - low)


def _end_slope(width: float, next_width: float, rise: float, next_rise: float) -> float:
    """The parabola through three points, kept between flat and three times the first rise: no overshoot."""
    slope = ((2 * width + next_width) * rise - width * next_rise) / (width + next_width)
    return min(max(slope, 0.0), 3 * rise)


def _hermite(x: np.ndarray, y: np.ndarray, slopes: np.ndarray, at: np.ndarray) -> np.ndarray:
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    width = x[piece + 1] - x[piece]
    t = (at - x[piece]) / width
    values = y[piece] * (1 + 2 * t) * (1 - t) ** 2 + y[piece + 1] * t**2 * (3 - 2 * t)
    return values + width * (slopes[piece] * t * (1 - t) ** 2 - slopes[piece + 1] * t**2 * (1 - t))


def _levels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values numbered from the smallest up, equal ones alike: sorted once, whatever the number of draws."""
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"x is {x.shape} and y {y.shape}; expected (B,) both, of at least 2 images")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("x or y holds not-a-number; expected numbers")
    return np.unique(x, return_inverse=True)[1], np.unique(y, return_inverse=True)[1]


def _ranks(levels: np.ndarray) -> np.ndarray:
    counts = np.bincount(levels)
    return (np.cumsum(counts) - (counts - 1) / 2)[levels]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread > 0 else math.nan


def _bootstrap(
    statistic: Callable[[np.ndarray], float], images: int, seed: int, draws: int, level: float
) -> tuple[float, float]:
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws is {draws} and level {level}; expected at least 1 draw and a level between 0 and 1")
    random = np.random.default_rng(seed)
    values = np.array([statistic(random.integers(images, size=images)) for _ in range(draws)])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
