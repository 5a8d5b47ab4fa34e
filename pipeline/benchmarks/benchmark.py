"""The stage behind `jobs/benchmark.py`: speed, as ratios that were taken side by side in one run."""

from pipeline.core.config import Config
from pipeline.core.run import Run
from pipeline.core.stages import find_benchmark
from pipeline.tracking import check_tracking


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; see the `check` of the kind.

    Raises:
        BadInput: as that; a tracking address of unknown form.
    """
    check_tracking(config)
    find_benchmark(config.benchmark.kind).check(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-benchmark-{config.benchmark.kind}"


def run(run: Run) -> None:
    """Measure, and leave a report in the run folder."""
    find_benchmark(run.config.benchmark.kind).run(run)
