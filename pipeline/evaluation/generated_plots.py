"""Lengths of generated and of real token sequences in one figure.

Shapes: B generated pictures, R real ones.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.evaluation.plots import COLOURS, DPI, INK, PALE
from pipeline.paths import write_atomically

BARS = 60  # at most


def length_plot(path: Path, generated: np.ndarray, real: np.ndarray, title: str) -> None:
    """Which share of pictures has how many tokens, as PNG: real ones filled, generated ones as a line over them.

    Args:
        path: of the picture; written aside and renamed.
        generated: (B,) tokens of each generated picture.
        real: (R,) of each real one.
        title: what was compared.

    Raises:
        ValueError: there is no picture of a kind.
    """
    if generated.ndim != 1 or real.ndim != 1 or not len(generated) or not len(real):
        raise ValueError(f"lengths are {generated.shape} and {real.shape}; expected (B,) and (R,), at least 1 of each")
    least, most = int(min(generated.min(), real.min())), int(max(generated.max(), real.max()))
    step = max(1, math.ceil((most - least + 1) / BARS))  # whole tokens a bar, or bars would differ by rounding
    edges = np.arange(least, most + 1 + step, step) - 0.5
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    looks: list[tuple[np.ndarray, str, dict[str, Any]]] = [
        (real, "real", {"color": COLOURS[0], "alpha": 0.55, "linewidth": 0}),
        (generated, "generated", {"color": COLOURS[1], "histtype": "step", "linewidth": 2}),
    ]
    for values, name, look in looks:
        label = f"{name}: mean {values.mean():.1f}, standard deviation {values.std():.1f}"
        axes.hist(values, bins=edges.tolist(), weights=np.full(len(values), 1 / len(values)), label=label, **look)
    axes.set_xlabel("tokens per image", color=INK)
    axes.set_ylabel("share of images", color=INK)
    axes.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold")
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the legend
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
