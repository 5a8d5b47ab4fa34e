"""Quantizers: continuous embeddings to codebook entries and back.

`vq` is a codebook of unit vectors kept by exponential averages, `fsq` rounds a few bounded numbers (arXiv 2309.15505).
Both come from vector-quantize-pytorch; this file gives them one interface.

Shapes: B images, L tokens, D width, K codebook entries.
"""

import math

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

from tatok_model.config import TokenizerConfig


class VQ(nn.Module):
    """Nearest entry by cosine similarity; entries are averages of what they are chosen for, dead ones are re-drawn.

    Under `torch.distributed` the averages and the re-drawn entries are the same on every rank.
    """

    def __init__(self, width: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.quantize = VectorQuantize(
            dim=width,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            use_cosine_sim=True,
            decay=config.codebook_decay,
            threshold_ema_dead_code=config.dead_code_threshold,
            commitment_weight=config.commitment_weight,
            kmeans_init=True,
            # None: on exactly where torch.distributed runs (with sync_kmeans, its default, also the first codebook).
            sync_codebook=None,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace each embedding by its entry.

        Args:
            x: (B, L, D).

        Returns:
            (B, L, D) embeddings of the entries, with gradients to `x`; (B, L) int64 indices; scalar commitment loss.
        """
        # Nearby similarities are compared: float32 under any autocast.
        with torch.autocast(x.device.type, enabled=False):
            embeddings, indices, loss = self.quantize(x.float())
        return embeddings, indices, loss.sum()

    def embed(self, indices: Tensor) -> Tensor:
        """Embeddings of codebook entries: (B, L) int64 -> (B, L, D)."""
        return self.quantize.get_output_from_indices(indices)


class FiniteScalar(nn.Module):
    """Rounds a few bounded numbers per token; nothing to collapse and no auxiliary loss."""

    def __init__(self, width: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size = math.prod(config.fsq_levels)
        self.quantize = FSQ(levels=list(config.fsq_levels), dim=width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `VQ.forward`; the loss is 0."""
        with torch.autocast(x.device.type, enabled=False):
            embeddings, indices = self.quantize(x.float())
        return embeddings, indices.long(), x.new_zeros(())

    def embed(self, indices: Tensor) -> Tensor:
        """Embeddings of codebook entries: (B, L) int64 -> (B, L, D)."""
        return self.quantize.indices_to_codes(indices)


def build_quantizer(width: int, config: TokenizerConfig) -> VQ | FiniteScalar:
    """The quantizer that `config.quantizer` names."""
    return VQ(width, config) if config.quantizer == "vq" else FiniteScalar(width, config)
