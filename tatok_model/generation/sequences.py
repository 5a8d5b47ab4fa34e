"""Token sequences as a generator reads and writes them: global tokens, then kept patch tokens in raster order.

Shapes: B images, M global tokens, N patch positions, T patch tokens of the longest sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tatok_model.tokens import Tokens


@dataclass(frozen=True)
class Sequences:
    """B sequences, padded to the longest.

    Attributes:
        global_indices: (B, M) int64 codebook entries.
        codes: (B, T) int64 codebook entries of the kept patch tokens; 0 beyond an image's own.
        places: (B, T) int64 their positions in raster order, ascending; 0 beyond an image's own.
        counts: (B,) int64, how many patch tokens each image has.
    """

    global_indices: Tensor
    codes: Tensor
    places: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        batch = len(self.global_indices)
        if self.codes.shape != self.places.shape or self.codes.ndim != 2 or len(self.codes) != batch:
            raise ValueError(
                f"global_indices is {tuple(self.global_indices.shape)}, codes {tuple(self.codes.shape)} and places "
                f"{tuple(self.places.shape)}; expected (B, M), (B, T) and (B, T)"
            )
        if self.counts.shape != (batch,):
            raise ValueError(f"counts is {tuple(self.counts.shape)}; expected ({batch},)")

    @classmethod
    def from_tokens(cls, tokens: Tokens) -> "Sequences":
        """From tokens at one cut; ValueError unless all images have the same number of global tokens."""
        counts = tokens.patch_counts
        longest = int(counts.max()) if len(tokens) else 0
        # Kept positions first, each kind in raster order.
        places = (~tokens.kept_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        real = torch.arange(longest, device=counts.device) < counts[:, None]
        places = places.where(real, 0)
        codes = tokens.patch_indices.gather(1, places).where(real, 0)
        global_indices = tokens.global_indices
        if tokens.global_counts is not None and len(tokens):
            if len(lengths := tokens.global_counts.unique()) > 1:
                raise ValueError(f"images have {lengths.tolist()} global tokens; expected as many in all of them")
            global_indices = global_indices[:, : int(lengths[0])]
        return cls(global_indices, codes, places, counts)

    def to_tokens(self, patch_positions: int, global_tokens: int) -> Tokens:
        """`Tokens` for a tokenizer of N patch positions and M global tokens; missing global ones are marked as lost."""
        batch, present = self.global_indices.shape
        at = self.places.where(self.real, patch_positions)  # padding goes to column N, which is cut off below
        codes = self.codes.new_zeros(batch, patch_positions + 1).scatter(1, at, self.codes)
        kept = torch.zeros_like(codes, dtype=torch.bool).scatter(1, at, True)
        global_indices = F.pad(self.global_indices, (0, global_tokens - present))
        counts = None if present == global_tokens else torch.full_like(self.counts, present)
        return Tokens(global_indices, codes[:, :patch_positions], kept[:, :patch_positions], global_counts=counts)

    @property
    def real(self) -> Tensor:
        """(B, T) bool, False at padding."""
        return torch.arange(self.codes.shape[1], device=self.counts.device) < self.counts[:, None]

    def lengths(self) -> Tensor:
        """(B,) int64, tokens of each image."""
        return self.global_indices.shape[1] + self.counts

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, images: Any) -> "Sequences":
        """Some of the images, padded to the longest of them."""
        counts = self.counts[images]
        longest = int(counts.max()) if len(counts) else 0
        codes, places = self.codes[images][:, :longest], self.places[images][:, :longest]
        return Sequences(self.global_indices[images], codes, places, counts)

    def to(self, device: torch.device | str) -> "Sequences":
        """The same sequences on another device."""
        parts = (self.global_indices, self.codes, self.places, self.counts)
        ahead = torch.device(device).type != "cpu"  # a copy to the CPU could be read before it has arrived
        return Sequences(*(part.to(device, non_blocking=ahead) for part in parts))
