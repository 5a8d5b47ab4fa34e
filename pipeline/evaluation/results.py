"""From sums to named numbers, and what to say beside each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.console import SMALL, Row
from pipeline.core.files import sha256_file
from pipeline.core.run import Run
from pipeline.evaluation.actors import Bench
from pipeline.evaluation.evaluator import charged, fallback_share
from pipeline.evaluation.measurements import Measurements, PerImage, Plan
from pipeline.evaluation.reference import Extractor, Reference, cache_path, describe, read_cached, read_given
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.rate_distortion import spearman, spearman_interval

# The rate-distortion curve of a tokenizer: what was measured at each cut, as named numbers and as rows of a table.

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
    from pipeline.core.console import format_value

    columns = [*COLUMNS[1:], *distances]
    header = ["cut", *(name.replace("_per_image", "") for name in columns)]
    return [header, *([label, *(format_value(values[name]) for name in columns)] for label, values in points)]


def _mean(values: np.ndarray) -> float:
    """The same to the last bit however images were shared out."""
    return math.fsum(values) / len(values)


# Which Frechet distances an evaluation reports, and the statistics of originals that they are measured against.


def measured_with_distances(run: Run, bench: Bench, tokenizer: object) -> tuple[Measurements, list[Distance]]:
    """Measure the tokenizer, and the originals too where their statistics are not known yet.

    Returns:
        What was measured; the Frechet distances to report, the main one first.

    Raises:
        BadInput: kept or given statistics are of other images or another network.
        Stopped: the run was asked to stop.
    """
    extractors = {"": bench.extractor, **{f"@{extractor.name}": extractor for extractor in bench.more}}
    known = {key: known_reference(run, bench, extractor) for key, extractor in extractors.items()}
    found = bench.measure("evaluate", tokenizer, originals=None in known.values())
    distances = []
    for key, extractor in extractors.items():
        reference = known[key] or new_reference(run, bench, found, key, extractor)
        distances.append(Distance(key, extractor.distance_name, reference))
    return found, distances


def known_reference(run: Run, bench: Bench, extractor: Extractor) -> Reference | None:
    """Statistics of the originals that were given for the main extractor, or kept by an earlier run."""
    meta = describe(bench.manifest, bench.plan, extractor)
    width = extractor.network.feature_dim
    given = run.config.evaluate.reference if extractor is bench.extractor else ""
    path = Path(given or cache_path(run.config.run.output, meta))
    reference = read_given(str(path), meta, width) if given else read_cached(path, meta, width)
    if reference is not None:
        run.inputs[_reference_name(bench, extractor)] = {"path": str(path), "sha256": sha256_file(path)}
    return reference


def new_reference(run: Run, bench: Bench, found: Measurements, key: str, extractor: Extractor) -> Reference:
    """Statistics of the originals, kept for later runs."""
    meta = describe(bench.manifest, bench.plan, extractor)
    score = found["original_score"].result() if extractor is bench.extractor else None
    reference = Reference.of(found[f"original_features{key}"], score, meta)
    path = cache_path(run.config.run.output, meta)
    reference.save(path)
    run.outputs[_reference_name(bench, extractor)] = str(path)
    return reference


def _reference_name(bench: Bench, extractor: Extractor) -> str:
    return "reference" if extractor is bench.extractor else f"reference_{extractor.name}"


BASELINE = "baseline_kmeans_"


def tokenizer_results(
    found: Measurements, distances: list[Distance], reference: Reference, extractor: Extractor, pixels: int, plan: Plan
) -> dict[str, float]:
    """Every metric of a tokenizer at its operating point, by its name in summary.json.

    Args:
        found: on all images of the plan.
        distances: Frechet distances, the main one first.
        reference: statistics of the originals, for the main extractor.
        extractor: the main one.
        pixels: of an image, height times width.
        plan: for the batch size that the rates belong to.
    """
    totals, n = found["totals"].values, found.images
    results: dict[str, float] = {"images": n, "batch_size": plan.batch_size}
    results |= cut_results(found, "", distances, pixels)
    if "images" in found:
        results |= content_results(found)
    if "lpips" in totals:
        results["lpips"] = totals["lpips"] / n
    results[extractor.score_name] = found["score"].result()
    if reference.inception_score is not None:
        results[f"{extractor.score_name}_originals"] = reference.inception_score
    for kind in ("global", "patch"):
        if f"codes_{kind}" in found:
            results[f"codebook_usage_{kind}"] = found[f"codes_{kind}"].usage
            results[f"codebook_perplexity_{kind}"] = found[f"codes_{kind}"].perplexity
    for name in ("encode", "rank", "decode"):
        if f"{name}_seconds" in totals:  # nothing is ranked where everything is kept
            results[f"{name}_images_per_second"] = totals["timed"] / totals[f"{name}_seconds"]
    if totals.get("replay_seconds"):
        results["replay_images_per_second"] = results["replay_checked_images"] / totals["replay_seconds"]
    results["images_per_second"] = n / totals["seconds"]
    return results


def curve_results(
    found: Measurements, names: list[str], distances: list[Distance], pixels: int
) -> list[dict[str, float]]:
    """Every metric of each point of the curve, in the order of `names`."""
    return [cut_results(found, f"{name}.", distances, pixels) for name in names]


def baseline_results(found: Measurements, distances: list[Distance]) -> dict[str, float]:
    """What a baseline is compared by."""
    quality, lengths = found["quality"].results(), found["lengths"]
    return {
        f"{BASELINE}psnr": quality["psnr"],
        f"{BASELINE}psnr_pooled": quality["psnr_pooled"],
        f"{BASELINE}ssim": quality["ssim"],
        **{f"{BASELINE}{one.name}": frechet(found[f"features{one.key}"], one.reference) for one in distances},
        f"{BASELINE}bits_per_image": float(lengths["bits_fixed"].mean()),
    }


def warnings(results: dict[str, float], reference: Reference, extractor: Extractor) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    n, told = int(results["images"]), (reference, extractor.comparable, "tokenizers")
    return distance_warnings(extractor.distance_name, n, *told)


def distance_warnings(name: str, images: int, reference: Reference, comparable: bool, compared: str) -> list[str]:
    """What a reader must know of a Frechet distance.

    Args:
        name: of the metric.
        images: how many were measured.
        reference: what they are compared with.
        comparable: whether its numbers may stand beside published ones.
        compared: what the distance tells apart, in the plural.
    """
    found = []
    if images < SMALL:
        found.append(f"{name} over {images} images: below {SMALL} it is biased upwards by about 1/N and says little")
    if reference.meta is None:
        found.append(f"{name} is against a reference that does not say how its images were cropped and resized")
    if reference.n is not None and reference.n != images:
        found.append(f"{name} compares {images} images with statistics of {reference.n}: its bias depends on both")
    if not comparable:
        found.append(f"{name} compares {compared} of this project and is no FID: do not set it beside published ones")
    return found


def rows(results: dict[str, float], extractor: Extractor, device: str) -> Iterator[Row]:
    """The table: every result with a note, in the order they are in."""
    notes = _notes(results, extractor, device)
    for name, value in results.items():
        yield Row(name, value, notes.get(name) or notes.get(_bare(name), ""))


def _bare(name: str) -> str:
    """Without the beginning that says which baseline."""
    return name.split("_", 2)[2] if name.startswith("baseline_") else name


def _notes(results: dict[str, float], extractor: Extractor, device: str) -> dict[str, str]:
    place = "one CPU core" if device == "cpu" else "one GPU"  # what each actor reserves
    rate = f"one worker on {place}, batch {results['batch_size']:.0f}, after warm-up"
    return {
        "images": "held-out",
        "psnr": "dB, mean over images",
        "psnr_pooled": "dB of the mean squared error",
        "psnr_p10": "dB, exceeded by 90% of images",
        "ssim": "gaussian window 11, sigma 1.5",
        "lpips": "lower is better",
        extractor.distance_name: f"Frechet distance, {extractor.name}",
        extractor.score_name: f"of reconstructions, {extractor.name}",
        f"{extractor.score_name}_originals": "the same of originals",
        "codebook_usage_global": "share of entries in use",
        "codebook_usage_patch": "share of entries in use",
        "tokens_per_image": "mean; global and kept patch tokens",
        "tokens_std": "over images",
        "generator_steps": "one per token",
        "bits_fixed": "log2 K per token, length and positions counted",
        "bits_coded": "patch codes entropy-coded by q",
        "rate_bits": "R(theta): bits that Gaussian components of the kept scores would cost at this level",
        "bits_per_pixel": "of bits_fixed",
        "bits_coded_per_pixel": "of bits_coded",
        "spearman_tokens_png": "do lengths follow the size as PNG; 95% interval below",
        "spearman_error_png": "do errors at one length follow the size as PNG; 95% interval below",
        "bits_per_image": "headers and tables not counted",
        "replay_checked_images": "whose replay was verified, one by one",
        "replay_fallback_share": "of them, positions sent instead and paid for",
        "replay_images_per_second": "one image at a time, one thread; a writer's check or a reader",
        "rank_images_per_second": rate,
        "encode_images_per_second": rate,
        "decode_images_per_second": rate,
        "images_per_second": "one worker: reading, coding, measuring",
        f"{BASELINE}psnr": "dB, patch k-means of at most the same bits",
    }
