"""The sweep as one picture: every trial's rate-distortion curve, with the points marked that no other point beats.

The figure owns its canvas, as those of `pipeline.evaluation.plots` do.
"""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.evaluation.plots import COLOURS, DPI, INK, MARKERS, PALE
from pipeline.paths import write_atomically
from pipeline.tuning.objective import Point, leading

PANELS = (  # rate, its label, what it is worth, its label, whether more is better
    ("tokens", "tokens per image", "psnr", "PSNR (dB)", True),
    ("bits_fixed", "bits per image", "psnr", "PSNR (dB)", True),
    ("tokens", "tokens per image", "distance", "", False),
)
FRONT: dict[str, Any] = {
    "color": INK, "linestyle": ":", "linewidth": 1.2, "marker": "o", "markersize": 12, "markerfacecolor": "none",
    "markeredgewidth": 1.6,
}  # fmt: skip
MOST = 12  # trials that the legend names


def sweep_plot(path: Path, points: list[Point], distance: str, best: str = "") -> None:
    """PSNR over tokens, PSNR over bits and Frechet distance over tokens, side by side, as PNG.

    Args:
        path: of the picture; written aside and renamed.
        points: of all trials.
        distance: the name of the Frechet distance.
        best: the trial whose line is drawn thick.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("points are 0; expected at least 1")
    figure = Figure(figsize=(15, 5.6), dpi=DPI, layout="constrained")
    series = list(dict.fromkeys((point.trial, point.rule) for point in points))
    for axes, (rate, x, worth, y, more) in zip(figure.subplots(1, 3), PANELS, strict=True):
        _style(axes, x, y or f"{distance} (lower is better)")
        for number, key in enumerate(series):
            chosen = sorted((p for p in points if (p.trial, p.rule) == key), key=lambda p: getattr(p, rate))
            axes.plot(_values(chosen, rate), _values(chosen, worth), **_look(number, key[0] == best))
        sign = 1 if more else -1
        front = [points[i] for i in leading(_values(points, rate), [sign * v for v in _values(points, worth)])]
        axes.plot(_values(front, rate), _values(front, worth), **FRONT)
    _legend(figure, series, best)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def _values(points: list[Point], name: str) -> list[float]:
    return [float(getattr(point, name)) for point in points]


def _look(number: int, best: bool) -> dict[str, Any]:
    """Colours and markers repeat at different periods, so that pairs of them do not."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 2.6 if best else 1.4, "markersize": 5}


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _legend(figure: Figure, series: list[tuple[str, str]], best: str) -> None:
    rules = len({rule for _, rule in series}) > 1
    handles = []
    for number, (trial, rule) in enumerate(series[:MOST]):
        label = f"{trial}, {rule}" if rules else trial
        handles.append(
            Line2D([], [], label=label + (" (best)" if trial == best else ""), **_look(number, trial == best))
        )
    if len(series) > MOST:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(series) - MOST} more"))
    handles.append(Line2D([], [], label="Pareto front", **FRONT))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)
