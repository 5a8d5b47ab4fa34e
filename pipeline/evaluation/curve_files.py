"""What an evaluation with a rate-distortion curve leaves beside its numbers: a table of images, plots, a picture.

    images.parquet                     a row per image: what it holds, and at each cut its tokens, bits and error
    pictures/rate_distortion.png       distortion against tokens and bits
    pictures/token_histogram.png       tokens per image at the operating point
    pictures/kept_patches.png          which patches are kept at three thresholds, and what is decoded from them

Shapes: B images.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.console import say
from pipeline.core.files import write_atomically
from pipeline.core.run import Run
from pipeline.evaluation.measurements import Measurements, Point
from pipeline.evaluation.results import bits_of
from pipeline.tracking import Tracker

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.actors import Bench

PER_CUT, BITS_PER_CUT = ("tokens", "squared_error"), ("bits_fixed", "bits_coded")
Curve = list[tuple[Point, dict[str, float]]]


def keep_curve(run: Run, bench: "Bench", found: Measurements, curve: Curve, distance: str, tracker: Tracker) -> None:
    """Write all of them into the run folder and tell the tracker.

    Args:
        run: its folder and results.
        bench: the pictures.
        found: what was measured.
        curve: points in order, with their metrics.
        distance: name of the main Frechet distance.
        tracker: of the run.
    """
    path = run.folder / "images.parquet"
    write_atomically(path, _images_table(bench, found, curve))
    run.outputs["images"] = str(path)
    tracker.artifact(path)
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    drawn = {
        "rate_distortion": _draw_curve(run, folder / "rate_distortion.png", curve, distance),
        "token_histogram": _draw_lengths(run, folder / "token_histogram.png", found),
    }
    if bench.plan.grid:
        drawn["kept_patches"] = _draw_kept(run, bench, folder / "kept_patches.png", found, curve)
    for name, file in drawn.items():
        run.outputs[name] = str(file)
        tracker.picture(file, name, 0)
        tracker.artifact(file, "pictures")
        say(f"{name.replace('_', ' ')}: {file}")


def _images_table(bench: "Bench", found: Measurements, curve: Curve) -> bytes:
    """Parquet: id, label, png_bytes, total_score, then `operating_tokens`, ..., `curve00_tokens`, ..."""
    places = bench.plan.indices(np.arange(bench.plan.count)).tolist()
    values: dict[str, object] = {"id": bench.pictures.ids(places), "label": bench.pictures.labels(places)}
    values |= dict(found["images"].arrays)
    for column, state in [("operating", "lengths"), *((point.name, f"{point.name}.lengths") for point, _ in curve)]:
        values |= {f"{column}_{name}": found[state][name] for name in PER_CUT}
        values |= {f"{column}_{name}": bits_of(found[state], name) for name in BITS_PER_CUT}
        values[f"{column}_psnr"] = _psnr(found[state]["squared_error"], 3 * bench.manifest.image_size**2)
    file = io.BytesIO()
    pq.write_table(pa.table(values), file, compression="ZSTD")
    return file.getvalue()


def _psnr(squared_error: np.ndarray, values: int) -> np.ndarray:
    """(B,) dB as `tatok_model.metrics.images.psnr` has them, of sums over `values` numbers."""
    return 10 * np.log10(255**2 * values / np.maximum(squared_error, 1))


def _draw_curve(run: Run, path: Path, points: Curve, distance: str) -> Path:
    from pipeline.core.plots import Curve as Line
    from pipeline.core.plots import rate_distortion_plot

    section, metrics = run.config.filter, [values for _, values in points]

    def series(name: str) -> list[float]:
        return [values[name] for values in metrics]

    label = f"{section.score}, {section.rule}" if run.config.tokenizer.patch_tokens else "global tokens"
    lines = [
        Line(
            label, series("tokens_per_image"), series("bits_fixed"), series("psnr"), series(distance),
            bits_coded=series("bits_coded"), operating_point=_operating(run, points),
        )
    ]  # fmt: skip
    for codec in ("jpeg", "webp"):
        if f"baseline_{codec}_curve00_psnr" in run.results:
            prefixes = [f"baseline_{codec}_{point.name}_" for point, _ in points]
            bits = [run.results[f"{prefix}bits_per_image"] for prefix in prefixes]
            lines.append(Line(codec, (), bits, [run.results[f"{prefix}psnr"] for prefix in prefixes]))
    rate_distortion_plot(path, lines, distance)
    return path


def _operating(run: Run, points: Curve) -> int | None:
    """Which point of the curve is the operating point."""
    for number, (point, _) in enumerate(points):
        if point.threshold == run.config.filter.threshold:
            return number
    return None


def _draw_lengths(run: Run, path: Path, found: Measurements) -> Path:
    from pipeline.core.plots import token_histogram

    section = run.config.filter
    token_histogram(path, found["lengths"]["tokens"], f"Tokens per image, {section.rule} {section.threshold:g}")
    return path


def _draw_kept(run: Run, bench: "Bench", path: Path, found: Measurements, curve: Curve) -> Path:
    from pipeline.core.plots import KeptRow, kept_patches_picture

    cuts = [(number, point) for number, (point, _) in enumerate(curve) if point.threshold is not None]
    chosen = sorted({cuts[0], cuts[len(cuts) // 2], cuts[-1]}, key=lambda cut: cut[0])
    rows = []
    for _, point in chosen:
        shown = found[f"{point.name}.shown"]
        label = f"{run.config.filter.rule} {point.threshold:g}"
        rows.append(KeptRow(label, shown["kept_mask"], shown["tokens"], shown["pictures"]))
    originals = bench.pictures.images(bench.plan.indices(bench.plan.shown()).tolist())
    kept_patches_picture(path, originals, rows)
    return path
