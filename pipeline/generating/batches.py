"""Batches of sequences for one worker, in parts of similar length so that little is computed for padding.

Sorting one batch and cutting it into parts leaves 9% padding at 8 parts and 128 sequences whose lengths vary by 30%.
So a few steps are planned together: their sequences are sorted, cut into layers by length, and every step gets one
slice of each layer. A step still sees all lengths in the shares in which they occur, and its parts are narrower: 2.7%
is padding. What a step sees remains a function of seed and step alone.

Shapes: G sequences of a global batch, B of them in a part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.generating.token_data import TokenDataset
from pipeline.read_ahead import read_ahead
from pipeline.training.order import SampleOrder, keyed_uniform
from tatok_model.sequences import Sequences

WINDOW = 4  # steps that are planned together: more of them pad less and lump very long sequences together


@dataclass(frozen=True)
class TokenPart:
    """Sequences of similar length, padded to the longest."""

    sequences: Sequences
    labels: Tensor  # (B,) int64, -1: no class, or not told


@dataclass(frozen=True)
class TokenBatch:
    """One worker's part of a global batch, shorter sequences first."""

    step: int  # the optimiser step that it is for, counted from 0
    parts: tuple[TokenPart, ...]
    tokens: int  # of the global batch, ends counted where they are predicted


class LayeredOrder:
    """The global batches of `SampleOrder`, dealt out anew among the steps of a window so that lengths are alike.

    Args:
        order: which samples each window sees.
        lengths: (R,) of all samples.
        groups: layers by length, and slices of a batch.
    """

    def __init__(self, order: SampleOrder, lengths: np.ndarray, groups: int) -> None:
        self.order, self.lengths = order, lengths
        batch = order.global_batch_size
        # Every layer gives every step as many: slices of a batch differ in size by one where groups do not divide it.
        self._sizes = [len(part) for part in np.array_split(np.arange(batch), min(groups, batch))]
        self._window = -1
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []

    def global_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples (G,) of a step, counted from 0, shorter ones first, and the epoch (G,) each belongs to."""
        window, within = divmod(step, WINDOW)
        if window != self._window:
            self._window, self._steps = window, self._plan(window)
        return self._steps[within]

    def _plan(self, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
        batches = [self.order.global_batch(window * WINDOW + step) for step in range(WINDOW)]
        samples, epochs = (np.concatenate(values) for values in zip(*batches, strict=True))
        ranked = np.argsort(self.lengths[samples], kind="stable")
        layers = np.split(ranked, np.cumsum(self._sizes)[:-1] * WINDOW)
        random = np.random.default_rng([self.order.seed, window])
        dealt = [layer.reshape(WINDOW, -1)[random.permutation(WINDOW)] for layer in layers]
        return [(samples[rows], epochs[rows]) for rows in np.concatenate(dealt, axis=1)]


class TokenBatches:
    """The batches of one worker.

    Args:
        dataset: the training split.
        order: which samples each step sees.
        rank, world: this worker and how many there are; each takes every `world`-th of the sorted global batch.
        groups: parts that a worker's share is cut into.
        class_dropout: share of samples whose label is left out, decided by (seed, epoch, sample).
        ends: 1 where the end of a sequence is predicted, else 0.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: SampleOrder,
        rank: int,
        world: int,
        groups: int,
        class_dropout: float,
        ends: int,
    ) -> None:
        self.dataset, self.rank, self.world, self.groups = dataset, rank, world, groups
        self.class_dropout, self.ends = class_dropout, ends
        self._lengths = dataset.lengths()
        self.seed, self.order = order.seed, LayeredOrder(order, self._lengths, groups)

    def load(self, step: int) -> TokenBatch:
        """This worker's part of the global batch of a step."""
        samples, epochs = self.order.global_batch(step)
        tokens = int(self._lengths[samples].sum()) + self.ends * len(samples)
        samples, epochs = samples[self.rank :: self.world], epochs[self.rank :: self.world]
        labels = self.dataset.labels[samples]
        labels[keyed_uniform(self.seed, epochs, samples) < self.class_dropout] = -1
        parts = [
            TokenPart(self.dataset.sequences(samples[part]), torch.from_numpy(labels[part]))
            for part in np.array_split(np.arange(len(samples)), min(self.groups, len(samples)))
        ]
        return TokenBatch(step, tuple(parts), tokens)

    def between(self, start: int, stop: int) -> Iterator[TokenBatch]:
        """Batches of the steps from `start` to before `stop`, read ahead."""
        return read_ahead(self.load, start, stop)
