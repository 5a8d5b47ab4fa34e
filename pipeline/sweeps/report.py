"""What a trial is worth: points of its rate-distortion curves, one number for all of them, and which points lead.

Shapes: P points of a curve.
"""

import csv
import io
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.core.config import Config, SweepConfig
from pipeline.core.console import columns
from pipeline.core.files import write_atomically
from pipeline.core.plots import COLOURS, DPI, INK, MARKERS, PALE
from pipeline.core.run import read_summary
from pipeline.evaluation.compare import curve_of
from pipeline.sweeps.trials import CHECKPOINT, Entry, Plan, Trial
from tatok_model.metrics.rate_distortion import bd_rate

LESS_IS_BETTER = {"psnr_at_tokens": False, "distance_at_tokens": True, "bd_rate": True}


@dataclass(frozen=True)
class Point:
    """One trial at one cut: a row of the sweep's table."""

    trial: str
    number: int
    global_tokens: int
    rule: str
    threshold: float
    tokens: float  # per image, global ones counted
    bits_fixed: float
    bits_coded: float
    psnr: float  # dB
    distance: float  # Frechet distance
    images_per_second: float  # of the whole evaluation of this trial: decoding takes the same time at every threshold

    def to_dict(self) -> dict[str, Any]:
        """By column."""
        return asdict(self)


def distance_name(names: list[str]) -> str:
    """The main Frechet distance among names of metrics: `rfid` or the first `rfd_...`."""
    return next(name for name in names if name == "rfid" or name.startswith("rfd_"))


def points_of(plan: Plan, trial: Trial) -> list[Point]:
    """Every point that a trial has measured, in the order of the cuts.

    Raises:
        BadInput: an evaluation is missing or has no curve.
    """
    config, found = plan.config_of(trial), []
    for rule, thresholds in plan.cuts.items():
        folder = plan.evaluation_folder(trial, rule)
        curve = curve_of(folder)
        rate = read_summary(folder)["results"]["images_per_second"]
        distance = curve[distance_name(list(curve))]
        found += [
            Point(
                trial.name, trial.number, config.tokenizer.global_tokens, rule, threshold,
                curve["tokens_per_image"][i], curve["bits_fixed"][i], curve["bits_coded"][i],
                curve["psnr"][i], distance[i], rate,
            )
            for i, threshold in enumerate(thresholds)
        ]  # fmt: skip
    return found


def distance_in(plan: Plan, trial: Trial) -> str:
    """The name of the Frechet distance that a finished trial was measured by."""
    return distance_name(list(curve_of(plan.evaluation_folder(trial, next(iter(plan.cuts))))))


def budget(config: Config) -> float:
    """Tokens per image at which trials are compared."""
    return config.sweep.budget_tokens or config.tokenizer.max_tokens / 2


def objective(points: list[Point], config: Config) -> float | None:
    """The number that trials are compared by, in its own unit; None where the curve does not say.

    `psnr_at_tokens` and `distance_at_tokens` lie on the line through the points that no other point of the trial
    beats. Below its first point there is nothing; beyond its last one more tokens buy nothing. `bd_rate` is the lowest
    of the trial's cut rules.

    Args:
        points: of one trial.
        config: of the sweep.
    """
    sweep = config.sweep
    if sweep.objective == "bd_rate":
        return _bd_rate(points, sweep)
    sign = -1.0 if LESS_IS_BETTER[sweep.objective] else 1.0
    values = [point.distance if LESS_IS_BETTER[sweep.objective] else point.psnr for point in points]
    front = leading([point.tokens for point in points], [sign * value for value in values])
    tokens, wanted = np.array([points[i].tokens for i in front]), budget(config)
    if not front or wanted < tokens[0]:
        return None
    return float(np.interp(wanted, tokens, [values[i] for i in front]))


def _bd_rate(points: list[Point], sweep: SweepConfig) -> float | None:
    control = {name: np.array(values) for name, values in curve_of(Path(sweep.control)).items()}
    column = {"tokens_per_image": "tokens"}.get(sweep.rate, sweep.rate)
    found = []
    for rule in dict.fromkeys(point.rule for point in points):
        chosen = [point for point in points if point.rule == rule]
        rate, psnr = np.array([getattr(p, column) for p in chosen]), np.array([p.psnr for p in chosen])
        found.append(bd_rate(control[sweep.rate], control["psnr"], rate, psnr))
    return min((value for value in found if value is not None), default=None)


def leading(rate: list[float], worth: list[float]) -> list[int]:
    """The Pareto front: indices of points that no other point beats, by rising rate.

    A point goes when another one has at most its rate and at least its worth; of equal points the first stays.

    Args:
        rate: (P,) less is better.
        worth: (P,) more is better.
    """
    best, front = -np.inf, []
    for i in sorted(range(len(rate)), key=lambda i: (rate[i], -worth[i], i)):
        if worth[i] > best:
            best = worth[i]
            front.append(i)
    return front


