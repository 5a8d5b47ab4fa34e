"""Measuring one range of images: a plain class that knows neither Ray nor MLflow.

Shapes: B images, R images of a range, H and W pixels.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.measurements import Measurements, Pictures, Totals
from pipeline.evaluation.plan import Plan
from tatok_model.config import TokenizerConfig
from tatok_model.lpips import LPIPS
from tatok_model.metrics.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality, to_uint8
from tatok_model.metrics.scores import CodeUsage, InceptionScore
from tatok_model.tokens import Tokens

T = TypeVar("T")


class Codec(Protocol):
    """What can be evaluated: `TaTok`, or a baseline."""

    config: TokenizerConfig

    def encode(self, images: Tensor) -> Tokens:
        """Of (B, 3, H, W) uint8."""
        ...

    def decode(self, tokens: Tokens) -> Tensor:
        """(B, 3, H, W) floats in [0, 1]."""
        ...


class ImageSource(Protocol):
    """Where images come from; `pipeline.data.shards.ShardDataset` is one."""

    def images(self, indices: Any) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        ...


@dataclass(frozen=True)
class Instruments:
    """The networks that measure."""

    extractor: FeatureExtractor
    lpips: LPIPS | None = None


class Evaluator:
    """Encodes and decodes images and measures what became of them.

    Args:
        codec: an `nn.Module` too; it is moved to `device` and put into evaluation mode.
        instruments: moved to `device`.
        plan: says which images belong to a range.
        originals: whether the originals' features are wanted too.
        device: where everything computes.
    """

    def __init__(
        self, codec: Any, instruments: Instruments, plan: Plan, originals: bool, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.codec: Codec = codec.to(self.device).eval()
        self.extractor = instruments.extractor.to(self.device).eval()
        self.lpips = instruments.lpips.to(self.device) if instruments.lpips else None
        self.plan, self.originals = plan, originals
        self._splits = torch.from_numpy(plan.score_split_of())
        self._shown = plan.shown()

    def warm_up(self) -> None:
        """One whole batch of noise, so that the first timed batch pays for no set-up."""
        side, batch = self.codec.config.image_size, self.plan.batch_size
        noise = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        self._measure_batch(self._new(), noise, np.arange(batch))

    def measure(self, source: ImageSource, start: int, stop: int) -> Measurements:
        """Measure the plan's images `start` to before `stop`, batch by batch."""
        found = self._new()
        started = time.perf_counter()
        for first in range(start, stop, self.plan.batch_size):
            numbers = np.arange(first, min(first + self.plan.batch_size, stop))
            self._measure_batch(found, source.images(self.plan.indices(numbers)), numbers)
        found["totals"].merge(Totals(seconds=time.perf_counter() - started))
        return found

    def _new(self) -> Measurements:
        codes, extractor, side = self.codec.config.codebook_size, self.extractor, self.codec.config.image_size
        states: dict[str, Any] = {
            "features": FeatureStatistics(extractor.feature_dim),
            "score": InceptionScore(extractor.classes, self.plan.score_splits),
            "quality": ImageQuality(),
            "totals": Totals(),
            "pictures": Pictures(np.zeros((0, side, side, 3), np.uint8)),
        }
        if self.codec.config.global_tokens:
            states["codes_global"] = CodeUsage(codes)
        if self.codec.config.patch_tokens:
            states["codes_patch"] = CodeUsage(codes)
        if self.originals:
            states["original_features"] = FeatureStatistics(extractor.feature_dim)
            states["original_score"] = InceptionScore(extractor.classes, self.plan.score_splits)
        return Measurements(**states)

    @torch.inference_mode()
    def _measure_batch(self, found: Measurements, batch: np.ndarray, numbers: np.ndarray) -> None:
        """Add (B, H, W, 3) uint8 images whose numbers are (B,) to `found`."""
        images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self.device)
        tokens, encode_seconds = self._timed(lambda: self.codec.encode(images))
        decoded, decode_seconds = self._timed(lambda: self.codec.decode(tokens))
        pictures = to_uint8(decoded)
        self._add_features(found, "", pictures, numbers)
        if self.originals:
            self._add_features(found, "original_", images, numbers)
        found["quality"].update(images, pictures)
        for kind, indices in (("global", tokens.global_indices), ("patch", tokens.patch_indices[tokens.kept_mask])):
            if f"codes_{kind}" in found:
                found[f"codes_{kind}"].update(indices)
        totals = Totals(
            tokens=float(tokens.counts().sum()), bits=float(tokens.bits(self.codec.config.bits_per_token).sum())
        )
        if self.lpips is not None:
            totals.values["lpips"] = float(self.lpips(images.float() / 255, pictures.float() / 255).double().sum())
        if len(images) == self.plan.batch_size:  # a rate belongs to a batch size: shorter batches are left out
            totals.values |= {"timed": len(images), "encode_seconds": encode_seconds, "decode_seconds": decode_seconds}
        found["totals"].merge(totals)
        wanted = pictures[torch.from_numpy(np.isin(numbers, self._shown)).to(self.device)]
        found["pictures"].merge(Pictures(wanted.permute(0, 2, 3, 1).cpu().numpy()))

    def _add_features(self, found: Measurements, prefix: str, images: Tensor, numbers: np.ndarray) -> None:
        features, logits = self.extractor(images)
        found[f"{prefix}features"].update(features)
        found[f"{prefix}score"].update(logits, self._splits[numbers])

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """The result, and how long the device took for it."""
        self._wait()
        started = time.perf_counter()
        result = work()
        self._wait()
        return result, time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_here(evaluator: Evaluator, source: ImageSource) -> Iterator[tuple[int, Measurements]]:
    """Every range of the evaluator's plan with its number, in this process."""
    for number, (start, stop) in enumerate(evaluator.plan.ranges()):
        yield number, evaluator.measure(source, start, stop)


def merged(parts: Iterator[tuple[int, Measurements]], expected: int) -> Measurements:
    """All ranges as one, in the order of their numbers, whatever the order they come in.

    Raises:
        RuntimeError: the ranges do not hold `expected` images: one is missing.
    """
    total: Measurements | None = None
    waiting: dict[int, Measurements] = {}
    done = 0
    for number, part in parts:
        waiting[number] = part
        while done in waiting:
            next_part = waiting.pop(done)
            if total is None:
                total = next_part
            else:
                total.merge(next_part)
            done += 1
    images = total.images if total else 0
    if total is None or images != expected:
        raise RuntimeError(f"{images} images were measured; expected {expected}")
    return total
