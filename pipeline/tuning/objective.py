"""What a trial is worth: points of its rate-distortion curves, one number for all of them, and which points lead.

Shapes: P points of a curve.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config, SweepConfig
from pipeline.evaluation.compare import curve_of
from pipeline.tuning.plan import Plan, Trial
from tatok_model.metrics.rate_distortion import bd_rate

LESS_IS_BETTER = {"psnr_at_tokens": False, "distance_at_tokens": True, "bd_rate": True}


@dataclass(frozen=True)
class Point:
    """One trial at one cut: a row of the sweep's table."""

    trial: str
    number: int
    global_tokens: int
    rule: str
    threshold: float
    tokens: float  # per image, global ones counted
    bits_fixed: float
    bits_coded: float
    psnr: float  # dB
    distance: float  # Frechet distance
    images_per_second: float  # of the whole evaluation of this trial: decoding takes the same time at every threshold

    def to_dict(self) -> dict[str, Any]:
        """By column."""
        return asdict(self)


def distance_name(names: list[str]) -> str:
    """The main Frechet distance among names of metrics: `rfid` or the first `rfd_...`."""
    return next(name for name in names if name == "rfid" or name.startswith("rfd_"))


def points_of(plan: Plan, trial: Trial) -> list[Point]:
    """Every point that a trial has measured, in the order of the cuts.

    Raises:
        BadInput: an evaluation is missing or has no curve.
    """
    config, found = plan.config_of(trial), []
    for rule, thresholds in plan.cuts.items():
        folder = plan.evaluation_folder(trial, rule)
        curve = curve_of(folder)
        rate = json.loads((folder / "summary.json").read_text())["results"]["images_per_second"]
        distance = curve[distance_name(list(curve))]
        found += [
            Point(
                trial.name, trial.number, config.tokenizer.global_tokens, rule, threshold,
                curve["tokens_per_image"][i], curve["bits_fixed"][i], curve["bits_coded"][i],
                curve["psnr"][i], distance[i], rate,
            )
            for i, threshold in enumerate(thresholds)
        ]  # fmt: skip
    return found


def distance_in(plan: Plan, trial: Trial) -> str:
    """The name of the Frechet distance that a finished trial was measured by."""
    return distance_name(list(curve_of(plan.evaluation_folder(trial, next(iter(plan.cuts))))))


def budget(config: Config) -> float:
    """Tokens per image at which trials are compared."""
    return config.sweep.budget_tokens or config.tokenizer.max_tokens / 2


def objective(points: list[Point], config: Config) -> float | None:
    """The number that trials are compared by, in its own unit; None where the curve does not say.

    `psnr_at_tokens` and `distance_at_tokens` lie on the line through the points that no other point of the trial
    beats. Below its first point there is nothing; beyond its last one more tokens buy nothing. `bd_rate` is the lowest
    of the trial's cut rules.

    Args:
        points: of one trial.
        config: of the sweep.
    """
    sweep = config.sweep
    if sweep.objective == "bd_rate":
        return _bd_rate(points, sweep)
    sign = -1.0 if LESS_IS_BETTER[sweep.objective] else 1.0
    values = [point.distance if LESS_IS_BETTER[sweep.objective] else point.psnr for point in points]
    front = leading([point.tokens for point in points], [sign * value for value in values])
    tokens, wanted = np.array([points[i].tokens for i in front]), budget(config)
    if not front or wanted < tokens[0]:
        return None
    return float(np.interp(wanted, tokens, [values[i] for i in front]))


def _bd_rate(points: list[Point], sweep: SweepConfig) -> float | None:
    control = {name: np.array(values) for name, values in curve_of(Path(sweep.control)).items()}
    column = {"tokens_per_image": "tokens"}.get(sweep.rate, sweep.rate)
    found = []
    for rule in dict.fromkeys(point.rule for point in points):
        chosen = [point for point in points if point.rule == rule]
        rate, psnr = np.array([getattr(p, column) for p in chosen]), np.array([p.psnr for p in chosen])
        found.append(bd_rate(control[sweep.rate], control["psnr"], rate, psnr))
    return min((value for value in found if value is not None), default=None)


def leading(rate: list[float], worth: list[float]) -> list[int]:
    """The Pareto front: indices of points that no other point beats, by rising rate.

    A point goes when another one has at most its rate and at least its worth; of equal points the first stays.

    Args:
        rate: (P,) less is better.
        worth: (P,) more is better.
    """
    best, front = -np.inf, []
    for i in sorted(range(len(rate)), key=lambda i: (rate[i], -worth[i], i)):
        if worth[i] > best:
            best = worth[i]
            front.append(i)
    return front


def best_trial(values: dict[int, float | None], config: Config) -> int | None:
    """The number of the trial with the best objective; of equals the first. None where no trial has one.

    Args:
        values: objective by number of the trial.
        config: of the sweep.
    """
    sign = 1.0 if LESS_IS_BETTER[config.sweep.objective] else -1.0
    known = [(sign * value, number) for number, value in values.items() if value is not None and np.isfinite(value)]
    return min(known)[1] if known else None


def best_cut(points: list[Point], config: Config) -> Point | None:
    """The point of the best trial that a token budget allows; None where there is no budget to go by."""
    if config.sweep.objective == "bd_rate":
        return None
    sign = -1.0 if LESS_IS_BETTER[config.sweep.objective] else 1.0
    allowed = [point for point in points if point.tokens <= budget(config)]
    if not allowed:
        return None
    return max(allowed, key=lambda p: sign * (p.distance if sign < 0 else p.psnr))
