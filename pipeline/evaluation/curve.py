"""The rate-distortion curve of a tokenizer: what was measured at each cut, as named numbers and as rows of a table.

Shapes: B images.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.measurements import Measurements, PerImage
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.replay import charged, fallback_share
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.rate_distortion import spearman, spearman_interval

SEED = 0  # of bootstrap intervals
COLUMNS = ("threshold", "tokens_per_image", "bits_fixed", "bits_coded", "psnr", "ssim")  # of the table, then distances


@dataclass(frozen=True)
class Distance:
    """One Frechet distance."""

    key: str  # ending of the states' names, see `Instruments.extractors`
    name: str  # rfid or rfd_<extractor>
    reference: Reference


def cut_results(found: Measurements, prefix: str, distances: list[Distance], pixels: int) -> dict[str, float]:
    """Every metric of one cut by its name.

    Args:
        found: on all images.
        prefix: '' for the operating point, `curve00.` and so on for points of the curve.
        distances: Frechet distances to report.
        pixels: of an image, height times width.
    """
    lengths = found[f"{prefix}lengths"]
    results = dict(found[f"{prefix}quality"].results())
    for distance in distances:
        results[distance.name] = frechet(found[f"{prefix}features{distance.key}"], distance.reference)
    results |= length_results(lengths["tokens"], bits_of(lengths, "bits_fixed"), bits_of(lengths, "bits_coded"), pixels)
    if "rate_bits" in lengths.arrays:
        results["rate_bits"] = _mean(lengths["rate_bits"])
    if "replay_state" in lengths.arrays:
        states = lengths["replay_state"]
        results["replay_checked_images"] = float((states >= 0).sum())
        results["replay_fallback_share"] = fallback_share(states)
    return results


def bits_of(lengths: PerImage, name: str) -> np.ndarray:
    """(B,) bits_fixed or bits_coded of each image; those that a reader cannot replay pay for their positions."""
    if "replay_state" not in lengths.arrays:
        return lengths[name]
    return charged(lengths[name], lengths["replay_state"], lengths["fallback_bits"])


def length_results(tokens: np.ndarray, bits_fixed: np.ndarray, bits_coded: np.ndarray, pixels: int) -> dict[str, float]:
    """Of (B,) tokens and bits of each image; a generator takes one step per token."""
    low, middle, high = np.percentile(tokens, (5, 50, 95)).tolist()
    mean, fixed, coded = _mean(tokens), _mean(bits_fixed), _mean(bits_coded)
    return {
        "tokens_per_image": mean,
        "tokens_std": float(tokens.std()),
        "tokens_p05": low,
        "tokens_p50": middle,
        "tokens_p95": high,
        "generator_steps": mean,
        "bits_fixed": fixed,
        "bits_coded": coded,
        "bits_per_pixel": fixed / pixels,
        "bits_coded_per_pixel": coded / pixels,
    }


def content_results(found: Measurements) -> dict[str, float]:
    """Whether lengths, or at one length errors, follow what a picture holds: Spearman's rho with its size as PNG."""
    content, lengths = found["images"]["png_bytes"], found["lengths"]
    varies = bool(lengths["tokens"].std() > 0)
    name, values = ("tokens", lengths["tokens"]) if varies else ("error", lengths["squared_error"])
    if len(content) < 3 or values.std() == 0 or content.std() == 0:
        return {}
    low, high = spearman_interval(values, content, SEED)
    key = f"spearman_{name}_png"
    return {key: spearman(values, content), f"{key}_low": low, f"{key}_high": high}


def frechet(features: FeatureStatistics, reference: Reference) -> float:
    """Frechet distance between reconstructions and originals; arithmetic may leave a tiny negative one: 0."""
    return max(0.0, frechet_distance(features.mean(), features.covariance(), reference.mu, reference.sigma))


def table(points: list[tuple[str, dict[str, float]]], distances: list[str]) -> list[list[str]]:
    """Header and a line for each named cut, for people."""
    from pipeline.evaluation.report import format_value

    columns = [*COLUMNS[1:], *distances]
    header = ["cut", *(name.replace("_per_image", "") for name in columns)]
    return [header, *([label, *(format_value(values[name]) for name in columns)] for label, values in points)]


def _mean(values: np.ndarray) -> float:
    """The same to the last bit however images were shared out."""
    return math.fsum(values) / len(values)
