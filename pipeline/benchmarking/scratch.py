"""Folders that a benchmark works in, which leave nothing behind."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.benchmarking.table import Findings, publish
from pipeline.run import Run
from pipeline.tracking import Tracker


@contextmanager
def scratch(run: Run) -> Iterator[Path]:
    """A new folder in the run's, not made yet, that goes when the benchmark ends, however it ends."""
    folder = run.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def emptied(folder: Path, *names: str) -> None:
    """Make the folder anew, with folders of these names and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)


def publish_measured(run: Run, measure: Callable[[Run, Path], Findings]) -> None:
    """Publish what `measure` finds in a scratch folder."""
    with scratch(run) as folder, Tracker.start(run) as tracker:
        publish(run, tracker, measure(run, folder))
