"""Dynamic token filtering: what each patch token adds, and where to cut.

Pure functions on tensors, for all images of a batch at once. Every step of a ranking (`ranking.py`) has a score of what
that token adds. Cut: keep the first t. Scores are whole numbers of score units (`Score.resolution` of them make a bit,
or whatever the score is measured in), so that they add up alike everywhere: with the cumulative curve
C(t) = h_1 + ... + h_t no cut depends on the order of a sum or on the other images of the batch. What may be asked for
is in `filtering_rules.py`; docs/filtering.md has the theory.

Shapes: B images, N patch positions, K codebook entries, T kept tokens.

Source: arXiv 2605.16384 for filtering by cumulative conditional entropy; the other rules are ours (docs/paper.md).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tatok_model.filtering_rules import RULES, UNITS, check_threshold


def surprisal(logits: Tensor, indices: Tensor) -> Tensor:
    """-log2 q of the true codes, in bits: (..., K) unnormalised scores and (...) int64 codes -> (...) float32."""
    nats = F.cross_entropy(logits.float().flatten(0, -2), indices.flatten(), reduction="none")
    return nats.view(indices.shape) / math.log(2)


def conditional_entropy(logits: Tensor) -> Tensor:
    """Entropy of q in bits, from 0 (certain) to log2 K (uniform): (..., K) -> (...) float32.

    Computed in float32 under any autocast: the filter compares nearby values.
    """
    log_q = logits.float().log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1) / math.log(2)


def to_units(values: Tensor, resolution: int = UNITS) -> Tensor:
    """Scores as whole score units, `resolution` of which make 1, at least 0: int64 of the same shape."""
    return (values.double() * resolution).round().clamp(min=0).long()


def kept_counts(score_units: Tensor, rule: str, threshold: float, resolution: int = UNITS) -> Tensor:
    """T of each image: the length at which a rule cuts.

    With C(t) the sum of the first t scores:
        relative: the smallest t with C(t) >= threshold * C(N); by definition 0 keeps none and 1 keeps all.
        residual: the smallest t with C(N) - C(t) <= threshold: what is dropped is bounded.
        marginal: up to the first score below threshold: one level for all images (reverse water-filling).
        count: threshold tokens.
    `quality` is a residual of its own for each image, see `filtering_rules.QualityLine`.

    Args:
        score_units: (B, N) int64 scores in the order of ranking.
        rule: one of RULES, `quality` aside.
        threshold: a share, the score's unit, the score's unit, a number of tokens.
        resolution: score units in the score's unit, see `filtering_rules.Score`.

    Returns:
        (B,) int64, from 0 to N.

    Raises:
        ValueError: an unknown rule or a threshold outside its range.
    """
    positions = score_units.shape[1]
    check_threshold(rule, threshold, positions)
    if rule == "count":
        return torch.full_like(score_units[:, 0], int(threshold)) if positions else score_units.sum(1)
    if rule == "quality":
        raise ValueError("rule is 'quality'; expected Ranking.counts, which knows the line that predicts dB")
    if rule == "marginal":
        return (score_units.double() >= threshold * resolution).long().cumprod(dim=1).sum(dim=1)
    if rule == "relative" and threshold == 1:  # scores of 0 at the end would be cut, and 1 means all
        return torch.full_like(score_units[:, 0], positions)
    if rule == "residual":
        return residual_counts(score_units, threshold * resolution)
    cumulative = F.pad(score_units.cumsum(dim=1), (1, 0))  # (B, N + 1): C(0) ... C(N)
    enough = cumulative.double() >= threshold * cumulative[:, -1:].double()
    return positions + 1 - enough.sum(dim=1)  # C never decreases, so `enough` is True on a suffix


def residual_counts(score_units: Tensor, most_units: Tensor | float) -> Tensor:
    """(B,) int64, the smallest t with C(N) - C(t) <= `most_units` of (B, N) scores in the order of ranking.

    `most_units` is one number, or (B, 1), one an image; where it is below 0, all tokens with a score are kept.
    """
    cumulative = F.pad(score_units.cumsum(dim=1), (1, 0))  # (B, N + 1): C(0) ... C(N)
    left = (cumulative[:, -1:] - cumulative).double()
    enough = left <= torch.as_tensor(most_units, dtype=torch.float64, device=left.device).clamp(min=0)
    return score_units.shape[1] + 1 - enough.sum(dim=1)  # `left` never increases, so `enough` is True on a suffix


def kept_mask_of(order: Tensor, counts: Tensor) -> Tensor:
    """(B, N) bool, True at the first `counts` positions of each order: (B, N) int64, (B,) int64."""
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, steps < counts[:, None])


def rate_bits(score_units: Tensor, counts: Tensor, rule_threshold: float, resolution: int, dimensions: int) -> Tensor:
    """R(theta) of reverse water-filling, in bits: (B,) float64.

    The sum over the kept tokens of (d / 2) log2(s / theta): what independent Gaussian components of total variance s
    each, spread evenly over d dimensions, cost at the distortion theta. A step below theta that an order in rounds has
    kept counts nothing.

    Args:
        score_units: (B, N) int64 scores in the order of ranking, of a score that is a squared error.
        counts: (B,) int64, T.
        rule_threshold: theta, in the score's unit, more than 0.
        resolution: score units in that unit.
        dimensions: d, numbers that a token's score adds up.

    Source: Cover and Thomas, Elements of Information Theory, 10.3.3.
    """
    kept = torch.arange(score_units.shape[1], device=score_units.device) < counts[:, None]
    ratios = (score_units.double() / (rule_threshold * resolution)).clamp(min=1)
    return (ratios.log2() * kept).sum(dim=1) * (dimensions / 2)


def calibrate(score_units: Tensor, rule: str, mean_tokens: float, resolution: int = UNITS) -> float:
    """The threshold at which images keep nearest to `mean_tokens` patch tokens on average, by bisection.

    T is a whole number per image, so the mean moves in steps. Global tokens are not counted.

    Args:
        score_units: (B, N) int64 scores of validation images, in the order of ranking.
        rule: one of RULES, `quality` aside.
        mean_tokens: 0 to N.
        resolution: score units in the score's unit.

    Raises:
        ValueError: an unknown rule, or a mean that cannot be.
    """
    batch, positions = score_units.shape
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if not 0 <= mean_tokens <= positions or not batch:
        raise ValueError(f"{mean_tokens} tokens are wanted of {batch} images; expected 0 to {positions} of at least 1")
    if rule == "count":
        return float(round(mean_tokens))
    highest = score_units.sum(dim=1).max() if rule == "residual" else score_units.max()
    low, high = 0.0, 1.0 if rule == "relative" else (int(highest) + 1) / resolution

    def mean(threshold: float) -> float:
        return float(kept_counts(score_units, rule, threshold, resolution).double().mean())

    return bisect(mean, mean_tokens, low, high, grows=rule == "relative")  # the others keep less when they are raised


def bisect(
    measure: Callable[[float], float], wanted: float, low: float, high: float, grows: bool, steps: int = 60
) -> float:
    """Where between `low` and `high` a monotone `measure` is nearest to `wanted`; `grows`: it does not fall."""
    for _ in range(steps):
        middle = (low + high) / 2
        if (measure(middle) < wanted) == grows:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda value: abs(measure(value) - wanted))
