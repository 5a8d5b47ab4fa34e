"""The data stages as `scaling` takes them apart: ranges of work, given to our workers or to plain processes.

A stage under test yields how many pictures a finished range had, as ranges finish. Plain processes do the same ranges
with the same code and share nothing; what Ray costs is the difference.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from pipeline.benchmarking.scratch import emptied
from pipeline.cluster import connect
from pipeline.config import Config
from pipeline.data import preprocess
from pipeline.data import ranges as pictures_ranges
from pipeline.data.manifest import read_manifest
from pipeline.data.plan import make_plan, open_sources
from pipeline.tokenizing.plan import Range


class Scaled(Protocol):
    """A stage under test."""

    def ours(self, workers: int) -> Iterator[int]:
        """Pictures of each finished range, by our workers: one works in this process, several on Ray."""
        ...

    def plain(self, workers: int) -> Iterator[int]:
        """The same by so many plain processes, which are kept for the next time."""
        ...

    def close(self) -> None:
        """End the processes."""
        ...


class Pools:
    """Plain processes, a pool for each number of them."""

    def __init__(self, initializer: Any = None, arguments: tuple[Any, ...] = ()) -> None:
        self._how = {"mp_context": get_context("spawn"), "initializer": initializer, "initargs": arguments}
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def of(self, workers: int) -> Executor:
        """The pool with so many."""
        if workers not in self._pools:
            self._pools[workers] = ProcessPoolExecutor(workers, **self._how)
        return self._pools[workers]

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.shutdown()


class Preprocess:
    """Pictures of a folder to shards.

    Args:
        config: `data.source` names the folder; `data.rows_per_shard` says how long a range is.
        folder: for what is made; emptied each time.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._data, self._folder, self._pools = config.data, folder, Pools()
        sources = open_sources(self._data)
        self._plan = make_plan(sources, self._data)
        self._sources = [source.without_listing() for source in sources]

    def ours(self, workers: int) -> Iterator[int]:
        """See `Scaled`."""
        work, ranges = self._work(workers), self._plan.ranges
        made = (
            (pictures_ranges.make_part(task, work) for task in ranges)
            if workers == 1
            else preprocess.make_on_ray(connect(), ranges, work)
        )
        for part, _ in made:
            yield ranges[part.number].rows

    def plain(self, workers: int) -> Iterator[int]:
        """See `Scaled`."""
        work, ranges, pool = self._work(workers), self._plan.ranges, self._pools.of(workers)
        for done in as_completed([pool.submit(pictures_ranges.make_part, task, work) for task in ranges]):
            yield ranges[done.result()[0].number].rows

    def close(self) -> None:
        """See `Scaled`."""
        self._pools.close()

    def _work(self, workers: int) -> pictures_ranges.Work:
        emptied(self._folder, "shards", "parts")
        data = dataclasses.replace(self._data, num_workers=workers)
        return pictures_ranges.Work(self._folder, self._plan.key, self._plan.classes, self._sources, data)


class Tokenize:
    """Pictures of shards to token files.

    Args:
        config: `data.shards` and `tokenizer.checkpoint` are named.
        folder: for what is made; emptied each time.
        pictures: of the training split to take, if it has so many.
        rows: pictures of a range.
    """

    def __init__(self, config: Config, folder: Path, pictures: int, rows: int) -> None:
        from pipeline.pretrained import load_tokenizer
        from pipeline.tokenizing.encoding import EncodingWork
        from pipeline.tokenizing.manifest import stream_of

        self._tokenizer, sha256 = load_tokenizer(config)
        tokens = dataclasses.replace(config.tokens, batch_size=min(config.tokens.batch_size, rows), flip=False, crops=0)
        self._folder = folder
        self._work = EncodingWork(folder, "", config.data.shards, stream_of(config, sha256), tokens, config.train.seed)
        total = min(read_manifest(config.data.shards).splits["train"].rows, pictures)
        self._ranges = [
            Range(number, "train", number, start, min(start + rows, total), total, total)
            for number, start in enumerate(range(0, total, rows))
        ]
        self._pools = Pools(_load, (self._tokenizer, self._work))

    def ours(self, workers: int) -> Iterator[int]:
        """See `Scaled`."""
        from pipeline.tokenizing.actors import make_here, make_on_actors

        emptied(self._folder, "tokens", "parts")
        made = (
            make_here(self._tokenizer, self._work, self._ranges, "cpu")
            if workers == 1
            else make_on_actors(self._tokenizer, self._work, self._ranges, "cpu", workers)
        )
        for part in made:
            yield part.file.rows

    def plain(self, workers: int) -> Iterator[int]:
        """See `Scaled`."""
        emptied(self._folder, "tokens", "parts")
        pool = self._pools.of(workers)
        for done in as_completed([pool.submit(_tokenize, task) for task in self._ranges]):
            yield done.result()

    def close(self) -> None:
        """See `Scaled`."""
        self._pools.close()


_loaded: list[Any] = []  # in a plain process: the work and the worker that it keeps for all its ranges


def _load(tokenizer: Any, work: Any) -> None:
    _loaded[:] = [work, work.worker(tokenizer, "cpu")]


def _tokenize(task: Range) -> int:
    from pipeline.tokenizing.parts import make_part

    work, worker = _loaded
    return make_part(work.folder, work.key, task, worker.make).file.rows
