"""Which samples a step sees, and their batches, read ahead by a thread.

The samples are a function of seed and step alone, never of rank, worker count or time.

The order of an epoch is a permutation of all samples, and a step's global batch is the next stretch of the endless
sequence of epochs: every sample is seen exactly once per epoch, and batches may cross from one epoch into the next.

Splits that do not fit into memory are shuffled in two levels, so that reading stays local: blocks of neighbouring
samples are permuted, then the samples inside a window of some blocks.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.data.shards import ShardDataset

if TYPE_CHECKING:  # torch is imported inside functions: crops of a stream are drawn by these keys where there is none
    from torch import Tensor

AHEAD = 4  # batches that wait ready
T = TypeVar("T")

BLOCK = 64  # samples that are read together; the row group of the shards
WINDOW = 64  # blocks whose samples are mixed, when reading has to stay local


def epoch_order(rows: int, seed: int, epoch: int, local: bool = False) -> np.ndarray:
    """(rows,) int64, the samples of an epoch in the order in which they are seen; `local` keeps neighbours together."""
    random = np.random.default_rng([seed, epoch])
    if not local:
        return random.permutation(rows)
    blocks = random.permutation(-(-rows // BLOCK))
    windows = []
    for start in range(0, len(blocks), WINDOW):
        samples = (blocks[start : start + WINDOW, None] * BLOCK + np.arange(BLOCK)).ravel()
        windows.append(random.permutation(samples[samples < rows]))
    return np.concatenate(windows)


class SampleOrder:
    """The endless sequence of samples of a run, cut into global batches."""

    def __init__(self, rows: int, seed: int, global_batch_size: int, local: bool = False) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected at least 1 sample to train on")
        self.rows, self.seed, self.global_batch_size, self.local = rows, seed, global_batch_size, local
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def global_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples (G,) of a step, counted from 0, and the epoch (G,) each belongs to."""
        places = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, within = np.divmod(places, self.rows)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._epoch_order(int(epoch))[within[here]]
        return samples, epochs

    def part(self, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """One worker's contiguous part of `global_batch`; parts differ by one where workers do not divide it."""
        mine = slice(rank * self.global_batch_size // world, (rank + 1) * self.global_batch_size // world)
        samples, epochs = self.global_batch(step)
        return samples[mine], epochs[mine]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.rows, self.seed, epoch, self.local)
        return self._order


def keyed_uniform(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each (seed, epoch, sample): the same wherever and whenever it is drawn.

    The splitmix64 finaliser over the three keys, vectorised (a numpy generator per sample would cost more than the
    decoding of a small picture).
    """
    with np.errstate(over="ignore"):
        key = _mix(np.full(1, seed % 2**64, dtype=np.uint64))
        key = _mix(key ^ epochs.astype(np.uint64))
        key = _mix(key ^ samples.astype(np.uint64))
    return (key >> np.uint64(11)).astype(np.float64) / 2**53


def keyed_uniforms(seed: int, epochs: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """(B, count) float32 in [0, 1): as many for each (seed, epoch, sample), unrelated to `keyed_uniform`'s."""
    with np.errstate(over="ignore"):
        key = _mix(np.full(1, (seed + 1) % 2**64, dtype=np.uint64))
        key = _mix(_mix(key ^ epochs.astype(np.uint64)) ^ samples.astype(np.uint64))
        key = _mix(key[:, None] ^ _mix(np.arange(1, count + 1, dtype=np.uint64)))
    return (key >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _mix(key: np.ndarray) -> np.ndarray:
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch."""

    step: int  # the optimiser step that it is for, counted from 0
    indices: np.ndarray  # (B,) samples of the split
    images: "Tensor"  # (B, 3, H, W) uint8
    uniforms: "Tensor"  # (B, draws) float32 in [0, 1): what each sample's kept set is drawn from


class Batches:
    """One worker's parts of the global batches.

    Args:
        pictures: the training split.
        order: which samples each step sees.
        rank, world: this worker and how many there are; each takes a contiguous part of the global batch.
        horizontal_flip: mirror each picture with probability 1/2, decided by (seed, epoch, sample).
        draws: random numbers per sample, decided likewise.
    """

    def __init__(
        self, pictures: ShardDataset, order: SampleOrder, rank: int, world: int, horizontal_flip: bool, draws: int = 0
    ) -> None:
        self.pictures, self.order, self.rank, self.world = pictures, order, rank, world
        self.horizontal_flip, self.draws = horizontal_flip, draws

    def load(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        import torch

        samples, epochs = self.order.part(step, self.rank, self.world)
        images = self.pictures.images(samples.tolist())
        if self.horizontal_flip:
            mirrored = keyed_uniform(self.order.seed, epochs, samples) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        uniforms = torch.from_numpy(keyed_uniforms(self.order.seed, epochs, samples, self.draws))
        return Batch(step, samples, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), uniforms)


def read_ahead(load: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """`load(start)` to `load(stop - 1)`, loaded ahead by a thread; an error in there is raised here."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.5)
                return

    def read() -> None:
        try:
            for step in range(start, stop):
                put(load(step))
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch was wanted
            put(error)

    threading.Thread(target=read, daemon=True, name="batches").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
