"""What trials are worth, and what a sweep leaves: a table, a plot, the best configuration, the champion in MLflow.

Shapes: P points of a curve.
"""

import csv
import io
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.core.checkpoints import load_tokenizer
from pipeline.core.collages import INK
from pipeline.core.config import Config, SweepConfig
from pipeline.core.console import columns, say
from pipeline.core.files import write_atomically
from pipeline.core.plots import DPI, look_of, save_figure, style
from pipeline.core.run import Run, read_summary
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.compare import curve_of
from pipeline.sweeps import champion
from pipeline.sweeps.trials import CHECKPOINT, FAILED, FINISHED, STOPPED, Ledger, SweepPlan, Trial
from pipeline.tracking import Tracker
from tatok_model.metrics.rate_distortion import bd_rate

LESS_IS_BETTER = {"psnr_at_tokens": False, "distance_at_tokens": True, "bd_rate": True}

# What a trial is worth: points of its rate-distortion curves, one number for all of them, and which points lead.


@dataclass(frozen=True)
class TrialPoint:
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

    def metrics(self, prefix: str, distance: str) -> dict[str, float]:
        """By the names of its metrics: charts over steps are then curves over tokens. `prefix` names the curve."""
        return {
            f"{prefix}/psnr": self.psnr,
            f"{prefix}/{distance}": self.distance,
            f"{prefix}/bits_fixed": self.bits_fixed,
            f"{prefix}/bits_coded": self.bits_coded,
            f"{prefix}/threshold": self.threshold,
            f"{prefix}/tokens_per_image": self.tokens,
        }


def points_of(plan: SweepPlan, trial: Trial) -> list[TrialPoint]:
    """Every point that a trial has measured, in the order of the cuts.

    Raises:
        BadInput: an evaluation is missing or has no curve.
    """
    config, distance, points = plan.config_of(trial), distance_in(plan, trial), []
    for rule, thresholds in plan.cuts.items():
        folder = plan.evaluation_folder(trial, rule)
        curve = curve_of(folder)
        rate = read_summary(folder)["results"]["images_per_second"]
        points += [
            TrialPoint(
                trial.name, trial.number, config.tokenizer.global_tokens, rule, threshold,
                curve["tokens_per_image"][i], curve["bits_fixed"][i], curve["bits_coded"][i],
                curve["psnr"][i], curve[distance][i], rate,
            )
            for i, threshold in enumerate(thresholds)
        ]  # fmt: skip
    return points


def distance_in(plan: SweepPlan, trial: Trial) -> str:
    """The name of the Frechet distance that a finished trial was measured by: `rfid`, or the first `rfd_...`."""
    curve = curve_of(plan.evaluation_folder(trial, next(iter(plan.cuts))))
    return next(name for name in curve if name == "rfid" or name.startswith("rfd_"))


def budget(config: Config) -> float:
    """Tokens per image at which trials are compared."""
    return config.sweep.budget_tokens or config.tokenizer.max_tokens / 2


def objective(points: list[TrialPoint], config: Config) -> float | None:
    """The number that trials are compared by, in its own unit; None where the curve does not say.

    `psnr_at_tokens` and `distance_at_tokens` lie on the line through the points that no other point of the trial
    beats. Below its first point there is nothing; beyond its last one more tokens buy nothing. `bd_rate` is the lowest
    of the trial's cut rules.
    """
    if config.sweep.objective == "bd_rate":
        return _bd_rate(points, config.sweep)
    less = LESS_IS_BETTER[config.sweep.objective]
    values = [point.distance if less else point.psnr for point in points]
    front = leading([point.tokens for point in points], [-value if less else value for value in values])
    tokens, wanted = np.array([points[i].tokens for i in front]), budget(config)
    if not front or wanted < tokens[0]:
        return None
    return float(np.interp(wanted, tokens, [values[i] for i in front]))


def _bd_rate(points: list[TrialPoint], sweep: SweepConfig) -> float | None:
    control = {name: np.array(values) for name, values in curve_of(Path(sweep.control)).items()}
    column = {"tokens_per_image": "tokens"}.get(sweep.rate, sweep.rate)
    rates = []
    for rule in dict.fromkeys(point.rule for point in points):
        chosen = [point for point in points if point.rule == rule]
        rate, psnr = np.array([getattr(p, column) for p in chosen]), np.array([p.psnr for p in chosen])
        rates.append(bd_rate(control[sweep.rate], control["psnr"], rate, psnr))
    return min((value for value in rates if value is not None), default=None)


