"""Ray Tune around the trials: it places them, runs them side by side and, with ASHA, stops those that fall behind.

Tune's own state is not used to resume: see `ledger.py`.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from pipeline.core.config import Config
from pipeline.sweeps.trial_work import METRIC, STEP, in_tune

Take = Callable[[], "tuple[int, dict[str, Any]] | None"]  # the number of the next trial and its task
Ended = Callable[[int, str, str], None]  # number, outcome, reason
SHARE = {"memory": 2**20}  # bytes; what a trial itself takes. A CPU for it would be one less for its workers


class QueueSearcher(Searcher):
    """Tune's view of the queue of trials.

    Args:
        take: gives the next trial, None when there is none left.
        ended: is told how each one ended.
    """

    def __init__(self, take: Take, ended: Ended) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._take, self._ended = take, ended
        self._numbers: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given, to be able to resume: it finds nothing here that it could use."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        """Nothing to set."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial's task as its configuration."""
        given = self._take()
        if given is None:
            return Searcher.FINISHED
        self._numbers[trial_id], task = given
        return task

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass on how it ended; a trial that says nothing of its outcome was stopped by the scheduler."""
        number = self._numbers.pop(trial_id)
        if error:
            self._ended(number, "failed", "its worker died; see Ray's log")
        elif result and "outcome" in result:
            self._ended(number, result["outcome"], result["reason"])
        else:
            found = result or {}
            step, value = found.get(STEP, 0), found.get(METRIC, float("nan"))
            self._ended(number, "stopped", f"ASHA: after step {step} its validation PSNR, {value:.2f} dB, was behind")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger is what resuming reads."""


def run_tune(config: Config, folder: Path, total: int, at_once: int, take: Take, ended: Ended) -> threading.Thread:
    """Begin to run trials; the thread that does ends when all have.

    Tune takes SIGINT for itself where it is called on the main thread; a job's orderly stop needs it.

    Args:
        config: of the sweep.
        folder: its run folder.
        total: most trials.
        at_once: of them.
        take: gives trials.
        ended: hears of each end, on the thread.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our run folders hold all of it
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its state is not used
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one announces an experiment whatever `verbose` is
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it would miss the files that are switched off above
    _make_actors_of_ray_data()
    tuner = tune.Tuner(
        tune.with_resources(in_tune, tune.PlacementGroupFactory([SHARE])),
        tune_config=tune.TuneConfig(
            search_alg=QueueSearcher(take, ended),
            scheduler=_scheduler(config),
            num_samples=total,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,  # else made of the whole configuration
        ),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder / "ray_tune"),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            verbose=0,
        ),
    )
    thread = threading.Thread(target=tuner.fit, daemon=True, name="ray-tune")
    thread.start()
    return thread


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
        grace_period=grace_steps(config),
        reduction_factor=config.sweep.reduction,
    )


def grace_steps(config: Config) -> int:
    """Steps that every trial may take."""
    return config.sweep.grace_steps or config.train.validate_every
