"""The stage behind `jobs/benchmark.py`: speed, as ratios that were taken side by side in one run."""

from importlib import import_module
from typing import Any

from pipeline.core.config import BENCHMARKS, Config
from pipeline.core.run import Run
from pipeline.tracking import check_tracking

KINDS = {  # imported when asked for
    name: f"pipeline.benchmarks.{name}" + ("" if name in ("scaling", "train_step") else "_speed") for name in BENCHMARKS
}


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; see the `check` of the kind.

    Raises:
        BadInput: as that; a tracking address of unknown form.
    """
    check_tracking(config)
    _kind(config).check(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-benchmark-{config.benchmark.kind}"


def run(run: Run) -> None:
    """Measure, and leave a report in the run folder."""
    _kind(run.config).run(run)


def _kind(config: Config) -> Any:
    return import_module(KINDS[config.benchmark.kind])
