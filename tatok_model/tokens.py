"""A batch of token sequences as a value.

Shapes: B images, M global tokens, N patch positions, K codebook entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What an encoder says of B images and all that a decoder needs.

    Attributes:
        global_indices: (B, M) int64 codebook entries of the global tokens.
        patch_indices: (B, N) int64 codebook entries at the patch positions, in raster order.
        kept_mask: (B, N) bool, True where the patch token is part of the sequence; entries elsewhere mean nothing.
    """

    global_indices: Tensor
    patch_indices: Tensor
    kept_mask: Tensor

    def __post_init__(self) -> None:
        if self.global_indices.ndim != 2 or self.patch_indices.ndim != 2:
            raise ValueError(
                f"global_indices is {tuple(self.global_indices.shape)} and patch_indices "
                f"{tuple(self.patch_indices.shape)}; expected (B, M) and (B, N)"
            )
        if self.kept_mask.shape != self.patch_indices.shape or self.kept_mask.dtype != torch.bool:
            raise ValueError(
                f"kept_mask is {self.kept_mask.dtype} {tuple(self.kept_mask.shape)}; "
                f"expected bool {tuple(self.patch_indices.shape)}"
            )
        if len(self.global_indices) != len(self.patch_indices):
            raise ValueError(
                f"global_indices has {len(self.global_indices)} images and patch_indices {len(self.patch_indices)}; "
                "expected as many"
            )

    def __len__(self) -> int:
        return len(self.global_indices)

    def __getitem__(self, images: Tensor | slice | list[int]) -> "Tokens":
        """The tokens of some of the images."""
        return Tokens(self.global_indices[images], self.patch_indices[images], self.kept_mask[images])

    def counts(self) -> Tensor:
        """(B,) int64, tokens of each image: M + kept patch tokens."""
        return self.global_indices.shape[1] + self.kept_mask.sum(dim=1)

    def bits(self, bits_per_token: float) -> Tensor:
        """(B,) float64, `bits_fixed` of each image: every token costs log2 K.

        Nothing is added for positions: the decoder can derive them, since an image keeps all patch tokens or none.
        """
        return self.counts().double() * bits_per_token

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens on another device."""
        return Tokens(self.global_indices.to(device), self.patch_indices.to(device), self.kept_mask.to(device))
