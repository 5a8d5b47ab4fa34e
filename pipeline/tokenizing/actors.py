"""Ranges to workers: in this process when there is one, else on a pool of Ray Data actors.

An actor that dies takes nothing with it: a range is one row, and Ray Data gives it to another.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster import as_they_finish, connect
from pipeline.config import Config
from pipeline.data.manifest import Shard
from pipeline.tokenizing.parts import Made, Part, Seconds, make_part, part_from_dict
from pipeline.tokenizing.plan import Range


@dataclass(frozen=True)
class Workers:
    """Who does it, as a section of the configuration says."""

    section: str  # tokens | generate | evaluate: names the keys in messages
    number: int  # at most
    device: str  # auto | cpu | cuda

    @classmethod
    def of(cls, config: Config, section: str) -> "Workers":
        """Of a section with `num_workers` and `device`."""
        part = getattr(config, section)
        return cls(section, part.num_workers, part.device)


class Work(Protocol):
    """What the tasks of one run have in common; travels to the actors."""

    @property
    def folder(self) -> Path:
        """Of the run, or one that runs share."""
        ...

    @property
    def key(self) -> str:
        """Of the plan."""
        ...

    @property
    def files(self) -> str:
        """The folder, inside that one, of what is made."""
        ...

    def worker(self, models: Any, device: str) -> "Worker":
        """Loads and warms up what a process needs."""
        ...


class Worker(Protocol):
    """Makes the file of one range after the other."""

    def make(self, task: Range) -> tuple[Shard, Seconds] | Made:
        """The file, written whole, and how long it took."""
        ...


class RangeActor:
    """Lives in a process of its own: models are loaded and warmed up once, then ranges come in.

    Args:
        shared: reference to (models, work), which the driver has made.
        device: where it computes.
    """

    def __init__(self, shared: Any, device: str) -> None:
        import ray

        models, self._work = ray.get(shared)
        self._worker = self._work.worker(models, device)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Make one range's file, unless it is there; rows hold JSON."""
        task = Range(**json.loads(row["task"]))
        return {"part": json.dumps(asdict(make_part(self._work.folder, self._work.key, task, self._worker.make)))}


def is_alone(workers: Workers, ranges: int) -> bool:
    """Whether one worker does it all: it needs no Ray, unless a cluster was named."""
    return min(workers.number, ranges) == 1 and "RAY_ADDRESS" not in os.environ


def make_here(models: Any, work: Work, ranges: list[Range], device: str) -> Iterator[Part]:
    """Every range's part, in order, in this process."""
    worker: Worker | None = None

    def make(task: Range) -> tuple[Shard, Seconds] | Made:
        nonlocal worker
        worker = worker or work.worker(models, device)
        return worker.make(task)

    for task in ranges:
        yield make_part(work.folder, work.key, task, make)


def make_on_actors(models: Any, work: Work, ranges: list[Range], device: str, workers: int) -> Iterator[Part]:
    """Every range's part, as actors finish them."""
    ray = connect()
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would warn that its progress bars are off
    items = [{"task": json.dumps(asdict(task))} for task in ranges]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(  # one block is one range
        RangeActor,
        fn_constructor_args=(ray.put((models, work)), device),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
    )
    for row in as_they_finish(rows):
        yield part_from_dict(json.loads(row["part"]))
