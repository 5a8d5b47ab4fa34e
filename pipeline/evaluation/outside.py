"""Outside rows: JPEG and WebP at the bits of a tokenizer, measured on the same pictures by the same instruments."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.evaluation.curve import Distance, frechet
from pipeline.evaluation.evaluator import ImageSource, Instruments
from pipeline.evaluation.picture_codecs import compress, quality_for
from pipeline.evaluation.plan import Plan
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality

CHOOSING = 512  # training pictures, evenly spread, by which a quality is chosen


@dataclass(frozen=True)
class Outside:
    """What a picture codec is measured on and by."""

    source: ImageSource  # held-out pictures, measured as `plan` says
    plan: Plan
    instruments: Instruments
    distances: list[Distance]
    training: ImageSource  # the quality is chosen on these, as k-means is fitted to them
    training_images: int  # how many there are, at least one

    def measure(self, codec: str, bits: float, advance: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """The codec at the quality whose mean bits on training pictures are nearest below `bits`, or at its lowest.

        Args:
            codec: jpeg or webp.
            bits: wanted mean of an image; headers are not counted.
            advance: told how many pictures were measured.

        Returns:
            `bits_per_image`, as they came out on the measured pictures; `quality`, PSNR, SSIM and every Frechet
            distance.
        """
        used = min(CHOOSING, self.training_images)
        chosen = quality_for(codec, self.training.images(np.arange(used) * self.training_images // used), bits)
        quality, spent = ImageQuality(), 0
        networks = self.instruments.extractors()
        features = {key: FeatureStatistics(network.feature_dim) for key, network in networks.items()}
        for first in range(0, self.plan.count, self.plan.batch_size):
            numbers = np.arange(first, min(first + self.plan.batch_size, self.plan.count))
            pictures = self.source.images(self.plan.indices(numbers))
            made = compress(codec, pictures, chosen)
            originals, decoded = (_channels_first(batch) for batch in (pictures, made.reconstructions))
            quality.update(originals, decoded)
            spent += int(made.bits.sum())
            with torch.inference_mode():
                for key, network in networks.items():
                    features[key].update(network.cpu()(decoded)[0])
            advance(len(numbers))
        found = {"bits_per_image": spent / self.plan.count, "quality": float(chosen), **quality.results()}
        return found | {one.name: frechet(features[one.key], one.reference) for one in self.distances}


def _channels_first(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
