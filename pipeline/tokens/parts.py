"""Ranges to workers: in this process when there is one, else on a pool of Ray Data actors.

An actor that dies takes nothing with it: a range is one row, and Ray Data gives it to another.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pipeline.core.cluster import as_they_finish, connect, pick_device, pick_workers_device
from pipeline.core.config import Config
from pipeline.core.console import progress
from pipeline.core.errors import Stopped
from pipeline.core.files import sha256_file, write_json
from pipeline.core.run import Run
from pipeline.data.shards import Shard
from pipeline.tokens.ranges import Range
from pipeline.tracking import Tracker
from tatok_model.vit import one_thread

# What a task leaves behind: a file, maybe one beside it, and a small JSON file in `parts/` that says so, written last.

Seconds = dict[str, float]  # by kind of work
OF_TODAY = ("seconds", "batch_seconds")  # of a part: they are not kept


class Made(NamedTuple):
    """What a worker made of one range."""

    file: Shard
    seconds: Seconds
    beside: Shard | None = None  # a second file
    batch_seconds: tuple[float, ...] = ()  # of each whole batch, where that is wanted


@dataclass(frozen=True)
class Part:
    """What one range became."""

    key: str  # of the plan
    number: int  # of the range
    file: Shard
    seconds: Seconds  # that a worker spent on it, `total` and its shares; empty: it was there already
    beside: Shard | None = None
    batch_seconds: tuple[float, ...] = ()  # of whole batches


class Stopwatch:
    """Adds up how long kinds of work take on a device."""

    def __init__(self, device: torch.device) -> None:
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
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def part_from_dict(values: dict[str, Any]) -> Part:
    """The part that `dataclasses.asdict` made plain."""
    beside = values.get("beside")
    return Part(
        values["key"],
        values["number"],
        Shard(**values["file"]),
        values.get("seconds", {}),
        Shard(**beside) if beside else None,
        tuple(values.get("batch_seconds", ())),
    )


def make_part(folder: Path, key: str, task: Range, make: Callable[[Range], tuple[Shard, Seconds] | Made]) -> Part:
    """Do the work of one range, unless it is done.

    Args:
        folder: of the run, on a file system that all workers share.
        key: of the plan.
        task: the range.
        make: makes its file, or files.
    """
    path = folder / "parts" / f"{task.number:05d}.json"
    done = _finished(path, folder, key)
    if done:
        return done
    with one_thread():
        made = Made(*make(task))
    part = Part(key, task.number, *made)
    kept = {name: value for name, value in asdict(part).items() if name not in OF_TODAY and value is not None}
    write_json(path, kept)
    return part


def prepare_folder(folder: Path, *names: str, tidy: bool = True) -> None:
    """Make the folders; where they are this run's own, `tidy`, remove what a killed worker was in the middle of."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / name).glob(".*.tmp") if tidy else ():
            leftover.unlink(missing_ok=True)


def _finished(path: Path, folder: Path, key: str) -> Part | None:
    """The part that an earlier attempt left, if it is of this plan and its files are whole."""
    if not path.exists():
        return None
    part = part_from_dict(json.loads(path.read_bytes()))
    files = [part.file, *([part.beside] if part.beside else [])]
    whole = part.key == key and all(_is_whole(folder / file.file, file) for file in files)
    return part if whole else None


def _is_whole(path: Path, file: Shard) -> bool:
    return path.is_file() and sha256_file(path) == file.sha256


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


# What stages do around workers that make files: progress, stopping, speed, the histogram of lengths.


def make_all(
    run: Run, label: str, models: Any, work: Work, ranges: list[Range], section: str = "tokens"
) -> tuple[list[Part], float]:
    """The parts of all ranges, in their order, and how many seconds it took, start of the workers included.

    Args:
        run: may be asked to stop.
        label: of the progress bar.
        models: what the work's workers are made of; travels to actors.
        work: what the ranges have in common.
        ranges: at least one.
        section: of the configuration, that says how many workers there are and where they compute.

    Raises:
        BadInput: as `pick_device`, or as `pick_workers_device`.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    workers = Workers.of(run.config, section)
    alone = is_alone(workers, len(ranges))
    device = (
        pick_device(section, workers.device).type
        if alone
        else pick_workers_device(section, workers.device, workers.number)
    )
    prepare_folder(work.folder, "parts", work.files, tidy=work.folder == run.folder)
    made = (
        make_here(models, work, ranges, device)
        if alone
        else make_on_actors(models, work, ranges, device, workers.number)
    )
    parts: dict[int, Part] = {}
    started = time.monotonic()
    with progress(label, sum(task.stop - task.start for task in ranges), "images") as shown:
        for part in made:
            parts[part.number] = part
            shown.advance(part.file.rows)
            if run.should_stop and len(parts) < len(ranges):
                raise Stopped(f"{len(parts)} of {len(ranges)} files are made; --resume makes the others")
    return [parts[task.number] for task in ranges], time.monotonic() - started


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
    found = {"images_per_second": images / spent["total"], "stage_images_per_second": images / seconds}
    for kind in kinds:
        found[f"{kind}_images_per_second"] = images / spent[kind]
        found[f"{kind}_share"] = spent[kind] / spent["total"]
    return found


def draw_lengths(run: Run, counts: np.ndarray, tracker: Tracker) -> None:
    """The histogram of (B,) tokens per image at the configured cut."""
    from pipeline.core.plots import token_histogram

    section = run.config.filter
    title = "Tokens per image"
    if run.config.tokenizer.patch_tokens:
        title += f": {section.score}, {section.rule} {section.threshold:g}"
    path = run.folder / "pictures" / "token_histogram.png"
    path.parent.mkdir(exist_ok=True)
    token_histogram(path, counts, title)
    run.outputs["token_histogram"] = str(path)
    tracker.picture(path, "token_histogram", 0)
