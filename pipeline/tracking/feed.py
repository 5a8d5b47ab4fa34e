"""What MLflow has not got yet of `metrics.jsonl`.

Two marks decide. What lies beyond the last commit is held back: a resumed run repeats those steps. And a name is sent
once for each step, in rising order of steps, so that a file that was rewound to an older checkpoint, by this process or
another, never puts a point into MLflow twice.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

from pipeline.core.run import parse_metrics

BATCH = 1000  # metrics MLflow takes in one call


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float  # not-a-number where the file has null
    milliseconds: int  # since 1970
    step: int


class Batch(NamedTuple):
    """Points to send and what is to be remembered once they are."""

    points: list[Point]
    file: int  # its inode: a rewound file is a new one
    position: int  # bytes of it read so far
    sent: dict[str, int]  # name: last step


class Feed:
    """Reads `metrics.jsonl` from where the last accepted batch ended."""

    def __init__(self, path: Path, sent: dict[str, int]) -> None:
        self.sent = sent  # name: last step that MLflow has
        self._path = path
        self._file = self._position = self._committed = 0

    def commit(self) -> None:
        """Everything in the file now may be sent."""
        self._committed = self._path.stat().st_size if self._path.exists() else 0

    def next(self, limit: float = BATCH) -> Batch:
        """The next points, whole lines until there are `limit`; changes nothing.

        A line still being written ends the batch; one that is not understood is skipped.
        """
        points: list[Point] = []
        sent = dict(self.sent)
        if not self._committed:
            return Batch(points, 0, 0, sent)
        with open(self._path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            position = self._position if inode == self._file else 0
            file.seek(position)
            while position < self._committed and len(points) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                for logged in parse_metrics(line):
                    fresh = {n: v for n, v in logged.metrics.items() if logged.step > sent.get(n, -math.inf)}
                    points += [Point(n, v, int(logged.time * 1000), logged.step) for n, v in fresh.items()]
                    sent |= dict.fromkeys(fresh, logged.step)
        return Batch(points, inode, position, sent)

    def accept(self, batch: Batch) -> None:
        """MLflow has `batch`: the next one starts behind it."""
        self._file, self._position, self.sent = batch.file, batch.position, batch.sent
