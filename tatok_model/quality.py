"""How good a picture will be, predicted from what its tokens say and leave unsaid: the line behind the rule `quality`.

A score that is a squared error (`distortion`, `error`) adds up over the dropped tokens to what a cut leaves unsaid. The
squared error of the decoded picture follows it: what is dropped costs most of its score, what is kept still a little,
because codes are coarse. Calibration fits both slopes on validation pictures and keeps them beside the weights in
`quality.json`. Asked for a PSNR, the rule keeps the fewest tokens whose predicted error is small enough.

Does not import torch.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tatok_model.filtering_rules import SCORES

FILE = "quality.json"  # in a checkpoint folder


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
        """What may be left unsaid of a picture at a wanted PSNR, in the score's unit; below 0 where it is not reached.

        Args:
            decibels: wanted.
            total: all scores of the picture, summed: a number or a tensor of them.

        Raises:
            ValueError: as `check`.
        """
        self.check(decibels)
        return (10 ** (-decibels / 10) - self.intercept - self.kept_slope * total) / (self.slope - self.kept_slope)


def read_lines(path: Path) -> tuple[QualityLine, ...]:
    """The lines in a `quality.json`; none where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
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
    found: list[Any] = [line for line in lines if (line.score, line.rounds) == (score, rounds)]
    return found[0] if found else None
