"""From sums to named numbers, and what to say beside each."""

from collections.abc import Iterator

from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.plan import Plan
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.report import SMALL, Row
from tatok_model.metrics.frechet import frechet_distance

BASELINE = "baseline_kmeans_"


def tokenizer_results(
    found: Measurements, reference: Reference, extractor: Extractor, pixels: int, plan: Plan
) -> dict[str, float]:
    """Every metric of a tokenizer by its name in summary.json.

    Args:
        found: on all images of the plan.
        reference: statistics of the originals.
        extractor: of both.
        pixels: of an image, height times width.
        plan: for the batch size that the rates belong to.
    """
    totals, n = found["totals"].values, found.images
    results: dict[str, float] = {"images": n, "batch_size": plan.batch_size}
    results |= found["quality"].results()
    if "lpips" in totals:
        results["lpips"] = totals["lpips"] / n
    results[extractor.distance_name] = distance(found, reference)
    results[extractor.score_name] = found["score"].result()
    if reference.inception_score is not None:
        results[f"{extractor.score_name}_originals"] = reference.inception_score
    for kind in ("global", "patch"):
        if f"codes_{kind}" in found:
            results[f"codebook_usage_{kind}"] = found[f"codes_{kind}"].usage
            results[f"codebook_perplexity_{kind}"] = found[f"codes_{kind}"].perplexity
    results["tokens_per_image"] = totals["tokens"] / n
    results["bits_per_image"] = totals["bits"] / n
    results["bits_per_pixel"] = totals["bits"] / n / pixels
    results["encode_images_per_second"] = totals["timed"] / totals["encode_seconds"]
    results["decode_images_per_second"] = totals["timed"] / totals["decode_seconds"]
    results["images_per_second"] = n / totals["seconds"]
    return results


def baseline_results(found: Measurements, reference: Reference, extractor: Extractor) -> dict[str, float]:
    """What a baseline is compared by."""
    quality = found["quality"].results()
    return {
        f"{BASELINE}psnr": quality["psnr"],
        f"{BASELINE}psnr_pooled": quality["psnr_pooled"],
        f"{BASELINE}ssim": quality["ssim"],
        f"{BASELINE}{extractor.distance_name}": distance(found, reference),
        f"{BASELINE}bits_per_image": found["totals"].values["bits"] / found.images,
    }


def distance(found: Measurements, reference: Reference) -> float:
    """Frechet distance between reconstructions and originals; arithmetic may leave a tiny negative one: 0."""
    features = found["features"]
    return max(0.0, frechet_distance(features.mean(), features.covariance(), reference.mu, reference.sigma))


def warnings(results: dict[str, float], reference: Reference, extractor: Extractor) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    n, name, found = int(results["images"]), extractor.distance_name, []
    if n < SMALL:
        found.append(f"{name} over {n} images: below {SMALL} it is biased upwards by about 1/N and says little")
    if reference.meta is None:
        found.append(f"{name} is against a reference that does not say how its images were cropped and resized")
    if reference.n is not None and reference.n != n:
        found.append(f"{name} compares {n} images with statistics of {reference.n}: its bias depends on both")
    if not extractor.comparable:
        found.append(f"{name} compares tokenizers of this project and is no FID: do not set it beside published ones")
    return found


def rows(results: dict[str, float], extractor: Extractor, device: str) -> Iterator[Row]:
    """The table: every result with a note, in the order they are in."""
    notes = _notes(results, extractor, device)
    for name, value in results.items():
        yield Row(name, value, notes.get(name) or notes.get(name.removeprefix(BASELINE), ""))


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
        "bits_per_image": "bits_fixed: log2 K per token",
        "encode_images_per_second": rate,
        "decode_images_per_second": rate,
        "images_per_second": "one worker: reading, coding, measuring",
        f"{BASELINE}psnr": "dB, patch k-means of at most the same bits",
    }
