"""What is measured, where and on which pictures.

    EvaluationPlan  which held-out pictures, in which ranges: a worker measures one range after the other
    Cuts            where the tokens of a picture are cut: at the operating point, and at the points of a curve
    Measurements    what was found on some pictures: one `CutSums` for every cut. Ranges add up in the plan's order.

Shapes: B images, H and W pixels, N patch positions.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from torch import Tensor

from pipeline.core.config import EvaluateConfig, FilterConfig
from pipeline.core.errors import BadInput
from tatok_model.codec.payload import grid_schedule, ranking_schedule
from tatok_model.filtering import rate_bits
from tatok_model.filtering_rules import SCORES
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality
from tatok_model.metrics.scores import CodeUsage, InceptionScore
from tatok_model.tokens import Tokens

SPLIT_IMAGES = 5000  # images in a split of the Inception score, as in ADM's evaluator
SHUFFLE_SEED = 2020  # of the deal of images into those splits: shards may be sorted by class
NARROW, WIDE = 512, 2048  # images per range; a range returns F x F float64, 33.5 MB at 2048 features
NARROW_FEATURES = 512


@dataclass(frozen=True)
class EvaluationPlan:
    """Measured pictures are numbered 0 to count - 1; `indices` says which of the split they are."""

    count: int  # pictures measured
    total: int  # pictures in the split
    batch_size: int  # pictures per forward pass
    range_size: int  # pictures per range, a multiple of batch_size
    grid: int  # pictures to show, evenly spread

    def ranges(self) -> list[tuple[int, int]]:
        """First and one past the last number of each range."""
        starts = range(0, self.count, self.range_size)
        return [(start, min(start + self.range_size, self.count)) for start in starts]

    def indices(self, numbers: np.ndarray) -> np.ndarray:
        """Places in the split: evenly spread over it, because shards may be sorted by class."""
        return numbers * self.total // self.count

    def shown(self) -> np.ndarray:
        """Numbers of the pictures to show."""
        return np.arange(self.grid) * self.count // max(self.grid, 1)


def score_splits(images: int) -> int:
    """Into how many equal splits the Inception score deals so many pictures."""
    return max(1, images // SPLIT_IMAGES)


def score_split_of(images: int) -> np.ndarray:
    """(images,) int64, the split of the Inception score that each picture belongs to."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(images) * score_splits(images) // images


