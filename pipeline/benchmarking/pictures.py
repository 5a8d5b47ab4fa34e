"""Pictures for benchmarks of the model: those that the configuration names, else photographs made for the run."""

import dataclasses

from pipeline.benchmarking import shards
from pipeline.checks import check_pictures
from pipeline.config import Config
from pipeline.run import Run
from pipeline.training import stage as training

WORK = "work"  # folder in the run folder, for what is made


def names_pictures(config: Config) -> bool:
    """Whether there are shards or a source."""
    return bool(config.data.shards or config.data.source)


def check_named(config: Config) -> None:
    """Refuse named pictures that cannot be used.

    Raises:
        BadInput: as `check_pictures`.
    """
    if names_pictures(config):
        check_pictures(config)


def with_pictures(run: Run, heldout_fraction: float) -> Config:
    """The run's configuration with `data.shards`.

    Args:
        run: of the benchmark.
        heldout_fraction: of the pictures that are made where none are named.
    """
    if names_pictures(run.config):
        return training.with_shards(run.config)
    data = dataclasses.replace(run.config.data, heldout_fraction=heldout_fraction)
    return shards.with_shards(dataclasses.replace(run.config, data=data), run.folder / WORK)
