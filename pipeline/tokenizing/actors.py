"""Ranges to workers: in this process when there is one, else on a pool of Ray Data actors.

An actor that dies takes nothing with it: a range is one row, and Ray Data gives it to another.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster import connect
from pipeline.config import TokensConfig
from pipeline.data.manifest import Shard
from pipeline.errors import BadInput
from pipeline.tokenizing.parts import Part, Seconds, make_part
from pipeline.tokenizing.plan import Range


class Work(Protocol):
    """What the tasks of one run have in common; travels to the actors."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        ...

    @property
    def key(self) -> str:
        """Of the plan."""
        ...

    @property
    def files(self) -> str:
        """The folder, inside the run's, of what is made."""
        ...

    def worker(self, tokenizer: Any, device: str) -> "Worker":
        """Loads and warms up what a process needs."""
        ...


class Worker(Protocol):
    """Makes the file of one range after the other."""

    def make(self, task: Range) -> tuple[Shard, Seconds]:
        """The file, written whole, and how long it took."""
        ...


class RangeActor:
    """Lives in a process of its own: the tokenizer is loaded and warmed up once, then ranges come in.

    Args:
        shared: reference to (tokenizer, work), which the driver has made.
        device: where it computes.
    """

    def __init__(self, shared: Any, device: str) -> None:
        import ray

        tokenizer, self._work = ray.get(shared)
        self._worker = self._work.worker(tokenizer, device)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Make one range's file, unless it is there; rows hold JSON."""
        task = Range(**json.loads(row["task"]))
        return {"part": json.dumps(asdict(make_part(self._work.folder, self._work.key, task, self._worker.make)))}


def is_alone(config: TokensConfig, ranges: int) -> bool:
    """Whether one worker does it all: it needs no Ray, unless a cluster was named."""
    return min(config.num_workers, ranges) == 1 and "RAY_ADDRESS" not in os.environ


def pick_device(config: TokensConfig, alone: bool) -> str:
    """Where workers compute: as configured, by default on GPUs where there is one for each.

    Raises:
        BadInput: more workers than the cluster has CPUs, or than there are GPUs when those are asked for.
    """
    import torch

    if alone:
        gpus = torch.cuda.device_count()
    else:
        resources = connect().cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if config.num_workers > cpus:
            raise BadInput(f"tokens.num_workers is {config.num_workers}; expected at most the cluster's {cpus} CPUs")
    workers = 1 if alone else config.num_workers
    if config.device == "cuda" and workers > gpus:
        raise BadInput(f"tokens.device is 'cuda' for {workers} workers; expected at most as many as the {gpus} GPUs")
    return "cuda" if config.device != "cpu" and gpus >= workers else "cpu"


def make_here(tokenizer: Any, work: Work, ranges: list[Range], device: str) -> Iterator[Part]:
    """Every range's part, in order, in this process."""
    worker: Worker | None = None

    def make(task: Range) -> tuple[Shard, Seconds]:
        nonlocal worker
        worker = worker or work.worker(tokenizer, device)
        return worker.make(task)

    for task in ranges:
        yield make_part(work.folder, work.key, task, make)


def make_on_actors(tokenizer: Any, work: Work, ranges: list[Range], device: str, workers: int) -> Iterator[Part]:
    """Every range's part, as actors finish them."""
    ray = connect()
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would warn that its progress bars are off
    items = [{"task": json.dumps(asdict(task))} for task in ranges]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(  # one block is one range
        RangeActor,
        fn_constructor_args=(ray.put((tokenizer, work)), device),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
    )
    for row in rows.iter_rows():
        values = json.loads(row["part"])
        yield Part(**{**values, "file": Shard(**values["file"])})
