"""Batches for one worker, read ahead of the training step by a thread."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.read_ahead import read_ahead
from pipeline.training.order import SampleOrder, keyed_uniform, keyed_uniforms


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
