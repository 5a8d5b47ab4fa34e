"""Quantizers: continuous embeddings to codebook entries and back.

`vq` is a codebook of unit vectors, each a moving average of its members; `fsq` rounds a few bounded numbers per token
(arXiv 2309.15505). Both come from vector-quantize-pytorch; this file gives them one interface.

Shapes: B images, L tokens, D width, K codebook entries, d code width.
"""

import math
from functools import partial

import torch
from torch import Tensor, distributed, nn
from vector_quantize_pytorch import FSQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook, batched_sample_vectors

from tatok_model.config import TokenizerConfig
from tatok_model.vit import rows_at_once

GRACE = 40  # steps after which a re-drawn entry that nothing chose is drawn again


class VQ(nn.Module):
    """Nearest entry by cosine similarity; entries are moving averages of the embeddings that choose them.

    Entries that are hardly chosen ("dead") are replaced by embeddings of the batch. Under `torch.distributed` all ranks
    hold the codebook that one process with the whole batch would hold.
    """

    def __init__(self, width: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.dead_code_share = config.dead_code_share
        self.quantize = VectorQuantize(
            dim=width,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            use_cosine_sim=True,
            decay=config.codebook_decay,
            threshold_ema_dead_code=config.dead_code_share,
            commitment_weight=config.commitment_weight,
            rotation_trick=True,  # gradients are rotated along with the vector, arXiv 2410.06424
            # The first codebook is random: one made of the first batch is no better after some hundred steps and would
            # depend on the number of workers.
            kmeans_init=False,
            sync_codebook=None,  # on exactly where torch.distributed runs
        )
        # The library starts every entry with a count of 1, which decays for hundreds of steps before an unused entry
        # counts as dead. From 0, entries that no token chooses are re-drawn from the data at once.
        codebook = self.quantize._codebook
        codebook.cluster_size.zero_()
        codebook.embed_avg.zero_()
        # The library lets each rank draw entries from its own part of the batch.
        codebook.replace_sample_fn = batched_sample_vectors
        codebook.replace = partial(_replace, codebook)  # a bound method would not pickle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace each embedding by its entry.

        Args:
            x: (B, L, D).

        Returns:
            (B, L, D) embeddings of the entries, with gradients to `x`; (B, L) int64 indices; scalar commitment loss.
        """
        if self.training:
            self._scale_threshold(tokens=x.shape[0] * x.shape[1])
        # Nearby similarities are compared: float32 under any autocast.
        with torch.autocast(x.device.type, enabled=False):
            embeddings, indices, loss = self.quantize(x.float())
        return embeddings, indices, loss.sum()

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The entries that `forward` chooses, without updating the codebook: (B, L, D) -> (B, L) int64.

        Of equal similarities the lowest index. Tokens go through in chunks: the library's own forward pass holds
        (B * L, K) similarities and as large a one-hot matrix at once.
        """
        with torch.autocast(x.device.type, enabled=False):
            projected = self.quantize.project_in(x.to(self.codes().dtype))  # (B, L, d)
            unit_vectors = self.quantize._codebook.transform_input(projected).flatten(0, 1)  # (B * L, d)
            # Chunks of equal size, so that none is a single row: a product with one row rounds differently.
            chunks = max(1, math.ceil(len(unit_vectors) / rows_at_once(self.codebook_size, x.device)))
            indices = [(chunk @ self.codes().T).argmax(-1) for chunk in unit_vectors.tensor_split(chunks)]
        return torch.cat(indices).view(x.shape[:2])

    def embed(self, indices: Tensor) -> Tensor:
        """Embeddings of codebook entries: (B, L) int64 -> (B, L, D)."""
        return self.quantize.get_output_from_indices(indices)

    @property
    def code_dim(self) -> int:
        """d, width of a code vector."""
        return int(self.quantize.codebook.shape[-1])

    def codes(self) -> Tensor:
        """(K, d) code vectors of all entries, without gradients."""
        return self.quantize.codebook.detach()

    def _scale_threshold(self, tokens: int) -> None:
        """Count an entry as dead by its share of the average use.

        The library wants a number of uses per step. With few tokens and many entries (8 global tokens of 64 images,
        1000 entries) the average itself is below one: a fixed number would re-draw every entry at every step.
        """
        codebook = self.quantize._codebook
        codebook.threshold_ema_dead_code = self.dead_code_share * tokens * _world() / self.codebook_size
        # A re-drawn entry that stays unused is drawn again after GRACE steps: while the encoder still moves fast,
        # entries drawn from its first outputs would otherwise wait for hundreds of steps.
        codebook.reset_cluster_size = codebook.threshold_ema_dead_code / codebook.decay**GRACE


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _replace(codebook: Codebook, batch_samples: Tensor, batch_mask: Tensor, seq_mask: None = None) -> None:
    """The library's re-drawing of dead entries, from the vectors of all ranks in their order: (1, n, d), (1, K) bool.

    Every rank has seeded its random generator by the step, so that all draw the same.
    """
    if _world() > 1:
        counts = [torch.zeros(1, dtype=torch.int64, device=batch_samples.device) for _ in range(_world())]
        distributed.all_gather(counts, torch.full_like(counts[0], batch_samples.shape[1]))
        padded = batch_samples.new_zeros(max(map(int, counts)), batch_samples.shape[2])
        padded[: batch_samples.shape[1]] = batch_samples[0]
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        batch_samples = torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])[None]
    type(codebook).replace(codebook, batch_samples, batch_mask, seq_mask)


class FiniteScalar(nn.Module):
    """Rounds a few bounded numbers per token: no learned codebook that could collapse, no auxiliary loss."""

    def __init__(self, width: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size = math.prod(config.fsq_levels)
        self.quantize = FSQ(levels=list(config.fsq_levels), dim=width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `VQ.forward`; the loss is 0."""
        with torch.autocast(x.device.type, enabled=False):
            embeddings, indices = self.quantize(x.float())
        return embeddings, indices.long(), x.new_zeros(())

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """As `VQ.nearest`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(x.to(self.codes().dtype))[1].long()

    def embed(self, indices: Tensor) -> Tensor:
        """Embeddings of codebook entries: (B, L) int64 -> (B, L, D)."""
        return self.quantize.project_out(self.codes()[indices])

    @property
    def code_dim(self) -> int:
        """d, numbers per code."""
        return int(self.quantize.implicit_codebook.shape[-1])

    def codes(self) -> Tensor:
        """(K, d) code vectors of all entries, without gradients."""
        return self.quantize.implicit_codebook.detach()


Quantizer = VQ | FiniteScalar
CLASSES: dict[str, type[Quantizer]] = {"vq": VQ, "fsq": FiniteScalar}  # the names of `QUANTIZERS`


def build_quantizer(width: int, config: TokenizerConfig) -> Quantizer:
    """The quantizer that `config.quantizer` names."""
    return CLASSES[config.quantizer](width, config)
