"""What token filtering can be asked for: scores, cut rules and the ranges of their thresholds. Does not import torch.

Shapes: N patch positions.
"""

import math
from dataclasses import dataclass

UNITS = 1024  # score units in a bit
CHECK_BITS = 32  # the hash that guards replayed positions
RULES = ("relative", "residual", "marginal", "count")


@dataclass(frozen=True)
class Score:
    """What an order of patch tokens is made by."""

    needs_image: bool  # False: the decoder knows the order without being told
    in_bits: bool  # False: its steps have no score, only `count` can cut it


SCORES = {
    "surprisal": Score(needs_image=True, in_bits=True),  # -log2 q of the true code
    "entropy": Score(needs_image=True, in_bits=True),  # of q, from what is kept already
    "pixel_entropy": Score(needs_image=True, in_bits=True),  # of the patch's grey levels
    "random": Score(needs_image=False, in_bits=False),  # keyed by the global tokens
    "grid": Score(needs_image=False, in_bits=False),  # the same for every image, evenly spread
}


def fixes_length(rule: str, threshold: float) -> bool:
    """Whether a cut keeps equally many patch tokens of every image, so that no length needs to be sent."""
    return rule == "count" or keeps_all(rule, threshold) or (rule == "relative" and threshold == 0)


def keeps_all(rule: str, threshold: float) -> bool:
    """Whether a cut keeps every patch token whatever the scores; a count of N is not known here."""
    return (rule == "relative" and threshold == 1) or (rule == "marginal" and threshold == 0)


def check_rounds(rounds: int, positions: int) -> None:
    """Raises ValueError when `rounds` is not from 1 to N."""
    if not 1 <= rounds <= positions:
        raise ValueError(f"rounds is {rounds}; expected 1 to {positions}, the number of patch positions")


def check_threshold(rule: str, threshold: float, positions: int) -> None:
    """Raises ValueError when there is no such rule or the threshold is outside the rule's range."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if rule == "relative" and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share from 0 to 1 for the rule relative")
    if rule in ("residual", "marginal") and not 0 <= threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; expected at least 0 bits for the rule {rule}")
    if rule == "count" and not (float(threshold).is_integer() and 0 <= threshold <= positions):
        raise ValueError(f"threshold is {threshold}; expected 0 to {positions} whole tokens for the rule count")


def check_cut(score: str, rule: str, threshold: float, positions: int) -> None:
    """Raises ValueError as `check_threshold`, or when the score has no bits that the rule could add up."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    check_threshold(rule, threshold, positions)
    if rule != "count" and not SCORES[score].in_bits:
        raise ValueError(f"rule is {rule!r}; expected count for the score {score!r}, whose steps have no bits")
