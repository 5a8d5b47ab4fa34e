"""The end of a sweep: all finished trials compared, told to people and to MLflow, and the best one handed on."""

import shutil
from dataclasses import dataclass

from pipeline.core.checkpoints import load_tokenizer
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.sweeps import champion
from pipeline.sweeps.driver import curve_metrics
from pipeline.sweeps.report import (
    Point,
    best_config,
    best_trial,
    distance_in,
    in_words,
    objective,
    on_front,
    points_of,
    sweep_plot,
    terminal_table,
    write_best,
    write_table,
)
from pipeline.sweeps.trials import CHECKPOINT, FAILED, FINISHED, RUNNING, STOPPED, Ledger, Plan, Trial, cuts_in_words
from pipeline.tracking import Tracker

ALIAS = "champion"
EXAMPLES = 4  # pictures that the registered model shows as its input


@dataclass(frozen=True)
class Comparison:
    """The trials that finished, side by side.

    Attributes:
        points: of all of them.
        values: objective by number of the trial.
        distance: name of the Frechet distance.
        best: the trial with the best objective; None where no trial has one.
        said: the best objective in words.
    """

    points: list[Point]
    values: dict[int, float | None]
    distance: str
    best: Trial | None
    said: str

    @classmethod
    def of(cls, plan: Plan, finished: list[Trial]) -> "Comparison":
        """Reads the evaluations of the trials, of which there is at least one."""
        measured = {trial.number: points_of(plan, trial) for trial in finished}
        values = {number: objective(found, plan.config) for number, found in measured.items()}
        number = best_trial(values, plan.config)
        value = None if number is None else values[number]
        return cls(
            [point for found in measured.values() for point in found],
            values,
            distance_in(plan, finished[0]),
            next((trial for trial in finished if trial.number == number), None),
            "no trial says what it is worth at the budget" if value is None else in_words(value, plan.config),
        )


def conclude(run: Run, plan: Plan, ledger: Ledger, tracker: Tracker) -> None:
    """Table, plot, best configuration and champion, of all trials that finished.

    Args:
        run: of the sweep; gets results and outputs.
        plan: its trials.
        ledger: how they ended.
        tracker: of the parent run.

    Raises:
        RuntimeError: no trial finished.
    """
    finished = [entry.trial for entry in ledger.of(FINISHED)]
    if not finished:
        reasons = "; ".join(f"{entry.trial.name}: {entry.reason}" for entry in ledger.of(FAILED, STOPPED))
        raise RuntimeError(f"no trial finished; {reasons}")
    found = Comparison.of(plan, finished)
    run.results = {
        "trials_planned": float(plan.total),
        "trials_finished": float(len(finished)),
        "trials_failed": float(len(ledger.of(FAILED))),
        "trials_stopped": float(len(ledger.of(STOPPED))),
        "points": float(len(found.points)),
    }
    if found.best is not None and (value := found.values[found.best.number]) is not None:
        run.results |= {"best_trial": float(found.best.number), "best_objective": value}
    _log(run, found)
    _show(run, plan, ledger, found, tracker)
    if found.best is not None:
        _hand_on(run, plan, found.best, found, tracker)


def _log(run: Run, found: Comparison) -> None:
    """The parent's charts: the objective over trials, and the Pareto front over tokens."""
    run.rewind_metrics(-1)  # a resumed sweep compares anew
    run.log(run.results, 0)
    for number, value in found.values.items():
        if value is not None:
            run.log({"trials/objective": value}, number)
    front = [found.points[i] for i in on_front(found.points)]
    for point in sorted(front, key=lambda p: p.tokens):
        run.log(curve_metrics(point, "front", found.distance), round(point.tokens))


def _show(run: Run, plan: Plan, ledger: Ledger, found: Comparison, tracker: Tracker) -> None:
    """Table and plot."""
    best = found.best.name if found.best else ""
    title = f"Best: {best}, {found.said}." if best else f"No best trial: {found.said}."
    entries = ledger.of(RUNNING, FINISHED, FAILED, STOPPED)
    summary = f"{title} Cuts: {cuts_in_words(plan)}."
    for path in write_table(run.folder, found.points, found.distance, entries, summary):
        run.outputs[path.name.replace(".", "_")] = str(path)
        tracker.artifact(path)
    picture = run.folder / "pictures" / "rate_distortion.png"
    sweep_plot(picture, found.points, found.distance, best)
    run.outputs["rate_distortion"] = str(picture)
    tracker.picture(picture, "rate_distortion", 0)
    tracker.artifact(picture, "pictures")
    table = terminal_table(found.points, found.distance)
    say(f"\n{table}\n\n{title}\nall trials and the Pareto front: {picture}")


def _hand_on(run: Run, plan: Plan, best: Trial, found: Comparison, tracker: Tracker) -> None:
    """The best configuration as a preset, and the model as MLflow's champion."""
    config = best_config(plan, best, [point for point in found.points if point.number == best.number])
    path = write_best(run.folder, config, best, found.said)
    run.outputs["best"] = str(path)
    tracker.artifact(path)
    tracker.tag("best_trial", best.name)
    say(f"the best configuration: {path}")
    if run.config.tracking.uri and run.config.sweep.register:
        try:
            _register(run, plan, best, config, tracker)
        except Exception as error:  # noqa: BLE001 - a sweep is worth something without a registered model
            say(f"the champion is not registered: {type(error).__name__}: {error}")


def _register(run: Run, plan: Plan, best: Trial, config: Config, tracker: Tracker) -> None:
    from pipeline.tracking.mlflow_store import save_pyfunc

    given = "" if plan.trains else best.values[CHECKPOINT]
    checkpoint = given or str(plan.training_folder(best) / "checkpoint")
    tokenizer, _ = load_tokenizer(plan.evaluation_of(best, next(iter(plan.cuts)), checkpoint))
    data, model = run.folder / "champion", run.folder / "champion-mlflow"
    champion.write_data(data, tokenizer, config.filter)
    pictures = ShardDataset(config.data.shards, "heldout")
    example = pictures.images(list(range(min(EXAMPLES, len(pictures)))))
    shutil.rmtree(model, ignore_errors=True)
    save_pyfunc(model, champion.__name__, data, example, champion.load(data).predict(example))
    shutil.rmtree(data)  # the model holds a copy
    run.outputs["champion"] = str(model)
    name = run.config.sweep.register
    tracker.register(model, name, ALIAS)
    say(f"registered in MLflow: models:/{name}@{ALIAS}")
