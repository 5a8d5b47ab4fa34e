"""What was measured on some of the images: sums that merge, and pass between processes as bytes."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
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
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

# At which cuts a tokenizer is measured: the configured operating point, and the points of a rate-distortion curve.

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


# Which pictures are measured, cut into ranges before any work.

SPLIT_IMAGES = 5000  # images in a split of the Inception score, as in ADM's evaluator
SHUFFLE_SEED = 2020  # of the deal of images into those splits: shards may be sorted by class
NARROW, WIDE = 512, 2048  # images per range; a range returns F x F float64, 33.5 MB at 2048 features
NARROW_FEATURES = 512


@dataclass(frozen=True)
class Plan:
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

    @property
    def score_splits(self) -> int:
        """Into how many equal splits the Inception score deals the pictures."""
        return max(1, self.count // SPLIT_IMAGES)

    def score_split_of(self) -> np.ndarray:
        """(count,) int64, the split of the Inception score that each picture belongs to."""
        shuffled = np.random.default_rng(SHUFFLE_SEED).permutation(self.count)
        return shuffled * self.score_splits // self.count


def make_plan(total: int, feature_dim: int, config: EvaluateConfig) -> Plan:
    """The plan for a split of `total` pictures.

    Args:
        total: pictures in the split.
        feature_dim: F of the extractor; wide states are returned less often.
        config: how many pictures, in which batches.

    Raises:
        BadInput: fewer than two pictures, of which no covariance can be taken.
    """
    count = min(config.max_images or total, total)
    if count < 2:
        raise BadInput(f"{count} held-out pictures would be measured; expected at least 2 for a Frechet distance")
    batch = min(config.batch_size, count)
    wanted = NARROW if feature_dim <= NARROW_FEATURES else WIDE
    return Plan(count, total, batch, -(-wanted // batch) * batch, min(config.grid_images, count))


class Totals:
    """Named sums."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def merge(self, other: "Totals") -> None:
        """Add another part's sums."""
        for name, value in other.values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: one () per name."""
        return {name: np.array(value) for name, value in self.values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(**{name: float(value) for name, value in arrays.items()})


class Pictures:
    """Reconstructions that will be shown: (B, H, W, 3) uint8, in the order of their images."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def merge(self, other: "Pictures") -> None:
        """Append a later part's pictures."""
        self.images = np.concatenate([self.images, other.images])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: images (B, H, W, 3)."""
        return {"images": self.images}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(arrays["images"])


class PerImage:
    """Named values of each image, in the order of the images: (B, ...) arrays of equal length."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def merge(self, later: "PerImage") -> None:
        """Append a later part's values."""
        pairs = {name: (self.arrays.get(name), array) for name, array in later.arrays.items()}
        self.arrays = {name: new if old is None else np.concatenate([old, new]) for name, (old, new) in pairs.items()}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: one array per name."""
        return self.arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(**arrays)


KINDS: dict[str, Any] = {
    "features": FeatureStatistics,  # of reconstructions
    "original_features": FeatureStatistics,  # only while there are no reference statistics
    "score": InceptionScore,
    "original_score": InceptionScore,
    "quality": ImageQuality,
    "codes_global": CodeUsage,
    "codes_patch": CodeUsage,
    "totals": Totals,
    "pictures": Pictures,
    "lengths": PerImage,  # tokens, patch_tokens, bits_fixed, bits_coded, squared_error; at one water level rate_bits;
    # where positions are replayed replay_state, fallback_bits
    "images": PerImage,  # png_bytes, total_score: what a picture holds, whatever is kept of it
    "shown": PerImage,  # pictures, kept_mask: of the pictures that are shown
}


def kind_of(name: str) -> Any:
    """The class of a state: names may carry a point of the curve before a dot, and an extractor after an @."""
    return KINDS[name.rsplit(".", maxsplit=1)[-1].split("@", maxsplit=1)[0]]


class Measurements:
    """One state per name, see `kind_of`; names that were not measured are missing."""

    def __init__(self, **states: Any) -> None:
        self.states = states

    def __getitem__(self, name: str) -> Any:
        return self.states[name]

    def __contains__(self, name: str) -> bool:
        return name in self.states

    @property
    def images(self) -> int:
        """How many images were measured."""
        return int(self["features"].n)

    def merge(self, later: "Measurements") -> None:
        """Add what was measured on the images after these; sums of floats depend on their order.

        Raises:
            ValueError: the two did not measure the same things.
        """
        if self.states.keys() != later.states.keys():
            raise ValueError(f"cannot merge {sorted(later.states)} into {sorted(self.states)}")
        for name, state in later.states.items():
            self[name].merge(state)

    def to_bytes(self) -> bytes:
        """As an uncompressed npz with one array per `name/part`."""
        arrays = {
            f"{name}/{part}": array for name, state in self.states.items() for part, array in state.to_arrays().items()
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in arrays.files:
                name, part = key.split("/")
                parts.setdefault(name, {})[part] = arrays[key]
        return cls(**{name: kind_of(name).from_arrays(arrays) for name, arrays in parts.items()})
