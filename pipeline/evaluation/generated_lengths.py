"""Are generated token sequences as long as real ones? Means, deviations, Kolmogorov-Smirnov distances.

Shapes: B generated pictures, R real ones.
"""

import re

import numpy as np

from pipeline.config import Config
from pipeline.data.manifest import SPLITS
from pipeline.generating.token_data import TokenDataset

VIEW = re.compile(r"@(flip|crop\d+)$")  # ending of the id of a picture's mirror image or shifted copy


def real_lengths(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the pictures behind `tokens.path` at the configured cut; mirrored and shifted copies do not count.

    Returns:
        counts: (R,) int64, M + T of each picture of both splits.
        labels: (R,) int64, -1 for none.

    Raises:
        BadInput: a stream that cannot be read or cut; see `TokenDataset.load`.
    """
    counts, labels = [], []
    for split in SPLITS:
        rows = TokenDataset.load(config.tokens.path, split, config.filter)
        originals = np.array([VIEW.search(name) is None for name in rows.ids], dtype=bool)
        counts.append(rows.lengths()[originals])
        labels.append(rows.labels[originals])
    return np.concatenate(counts), np.concatenate(labels)


def compare_lengths(
    counts: np.ndarray, labels: np.ndarray, real_counts: np.ndarray, real_labels: np.ndarray
) -> dict[str, float]:
    """Generated against real lengths, by their names in summary.json.

    Classes count that both sides have pictures of.

    Args:
        counts: (B,) tokens of each generated picture.
        labels: (B,) classes that were asked for, -1 for none.
        real_counts: (R,).
        real_labels: (R,).
    """
    found = {
        "tokens_per_image": float(counts.mean()),
        "tokens_per_image_real": float(real_counts.mean()),
        "tokens_std": float(counts.std()),
        "tokens_std_real": float(real_counts.std()),
        "tokens_mean_difference": _difference(counts, real_counts),
        "tokens_ks": ks_distance(counts, real_counts),
    }
    classes = np.intersect1d(labels[labels >= 0], real_labels)
    if len(classes):
        pairs = [(counts[labels == label], real_counts[real_labels == label]) for label in classes]
        distances = [ks_distance(*pair) for pair in pairs]
        found["tokens_ks_worst"] = max(distances)
        found["tokens_ks_worst_class"] = int(classes[np.argmax(distances)])
        found["tokens_mean_difference_worst"] = max((_difference(*pair) for pair in pairs), key=abs)
    return found


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference between the distribution functions of (B,) and (R,) values, 0 to 1 (Kolmogorov-Smirnov)."""
    points = np.union1d(first, second)
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def _difference(counts: np.ndarray, real_counts: np.ndarray) -> float:
    """Of the means, relative to the real one."""
    return float(counts.mean() / real_counts.mean() - 1)
