"""Quantizers: continuous embeddings to codebook entries and back.

`vq` is a codebook of unit vectors kept by exponential averages, `fsq` rounds a few bounded numbers (arXiv 2309.15505).
Both come from vector-quantize-pytorch; this file gives them one interface.

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

GRACE = 40  # steps


class VQ(nn.Module):
    """Nearest entry by cosine similarity; entries are averages of what they are chosen for, dead ones are re-drawn.

    Under `torch.distributed` the averages and the re-drawn entries are the same on every rank, and the same as those of
    one process with the whole batch.
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
        """The entries that `forward` chooses, without moving the codebook: (B, L, D) -> (B, L) int64.

        The largest cosine, of equal ones the lowest entry. Cosines are made for some tokens at a time: the library has
        all of them at once, and a one-hot row of K for each token.
        """
        with torch.autocast(x.device.type, enabled=False):
            inside = self.quantize.project_in(x.to(self.codes().dtype))
            directions = self.quantize._codebook.transform_input(inside).flatten(0, 1)
            # Parts of even size: a product of a single row rounds differently.
            parts = -(-len(directions) // rows_at_once(self.codebook_size, x.device)) or 1
            chosen = [(part @ self.codes().T).argmax(-1) for part in directions.tensor_split(parts)]
        return torch.cat(chosen).view(x.shape[:2])

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

    Every rank's generator has been keyed alike by the step, so that all draw the same.
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
