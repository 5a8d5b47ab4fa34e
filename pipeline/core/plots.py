"""Plots for people: rate-distortion curves and lengths.

Figures own their canvas, so nothing global to matplotlib is set and stages may draw in any process or thread.

Shapes: B images, P points of a curve.
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

from pipeline.core.collages import INK, PALE
from pipeline.core.files import write_atomically

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),  # Okabe and Ito's
    *("#8C564B", "#7F7F7F", "#9467BD", "#9A9A00", "#003F5C"),
)
MARKERS = "osD^vPX<>"
DPI = 130
HOLLOW: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
RING: dict[str, Any] = {
    "linestyle": "", "marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.8,
}  # fmt: skip
LOG_RATIO = 8  # largest to smallest value beyond which an axis is logarithmic


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


def rate_distortion_plot(path: Path, curves: Sequence[Curve], frechet_name: str = "Frechet distance") -> None:
    """PSNR over tokens, PSNR over bits and Frechet distance over tokens, side by side, as PNG.

    Args:
        path: of the picture; written aside and renamed.
        curves: at least one.
        frechet_name: names the distance with its extractor, `rfd_resnet20_cifar10` for instance.
    """
    figure = Figure(figsize=(15, 5.2), dpi=DPI, layout="constrained")
    psnr_tokens, psnr_bits, frechet_tokens = figure.subplots(1, 3)
    style(psnr_tokens, "tokens per image", "PSNR (dB)", "PSNR over tokens")
    style(psnr_bits, "bits per image", "PSNR (dB)", "PSNR over bits")
    style(frechet_tokens, "tokens per image", f"{frechet_name} (lower is better)", "Frechet distance over tokens")
    for number, curve in enumerate(curves):
        look = look_of(number)
        _draw(psnr_tokens, curve.tokens, curve.psnr, curve, look)
        _draw(psnr_bits, curve.bits_fixed, curve.psnr, curve, look)
        _draw(psnr_bits, curve.bits_coded, curve.psnr, curve, look | HOLLOW)
        _draw(frechet_tokens, curve.tokens, curve.frechet, curve, look)
    for axes in (psnr_tokens, psnr_bits, frechet_tokens):
        _spread(axes)
    _legend(figure, curves)
    save_figure(figure, path)


def token_histogram(path: Path, counts: np.ndarray, title: str) -> None:
    """How many images have how many tokens, as PNG, with mean, standard deviation and 5%, 95% marked.

    Args:
        path: of the picture; written aside and renamed.
        counts: (B,) tokens of each image, at least one image.
        title: what was counted.
    """
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, "tokens per image", "images", title)
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
    save_figure(figure, path)


def style(axes: Axes, x: str, y: str, title: str) -> None:
    """The look of all plots: labels, title, a pale grid."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold")
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def look_of(number: int, linewidth: float = 1.6) -> dict[str, Any]:
    """Colours and markers repeat at different periods, so that pairs of them do not."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": linewidth, "markersize": 5}


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
    handles = [Line2D([], [], label=curve.name, **look_of(number)) for number, curve in enumerate(curves)]
    if any(len(curve.bits_coded) for curve in curves):
        handles.append(Line2D([], [], label="hollow: bits_coded", color=INK, marker="o", markersize=5, **HOLLOW))
    if any(curve.operating_point is not None for curve in curves):
        handles.append(Line2D([], [], label="operating point", color=INK, **RING))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=9)


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG, written aside and renamed."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