def loss_of(value: float | None, config: Config) -> float | None:
    """An objective as a number that is less the better the trial is."""
    return value if value is None or LESS_IS_BETTER[config.sweep.objective] else -value


def leading(rate: list[float], worth: list[float]) -> list[int]:
    """The Pareto front: indices of points that no other point beats, by rising rate (P,); worth is (P,), too.

    A point goes when another one has at most its rate and at least its worth; of equal points the first stays.
    """
    best, front = -np.inf, []
    for i in sorted(range(len(rate)), key=lambda i: (rate[i], -worth[i], i)):
        if worth[i] > best:
            best = worth[i]
            front.append(i)
    return front


def on_front(points: list[TrialPoint]) -> list[int]:
    """Indices of the points that no other one beats in PSNR over tokens."""
    return leading([point.tokens for point in points], [point.psnr for point in points])


def best_trial(values: dict[int, float | None], config: Config) -> int | None:
    """The number of the trial with the best objective; of equals the first. None where no trial has one."""
    losses = {number: loss_of(value, config) for number, value in values.items()}
    known = [(loss, number) for number, loss in losses.items() if loss is not None and np.isfinite(loss)]
    return min(known)[1] if known else None


def best_cut(points: list[TrialPoint], config: Config) -> TrialPoint | None:
    """The point of the best trial that a token budget allows; None where there is no budget to go by."""
    allowed = [point for point in points if point.tokens <= budget(config)]
    if config.sweep.objective == "bd_rate" or not allowed:
        return None
    less = LESS_IS_BETTER[config.sweep.objective]
    return max(allowed, key=lambda point: -point.distance if less else point.psnr)


# The sweep as one picture: every trial's rate-distortion curve, with the points marked that no other point beats.

PANELS = (  # rate, its label, what it is worth, its label, whether more is better (1) or less (-1)
    ("tokens", "tokens per image", "psnr", "PSNR (dB)", 1),
    ("bits_fixed", "bits per image", "psnr", "PSNR (dB)", 1),
    ("tokens", "tokens per image", "distance", "", -1),
)
FRONT: dict[str, Any] = {
    "color": INK, "linestyle": ":", "linewidth": 1.2, "marker": "o", "markersize": 12, "markerfacecolor": "none",
    "markeredgewidth": 1.6,
}  # fmt: skip
MOST = 12  # trials that the legend names


