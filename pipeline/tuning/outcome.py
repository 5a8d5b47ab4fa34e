"""The end of a sweep: all finished trials compared, told to people and to MLflow, and the best one handed on."""

import shutil

from pipeline.config import Config
from pipeline.data.shards import ShardDataset
from pipeline.pretrained import load_tokenizer
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker
from pipeline.tuning import champion
from pipeline.tuning.child import curve_metrics
from pipeline.tuning.ledger import FAILED, FINISHED, RUNNING, STOPPED, Ledger
from pipeline.tuning.objective import Point, best_trial, distance_in, objective, points_of
from pipeline.tuning.plan import CHECKPOINT, Plan, Trial, cuts_in_words
from pipeline.tuning.plot import sweep_plot
from pipeline.tuning.report import best_config, in_words, on_front, terminal_table, write_best, write_table

ALIAS = "champion"
EXAMPLES = 4  # pictures that the registered model shows as its input


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
    measured = {trial.number: points_of(plan, trial) for trial in finished}
    points = [point for trial in finished for point in measured[trial.number]]
    values = {number: objective(found, plan.config) for number, found in measured.items()}
    number = best_trial(values, plan.config)
    best = next((trial for trial in finished if trial.number == number), None)
    said = (
        "no trial says what it is worth at the budget"
        if best is None
        else in_words(values[best.number] or 0, run.config)
    )
    run.results = {
        "trials_planned": float(plan.total),
        "trials_finished": float(len(finished)),
        "trials_failed": float(len(ledger.of(FAILED))),
        "trials_stopped": float(len(ledger.of(STOPPED))),
        "points": float(len(points)),
    }
    distance = distance_in(plan, finished[0])
    _log(run, values, points, distance, best)
    _show(run, plan, ledger, points, distance, best, said, tracker)
    if best is not None:
        _hand_on(run, plan, best, measured[best.number], said, tracker)


def _log(run: Run, values: dict[int, float | None], points: list[Point], distance: str, best: Trial | None) -> None:
    """The parent's charts: the objective over trials, and the Pareto front over tokens."""
    if best is not None:
        run.results |= {"best_trial": float(best.number), "best_objective": values[best.number] or 0.0}
    run.rewind_metrics(-1)  # a resumed sweep compares anew
    run.log(run.results, 0)
    for number, value in values.items():
        if value is not None:
            run.log({"trials/objective": value}, number)
    front = [points[i] for i in on_front(points)]
    for point in sorted(front, key=lambda p: p.tokens):
        named = curve_metrics(point, "", distance)
        run.log({name.replace("curve/", "front/"): value for name, value in named.items()}, round(point.tokens))


def _show(
    run: Run,
    plan: Plan,
    ledger: Ledger,
    points: list[Point],
    distance: str,
    best: Trial | None,
    said: str,
    tracker: Tracker,
) -> None:
    """Table and plot."""
    title = f"Best: {best.name}, {said}." if best else f"No best trial: {said}."
    entries = ledger.of(RUNNING, FINISHED, FAILED, STOPPED)
    for path in write_table(run.folder, points, distance, entries, f"{title} Cuts: {cuts_in_words(plan)}."):
        run.outputs[path.name.replace(".", "_")] = str(path)
        tracker.artifact(path)
    picture = run.folder / "pictures" / "rate_distortion.png"
    sweep_plot(picture, points, distance, best.name if best else "")
    run.outputs["rate_distortion"] = str(picture)
    tracker.picture(picture, "rate_distortion", 0)
    tracker.artifact(picture, "pictures")
    say(f"\n{terminal_table(points, distance)}\n\n{title}\nall trials and the Pareto front: {picture}")


def _hand_on(run: Run, plan: Plan, best: Trial, points: list[Point], said: str, tracker: Tracker) -> None:
    """The best configuration as a preset, and the model as MLflow's champion."""
    config = best_config(plan, best, points)
    path = write_best(run.folder, config, best, said)
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
    run.outputs["champion"] = str(model)
    name = run.config.sweep.register
    tracker.register(model, name, ALIAS)
    say(f"registered in MLflow: models:/{name}@{ALIAS}")