def best_trial(values: dict[int, float | None], config: Config) -> int | None:
    """The number of the trial with the best objective; of equals the first. None where no trial has one.

    Args:
        values: objective by number of the trial.
        config: of the sweep.
    """
    sign = 1.0 if LESS_IS_BETTER[config.sweep.objective] else -1.0
    known = [(sign * value, number) for number, value in values.items() if value is not None and np.isfinite(value)]
    return min(known)[1] if known else None


def best_cut(points: list[Point], config: Config) -> Point | None:
    """The point of the best trial that a token budget allows; None where there is no budget to go by."""
    if config.sweep.objective == "bd_rate":
        return None
    sign = -1.0 if LESS_IS_BETTER[config.sweep.objective] else 1.0
    allowed = [point for point in points if point.tokens <= budget(config)]
    if not allowed:
        return None
    return max(allowed, key=lambda p: sign * (p.distance if sign < 0 else p.psnr))


# The sweep as one picture: every trial's rate-distortion curve, with the points marked that no other point beats.

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


# What a sweep leaves for people: a table, a plot, the best configuration.

HEADER = (
    "trial",
    "global tokens",
    "rule",
    "threshold",
    "tokens",
    "bits",
    "bits coded",
    "PSNR",
    "",
    "images/s",
    "front",
)


def on_front(points: list[Point]) -> set[int]:
    """Indices of the points that no other one beats in PSNR over tokens."""
    return set(leading([point.tokens for point in points], [point.psnr for point in points]))


def write_table(folder: Path, points: list[Point], distance: str, entries: list[Entry], summary: str) -> list[Path]:
    """Write `table.csv` and `table.md`.

    Args:
        folder: of the sweep.
        points: of all finished trials, one row each.
        distance: the name of the Frechet distance.
        entries: all trials: those that did not finish are named with their reason.
        summary: one line on top of the page.
    """
    front = on_front(points)
    names = [field.name for field in fields(Point)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([distance if name == "distance" else name for name in names] + ["pareto_front"])
    writer.writerows([[*point.to_dict().values(), int(i in front)] for i, point in enumerate(points)])
    header, *rows = table(points, distance)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    ends = [f"- {e.trial.name}: {e.status}: {e.reason}" for e in entries if e.status not in ("finished", "running")]
    notes = (
        "`front`: no other point has a higher PSNR at as few tokens. `images/s` is of the trial's whole evaluation: "
        "decoding takes the same time at every threshold."
    )
    page = [f"# {folder.name}", "", summary, "", *lines, "", notes, *(["", "Not finished:", "", *ends] if ends else [])]
    paths = [folder / "table.csv", folder / "table.md"]
    for path, content in zip(paths, (text.getvalue(), "\n".join(page) + "\n"), strict=True):
        write_atomically(path, content.encode())
    return paths


def table(points: list[Point], distance: str) -> list[list[str]]:
    """Header and a line for each point, for people."""
    front = on_front(points)
    return [
        [name or distance for name in HEADER],
        *(
            [
                p.trial, str(p.global_tokens), p.rule, f"{p.threshold:g}", f"{p.tokens:.1f}", f"{p.bits_fixed:.0f}",
                f"{p.bits_coded:.0f}", f"{p.psnr:.2f}", f"{p.distance:.3f}", f"{p.images_per_second:.0f}",
                "yes" if i in front else "",
            ]
            for i, p in enumerate(points)
        ),
    ]  # fmt: skip


def terminal_table(points: list[Point], distance: str) -> str:
    """The table as aligned columns."""
    return columns(table(points, distance))


def best_config(plan: Plan, trial: Trial, points: list[Point]) -> Config:
    """The configuration of the best trial, cut where the budget allows, as a preset for every job.

    Args:
        plan: of the sweep.
        trial: the best one.
        points: its own.
    """
    config = plan.config_of(trial)
    cut = best_cut(points, plan.config)
    if cut is not None:
        config = replace(config, filter=replace(config.filter, rule=cut.rule, threshold=cut.threshold))
    thresholds = plan.cuts.get(config.filter.rule, ())
    return replace(
        config,
        run=replace(config.run, name=""),
        evaluate=replace(config.evaluate, thresholds=thresholds),
        sweep=type(config.sweep)(),
    )


def write_best(folder: Path, config: Config, trial: Trial, said: str) -> Path:
    """Write `best.yaml`."""
    path = folder / "best.yaml"
    job = "evaluate" if trial.values.get(CHECKPOINT) else "train"  # what there is would be fine-tuned by train
    head = (
        f"# The best of a sweep: {trial.name}, {said}.\n#\n#     python jobs/{job}.py {path}\n#\n"
        "# Expected: the numbers of its trial; data.shards are the sweep's.\n"
    )
    write_atomically(path, (head + config.to_yaml()).encode())
    return path


def in_words(value: float, config: Config) -> str:
    """An objective with its unit."""
    sweep = config.sweep
    if sweep.objective == "bd_rate":
        return f"{value:+.1f}% {sweep.rate} against the control at equal PSNR"
    unit, name = ("", "Frechet distance") if LESS_IS_BETTER[sweep.objective] else (" dB", "PSNR")
    return f"{name} {value:.2f}{unit} at {budget(config):g} tokens"
