"""Work in pieces: ranges of a plan become files, each made once, in this process or on Ray Data actors.

A stage decides its ranges from its input and never from how many workers there are, keeps them as `plan.json`, and says
with `Work` how one of them is made; `run_ranges` does the rest. A range leaves its files and, written last, a small
`parts/NNNNN.json` with their checksums: a run that was stopped or killed goes on with the ranges that have none, and an
actor that dies takes nothing with it, because Ray Data gives its range to another.
"""

import hashlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline.core.cluster import (
    as_they_finish,
    connect,
    most_resources,
    names_cluster,
    pick_device,
    pick_workers_device,
)
from pipeline.core.console import progress
from pipeline.core.errors import Stopped
from pipeline.core.files import sha256_file, write_atomically, write_json
from pipeline.core.run import Run

Seconds = dict[str, float]  # by kind of work; `total` holds all of them


class Range(Protocol):
    """The work of one task: a frozen dataclass of the stage, which travels to workers."""

    @property
    def number(self) -> int:
        """Place in the plan, from 0; names the part."""
        ...

    @property
    def rows(self) -> int:
        """Pictures, for progress."""
        ...


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str  # relative to the folder of the run
    rows: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """What one range became."""

    key: str  # of the plan: parts of different plans are never mixed
    number: int  # of the range
    files: dict[str, Shard]  # by split where pictures can be rejected, else `file` and maybe another one
    rejected: list[tuple[str, str]] | None = None  # (path, reason); None where pictures cannot be
    seconds: Seconds = field(default_factory=dict)  # that a worker spent on it; empty: it was there already
    batch_seconds: tuple[float, ...] = ()  # of whole batches, where that is wanted

    @property
    def file(self) -> Shard:
        """The first, of a stage that makes the same files of every range."""
        return self.files["file"]

    def to_dict(self) -> dict[str, Any]:
        """As in `parts/NNNNN.json`, which does not keep how long it took."""
        files = {name: asdict(file) for name, file in self.files.items()}
        named = files if self.rejected is None else {"shards": files, "rejected": self.rejected}
        return {"key": self.key, "number": self.number, **named}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Part":
        """The part that `to_dict` made plain."""
        named = {name: value for name, value in values.items() if name not in ("key", "number")}
        rejected = [(path, reason) for path, reason in named.pop("rejected")] if "rejected" in named else None
        files = {name: Shard(**file) for name, file in named.get("shards", named).items()}
        return cls(values["key"], values["number"], files, rejected)


class Work(Protocol):
    """What the ranges of one run have in common; travels to actors."""

    @property
    def folder(self) -> Path:
        """Of the run, or one that runs share; on a file system that all workers see."""
        ...

    @property
    def key(self) -> str:
        """Of the plan."""
        ...

    @property
    def folders(self) -> tuple[str, ...]:
        """Inside that one, for what is made."""
        ...

    def worker(self, models: Any, device: str) -> Callable[[Any], Part]:
        """Load and warm up what one process needs; returns what makes a range's files, whole, and their part."""
        ...


def run_ranges(
    run: Run, label: str, work: Work, models: Any, ranges: Sequence[Range], section: str, made: str = "files"
) -> tuple[list[Part], float]:
    """The parts of all ranges, in the order of the plan, and how many seconds it took, start of the workers included.

    Args:
        run: may be asked to stop.
        label: of the progress bar.
        work: what the ranges have in common.
        models: for `work.worker`; they travel to actors.
        ranges: all of the plan, at least one.
        section: of the configuration, that says how many workers there are (0: one for each CPU) and, where networks
            compute, on which device.
        made: what is made of ranges, for the message of a run that was stopped.

    Raises:
        BadInput: as `pick_device` or `pick_workers_device`.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    workers = getattr(run.config, section).num_workers
    wanted = getattr(getattr(run.config, section), "device", "")  # "": no network
    # One worker needs no Ray, unless a cluster was named that may have the GPU which is not here.
    alone = 1 in (workers, len(ranges)) and not (wanted and names_cluster())
    if not alone:
        connect()  # before the clock runs
    device = "cpu"
    if wanted:
        device = pick_device(section, wanted).type if alone else pick_workers_device(section, wanted, workers)
    prepare_folders(work.folder, "parts", *work.folders, tidy=work.folder.is_relative_to(run.folder))
    parts: dict[int, Part] = {}
    started = time.monotonic()
    results = make_here(work, models, ranges, device) if alone else make_on_ray(work, models, ranges, device, workers)
    with progress(label, sum(task.rows for task in ranges), "images") as shown:
        for part in results:
            parts[part.number] = part
            shown.advance(ranges[part.number].rows)
            if run.should_stop and len(parts) < len(ranges):
                raise Stopped(f"{len(parts)} of {len(ranges)} {made} are made; --resume makes the others")
    return [parts[task.number] for task in ranges], time.monotonic() - started


def make_here(work: Work, models: Any, ranges: Sequence[Range], device: str) -> Iterator[Part]:
    """Every range's part, in order, in this process."""
    yield from map(PartMaker(work, models, device).part, ranges)


