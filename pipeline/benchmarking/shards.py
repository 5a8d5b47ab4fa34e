"""Pictures for a benchmark: those that the configuration names, else photographs that are made for the run."""

import dataclasses
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from pipeline.benchmarking.photographs import make_photographs
from pipeline.checks import check_pictures
from pipeline.config import Config, DataConfig
from pipeline.data import preprocess
from pipeline.data.manifest import read_manifest
from pipeline.run import Run
from pipeline.samples import photograph_files
from pipeline.training import stage as training


def names_pictures(config: Config) -> bool:
    """Whether there are shards or a source."""
    return bool(config.data.shards or config.data.source)


def check_named(config: Config) -> None:
    """Refuse pictures that cannot be used.

    Raises:
        BadInput: as `check_pictures`; none are named and there are no photographs to make them of.
    """
    if names_pictures(config):
        check_pictures(config)
    else:
        photograph_files()


def take_pictures(run: Run, folder: Path, heldout_fraction: float) -> None:
    """Give the run `data.shards`, and say in its inputs what they are.

    Args:
        run: of the benchmark.
        folder: a new one, for the photographs and shards that are made where no pictures are named.
        heldout_fraction: of what is made.
    """
    if names_pictures(run.config):
        run.config = training.with_shards(run.config)
    else:
        make_photographs(folder / "photographs", run.config.benchmark.pictures)
        changes: dict[str, Any] = {"source": str(folder / "photographs"), "heldout_source": ""}
        data = dataclasses.replace(run.config.data, **changes, heldout_fraction=heldout_fraction)
        shards = make_shards(run.config, data, folder / "shards")
        run.config = dataclasses.replace(run.config, data=dataclasses.replace(data, shards=str(shards)))
    place = run.config.data.shards
    run.inputs["shards"] = {"path": place, "sha256": read_manifest(place).fingerprint}


def make_shards(config: Config, data: DataConfig, folder: Path) -> Path:
    """Run the preprocess stage in a new run folder; gives that folder back.

    Args:
        config: of the run that asks.
        data: what to preprocess, and how.
        folder: for the shards.
    """
    return run_quietly("preprocess", preprocess, dataclasses.replace(config, data=data), folder)


def run_quietly(name: str, stage: Any, config: Config, folder: Path) -> Path:
    """Run a stage in a new run folder, without a word; gives that folder back.

    Args:
        name: of the stage.
        stage: its module.
        config: that it takes.
        folder: of its run.
    """
    place = dataclasses.replace(config.run, output=str(folder.parent), name=folder.name)
    run = Run.open(name, dataclasses.replace(config, run=place), folder.name, resume=False)
    try:
        with redirect_stderr(io.StringIO()):  # what it says is not for the reader of a benchmark
            stage.run(run)
    finally:
        run.close()
    return folder
