"""What token filtering can be asked for: scores, cut rules and the ranges of their thresholds. Does not import torch.

Shapes: N patch positions.
"""

import math
from dataclasses import dataclass

UNITS = 1024  # score units in a bit
CHECK_BITS = 32  # the hash that guards replayed positions
RULES = ("relative", "residual", "marginal", "count", "quality")


@dataclass(frozen=True)
class Score:
    """What an order of patch tokens is made by.

    Steps are kept as whole numbers, so that they add up alike everywhere: `resolution` of them make one `unit`. Powers
    of two that float32 holds exactly up to the largest step there can be.
    """

    unit: str = ""  # of a step's score; "": steps have none, only `count` can cut the order
    resolution: int = UNITS  # score units in one unit
    in_rounds: bool = False  # what is kept already changes what is open: R rounds may differ from one
    asks_entropy_model: bool = False
    needs_image: bool = True  # False: the decoder knows the order without being told
    in_signal: bool = False  # a squared error of what is dropped, which a picture's quality can be predicted from


SCORES = {
    # |c - E_q[c]|^2 between the true code vector and what q expects there
    "distortion": Score("squared distance", 2**16, in_rounds=True, asks_entropy_model=True, in_signal=True),
    # mean squared error of the patch in [0, 1], as decoded from what is kept so far
    "error": Score("squared error", 2**20, in_rounds=True, in_signal=True),
    # -log2 q of the true code
    "surprisal": Score("bits", in_rounds=True, asks_entropy_model=True),
    # of q, from what is kept already
    "entropy": Score("bits", in_rounds=True, asks_entropy_model=True),
    # of the patch's grey levels
    "pixel_entropy": Score("bits"),
    # keyed by the global tokens
    "random": Score(needs_image=False),
    # the same for every image, evenly spread
    "grid": Score(needs_image=False),
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
        raise ValueError(f"threshold is {threshold}; expected at least 0, in the score's unit, for the rule {rule}")
    if rule == "quality" and not 0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; expected more than 0 dB for the rule quality")
    if rule == "count" and not (float(threshold).is_integer() and 0 <= threshold <= positions):
        raise ValueError(f"threshold is {threshold}; expected 0 to {positions} whole tokens for the rule count")


def check_cut(score: str, rule: str, threshold: float, positions: int) -> None:
    """Raises ValueError as `check_threshold`, or when the score has no steps that the rule could cut by."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    check_threshold(rule, threshold, positions)
    if rule != "count" and not SCORES[score].unit:
        raise ValueError(f"rule is {rule!r}; expected count for the score {score!r}, whose steps have no scores")
    if rule == "quality" and not SCORES[score].in_signal:
        raise ValueError(
            f"rule is 'quality'; expected the score distortion or error, not {score!r}, to predict dB from"
        )
