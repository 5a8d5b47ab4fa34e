"""A ranked token stream, cut where the configuration says, in memory: what a generator learns from.

The stream can be cut again and again; only what one cut keeps is held, in small integers: some 300 bytes an image at
57 tokens.

Shapes: R rows of the split, B of them, M global tokens, N patch positions, T patch tokens of the longest sequence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import FilterConfig
from pipeline.errors import BadInput
from pipeline.generating.architecture import check_global_cut, global_tokens_of
from pipeline.tokenizing.arrow import from_table, read_token_file
from pipeline.tokenizing.decoding import cut
from pipeline.tokenizing.manifest import TokenManifest, read_token_manifest
from tatok_model.sequences import Sequences


@dataclass(frozen=True)
class TokenDataset:
    """The sequences of one split by number, 0 to `len - 1`, in the order of the stream.

    Attributes:
        manifest: of the stream.
        ids: R of them.
        labels: (R,) int64 class indices, -1 where there is none.
        global_indices: (R, M) codebook entries; M is less than the tokenizer's where global tokens are cut.
        codes: codebook entries of all rows' patch tokens, one row after the other.
        places: their positions in raster order, ascending in each row.
        offsets: (R + 1,) int64, where each row begins in the two, then the end.
    """

    manifest: TokenManifest
    ids: list[str]
    labels: np.ndarray
    global_indices: np.ndarray
    codes: np.ndarray
    places: np.ndarray
    offsets: np.ndarray

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
        for file in manifest.splits[split].files:
            tokens, names, classes = from_table(read_token_file(folder, file, manifest.stream))
            kept = cut(tokens, filter).kept_mask  # (B, N) bool
            ids += names
            labels.append(classes)
            globals_.append(tokens.global_indices[:, :keep].numpy().astype(small))
            codes.append(tokens.patch_indices[kept].numpy().astype(small))
            places.append(kept.nonzero()[:, 1].numpy().astype(np.int32))
            counts.append(kept.sum(1).numpy())
        found = np.concatenate(labels).astype(np.int64)
        if found.size and not -1 <= found.min() <= found.max() < len(manifest.classes):
            raise BadInput(
                f"tokens {folder!r} have labels {found.min()} to {found.max()}; "
                f"expected at most {len(manifest.classes) - 1}: they name {len(manifest.classes)} classes"
            )
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        flat = np.concatenate(codes).astype(small), np.concatenate(places).astype(np.int32)
        return cls(manifest, ids, found, np.concatenate(globals_), *flat, offsets)

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
