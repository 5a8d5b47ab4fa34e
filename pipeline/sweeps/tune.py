"""Ray Tune around the trials: it places them, runs them side by side and, with ASHA, stops those that fall behind.

A trial trains, then evaluates at every cut; stages that are finished are not repeated. It does not talk to MLflow: what
its stages leave in their run folders is read by the driver. Tune's own state is not used to resume, the ledger
is (see trials.py).
"""

import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.job import run_nested
from pipeline.core.presets import config_from_dict
from pipeline.core.run import METRICS, LoggedLine, parse_metrics, read_summary, wait_while_held
from pipeline.sweeps.space import Domain, read_space
from pipeline.sweeps.trials import FAILED, FINISHED, INTERRUPTED, SweepPlan, Trial

METRIC, STEP = "psnr", "step"  # reported to Tune while a trial trains
VALIDATED = "validation/psnr"  # as training logs it
LOOK_SECONDS = 0.5  # between looks at the metrics of a training
LOCK_SECONDS = 60.0  # how long a run folder may still be held by a worker of a sweep that was killed
STDERR = 2  # file descriptor
SHARE = {"memory": 2**20}  # bytes; what a trial itself takes. A CPU for it would be one less for its workers


class LookCallback(tune.Callback):
    """Calls a function in every step of Tune's loop, several times a second."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's hook."""
        self._look()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves what it is given."""
        return {}


def run_tune(
    config: Config, folder: Path, total: int, at_once: int, searcher: Searcher, look: Callable[[], None]
) -> None:
    """Run at most `total` trials, `at_once` side by side, until the searcher has none left and all have ended.

    Calls `look` meanwhile, several times a second.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our run folders hold all of it
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # a job's orderly stop needs SIGINT
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its state is not used
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one announces an experiment whatever `verbose` is
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it would miss the files that are switched off above
    _make_actors_of_ray_data()
    tune.Tuner(
        tune.with_resources(in_tune, tune.PlacementGroupFactory([SHARE])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(config),
            num_samples=total,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,  # else made of the whole configuration
        ),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder / "ray_tune"),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            callbacks=[LookCallback(look)],
            verbose=0,
        ),
    ).fit()


def _make_actors_of_ray_data() -> None:
    """Made by a trial, they would lie in its placement group and end with it, while the trial beside it uses them.

    That one then fails with ActorUnschedulableError (seen with Ray 2.60); Ray Data has no public call for this.
    """
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


def _scheduler(config: Config) -> Any:
    if config.sweep.scheduler == "none":
        return None
    return AsyncHyperBandScheduler(
        time_attr=STEP,
        metric=METRIC,
        mode="max",
        max_t=config.train.max_steps + 1,  # it stops what reaches max_t, and evaluation comes after the last step
        grace_period=config.sweep.grace_steps or config.train.validate_every,
        reduction_factor=config.sweep.reduction,
    )


