"""The options of token filtering: scores, cut rules, the ranges of their thresholds, and the rule `quality`.

`quality` keeps the fewest tokens that are predicted to reach a wanted PSNR. Of a score that is a squared error
(`distortion`, `error`), the sum over the dropped tokens predicts the squared error of the decoded picture: a dropped
token costs most of its score, a kept one still a little, because codes are coarse. Calibration fits both
slopes on validation pictures (`QualityLine`) and keeps them in `quality.json` beside the weights.

Does not import torch. Shapes: N patch positions.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNITS = 1024  # score units in a bit
CHECK_BITS = 32  # the hash that guards replayed positions
QUALITY_FILE = "quality.json"  # in a checkpoint folder
RULES = ("relative", "residual", "marginal", "count", "quality")


@dataclass(frozen=True)
class Score:
    """What patch tokens are ranked by.

    Scores are whole numbers of 1 / `resolution` `unit`, so that their sums are the same on every device. The resolution
    is a power of two at which float32 holds the largest possible score exactly.
    """

    unit: str = ""  # of a token's score; "": tokens have an order but no score, only `count` can cut it
    resolution: int = UNITS  # score units in one unit
    in_rounds: bool = False  # scores depend on the tokens placed before: R rounds may rank otherwise than one
    asks_entropy_model: bool = False
    known_to_decoder: bool = False  # it can work the order out from the global tokens, so that no positions are sent
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
    "random": Score(known_to_decoder=True),
    # the same for every image, evenly spread
    "grid": Score(known_to_decoder=True),
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
    if not isinstance(threshold, int | float):
        raise ValueError(f"threshold is {threshold!r}; expected a number")
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


@dataclass(frozen=True)
class QualityLine:
    """Mean squared error of a picture in [0, 1] = intercept + slope x summed scores dropped + kept_slope x those kept.

    Attributes:
        score: what was summed, in its unit.
        rounds: R of the ranking.
        intercept: error of a picture without any score.
        slope: error for each unit of score that is dropped.
        kept_slope: error for each unit of score that is kept; below `slope`, or keeping a token would not help.
        most: mean PSNR of validation pictures with all tokens, in dB: more cannot be asked for. 0: the intercept's.
    """

    score: str
    rounds: int
    intercept: float
    slope: float
    kept_slope: float = 0.0
    most: float = 0.0

    def __post_init__(self) -> None:
        predicts = [name for name, score in SCORES.items() if score.in_signal]
        if self.score not in predicts:
            raise ValueError(f"score is {self.score!r}; expected one of {', '.join(predicts)}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds!r}; expected a whole number, at least 1")
        for name in ("intercept", "slope"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if not 0 <= self.kept_slope < self.slope:
            raise ValueError(f"kept_slope is {self.kept_slope}; expected 0 or more, and less than slope, {self.slope}")
        if not 0 <= self.most < math.inf:
            raise ValueError(f"most is {self.most}; expected 0 or more dB")
        if not self.most:
            object.__setattr__(self, "most", -10 * math.log10(self.intercept))

    def check(self, decibels: float) -> None:
        """Raises ValueError when more dB are wanted than all tokens give."""
        if decibels > self.most:
            raise ValueError(
                f"threshold is {decibels:g} dB for the rule quality; "
                f"expected at most {math.floor(self.most * 10) / 10:g} dB, which this tokenizer reaches with all tokens"
            )

    def residual_at(self, decibels: float, total: Any = 0.0) -> Any:
        """How much score a cut may drop at a wanted PSNR, in the score's unit; below 0 where that is not reached.

        `total` is all scores of the picture, summed: a number or a tensor of them. Raises as `check`.
        """
        self.check(decibels)
        return (10 ** (-decibels / 10) - self.intercept - self.kept_slope * total) / (self.slope - self.kept_slope)


def read_lines(path: Path) -> tuple[QualityLine, ...]:
    """The lines in a `quality.json`, none where there is no such file; ValueError where it holds something else."""
    if not path.is_file():
        return ()
    try:
        return tuple(QualityLine(**values) for values in json.loads(path.read_text())["lines"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not what calibration writes: {error}") from None


def lines_json(lines: Iterable[QualityLine]) -> str:
    """The text of a `quality.json`."""
    return json.dumps({"lines": [asdict(line) for line in lines]}, indent=2) + "\n"


def with_line(lines: Iterable[QualityLine], new: QualityLine) -> tuple[QualityLine, ...]:
    """The lines with another one, which replaces that of the same score and rounds."""
    return (*(line for line in lines if (line.score, line.rounds) != (new.score, new.rounds)), new)


def line_of(lines: Iterable[QualityLine], score: str, rounds: int) -> QualityLine | None:
    """The line of a ranking; None where it was not fitted."""
    return next((line for line in lines if (line.score, line.rounds) == (score, rounds)), None)
