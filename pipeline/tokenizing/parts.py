"""What a task leaves behind: one file, and a small JSON file in `parts/` that says so, written last.

A task that finds its part and a file with the right checksum has nothing to do.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.data.manifest import Shard
from pipeline.paths import sha256_file, write_json
from pipeline.tokenizing.plan import Range
from tatok_model.threads import one_thread

Seconds = dict[str, float]  # by kind of work


@dataclass(frozen=True)
class Part:
    """What one range became."""

    key: str  # of the plan
    number: int  # of the range
    file: Shard
    seconds: Seconds  # that a worker spent on it, `total` and its shares; empty: it was there already


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


def make_part(folder: Path, key: str, task: Range, make: Callable[[Range], tuple[Shard, Seconds]]) -> Part:
    """Do the work of one range, unless it is done.

    Args:
        folder: of the run, on a file system that all workers share.
        key: of the plan.
        task: the range.
        make: makes its file.
    """
    path = folder / "parts" / f"{task.number:05d}.json"
    done = _finished(path, folder, key)
    if done:
        return done
    with one_thread():
        file, seconds = make(task)
    write_json(path, {"key": key, "number": task.number, "file": asdict(file)})
    return Part(key, task.number, file, seconds)


def prepare_folder(folder: Path, *names: str) -> None:
    """Make the folders and remove what a killed worker was in the middle of."""
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        for leftover in (folder / name).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _finished(path: Path, folder: Path, key: str) -> Part | None:
    """The part that an earlier attempt left, if it is of this plan and its file is whole."""
    if not path.exists():
        return None
    values = json.loads(path.read_bytes())
    part = Part(values["key"], values["number"], Shard(**values["file"]), {})
    file = folder / part.file.file
    whole = part.key == key and file.is_file() and sha256_file(file) == part.file.sha256
    return part if whole else None