class OptunaProposals:
    """Values of trials that learn from those before, by Tune's `OptunaSearch` with a Parzen estimator.

    `first` is the number of the trial that is proposed first: after a resume the draws are others than before.
    """

    def __init__(self, plan: SweepPlan, first: int) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep, kinds = plan.config.sweep, optuna.distributions

        def distribution(domain: Domain) -> Any:
            if domain.kind == "int":
                return kinds.IntDistribution(*domain.values)
            if domain.kind in ("uniform", "log_uniform"):
                return kinds.FloatDistribution(*domain.values, log=domain.kind == "log_uniform")
            return kinds.CategoricalDistribution(range(len(domain.values)))  # Optuna takes no lists as values

        startup = min(10, max(sweep.samples // 2, 2))
        sampler = optuna.samplers.TPESampler(seed=sweep.seed + first, n_startup_trials=startup)
        self._domains = read_space(sweep.space)
        space = {domain.key: distribution(domain) for domain in self._domains}
        self._search = OptunaSearch(space, metric="loss", mode="min", sampler=sampler)

    def propose(self, number: int) -> dict[str, Any]:
        """Values of the trial `number`."""
        drawn = self._search.suggest(str(number))
        assert isinstance(drawn, dict)
        return {d.key: d.values[drawn[d.key]] if d.is_listed else drawn[d.key] for d in self._domains}

    def learn(self, trial: Trial, loss: float | None) -> None:
        """A trial finished; `loss` is less the better it is. One without a finite loss says nothing."""
        if loss is not None and math.isfinite(loss):
            values = trial.values  # also of trials that another process proposed, before a resume
            point = {d.key: d.values.index(values[d.key]) if d.is_listed else values[d.key] for d in self._domains}
            self._search.add_evaluated_point(point, loss)


# What one trial does, wherever it runs.


def work(task: dict[str, Any]) -> None:
    """Do all that a trial has to do and was not done before; `TrialSearcher` makes the task.

    Raises:
        BadInput, Stopped: as the stages.
    """
    checkpoint = ""
    if task["training"]:
        config = config_from_dict(task["training"])
        _once("train", config)
        checkpoint = str(_folder("train", config) / "checkpoint")
    for values in task["evaluations"]:
        tokenizer = {**values["tokenizer"], "checkpoint": checkpoint or values["tokenizer"]["checkpoint"]}
        _once("evaluate", config_from_dict({**values, "tokenizer": tokenizer}))


def _once(stage: str, config: Config) -> None:
    """Run a stage, or go on with it, unless it is finished."""
    folder = _folder(stage, config)
    with suppress(OSError, ValueError):
        if read_summary(folder)["status"] == "finished":
            return
    wait_while_held(folder, LOCK_SECONDS)  # a killed sweep's workers live on for some seconds
    run_nested(stage, config)


def _folder(stage: str, config: Config) -> Path:
    return Path(config.run.output) / f"{config.preset}-{stage}"


def outcome_of(problem: BaseException) -> dict[str, str]:
    """How a trial ended, for the ledger."""
    if isinstance(problem, Stopped | KeyboardInterrupt):
        return {"outcome": INTERRUPTED, "reason": str(problem)}
    name = "" if isinstance(problem, BadInput) else f"{type(problem).__name__}: "
    return {"outcome": FAILED, "reason": " ".join(f"{name}{problem}".split())}


def in_tune(task: dict[str, Any]) -> None:
    """The function that Tune runs: works in a thread of its own and reports what its training validates meanwhile."""
    outcome = {"outcome": FINISHED, "reason": ""}

    def do() -> None:
        with _output_to(Path(task["folder"]) / "output.txt"):
            try:
                work(task)
            except BaseException as problem:  # noqa: BLE001 - whatever it was, it is reported and ends this trial only
                traceback.print_exc()
                outcome.update(outcome_of(problem))

    thread = threading.Thread(target=do, daemon=True, name="trial")
    thread.start()
    last = {STEP: 0, METRIC: -math.inf}
    lines = GrowingMetrics(_folder("train", config_from_dict(task["training"]))) if task["training"] else None
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        for line in lines.new() if lines else ():
            value = line.metrics.get(VALIDATED, math.nan)
            if line.step > last[STEP] and not math.isnan(value):
                last = {STEP: line.step, METRIC: value}
                tune.report(last)
    tune.report({**last, **outcome})


class GrowingMetrics:
    """The whole lines of a run's `metrics.jsonl` that grows, or that is written anew by a training that goes on."""

    def __init__(self, folder: Path) -> None:
        self._path, self._read = folder / METRICS, b""

    def new(self) -> list[LoggedLine]:
        """Lines since the last call, all of them where the file does not begin as it did."""
        data = self._path.read_bytes() if self._path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]
        fresh = data[len(self._read) :] if data.startswith(self._read) else data
        self._read = data
        return parse_metrics(fresh)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What is printed goes into a file: of several trials side by side, people could not tell whose it is.

    Ray's C++ part writes to the file descriptor itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(STDERR)
    with open(path, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(before, STDERR)
            os.close(before)
