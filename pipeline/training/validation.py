"""Validation inside training: PSNR, a Frechet distance and codebook use on some held-out pictures."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.measurements import Totals
from pipeline.training import adaptivity, distributed
from pipeline.training.batches import Pictures
from tatok_model.metrics.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.images import ImageQuality, to_uint8
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokenizer import TaTok

BATCH = 64  # pictures per forward pass
ORDER_SEED = 0  # of the order in which pictures are measured


class Validator:
    """Measures a tokenizer on `count` held-out pictures, evenly spread over the split, shared out over the workers.

    Evenly, because a split in the order of its classes would otherwise show one class only; in an order drawn at
    random, because what is measured on a batch exchanges global tokens within it.

    Args:
        pictures: the held-out split.
        count: how many of its pictures to use.
        grid: how many of them to show.
        extractor: the network behind the Frechet distance.
        device: where models live.
    """

    def __init__(
        self, pictures: Pictures, count: int, grid: int, extractor: FeatureExtractor, device: torch.device
    ) -> None:
        self.pictures, self.device = pictures, device
        self.extractor = extractor.to(device)
        indices = spread(len(pictures), count)
        self.indices = np.random.default_rng(ORDER_SEED).permutation(indices)
        self.shown = spread(len(pictures), grid)
        self._originals: FeatureStatistics | None = None

    def measure(self, model: TaTok) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker."""
        keep_originals = self._originals is None
        originals = FeatureStatistics(self.extractor.feature_dim)
        reconstructed = FeatureStatistics(self.extractor.feature_dim)
        quality = ImageQuality()
        usage = {kind: CodeUsage(model.config.codebook_size) for kind in ("global", "patch")}
        adaptive = Totals()
        for images in self._batches():
            if model.entropy_model is not None and len(images) > 1 and self._looked_at(adaptive) < adaptivity.IMAGES:
                adaptive.merge(adaptivity.measure(model, images))
            tokens = model.encode(images)
            pictures = to_uint8(model.decode(tokens))
            quality.update(images.cpu(), pictures.cpu())
            usage["global"].update(tokens.global_indices)
            usage["patch"].update(tokens.patch_indices[tokens.kept_mask])
            reconstructed.update(self.extractor(pictures)[0])
            if keep_originals:
                originals.update(self.extractor(images)[0])
        if keep_originals:
            self._originals = distributed.merged(originals)
        quality, reconstructed = distributed.merged(quality), distributed.merged(reconstructed)
        found = {f"validation/{name}": value for name, value in quality.results().items()}
        for kind, counted in usage.items():
            merged = distributed.merged(counted)
            if merged.counts.sum():
                found[f"validation/codebook_usage_{kind}"] = merged.usage
                found[f"validation/codebook_perplexity_{kind}"] = merged.perplexity
        adaptive = distributed.merged(adaptive)
        if adaptive.values:
            perplexity = found["validation/codebook_perplexity_patch"]
            found |= adaptivity.metrics(adaptive, model.config.patch_positions * math.log2(perplexity))
        if self._originals is not None and reconstructed.n > 1:
            distance = frechet_distance(
                self._originals.mean(), self._originals.covariance(), reconstructed.mean(), reconstructed.covariance()
            )
            found[f"validation/rfd_{self.extractor.name}"] = float(distance)
        return found

    def warnings(self, model: TaTok, found: dict[str, float]) -> list[str]:
        """What a reader of the log should look into, given the latest metrics by their logged names."""
        if "validation/psnr_quarter" not in found:
            return []
        return adaptivity.warnings(found, model.config.global_tokens > 0)

    def examples(self, model: TaTok) -> list[np.ndarray]:
        """A few pictures, (B, H, W, 3) uint8 each: originals and reconstructions.

        With an entropy model also reconstructions from a quarter of the patch tokens, from that quarter with the global
        tokens of another picture, from global tokens alone, and the distortion of every patch token.
        """
        if not len(self.shown):
            return []
        images = self._load(self.shown)
        tokens = model.encode(images)
        rows = [images, to_uint8(model.decode(tokens))]
        if model.entropy_model is not None:
            some = adaptivity.quarter(model, tokens)
            others = adaptivity.exchanged(some) if len(images) > 1 else some
            rows += [to_uint8(model.decode(part)) for part in (some, others, some.cut("count", 0))]
            rows.append(adaptivity.distortion_maps(model, tokens))
        return [batch.permute(0, 2, 3, 1).cpu().numpy() for batch in rows]

    def _looked_at(self, adaptive: Totals) -> float:
        """How many images the adaptive part has seen, as if every worker had seen as many as this one."""
        return adaptive.values.get("images", 0.0) * distributed.world_size()

    def _batches(self) -> Any:
        mine = self.indices[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), BATCH):
            yield self._load(mine[start : start + BATCH])

    def _load(self, indices: np.ndarray) -> Tensor:
        images = np.ascontiguousarray(self.pictures.images(indices).transpose(0, 3, 1, 2))
        return torch.from_numpy(images).to(self.device)


def spread(total: int, count: int) -> np.ndarray:
    """(min(count, total),) int64, numbers from 0 to total - 1 at even distances."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)
