"""Pictures for people: originals beside what became of them, rate-distortion curves, lengths, and kept patches.

Figures own their canvas, so nothing global to matplotlib is set and stages may draw in any process or thread.

Shapes: B images, N patch positions, H and W pixels, P points of a curve.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from pipeline.core.files import write_atomically

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),  # Okabe and Ito's
    *("#8C564B", "#7F7F7F", "#9467BD", "#9A9A00", "#003F5C"),
)
MARKERS = "osD^vPX<>"
DPI = 130
INK, PALE = "#333333", "#DDDDDD"
HOLLOW: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
RING: dict[str, Any] = {
    "linestyle": "", "marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.8,
}  # fmt: skip
LOG_RATIO = 8  # largest to smallest value beyond which an axis is logarithmic

ROW_GAP, MIN_SIDE = 2, 96  # of rows of pictures: pixels between them; smaller ones are enlarged without smoothing
PICTURE = 128  # pixels a side at least; smaller pictures are enlarged without smoothing
GAP, MARGIN, LINE = 10, 16, 22  # pixels between pictures, around them, of a line of text
LABEL = 190  # pixels, the column that names the rows


def save_rows(path: Path, rows: list[np.ndarray]) -> None:
    """Save rows of pictures below one another as PNG: originals first, reconstructions under them, for instance.

    Args:
        path: of the picture; written aside and renamed.
        rows: each (B, H, W, 3) uint8, equally many and large.
    """
    count, height, width, _ = rows[0].shape
    scale = max(1, -(-MIN_SIDE // height))
    high, wide = height * scale + ROW_GAP, width * scale + ROW_GAP
    canvas = np.full((len(rows) * high - ROW_GAP, count * wide - ROW_GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            place = np.s_[i * high : i * high + height * scale, j * wide : j * wide + width * scale]
            canvas[place] = _enlarged(picture, scale)
    _save_picture(Image.fromarray(canvas), path)


@dataclass(frozen=True)
class Curve:
    """One series: a tokenizer or control at P settings; a single setting is a single point.

    Attributes:
        name: in the legend.
        tokens: (P,) mean tokens an image; empty where there are none, as for JPEG.
        bits_fixed: (P,) mean bits an image.
        psnr: (P,) dB.
        frechet: (P,) Frechet distance; empty where it was not measured.
        bits_coded: (P,) mean bits an image with entropy-coded patch tokens, drawn hollow; empty where there are none.
        operating_point: the index of the setting that the run reports, ringed; None for none.
    """

    name: str
    tokens: Sequence[float]
    bits_fixed: Sequence[float]
    psnr: Sequence[float]
    frechet: Sequence[float] = ()
    bits_coded: Sequence[float] = ()
    operating_point: int | None = None


@dataclass(frozen=True)
class KeptRow:
    """What one threshold kept of each picture, and what became of it.

    Attributes:
        label: of the threshold; lines are separated by line breaks.
        kept_mask: (B, N) bool, True where the patch token is kept, in raster order.
        counts: (B,) tokens of each picture.
        reconstructions: (B, H, W, 3) uint8.
    """

    label: str
    kept_mask: np.ndarray
    counts: np.ndarray
    reconstructions: np.ndarray


def rate_distortion_plot(path: Path, curves: Sequence[Curve], frechet_name: str = "Frechet distance") -> None:
    """PSNR over tokens, PSNR over bits and Frechet distance over tokens, side by side, as PNG.

    Args:
        path: of the picture; written aside and renamed.
        curves: at least one.
        frechet_name: names the distance with its extractor, `rfd_resnet20_cifar10` for instance.
    """
    figure = Figure(figsize=(15, 5.2), dpi=DPI, layout="constrained")
    psnr_tokens, psnr_bits, frechet_tokens = figure.subplots(1, 3)
    _style(psnr_tokens, "tokens per image", "PSNR (dB)", "PSNR over tokens")
    _style(psnr_bits, "bits per image", "PSNR (dB)", "PSNR over bits")
    _style(frechet_tokens, "tokens per image", f"{frechet_name} (lower is better)", "Frechet distance over tokens")
    for number, curve in enumerate(curves):
        look = _look(number)
        _draw(psnr_tokens, curve.tokens, curve.psnr, curve, look)
        _draw(psnr_bits, curve.bits_fixed, curve.psnr, curve, look)
        _draw(psnr_bits, curve.bits_coded, curve.psnr, curve, look | HOLLOW)
        _draw(frechet_tokens, curve.tokens, curve.frechet, curve, look)
    for axes in (psnr_tokens, psnr_bits, frechet_tokens):
        _spread(axes)
    _legend(figure, curves)
    _save(figure, path)


def token_histogram(path: Path, counts: np.ndarray, title: str) -> None:
    """How many images have how many tokens, as PNG, with mean, standard deviation and 5%, 95% marked.

    Args:
        path: of the picture; written aside and renamed.
        counts: (B,) tokens of each image, at least one image.
        title: what was counted.
    """
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _style(axes, "tokens per image", "images", title)
    least, most = int(counts.min()), int(counts.max())
    step = max(1, math.ceil((most - least + 1) / 60))  # whole tokens a bar, or bars would differ by rounding
    axes.hist(
        counts, bins=(np.arange(least, most + 1 + step, step) - 0.5).tolist(), color=COLOURS[0], alpha=0.75, linewidth=0
    )
    mean, (low, high) = counts.mean(), np.quantile(counts, [0.05, 0.95])
    axes.axvspan(low, high, color=INK, alpha=0.07, linewidth=0, label=f"5% to 95%: {low:.0f} to {high:.0f}")
    axes.axvline(mean, color=COLOURS[1], linewidth=2, label=f"mean {mean:.1f}, standard deviation {counts.std():.1f}")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the legend
    if least == most:
        axes.set_xlim(least - 5, most + 5)
    _save(figure, path)


def kept_patches_picture(path: Path, originals: np.ndarray, rows: Sequence[KeptRow]) -> None:
    """Originals on top; for each threshold the patches kept, dropped ones greyed, and the reconstructions, as PNG.

    Args:
        path: of the picture; written aside and renamed.
        originals: (B, H, W, 3) uint8, at least one.
        rows: one for each threshold, at least one; N is a square number that tiles the pictures.
    """
    side = PICTURE // originals.shape[1] or 1
    large = [_enlarged(picture, side) for picture in originals]
    height, width = large[0].shape[:2]
    line_high = height + GAP
    block = LINE + 2 * line_high + GAP
    size = (
        2 * MARGIN + LABEL + len(originals) * (width + GAP) - GAP,
        2 * MARGIN + line_high + len(rows) * (block + GAP) - 2 * GAP,
    )
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    _label(pen, (MARGIN, MARGIN + height // 2), "original")
    _paste(canvas, large, MARGIN)
    top = MARGIN + line_high + GAP
    for row in rows:
        grid = math.isqrt(row.kept_mask.shape[1])
        kept = [_dimmed(picture, mask.reshape(grid, grid)) for picture, mask in zip(large, row.kept_mask, strict=True)]
        pen.line([(MARGIN, top - GAP // 2), (size[0] - MARGIN, top - GAP // 2)], fill=PALE)
        for number, count in enumerate(row.counts):
            middle = MARGIN + LABEL + number * (width + GAP) + width // 2
            pen.text((middle, top + LINE // 2), f"{int(count)} tokens", INK, _font(14), anchor="mm")
        _label(
            pen, (MARGIN, top + LINE + height // 2), f"{row.label}\nmean {np.mean(row.counts):.1f} tokens\npatches kept"
        )
        _paste(canvas, kept, top + LINE)
        _label(pen, (MARGIN, top + LINE + line_high + height // 2), "reconstruction")
        _paste(canvas, [_enlarged(picture, side) for picture in row.reconstructions], top + LINE + line_high)
        top += block + GAP
    _save_picture(canvas, path)


def _style(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold")
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _look(number: int) -> dict[str, Any]:
    """Colours and markers repeat at different periods, so that pairs of them do not."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 5}


