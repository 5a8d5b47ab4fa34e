"""From sums to named metrics, their notes and the report; a rate-distortion curve also leaves these files.

    images.parquet                     a row per image: its content, and at each cut its tokens, bits and error
    pictures/rate_distortion.png       distortion against tokens and bits
    pictures/token_histogram.png       tokens per image at the operating point
    pictures/kept_patches.png          which patches are kept at three thresholds, and what is decoded from them

Shapes: B images.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.collages import KeptRow, kept_patches_picture
from pipeline.core.console import Row, columns, format_value, markdown, say, terminal_table
from pipeline.core.files import write_atomically
from pipeline.core.plots import Curve, rate_distortion_plot, token_histogram
from pipeline.core.run import Run
from pipeline.evaluation.evaluator import EvaluationSetup
from pipeline.evaluation.measurements import OPERATING, Cut, CutSums, Measurements, NetworkSums
from pipeline.evaluation.reference import Distance, Extractor, describe, known_reference, new_reference
from pipeline.tokens.decoder import cut_warning
from pipeline.tracking import Tracker
from tatok_model.metrics.rate_distortion import spearman, spearman_interval

SEED = 0  # of bootstrap intervals
COLUMNS = ("tokens_per_image", "bits_fixed", "bits_coded", "psnr", "ssim")  # of the table, then distances
BASELINE = "baseline_kmeans_"
CurveResults = list[tuple[Cut, dict[str, float]]]  # the points of a curve in order, with their metrics

SMALL = 2048  # images, below which a Frechet distance is too biased to compare


def measured_with_distances(run: Run, setup: EvaluationSetup, tokenizer: object) -> tuple[Measurements, list[Distance]]:
    """Measure the tokenizer, and the originals too where their statistics for a distance are not known yet.

    Raises:
        BadInput: saved or given statistics are of other images or another network.
        Stopped: the run was asked to stop.
    """
    metas = [describe(setup.pictures.manifest, setup.plan, extractor) for extractor in setup.extractors]
    numbered = list(enumerate(setup.extractors))
    known = [known_reference(run, metas[i], extractor, main=i == 0) for i, extractor in numbered]
    found = setup.measure("evaluate", tokenizer, None in known, setup.cuts)
    originals = cast(NetworkSums, found.originals)  # measured where a reference is missing
    distances = []
    for i, extractor in numbered:
        reference = known[i]
        if reference is None:
            measured = originals.features[i], originals.score.result()
            reference = new_reference(run, metas[i], extractor, i == 0, *measured)
        distances.append(Distance(extractor, reference))
    return found, distances


def tokenizer_results(found: Measurements, distances: list[Distance], pixels: int, batch_size: int) -> dict[str, float]:
    """Every metric of a tokenizer at its operating point, by its name in summary.json.

    `distances` are those to report, the main one first; `pixels` is height times width of an image.
    """
    totals, n, main = found.totals, found.images, distances[0]
    results: dict[str, float] = {"images": n, "batch_size": batch_size}
    results |= cut_results(found.operating, distances, pixels)
    results |= content_results(found)
    if totals.lpips is not None:
        results["lpips"] = totals.lpips / n
    results[main.extractor.score_name] = found.operating.networks.score.result()
    if main.reference.inception_score is not None:
        results[f"{main.extractor.score_name}_originals"] = main.reference.inception_score
    for kind, usage in found.codes.items():
        results[f"codebook_usage_{kind}"] = usage.usage
        results[f"codebook_perplexity_{kind}"] = usage.perplexity
    for name, seconds in (("encode", totals.encode), ("rank", totals.rank), ("decode", totals.decode)):
        if seconds:  # 0 for `rank` where everything is kept
            results[f"{name}_images_per_second"] = totals.timed / seconds
    if totals.replay:
        results["replay_images_per_second"] = results["replay_checked_images"] / totals.replay
    results["images_per_second"] = n / totals.seconds
    return results


def cut_results(sums: CutSums, distances: list[Distance], pixels: int) -> dict[str, float]:
    """Every metric of one cut by its name; arguments as of `tokenizer_results`."""
    lengths = sums.lengths
    results = sums.quality.results() | distance_results(sums, distances)
    results |= length_results(
        lengths.tokens, lengths.charged(lengths.bits_fixed), lengths.charged(lengths.bits_coded), pixels
    )
    if lengths.rate_bits is not None:
        results["rate_bits"] = _mean(lengths.rate_bits)
    if lengths.replay_state is not None:
        results["replay_checked_images"] = float((lengths.replay_state >= 0).sum())
        results["replay_fallback_share"] = lengths.fallback_share
    return results


def distance_results(sums: CutSums, distances: list[Distance]) -> dict[str, float]:
    """Frechet distances between reconstructions and originals."""
    return {one.name: one.of(features) for one, features in zip(distances, sums.networks.features, strict=True)}


def length_results(tokens: np.ndarray, bits_fixed: np.ndarray, bits_coded: np.ndarray, pixels: int) -> dict[str, float]:
    """Means and percentiles of (B,) tokens and bits of each image; a generator takes one step per token."""
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
    """Spearman's rho of token counts, or of errors where all counts are equal, with a picture's size as PNG."""
    if found.contents is None:
        return {}
    content, lengths = found.contents.png_bytes, found.operating.lengths
    varies = bool(lengths.tokens.std() > 0)
    name, values = ("tokens", lengths.tokens) if varies else ("error", lengths.squared_error)
    if len(content) < 3 or values.std() == 0 or content.std() == 0:
        return {}
    low, high = spearman_interval(values, content, SEED)
    key = f"spearman_{name}_png"
    return {key: spearman(values, content), f"{key}_low": low, f"{key}_high": high}


def baseline_results(sums: CutSums, distances: list[Distance]) -> dict[str, float]:
    """Every metric of a baseline by its name."""
    quality = sums.quality.results()
    results = {name: quality[name] for name in ("psnr", "psnr_pooled", "ssim")} | distance_results(sums, distances)
    results["bits_per_image"] = float(sums.lengths.bits_fixed.mean())
    return {f"{BASELINE}{name}": value for name, value in results.items()}


def _mean(values: np.ndarray) -> float:
    """Exact summation, so that the order of images does not matter."""
    return math.fsum(values) / len(values)


# Notes and warnings beside the metrics.


def distance_warnings(name: str, images: int, distance: Distance, compared: str) -> list[str]:
    """Warnings for readers who compare a Frechet distance over `images` images with others.

    `compared`: what the distance is to compare, e.g. "tokenizers".
    """
    found, reference = [], distance.reference
    if images < SMALL:
        found.append(f"{name} over {images} images: below {SMALL} it is biased upwards by about 1/N and says little")
    if reference.meta is None:
        found.append(f"{name} is against a reference that does not say how its images were cropped and resized")
    if reference.n is not None and reference.n != images:
        found.append(f"{name} compares {images} images with statistics of {reference.n}: its bias depends on both")
    if not distance.extractor.comparable:
        found.append(f"{name} compares {compared} of this project and is no FID: do not set it beside published ones")
    return found


def cut_warnings(run: Run, found: Measurements) -> list[str]:
    """What to say of a threshold that keeps nothing or everything; of a curve only where all its points do."""
    config, told = run.config, []
    thresholds = {OPERATING: config.filter.threshold}
    thresholds |= {f"curve{number:02d}": value for number, value in enumerate(config.evaluate.thresholds)}
    for name, threshold in thresholds.items():
        kept = found.cuts[name].lengths.tokens - config.tokenizer.global_tokens
        told.append(cut_warning(config, threshold, kept, found.limits.reshape(-1, 2)))
    operating, *curve = told
    return [text for text in (operating, *(curve[:1] if all(curve) and not operating else [])) if text]


def table(curve: CurveResults, rule: str, distances: list[Distance]) -> list[list[str]]:
    """A header and a line for each point of a curve; empty where there is no curve."""
    names = [*COLUMNS, *(distance.name for distance in distances)]
    lines = [["cut", *(name.replace("_per_image", "") for name in names)]] if curve else []
    for point, values in curve:
        label = "all" if point.threshold is None else f"{rule} {point.threshold:g}"
        lines.append([label, *(format_value(values[name]) for name in names)])
    return lines


def rows(results: dict[str, float], extractor: Extractor, device: str) -> Iterator[Row]:
    """The table: every result with a note, in the order of `results`."""
    notes = _notes(results, extractor, device)
    for name, value in results.items():
        bare = name.split("_", 2)[2] if name.startswith("baseline_") else name  # without "baseline_<which>_"
        yield Row(name, value, notes.get(name) or notes.get(bare, ""))


def _notes(results: dict[str, float], extractor: Extractor, device: str) -> dict[str, str]:
    place = "one CPU core" if device == "cpu" else "one GPU"  # what each worker has
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
        "spearman_tokens_png": "do lengths follow the size as PNG; report.md has the 95% interval",
        "spearman_error_png": "do errors at one length follow the size as PNG; report.md has the 95% interval",
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


def _is_detail(name: str) -> bool:
    """Whether a number is for the report and not for the terminal."""
    ends = "_low", "_high", "_pooled", "_p05", "_p50", "_p95", "_per_pixel", "_originals", "_steps", "batch_size"
    return name == "images" or name.endswith(ends) or "perplexity" in name


# Files in the run folder.


def report(
    run: Run,
    title: str,
    lines: list[Row],
    warnings: list[str],
    facts: dict[str, str],
    tracker: Tracker,
    cuts: list[list[str]] | None = None,
) -> None:
    """Print the table with its warnings, and below it that of the `cuts`; `report.md` has all, with the facts."""
    path = run.folder / "report.md"
    write_atomically(path, markdown(title, lines, warnings, facts, cuts).encode())
    run.outputs["report"] = str(path)
    tracker.artifact(path)
    say(terminal_table(title, [line for line in lines if not _is_detail(line.name)], warnings))
    if cuts:
        say("\n" + columns(cuts))


def keep_curve(
    run: Run, setup: EvaluationSetup, found: Measurements, curve: CurveResults, distance: str, tracker: Tracker
) -> None:
    """Write `images.parquet` and the pictures into the run folder; `distance` names the main Frechet distance."""
    path = run.folder / "images.parquet"
    write_atomically(path, _images_table(setup, found))
    run.outputs["images"] = str(path)
    tracker.artifact(path)
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    names = ["rate_distortion", "token_histogram", *(["kept_patches"] if setup.plan.grid else [])]
    files = {name: folder / f"{name}.png" for name in names}
    _draw_curve(run, files["rate_distortion"], curve, distance)
    title = f"Tokens per image, {run.config.filter.rule} {run.config.filter.threshold:g}"
    token_histogram(files["token_histogram"], found.operating.lengths.tokens, title)
    if setup.plan.grid:
        _draw_kept(run, setup, files["kept_patches"], found, curve)
    for name, file in files.items():
        run.outputs[name] = str(file)
        tracker.picture(file, name, 0)
        tracker.artifact(file, "pictures")


def _images_table(setup: EvaluationSetup, found: Measurements) -> bytes:
    """Parquet: id, label, png_bytes, total_score, then `operating_tokens`, ..., `curve00_tokens`, ..."""
    places = setup.plan.indices(np.arange(setup.plan.count)).tolist()
    table: dict[str, object] = {"id": setup.pictures.ids(places), "label": setup.pictures.labels(places)}
    table |= {name: values for name, values in vars(found.contents).items() if values is not None}
    for name, sums in found.cuts.items():
        lengths = sums.lengths
        table[f"{name}_tokens"] = lengths.tokens
        table[f"{name}_squared_error"] = lengths.squared_error
        table[f"{name}_bits_fixed"] = lengths.charged(lengths.bits_fixed)
        table[f"{name}_bits_coded"] = lengths.charged(lengths.bits_coded)
        largest = 255**2 * 3 * setup.pixels  # squared error, summed over an image
        table[f"{name}_psnr"] = 10 * np.log10(largest / np.maximum(lengths.squared_error, 1))  # as `images.psnr`
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, compression="ZSTD")
    return file.getvalue()


def _draw_curve(run: Run, path: Path, points: CurveResults, distance: str) -> None:
    section = run.config.filter

    def series(name: str) -> list[float]:
        return [values[name] for _, values in points]

    label = f"{section.score}, {section.rule}" if run.config.tokenizer.patch_tokens else "global tokens"
    operating = [number for number, (point, _) in enumerate(points) if point.threshold == section.threshold]
    lines = [
        Curve(
            label, series("tokens_per_image"), series("bits_fixed"), series("psnr"), series(distance),
            bits_coded=series("bits_coded"), operating_point=operating[0] if operating else None,
        )
    ]  # fmt: skip
    for codec in ("jpeg", "webp"):
        if f"baseline_{codec}_curve00_psnr" in run.results:
            prefixes = [f"baseline_{codec}_{point.name}_" for point, _ in points]
            bits = [run.results[f"{prefix}bits_per_image"] for prefix in prefixes]
            lines.append(Curve(codec, (), bits, [run.results[f"{prefix}psnr"] for prefix in prefixes]))
    rate_distortion_plot(path, lines, distance)


def _draw_kept(run: Run, setup: EvaluationSetup, path: Path, found: Measurements, curve: CurveResults) -> None:
    cuts = [point for point, _ in curve if point.threshold is not None]
    chosen = sorted({0, len(cuts) // 2, len(cuts) - 1})
    rows = []
    for point in (cuts[number] for number in chosen):
        shown = found.cuts[point.name].shown
        label = f"{run.config.filter.rule} {point.threshold:g}"
        rows.append(KeptRow(label, shown.kept_mask, shown.tokens, shown.pictures))
    kept_patches_picture(path, setup.originals_shown(), rows)
