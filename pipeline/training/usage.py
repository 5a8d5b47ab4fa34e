"""How a codebook is used while it is trained, and how many patch tokens are kept."""

import torch
from torch import Tensor

from pipeline.training import distributed
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokens import Tokens


class UsageMeter:
    """Counts codes over some steps."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._codes, self._has_patch_codes = config.codebook_size, config.patch_tokens
        self._counts: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []  # kept patch tokens, images

    def add(self, tokens: Tokens) -> None:
        """Count one step. Counts stay on the device, without a look at them: it would have to wait."""
        everything = [("global", tokens.global_indices)]
        if self._has_patch_codes:
            everything.append(("patch", tokens.patch_indices))
        for kind, indices in everything:  # kept or not: the codebook learns from all of them
            counts = self._counts.setdefault(kind, indices.new_zeros(self._codes))
            counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        kept = [tokens.kept_mask.sum(), tokens.kept_mask.new_full((), len(tokens), dtype=torch.int64)]
        self._kept = [old + new for old, new in zip(self._kept, kept, strict=True)] if self._kept else kept

    def read(self) -> dict[str, float]:
        """Metrics since the last call by their logged names, over all workers; every worker has to ask."""
        metrics: dict[str, float] = {}
        for kind, counts in self._counts.items():
            usage = CodeUsage.from_arrays({"counts": distributed.total(counts).cpu().numpy()})
            if usage.counts.sum():
                metrics[f"codebook/usage_{kind}"] = usage.usage
                metrics[f"codebook/perplexity_{kind}"] = usage.perplexity
        kept = [distributed.total(count) for count in self._kept]
        metrics["train/kept_patch_tokens"] = float(kept[0] / kept[1])
        self._counts, self._kept = {}, []
        return metrics
