"""Which pictures are measured, cut into ranges before any work.

The cut depends on the number of pictures, the batch size and the extractor, never on how many workers there are: a
range is measured the same way whoever does it, so the merged result is the same to the last bit.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.config import EvaluateConfig
from pipeline.errors import BadInput

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