def sweep_plot(path: Path, points: list[TrialPoint], distance: str, best: str = "") -> None:
    """PSNR over tokens, PSNR over bits and Frechet distance over tokens, as PNG; the best trial's line is thick.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("points are 0; expected at least 1")
    figure = Figure(figsize=(15, 5.6), dpi=DPI, layout="constrained")
    series = list(dict.fromkeys((point.trial, point.rule) for point in points))
    for axes, (rate, x, worth, y, sign) in zip(figure.subplots(1, 3), PANELS, strict=True):
        style(axes, x, y or f"{distance} (lower is better)", "")
        for number, key in enumerate(series):
            chosen = sorted((p for p in points if (p.trial, p.rule) == key), key=lambda p: getattr(p, rate))
            axes.plot(_values(chosen, rate), _values(chosen, worth), **_look(number, key[0] == best))
        front = [points[i] for i in leading(_values(points, rate), [sign * v for v in _values(points, worth)])]
        axes.plot(_values(front, rate), _values(front, worth), **FRONT)
    _legend(figure, series, best)
    save_figure(figure, path)


def _values(points: list[TrialPoint], name: str) -> list[float]:
    return [float(getattr(point, name)) for point in points]


def _look(number: int, best: bool) -> dict[str, Any]:
    return look_of(number, 2.6 if best else 1.4)


def _legend(figure: Figure, series: list[tuple[str, str]], best: str) -> None:
    several = len({rule for _, rule in series}) > 1
    handles = []
    for number, (trial, rule) in enumerate(series[:MOST]):
        label = (f"{trial}, {rule}" if several else trial) + (" (best)" if trial == best else "")
        handles.append(Line2D([], [], label=label, **_look(number, trial == best)))
    if len(series) > MOST:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(series) - MOST} more"))
    handles.append(Line2D([], [], label="Pareto front", **FRONT))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)


# The end of a sweep: all finished trials compared, shown to people and in MLflow, and the best one handed on.

ALIAS = "champion"
EXAMPLES = 4  # pictures that the registered model shows as its input


@dataclass(frozen=True)
class TrialComparison:
    """The trials that finished, side by side."""

    points: list[TrialPoint]  # of all of them
    values: dict[int, float | None]  # objective by number of the trial
    distance: str  # name of the Frechet distance
    best: Trial | None  # the one with the best objective; None where no trial has one
    best_in_words: str  # its objective

    @classmethod
    def of(cls, plan: SweepPlan, finished: list[Trial]) -> "TrialComparison":
        """Reads the evaluations of the trials, of which there is at least one."""
        measured = {trial.number: points_of(plan, trial) for trial in finished}
        values = {number: objective(points, plan.config) for number, points in measured.items()}
        number = best_trial(values, plan.config)
        value = None if number is None else values[number]
        return cls(
            [point for points in measured.values() for point in points],
            values,
            distance_in(plan, finished[0]),
            next((trial for trial in finished if trial.number == number), None),
            in_words(value, plan.config),
        )

    def table(self) -> list[list[str]]:
        """Header and a line for each point, for people."""
        front = on_front(self.points)
        header = ["trial", "global tokens", "rule", "threshold", "tokens", "bits", "bits coded", "PSNR", self.distance,
                  "images/s", "front"]  # fmt: skip
        lines = [
            [
                p.trial, str(p.global_tokens), p.rule, f"{p.threshold:g}", f"{p.tokens:.1f}", f"{p.bits_fixed:.0f}",
                f"{p.bits_coded:.0f}", f"{p.psnr:.2f}", f"{p.distance:.3f}", f"{p.images_per_second:.0f}",
                "yes" if i in front else "",
            ]
            for i, p in enumerate(self.points)
        ]  # fmt: skip
        return [header, *lines]


def in_words(value: float | None, config: Config) -> str:
    """An objective with its unit."""
    if value is None:
        return "no trial says what it is worth at the budget"
    sweep = config.sweep
    if sweep.objective == "bd_rate":
        return f"{value:+.1f}% {sweep.rate} against the control at equal PSNR"
    unit, name = ("", "Frechet distance") if LESS_IS_BETTER[sweep.objective] else (" dB", "PSNR")
    return f"{name} {value:.2f}{unit} at {budget(config):g} tokens"


def conclude(run: Run, plan: SweepPlan, ledger: Ledger, tracker: Tracker) -> None:
    """Table, plot, best configuration and champion, of all trials that finished; fills the run's results and outputs.

    Raises:
        RuntimeError: no trial finished.
    """
    finished = [entry.trial for entry in ledger.of(FINISHED)]
    others = ledger.of(FAILED, STOPPED)
    if not finished:
        raise RuntimeError(f"no trial finished; {'; '.join(f'{e.trial.name}: {e.reason}' for e in others)}")
    compared = TrialComparison.of(plan, finished)
    run.results = {
        "trials_planned": float(plan.total),
        "trials_finished": float(len(finished)),
        "trials_failed": float(len(ledger.of(FAILED))),
        "trials_stopped": float(len(ledger.of(STOPPED))),
        "points": float(len(compared.points)),
    }
    if compared.best is not None and (value := compared.values[compared.best.number]) is not None:
        run.results |= {"best_trial": float(compared.best.number), "best_objective": value}
    _log(run, compared)
    _show(run, plan, [f"- {e.trial.name}: {e.status}: {e.reason}" for e in others], compared, tracker)
    if compared.best is not None:
        _hand_on(run, plan, compared.best, compared, tracker)


def _log(run: Run, compared: TrialComparison) -> None:
    """The parent's charts: the objective over trials, and the Pareto front over tokens."""
    run.rewind_metrics(-1)  # a resumed sweep compares anew
    run.log(run.results, 0)
    for number, value in compared.values.items():
        if value is not None:
            run.log({"trials/objective": value}, number)
    for point in (compared.points[i] for i in on_front(compared.points)):
        run.log(point.metrics("front", compared.distance), round(point.tokens))


