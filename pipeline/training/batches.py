"""Batches for one worker, read ahead of the training step by a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.training.order import SampleOrder, keyed_uniform, keyed_uniforms

# Batches that a thread reads while the one before is worked on.

AHEAD = 4  # batches that wait ready
T = TypeVar("T")


def read_ahead(load: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """`load(start)` to `load(stop - 1)`, loaded ahead by a thread; an error in there is raised here."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def read() -> None:
        try:
            for step in range(start, stop):
                _put(ready, load(step), ended)
            _put(ready, None, ended)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch was wanted
            _put(ready, error, ended)

    threading.Thread(target=read, daemon=True, name="batches").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


def _put(
    ready: "queue.Queue[T | BaseException | None]", item: T | BaseException | None, ended: threading.Event
) -> None:
    while not ended.is_set():
        try:
            return ready.put(item, timeout=0.5)
        except queue.Full:
            continue
    return None


class Pictures(Protocol):
    """What training needs of a data set; `pipeline.data.shards.ShardDataset` is one."""

    def __len__(self) -> int: ...

    def images(self, indices: Any) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        ...


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch."""

    step: int  # the optimiser step that it is for, counted from 0
    indices: np.ndarray  # (B,) samples of the split
    images: Tensor  # (B, 3, H, W) uint8
    uniforms: Tensor  # (B, draws) float32 in [0, 1): what each sample's kept set is drawn from


class Batches:
    """The batches of steps `start`, `start + 1`, ... `stop - 1` for one worker.

    Args:
        pictures: the training split.
        order: which samples each step sees.
        rank, world: this worker and how many there are; each takes a contiguous part of the global batch.
        horizontal_flip: mirror each picture with probability 1/2, decided by (seed, epoch, sample).
        draws: random numbers per sample, decided likewise.
    """

    def __init__(
        self, pictures: Pictures, order: SampleOrder, rank: int, world: int, horizontal_flip: bool, draws: int = 0
    ) -> None:
        self.draws = draws
        self.pictures, self.order, self.rank, self.world = pictures, order, rank, world
        self.horizontal_flip = horizontal_flip

    def load(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        samples, epochs = self.order.part(step, self.rank, self.world)
        images = self.pictures.images(samples)
        if self.horizontal_flip:
            mirrored = keyed_uniform(self.order.seed, epochs, samples) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        uniforms = torch.from_numpy(keyed_uniforms(self.order.seed, epochs, samples, self.draws))
        return Batch(step, samples, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), uniforms)

    def between(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps from `start` to before `stop`, decoded ahead; an error while reading is raised here."""
        return read_ahead(self.load, start, stop)
