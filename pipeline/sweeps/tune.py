"""Running trials on Ray Tune: it places them, runs several at once and, with ASHA, stops the worst early.

A trial trains, then evaluates at every cut; finished stages are not repeated. The driver, not the trial, sends the
results to MLflow, from the run folders. A resumed sweep uses the ledger of trials.py, not Tune's own state.
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
POLL_SECONDS = 0.5  # between reads of the metrics of a training
LOCK_SECONDS = 60.0  # how long a run folder may still be held by a worker of a sweep that was killed
STDERR = 2  # file descriptor
TRIAL_RESOURCES = {"memory": 2**20}  # bytes; no CPU, so that the workers of its stages can have them all


class LookCallback(tune.Callback):
    """Calls a function in every step of Tune's loop, several times a second."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's hook."""
        self._look()

    def __getstate__(self) -> dict[str, Any]:
        """No state: Tune pickles its callbacks, and nothing of this one needs saving."""
        return {}


def run_tune(
    config: Config, folder: Path, total: int, at_once: int, searcher: Searcher, look: Callable[[], None]
) -> None:
    """Run at most `total` trials, `at_once` at a time, until the searcher has none left and all have ended.

    Calls `look` several times a second.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our run folders hold the same
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # a job's orderly stop needs SIGINT
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its state is not used, so hardly ever save it
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints even with verbose=0
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns of the files that are switched off above
    _make_actors_of_ray_data()
    tune.Tuner(
        tune.with_resources(in_tune, tune.PlacementGroupFactory([TRIAL_RESOURCES])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(config),
            num_samples=total,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,  # the default contains the whole configuration
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
    """Make Ray Data's shared actors here: made by a trial, they would end with its placement group.

    Other trials would then fail with ActorUnschedulableError (seen with Ray 2.60). There is no public call for this.
    """
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


def _scheduler(config: Config) -> Any:
    """ASHA as configured, which stops trials with a low validation PSNR early; None: nothing is stopped."""
    if config.sweep.scheduler == "none":
        return None
    return AsyncHyperBandScheduler(
        time_attr=STEP,
        metric=METRIC,
        mode="max",
        max_t=config.train.max_steps + 1,  # Tune stops a trial at max_t, but evaluation comes after the last step
        grace_period=config.sweep.grace_steps or config.train.validate_every,
        reduction_factor=config.sweep.reduction,
    )


class OptunaProposals:
    """Proposes values of trials from the results of earlier ones: Tune's `OptunaSearch` with TPE.

    `first`, the number of the first trial to propose, is part of the seed, so that a resumed sweep draws new values.
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
            return kinds.CategoricalDistribution(range(len(domain.values)))  # indices: Optuna takes no lists as values

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
        """Add the result of a trial, a `loss` to minimise; one that is not finite is ignored."""
        if loss is not None and math.isfinite(loss):
            values = trial.values  # also of trials that another process proposed, before a resume
            point = {d.key: d.values.index(values[d.key]) if d.is_listed else values[d.key] for d in self._domains}
            self._search.add_evaluated_point(point, loss)


# What one trial does, wherever it runs.


def work(task: dict[str, Any]) -> None:
    """Run all stages of a trial that are not finished; `TrialSearcher` makes the task.

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
    """Run or resume a stage, unless it is finished."""
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
    """The function that Tune runs: `work` in a thread, while this one reports the training's validations."""
    outcome = {"outcome": FINISHED, "reason": ""}

    def do() -> None:
        with _output_to(Path(task["folder"]) / "output.txt"):
            try:
                work(task)
            except BaseException as problem:  # noqa: BLE001 - any error is reported and ends this trial only
                traceback.print_exc()
                outcome.update(outcome_of(problem))

    thread = threading.Thread(target=do, daemon=True, name="trial")
    thread.start()
    last = {STEP: 0, METRIC: -math.inf}
    lines = GrowingMetrics(_folder("train", config_from_dict(task["training"]))) if task["training"] else None
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        for line in lines.new() if lines else ():
            value = line.metrics.get(VALIDATED, math.nan)
            if line.step > last[STEP] and not math.isnan(value):
                last = {STEP: line.step, METRIC: value}
                tune.report(last)
    tune.report({**last, **outcome})


class GrowingMetrics:
    """Follows a run's `metrics.jsonl`, to which lines are appended and which a resumed training rewrites."""

    def __init__(self, folder: Path) -> None:
        self._path, self._read = folder / METRICS, b""

    def new(self) -> list[LoggedLine]:
        """Complete lines since the last call; all lines if the file was rewritten."""
        data = self._path.read_bytes() if self._path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]
        fresh = data[len(self._read) :] if data.startswith(self._read) else data
        self._read = data
        return parse_metrics(fresh)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect all output to a file, because that of several trials would be mixed.

    Also the file descriptor of stderr, to which Ray's C++ part writes.
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
