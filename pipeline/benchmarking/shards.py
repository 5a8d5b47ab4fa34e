"""Shards for a benchmark: the ones that are named, else made of photographs for the run."""

import dataclasses
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from pipeline.benchmarking.photographs import make_photographs
from pipeline.config import Config, DataConfig
from pipeline.data import preprocess
from pipeline.run import Run


def with_shards(config: Config, folder: Path) -> Config:
    """The configuration with `data.shards`.

    Args:
        config: of the run.
        folder: a new one, for the photographs and the shards that are made where none are named.
    """
    if config.data.shards:
        return config
    make_photographs(folder / "photographs", config.benchmark.pictures)
    data = dataclasses.replace(config.data, source=str(folder / "photographs"), heldout_source="")
    shards = make_shards(config, data, folder / "shards")
    return dataclasses.replace(config, data=dataclasses.replace(data, shards=str(shards)))


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