def make_plan(total: int, feature_dim: int, config: EvaluateConfig) -> EvaluationPlan:
    """The plan for a split of `total` pictures; wide features, of `feature_dim` numbers, are returned less often.

    Raises:
        BadInput: fewer than two pictures, of which no covariance can be taken.
    """
    count = min(config.max_images or total, total)
    if count < 2:
        raise BadInput(f"{count} held-out pictures would be measured; expected at least 2 for a Frechet distance")
    batch = min(config.batch_size, count)
    wanted = NARROW if feature_dim <= NARROW_FEATURES else WIDE
    return EvaluationPlan(count, total, batch, -(-wanted // batch) * batch, min(config.grid_images, count))


OPERATING, ALL = "operating", "all"  # names of cuts; those of a curve are curve00, curve01, ...


@dataclass(frozen=True)
class Cut:
    """Where tokens are cut."""

    name: str
    threshold: float | None  # of the filter's rule; None: everything is kept


@dataclass(frozen=True)
class Cuts:
    """What is done with the tokens of a batch before they are decoded. Codecs are `TaTok` or a baseline.

    Attributes:
        filter: score, rounds and rule, and the threshold of the operating point.
        thresholds: of the curve, for the same rule.
    """

    filter: FilterConfig = field(default_factory=FilterConfig)
    thresholds: tuple[float, ...] = ()

    @property
    def operating_point(self) -> Cut:
        """The configured cut; a relative threshold of 1 is a tokenizer without a filter."""
        keeps_all = self.filter.rule == "relative" and self.filter.threshold == 1
        return Cut(OPERATING, None if keeps_all else self.filter.threshold)

    def curve(self, codec: Any) -> list[Cut]:
        """The points of the curve; last, where an entropy model can code them, all tokens: the control `all_coded`."""
        points = [Cut(f"curve{number:02d}", threshold) for number, threshold in enumerate(self.thresholds)]
        return [*points, Cut(ALL, None)] if points and codec.entropy_model is not None else points

    def rank(self, codec: Any, tokens: Tokens, images: Tensor) -> Tokens:
        """Tokens that can be cut at every point; images (B, 3, H, W) uint8."""
        if not codec.config.patch_tokens or (self.operating_point.threshold is None and not self.thresholds):
            return tokens
        return codec.rank(tokens, self.filter.score, self.filter.rounds, images)

    def operating(self, tokens: Tokens) -> Tokens:
        """Ranked tokens, cut as configured."""
        return self.at(tokens, self.operating_point)

    def at(self, tokens: Tokens, cut: Cut) -> Tokens:
        """Ranked tokens, cut at one point. Without patch tokens, a count is of leading global tokens."""
        if cut.threshold is None:
            return tokens
        if tokens.ranking is None:
            return tokens.cut_globals(int(cut.threshold))
        return tokens.cut(self.filter.rule, cut.threshold, self.filter.replay)

    def rate_bits(self, codec: Any, tokens: Tokens, cut: Cut) -> Tensor | None:
        """(B,) float64: R(theta) of tokens cut at one water level; None where that is not how they were cut."""
        ranking, threshold = tokens.ranking, cut.threshold
        if ranking is None or self.filter.rule != "marginal" or not threshold or not SCORES[ranking.score].in_signal:
            return None
        codes = codec.code_vectors()[1]
        dimensions = 0 if codes is None else codes.shape[1]
        return rate_bits(ranking.score_units, tokens.patch_counts, threshold, ranking.resolution, dimensions)

    def bits_coded(self, codec: Any, tokens: Tokens) -> Tensor:
        """(B,) float64: bits with patch codes entropy-coded by q; everything else as in `bits_fixed`."""
        fixed = tokens.bits(codec.config.bits_per_token)
        if codec.entropy_model is None:
            return fixed
        if tokens.side.positions == "replayed" and tokens.ranking is not None:
            schedule = ranking_schedule(tokens.ranking)
        else:
            schedule = grid_schedule(tokens.kept_mask, self.filter.coding_rounds)
        return fixed - tokens.patch_counts * codec.config.bits_per_token + codec.code_lengths(tokens, schedule)


class Sums:
    """Base of dataclasses of sums over images: `merge` adds what was measured on later images, field by field."""

    def merge(self, later: Self) -> None:
        """Add `later`, in place; sums of floats depend on their order."""
        for name, theirs in vars(later).items():
            setattr(self, name, _added(getattr(self, name), theirs))


def _added(ours: Any, theirs: Any) -> Any:
    """Numbers are added, (B, ...) values of images joined, other sums merged one by one; None was not measured."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    if isinstance(ours, int | float):
        return ours + theirs
    if isinstance(ours, np.ndarray):
        return np.concatenate([ours, theirs]) if len(ours) else theirs
    if isinstance(ours, list):
        return [_added(one, other) for one, other in zip(ours, theirs, strict=True)]
    if isinstance(ours, dict):
        return {name: _added(one, theirs[name]) for name, one in ours.items()}
    ours.merge(theirs)
    return ours


def no_values() -> np.ndarray:
    """Of no image."""
    return np.zeros(0)


@dataclass
class CutLengths(Sums):
    """What the tokens that a cut keeps cost, and what became of the picture."""

    tokens: np.ndarray = field(default_factory=no_values)  # int64
    bits_fixed: np.ndarray = field(default_factory=no_values)  # log2 K a token; replay taken for granted
    bits_coded: np.ndarray = field(default_factory=no_values)  # patch codes entropy-coded
    squared_error: np.ndarray = field(default_factory=no_values)  # int64, grey levels squared
    rate_bits: np.ndarray | None = None  # where tokens were cut at one water level
    replay_state: np.ndarray | None = None  # where positions are replayed: 1 replayed, 0 not, -1 not verified
    fallback_bits: np.ndarray | None = None  # how many bits more than replayed positions sent ones cost

    def charged(self, bits: np.ndarray) -> np.ndarray:
        """(B,) bits with fallbacks paid for: verified images as they are, others their share of what one costs."""
        if self.replay_state is None:
            return bits
        share = np.where(self.replay_state < 0, self.fallback_share, self.replay_state == 0)
        return bits + share * self.fallback_bits

    @property
    def fallback_share(self) -> float:
        """Of the verified images, how many were not replayed."""
        verified = self.replay_state[self.replay_state >= 0] if self.replay_state is not None else np.zeros(0)
        return float((verified == 0).mean()) if len(verified) else 0.0


@dataclass
class Shown(Sums):
    """The pictures of `EvaluationPlan.shown`, as decoded from what a cut keeps."""

    pictures: np.ndarray = field(default_factory=no_values)  # (B, H, W, 3) uint8
    kept_mask: np.ndarray = field(default_factory=no_values)  # (B, N) bool
    tokens: np.ndarray = field(default_factory=no_values)  # (B,) int64


@dataclass
class Contents(Sums):
    """How much there is to say of a picture, whatever is kept of it."""

    png_bytes: np.ndarray = field(default_factory=no_values)  # size of the smallest PNG
    total_score: np.ndarray | None = None  # of all patch tokens, where they are ranked


@dataclass
class EvaluationTotals(Sums):
    """Sums over images. Rates belong to a batch size: seconds to encode, rank and decode are those of whole batches."""

    seconds: float = 0.0  # reading, coding, measuring
    timed: int = 0  # images in whole batches
    encode: float = 0.0
    rank: float = 0.0
    decode: float = 0.0  # at the operating point
    replay: float = 0.0  # verifying replayed positions at the operating point
    lpips: float | None = None  # at the operating point; None: not measured


@dataclass
class NetworkSums(Sums):
    """What feature networks say of some pictures."""

    score: InceptionScore  # by the main network
    features: list[FeatureStatistics]  # by each network, the main one first


@dataclass
class CutSums(Sums):
    """Everything that is measured at one cut."""

    networks: NetworkSums  # of the reconstructions
    quality: ImageQuality = field(default_factory=ImageQuality)
    lengths: CutLengths = field(default_factory=CutLengths)
    shown: Shown = field(default_factory=Shown)


@dataclass
class Measurements(Sums):
    """What was measured on some pictures of the plan."""

    cuts: dict[str, CutSums]  # by the names of `Cut`, the operating point first
    codes: dict[str, CodeUsage]  # of global and patch tokens, by kind, at the operating point
    originals: NetworkSums | None = None  # only while there are no reference statistics
    contents: Contents | None = None  # only where there is a curve
    totals: EvaluationTotals = field(default_factory=EvaluationTotals)
    limits: np.ndarray = field(default_factory=no_values)  # (B, 2) of `Ranking.limits`, where tokens are ranked

    @property
    def operating(self) -> CutSums:
        """At the configured cut."""
        return self.cuts[OPERATING]

    @property
    def images(self) -> int:
        """How many were measured."""
        return int(self.operating.networks.features[0].n)