def make_on_ray(work: Work, models: Any, ranges: Sequence[Range], device: str, workers: int) -> Iterator[Part]:
    """Every range's part, as Ray Data actors finish them."""
    ray = connect()
    items = [{"range": pickle.dumps(task)} for task in ranges]
    arguments, pool = (ray.put((work, models)), device), actor_pool(ray, len(items), workers)
    for row in map_on_actors(ray, items, PartActor, arguments, pool, device):
        yield pickle.loads(row["part"])


def map_on_actors(
    ray: Any, items: list[dict[str, Any]], actor: type, arguments: tuple[Any, ...], pool: Any, device: str
) -> Iterator[Any]:
    """Rows that actors make of items, as they finish them.

    Not as tasks do: Ray Data sees only every 0.1 seconds, twice for each, that one is over, and the CPU waits for that
    long. An actor has its next item at hand.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would warn that its progress bars are off
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(  # one block is one item
        actor,
        fn_constructor_args=arguments,
        compute=pool,
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
    )
    yield from as_they_finish(rows)


def actor_pool(ray: Any, ranges: int, workers: int) -> Any:
    """As many actors as are asked for, else one for each CPU, those that the cluster may grow by included."""
    # Ray leaves out what there is none of: a head node without CPUs, before its workers come, has no such entry.
    there, most = (int(resources.get("CPU", 0)) for resources in (ray.cluster_resources(), most_resources(ray)))
    if workers:
        there = most = min(workers, most)
    sizes = {"min_size": max(1, min(there, ranges)), "max_size": max(1, min(most, ranges))}
    return ray.data.ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=2)


class PartActor:
    """Lives in a process of its own: models are loaded and warmed up once, then ranges come in.

    Args:
        shared: reference to (work, models), which the driver has made.
        device: where it computes.
    """

    def __init__(self, shared: Any, device: str) -> None:
        import ray

        work, models = ray.get(shared)
        self._maker = PartMaker(work, models, device)

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """Make one range's part."""
        return {"part": pickle.dumps(self._maker.part(pickle.loads(row["range"])))}


class PartMaker:
    """Makes parts in this process; models are loaded for the first range that is not there yet."""

    def __init__(self, work: Work, models: Any, device: str) -> None:
        self._work, self._models, self._device = work, models, device

    @cached_property
    def _make(self) -> Callable[[Range], Part]:
        return self._work.worker(self._models, self._device)

    def part(self, task: Range) -> Part:
        """What an earlier attempt left, if it is of this plan and its files are whole; else made now."""
        path = self._work.folder / "parts" / f"{task.number:05d}.json"
        if path.exists():
            part = Part.from_dict(json.loads(path.read_bytes()))
            if part.key == self._work.key and all(self._is_whole(file) for file in part.files.values()):
                return part
        part = self._make(task)
        write_json(path, part.to_dict())
        return part

    def _is_whole(self, file: Shard) -> bool:
        path = self._work.folder / file.file
        return path.is_file() and sha256_file(path) == file.sha256


def prepare_folders(folder: Path, *names: str, tidy: bool = True) -> None:
    """Make folders inside `folder`; where nobody else writes, `tidy`, remove what a killed worker left half written."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / name).glob(".*.tmp") if tidy else ():
            leftover.unlink(missing_ok=True)


def keep_plan(run: Run, facts: dict[str, Any], ranges: Sequence[Any]) -> str:
    """Write `plan.json`, or compare with the one that is there; returns a key that parts of the work carry.

    Args:
        run: whose folder keeps it.
        facts: everything that decides bytes, by configuration key.
        ranges: that follow from them; dataclasses.

    Raises:
        BadInput: the run was begun with other facts.
    """
    path = run.folder / "plan.json"
    if path.exists():
        run.check_unchanged(json.loads(path.read_bytes())["facts"], facts)
    else:
        write_json(path, {"facts": facts, "ranges": [asdict(task) for task in ranges]})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, file: str, data: bytes, rows: int) -> Shard:
    """Write `data` whole as a file, relative to `folder`."""
    write_atomically(folder / file, data)
    return Shard(file, rows, hashlib.sha256(data).hexdigest())


class Stopwatch:
    """Adds up how long kinds of work take on a device, cpu or cuda."""

    def __init__(self, device: str) -> None:
        self.seconds: Seconds = {}
        self._device = device

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`; waits for the device before and after."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()


def rates(parts: list[Part], seconds: float, kinds: tuple[str, ...]) -> dict[str, float]:
    """Images a second by their names in summary.json; empty when nothing was made now.

    Of one worker after its warm-up: `images_per_second` over all it does, then each kind of work alone with its share
    of the time. `stage_images_per_second` is of all workers by the clock, their start included.

    Args:
        parts: of the run.
        seconds: by the clock.
        kinds: of work that the parts have seconds of.
    """
    new = [part for part in parts if part.seconds]
    images = sum(part.file.rows for part in new)
    if not images:
        return {}
    spent = {kind: sum(part.seconds[kind] for part in new) for kind in ("total", *kinds)}
    speeds = {"images_per_second": images / spent["total"], "stage_images_per_second": images / seconds}
    for kind in kinds:
        speeds[f"{kind}_images_per_second"] = images / spent[kind]
        speeds[f"{kind}_share"] = spent[kind] / spent["total"]
    return speeds
