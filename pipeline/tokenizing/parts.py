"""What a task leaves behind: a file, maybe one beside it, and a small JSON file in `parts/` that says so, written last.

A task that finds its part and files with the right checksums has nothing to do.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.data.manifest import Shard
from pipeline.paths import sha256_file, write_json
from pipeline.tokenizing.plan import Range
from tatok_model.threads import one_thread

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
