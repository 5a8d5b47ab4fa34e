"""From sums to named numbers, and what to say beside each."""

from collections.abc import Iterator

from pipeline.evaluation.curve import Distance, content_results, cut_results, frechet
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.plan import Plan
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.report import SMALL, Row

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
