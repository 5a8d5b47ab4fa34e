"""A token stream cut for training, and its batches for one worker, in parts of similar length: little padding.

Sorting one batch and cutting it into parts leaves 9% padding at 8 parts and 128 sequences whose lengths vary by 30%.
So a few steps are planned together: their sequences are sorted, cut into layers by length, and every step gets one
slice of each layer. A step still sees all lengths in the shares in which they occur, and its parts are narrower: 2.7%
is padding. What a step sees remains a function of seed and step alone.

Shapes: G sequences of a global batch, B of them in a part.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import FilterConfig
from pipeline.core.errors import BadInput
from pipeline.generator.fit import check_global_cut, global_tokens_of
from pipeline.tokens.decoder import NO_LIMITS, cut
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import TokenManifest, read_token_manifest
from pipeline.training.order import SampleOrder, keyed_uniform
from tatok_model.generation.sequences import Sequences

WINDOW = 4  # steps that are planned together: more of them pad less and lump very long sequences together


@dataclass(frozen=True)
class TokenDataset:
    """One split of a ranked token stream, cut as configured, in memory: sequences 0 to `len - 1`, in its order.

    Attributes:
        manifest: of the stream.
        ids: R of them.
        labels: (R,) int64 class indices, -1 where there is none.
        global_indices: (R, M) codebook entries; M is less than the tokenizer's where global tokens are cut.
        codes: codebook entries of all rows' patch tokens, one row after the other.
        places: their positions in raster order, ascending in each row.
        offsets: (R + 1,) int64, where each row begins in the two, then the end.
        limits: (R, 2) of `Ranking.limits`.
    """

    manifest: TokenManifest
    ids: list[str]
    labels: np.ndarray
    global_indices: np.ndarray
    codes: np.ndarray
    places: np.ndarray
    offsets: np.ndarray
    limits: np.ndarray

    @classmethod
    def load(cls, folder: str, split: str, filter: FilterConfig) -> "TokenDataset":  # noqa: A002 - the section's name
        """Read and cut one split.

        Args:
            folder: of `tokens.json`, a path or URL.
            split: train or heldout.
            filter: how rankings are cut. Streams of global tokens alone are cut to `threshold` of them by `count`.

        Raises:
            BadInput: as `read_token_manifest`, `read_token_file` and `from_table`, a cut that the stream does not
                allow, or labels that name no class.
        """
        manifest = read_token_manifest(folder)
        check_global_cut(manifest, filter)
        small = np.int16 if manifest.stream.codebook_size <= 2**15 else np.int32
        keep = global_tokens_of(manifest, filter)
        ids: list[str] = []
        empty = np.zeros(0, np.int64)
        labels, globals_, codes, places, counts = [empty], [np.zeros((0, keep), small)], [empty], [empty], [empty]
        limits = [NO_LIMITS]
        for file in manifest.splits[split].files:
            tokens, names, classes = from_table(read_token_file(folder, file, manifest.stream))
            kept = cut(tokens, filter).kept_mask  # (B, N) bool
            ids += names
            labels.append(classes)
            globals_.append(tokens.global_indices[:, :keep].numpy().astype(small))
            codes.append(tokens.patch_indices[kept].numpy().astype(small))
            places.append(kept.nonzero()[:, 1].numpy().astype(np.int32))
            counts.append(kept.sum(1).numpy())
            if tokens.ranking is not None:
                limits.append(tokens.ranking.limits(filter.rule).numpy())
        found = np.concatenate(labels).astype(np.int64)
        if found.size and not -1 <= found.min() <= found.max() < len(manifest.classes):
            raise BadInput(
                f"tokens {folder!r} have labels {found.min()} to {found.max()}; "
                f"expected at most {len(manifest.classes) - 1}: they name {len(manifest.classes)} classes"
            )
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        flat = np.concatenate(codes).astype(small), np.concatenate(places).astype(np.int32)
        return cls(manifest, ids, found, np.concatenate(globals_), *flat, offsets, np.concatenate(limits))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> np.ndarray:
        """(R,) int64, patch tokens of each row."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Patch tokens of the longest row; 0 where there is none."""
        return int(self.counts.max(initial=0))

    def lengths(self) -> np.ndarray:
        """(R,) int64, tokens of each row."""
        return self.global_indices.shape[1] + self.counts

    def sequences(self, indices: Any) -> Sequences:
        """Some of the rows, padded to the longest of them.

        Args:
            indices: (B,) numbers of rows.
        """
        rows = np.asarray(indices, dtype=np.int64)
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        steps = np.arange(counts.max(initial=0))
        real = steps < counts[:, None]  # (B, T)
        at = np.where(real, starts[:, None] + steps, 0)
        codes, places = (
            np.where(real, flat[at] if flat.size else 0, 0).astype(np.int64) for flat in (self.codes, self.places)
        )
        arrays = (self.global_indices[rows].astype(np.int64), codes, places, counts)
        return Sequences(*(torch.from_numpy(array) for array in arrays))


class TokenPart(NamedTuple):
    """Sequences of similar length, padded to the longest."""

    sequences: Sequences
    labels: Tensor  # (B,) int64, -1: no class, or not told
    tokens: int  # ends counted where they are predicted


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
        tokens = self._tokens(samples)
        samples, epochs = samples[self.rank :: self.world], epochs[self.rank :: self.world]
        labels = self.dataset.labels[samples]
        labels[keyed_uniform(self.seed, epochs, samples) < self.class_dropout] = -1
        count = min(self.groups, len(samples))
        parts = [
            TokenPart(self.dataset.sequences(rows), torch.from_numpy(their_labels), self._tokens(rows))
            for rows, their_labels in zip(np.array_split(samples, count), np.array_split(labels, count), strict=True)
        ]
        return TokenBatch(step, tuple(parts), tokens)

    def _tokens(self, samples: np.ndarray) -> int:
        return int(self._lengths[samples].sum()) + self.ends * len(samples)