def _show(run: Run, plan: SweepPlan, others: list[str], compared: TrialComparison, tracker: Tracker) -> None:
    """Table and plot."""
    best = compared.best.name if compared.best else ""
    title = f"Best: {best}, {compared.best_in_words}." if best else f"No best trial: {compared.best_in_words}."
    page = _page(run.folder.name, f"{title} Cuts: {plan.cuts_in_words}.", compared, others)
    for kind, text in (("csv", _csv(compared)), ("md", page)):
        path = run.folder / f"table.{kind}"
        write_atomically(path, text.encode())
        run.outputs[f"table_{kind}"] = str(path)
        tracker.artifact(path)
    picture = run.folder / "pictures" / "rate_distortion.png"
    sweep_plot(picture, compared.points, compared.distance, best)
    run.outputs["rate_distortion"] = str(picture)
    tracker.picture(picture, "rate_distortion", 0)
    tracker.artifact(picture, "pictures")
    say(f"\n{columns(compared.table())}\n\n{title}")


def _csv(compared: TrialComparison) -> str:
    front = on_front(compared.points)
    names = [compared.distance if field.name == "distance" else field.name for field in fields(TrialPoint)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "pareto_front"])
    writer.writerows([[*asdict(point).values(), int(i in front)] for i, point in enumerate(compared.points)])
    return text.getvalue()


def _page(name: str, summary: str, compared: TrialComparison, others: list[str]) -> str:
    """The table in Markdown, and the trials that did not finish with their reason."""
    header, *rows = compared.table()
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    notes = (
        "`front`: no other point has a higher PSNR at as few tokens. `images/s` is of the trial's whole evaluation: "
        "decoding takes the same time at every threshold."
    )
    ends = ["", "Not finished:", "", *others] if others else []
    return "\n".join([f"# {name}", "", summary, "", *lines, "", notes, *ends]) + "\n"


def _hand_on(run: Run, plan: SweepPlan, best: Trial, compared: TrialComparison, tracker: Tracker) -> None:
    """The best configuration as a preset, and the model as MLflow's champion."""
    config = best_config(plan, best, [point for point in compared.points if point.number == best.number])
    path = run.folder / "best.yaml"
    started_from = config.tokenizer.checkpoint
    config = config.with_values("tokenizer", checkpoint=_checkpoint(plan, best))
    head = f"# The best of a sweep: {best.name}, {compared.best_in_words}.\n#\n#     python jobs/evaluate.py {path}\n"
    if plan.trains:
        head += f"#     python jobs/train.py {path} tokenizer.checkpoint={started_from}     # train it again\n"
    head += "#\n# Expected: the numbers of its trial; data.shards are the sweep's.\n"
    write_atomically(path, (head + config.to_yaml()).encode())
    run.outputs["best"] = str(path)
    tracker.artifact(path)
    tracker.tag("best_trial", best.name)
    if run.config.tracking.uri and run.config.sweep.register:
        try:
            _register(run, plan, best, config, tracker)
        except Exception as error:  # noqa: BLE001 - a sweep is worth something without a registered model
            say(f"the champion is not registered: {type(error).__name__}: {error}")


def best_config(plan: SweepPlan, trial: Trial, points: list[TrialPoint]) -> Config:
    """The configuration of the best trial, which has these points, cut where the budget allows: a preset for jobs."""
    config = plan.config_of(trial)
    cut = best_cut(points, plan.config)
    if cut is not None:
        config = config.with_values("filter", rule=cut.rule, threshold=cut.threshold)
    config = config.with_values("evaluate", thresholds=plan.cuts.get(config.filter.rule, ()))
    return replace(config.with_values("run", name=""), sweep=SweepConfig())


def _checkpoint(plan: SweepPlan, trial: Trial) -> str:
    """Of the tokenizer of a trial: as the sweep was given it, else what the trial trained."""
    given = "" if plan.trains else trial.values[CHECKPOINT]
    return given or str(plan.training_folder(trial) / "checkpoint")


def _register(run: Run, plan: SweepPlan, best: Trial, config: Config, tracker: Tracker) -> None:
    from pipeline.tracking.mlflow_store import save_pyfunc

    tokenizer, _ = load_tokenizer(plan.evaluation_of(best, next(iter(plan.cuts)), config.tokenizer.checkpoint))
    data, model = run.folder / "champion", run.folder / "champion-mlflow"
    champion.write_data(data, tokenizer, config.filter)
    pictures = ShardDataset(config.data.shards, "heldout")
    example = pictures.images(list(range(min(EXAMPLES, len(pictures)))))
    shutil.rmtree(model, ignore_errors=True)
    save_pyfunc(model, champion.__name__, data, example, champion.load(data).predict(example))
    shutil.rmtree(data)  # the model holds a copy
    run.outputs["champion"] = str(model)
    tracker.register(model, run.config.sweep.register, ALIAS)  # says so once it is