def _draw(axes: Axes, x: Sequence[float], y: Sequence[float], curve: Curve, look: dict[str, Any]) -> None:
    """One series in the order of its x; nothing where it has no such values."""
    if len(x) == 0 or len(y) == 0:
        return
    order = np.argsort(x, kind="stable")
    axes.plot(np.asarray(x)[order], np.asarray(y)[order], **look)
    if curve.operating_point is not None:
        axes.plot(x[curve.operating_point], y[curve.operating_point], color=look["color"], **RING)


def _spread(axes: Axes) -> None:
    """Logarithmic, in powers of two, where values lie far apart; with plain numbers on the axis."""
    for coordinate, axis, set_scale in ((0, axes.xaxis, axes.set_xscale), (1, axes.yaxis, axes.set_yscale)):
        values = np.concatenate([np.ravel(line.get_data()[coordinate]) for line in axes.lines] or [np.ones(1)])
        if values.min() > 0 and values.max() > LOG_RATIO * values.min():
            set_scale("log", base=2)
            axis.set_major_formatter(ScalarFormatter())


def _legend(figure: Figure, curves: Sequence[Curve]) -> None:
    handles = [Line2D([], [], label=curve.name, **_look(number)) for number, curve in enumerate(curves)]
    if any(len(curve.bits_coded) for curve in curves):
        handles.append(Line2D([], [], label="hollow: bits_coded", color=INK, marker="o", markersize=5, **HOLLOW))
    if any(curve.operating_point is not None for curve in curves):
        handles.append(Line2D([], [], label="operating point", color=INK, **RING))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    _write(path, file.getvalue())


def _save_picture(picture: Image.Image, path: Path) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    _write(path, file.getvalue())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def _enlarged(picture: np.ndarray, times: int) -> np.ndarray:
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _dimmed(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Dropped patches in middle grey with thin lines, which black, white and grey ones that are kept do not have."""
    tall, wide = picture.shape[0] // kept.shape[0], picture.shape[1] // kept.shape[1]
    mask = kept.repeat(tall, axis=0).repeat(wide, axis=1)
    grey = 110 + 0.25 * (picture.astype(np.float64) @ (0.299, 0.587, 0.114))
    rows, columns = np.arange(picture.shape[0]) % tall == 0, np.arange(picture.shape[1]) % wide == 0
    grey[rows[:, None] | columns[None, :]] += 35
    return np.where(mask[..., None], picture, grey[..., None].round()).astype(np.uint8)


def _paste(canvas: Image.Image, pictures: Sequence[np.ndarray], top: int) -> None:
    for number, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture), (MARGIN + LABEL + number * (picture.shape[1] + GAP), top))


def _label(pen: ImageDraw.ImageDraw, middle_left: tuple[int, int], text: str) -> None:
    pen.multiline_text(middle_left, text, INK, _font(15), anchor="lm", spacing=6)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # comes with Pillow
