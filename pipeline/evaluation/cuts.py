"""At which cuts a tokenizer is measured: the configured operating point, and the points of a rate-distortion curve.

Shapes: B images, M global tokens, N patch positions.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.config import FilterConfig
from tatok_model.coding_schedule import grid_schedule, ranking_schedule
from tatok_model.filtering import rate_bits
from tatok_model.filtering_rules import SCORES
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

OPERATING, ALL = "", "all"  # names of points; those of the curve are curve00, curve01, ...


@dataclass(frozen=True)
class Point:
    """One cut."""

    name: str
    threshold: float | None  # of the filter's rule; None: everything is kept


@dataclass(frozen=True)
class Cuts:
    """What is done with the tokens of a batch before they are decoded.

    Attributes:
        filter: score, rounds and rule, and the threshold of the operating point.
        thresholds: of the curve, for the same rule.
    """

    filter: FilterConfig
    thresholds: tuple[float, ...] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether the operating point is that of a tokenizer without a filter."""
        return self.filter.rule == "relative" and self.filter.threshold == 1

    def curve(self, codec: TaTok) -> list[Point]:
        """The points of the curve; last, where an entropy model can code them, all tokens: the control `all_coded`."""
        points = [Point(f"curve{number:02d}", threshold) for number, threshold in enumerate(self.thresholds)]
        return [*points, Point(ALL, None)] if points and codec.entropy_model is not None else points

    def rank(self, codec: TaTok, tokens: Tokens, images: Tensor) -> Tokens:
        """Tokens that can be cut at every point; images (B, 3, H, W) uint8."""
        if not codec.config.patch_tokens or (self.keeps_all and not self.thresholds):
            return tokens
        return codec.rank(tokens, self.filter.score, self.filter.rounds, images)

    def operating(self, tokens: Tokens) -> Tokens:
        """Ranked tokens, cut as configured."""
        if self.keeps_all:
            return tokens
        return self.at(tokens, Point(OPERATING, self.filter.threshold))

    def at(self, tokens: Tokens, point: Point) -> Tokens:
        """Ranked tokens, cut at one point. Without patch tokens, a count is of leading global tokens."""
        if point.threshold is None:
            return tokens
        if tokens.ranking is None:
            return tokens.cut_globals(int(point.threshold))
        return tokens.cut(self.filter.rule, point.threshold, self.filter.replay)

    def rate_bits(self, codec: TaTok, tokens: Tokens, threshold: float | None) -> Tensor | None:
        """(B,) float64: R(theta) of tokens cut at one water level; None where that is not how they were cut."""
        ranking, section = tokens.ranking, self.filter
        if ranking is None or section.rule != "marginal" or not threshold or not SCORES[ranking.score].in_signal:
            return None
        codes = codec.code_vectors()[1]
        dimensions = 0 if codes is None else codes.shape[1]
        return rate_bits(ranking.score_units, tokens.patch_counts, threshold, ranking.resolution, dimensions)

    def bits_coded(self, codec: TaTok, tokens: Tokens) -> Tensor:
        """(B,) float64: bits with patch codes entropy-coded by q; everything else as in `bits_fixed`."""
        fixed = tokens.bits(codec.config.bits_per_token)
        if codec.entropy_model is None:
            return fixed
        if tokens.side.positions == "replayed" and tokens.ranking is not None:
            schedule = ranking_schedule(tokens.ranking)
        else:
            schedule = grid_schedule(tokens.kept_mask, self.filter.coding_rounds)
        return fixed - tokens.patch_counts * codec.config.bits_per_token + codec.code_lengths(tokens, schedule)
