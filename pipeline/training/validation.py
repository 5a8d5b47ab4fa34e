"""Validation inside training: PSNR, a Frechet distance and codebook use on some held-out pictures."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.training import distributed
from pipeline.training.batches import Pictures
from tatok_model.metrics.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.images import ImageQuality, to_uint8
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokenizer import TaTok

BATCH = 64  # pictures per forward pass


class Validator:
    """Measures a tokenizer on `count` held-out pictures, evenly spread over the split, shared out over the workers.

    Evenly, because a split in the order of its classes would otherwise show one class only.

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
        self.indices = spread(len(pictures), count)
        self.shown = spread(len(pictures), grid)
        self._originals: FeatureStatistics | None = None

    def measure(self, model: TaTok) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker."""
        keep_originals = self._originals is None
        originals = FeatureStatistics(self.extractor.feature_dim)
        reconstructed = FeatureStatistics(self.extractor.feature_dim)
        quality = ImageQuality()
        usage = {kind: CodeUsage(model.config.codebook_size) for kind in ("global", "patch")}
        for images in self._batches():
            tokens = model.encode(images)
            pictures = to_uint8(model.decode(tokens))
            quality.update(images.cpu(), pictures.cpu())
            usage["global"].update(tokens.global_indices)
            usage["patch"].update(tokens.patch_indices[tokens.kept_mask])
            reconstructed.update(self.extractor(pictures)[0])
            if keep_originals:
                originals.update(self.extractor(images)[0])
        if keep_originals:
            self._originals = _merged(originals)
        quality, reconstructed = _merged(quality), _merged(reconstructed)
        found = {f"validation/{name}": value for name, value in quality.results().items()}
        for kind, counted in usage.items():
            merged = _merged(counted)
            if merged.counts.sum():
                found[f"validation/codebook_usage_{kind}"] = merged.usage
                found[f"validation/codebook_perplexity_{kind}"] = merged.perplexity
        if self._originals is not None and reconstructed.n > 1:
            distance = frechet_distance(
                self._originals.mean(), self._originals.covariance(), reconstructed.mean(), reconstructed.covariance()
            )
            found[f"validation/rfd_{self.extractor.name}"] = float(distance)
        return found

    def examples(self, model: TaTok) -> list[np.ndarray]:
        """Originals and reconstructions of a few pictures: two (B, H, W, 3) uint8."""
        images = self._load(self.shown)
        pictures = to_uint8(model.reconstruct(images))
        return [batch.permute(0, 2, 3, 1).cpu().numpy() for batch in (images, pictures)]

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


def _merged(part: Any) -> Any:
    """What all workers have seen together."""
    total = None
    for arrays in distributed.gather(part.to_arrays()):
        other = type(part).from_arrays(arrays)
        if total is None:
            total = other
        else:
            total.merge(other)
    return total
