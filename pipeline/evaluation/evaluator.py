"""Measuring one range of images: a plain class that knows neither Ray nor MLflow.

Shapes: B images, R images of a range, H and W pixels.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.measurements import OPERATING, Cuts, Measurements, PerImage, Pictures, Plan, Point, Totals
from pipeline.evaluation.picture_codecs import png_bytes
from pipeline.training.order import read_ahead
from tatok_model.codec.bytestream import Codec
from tatok_model.codec.header import unseal
from tatok_model.config import TokenizerConfig
from tatok_model.losses import LPIPS
from tatok_model.metrics.extractors.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality, squared_error, to_uint8
from tatok_model.metrics.scores import CodeUsage, InceptionScore
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

# Which images a reader could not replay: verified as `Codec` does when it writes streams, one image at a time.

OPERATING_SAMPLE, CURVE_SAMPLE = 1024, 64  # images, evenly spread, that are verified at a cut: each is replayed alone


class ReplayCheck:
    """Verifies replay on a sample of the plan's images.

    Args:
        tokenizer: where it will compute, in evaluation mode.
        plan: says how many images are measured.
    """

    def __init__(self, tokenizer: TaTok, plan: Plan) -> None:
        self._codec = Codec(tokenizer)
        self._operating, self._curve = (_spread(plan.count, most) for most in (OPERATING_SAMPLE, CURVE_SAMPLE))

    def states(self, tokens: Tokens, numbers: np.ndarray, operating: bool) -> tuple[np.ndarray, float]:
        """Of (B,) images by their numbers in the plan: (B,) int64, 1 replayed, 0 not, -1 not verified; and seconds.

        Args:
            tokens: one cut with replayed positions.
            numbers: (B,) of the images.
            operating: the cut is the operating point, of which more images are verified than of others.
        """
        wanted = np.isin(numbers, self._operating if operating else self._curve).nonzero()[0]
        states = np.full(len(numbers), -1, dtype=np.int64)
        if not len(wanted):
            return states, 0.0
        started = time.perf_counter()
        streams = self._codec.to_bytes(tokens[wanted.tolist()])
        seconds = time.perf_counter() - started
        states[wanted] = [unseal(stream)[0].side.positions == "replayed" for stream in streams]
        return states, seconds


def fallback_bits(tokens: Tokens) -> Tensor:
    """(B,) float64: how many bits more than replayed ones the positions of an image cost once they are sent."""
    sent, positions = replace(tokens.side, positions="sent"), tokens.patch_indices.shape[1]
    return sent.bits(tokens.patch_counts, positions) - tokens.side.bits(tokens.patch_counts, positions)


def charged(bits: np.ndarray, states: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """(B,) bits with fallbacks paid for: verified images as they are, others their share of what a fallback costs.

    Args:
        bits: (B,) as if every image were replayed.
        states: (B,) as `ReplayCheck.states`.
        extra: (B,) as `fallback_bits`.
    """
    return bits + np.where(states < 0, fallback_share(states), states == 0) * extra


def fallback_share(states: np.ndarray) -> float:
    """Of the verified images, how many were not replayed."""
    verified = states[states >= 0]
    return float((verified == 0).mean()) if len(verified) else 0.0


def _spread(count: int, most: int) -> np.ndarray:
    return np.arange(min(count, most)) * count // min(count, most)


T = TypeVar("T")


class ImageCodec(Protocol):
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
    more: tuple[FeatureExtractor, ...] = ()  # further Frechet distances

    def extractors(self) -> dict[str, FeatureExtractor]:
        """By the ending of their states' names: '' for the main one."""
        return {"": self.extractor, **{f"@{network.name}": network for network in self.more}}


class Evaluator:
    """Encodes and decodes images and measures what became of them.

    Args:
        codec: an `nn.Module` too; it is moved to `device` and put into evaluation mode.
        instruments: moved to `device`.
        plan: says which images belong to a range.
        originals: whether the originals' features are wanted too.
        device: where everything computes.
        cuts: where the tokens of a `TaTok` are cut; None: they are decoded as they are encoded.
    """

    def __init__(
        self,
        codec: Any,
        instruments: Instruments,
        plan: Plan,
        originals: bool,
        device: str | torch.device = "cpu",
        cuts: Cuts | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.codec: ImageCodec = codec.to(self.device).eval()
        self.extractors = {key: network.to(self.device).eval() for key, network in instruments.extractors().items()}
        self.lpips = instruments.lpips.to(self.device) if instruments.lpips else None
        self.plan, self.originals = plan, originals
        self._splits = torch.from_numpy(plan.score_split_of())
        self._shown = plan.shown()
        self._cuts = cuts if isinstance(codec, TaTok) else None
        self._threshold = None if self._cuts is None or self._cuts.keeps_all else self._cuts.filter.threshold
        self._points = self._cuts.curve(codec) if self._cuts else []
        replays = self._cuts is not None and self._cuts.filter.replay and codec.config.patch_tokens
        self._replay = ReplayCheck(codec, plan) if replays else None

    def warm_up(self) -> None:
        """One whole batch of noise, so that the first timed batch pays for no set-up."""
        side, batch = self.codec.config.image_size, self.plan.batch_size
        noise = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        self._measure_batch(self._new(), noise, np.arange(batch))

    def measure(self, source: ImageSource, start: int, stop: int) -> Measurements:
        """Measure the plan's images `start` to before `stop`; a thread reads the next batches meanwhile."""
        found = self._new()
        started = time.perf_counter()
        batches = np.split(np.arange(start, stop), range(self.plan.batch_size, stop - start, self.plan.batch_size))

        def load(number: int) -> tuple[np.ndarray, np.ndarray]:
            return source.images(self.plan.indices(batches[number])), batches[number]

        for images, numbers in read_ahead(load, 0, len(batches)):
            self._measure_batch(found, images, numbers)
        found["totals"].merge(Totals(seconds=time.perf_counter() - started))
        return found

    def _new(self) -> Measurements:
        side = self.codec.config.image_size
        found: dict[str, Any] = {"totals": Totals(), "pictures": Pictures(np.zeros((0, side, side, 3), np.uint8))}
        for point in [OPERATING, *(f"{point.name}." for point in self._points)]:
            found |= {f"{point}quality": ImageQuality(), f"{point}lengths": PerImage()}
            found |= {f"{point}features{key}": FeatureStatistics(e.feature_dim) for key, e in self.extractors.items()}
            if point:
                found[f"{point}shown"] = PerImage()
        found["score"] = self._new_score()
        for kind, exists in (("global", self.codec.config.global_tokens), ("patch", self.codec.config.patch_tokens)):
            if exists:
                found[f"codes_{kind}"] = CodeUsage(self.codec.config.codebook_size)
        if self._points:
            found["images"] = PerImage()
        if self.originals:
            found |= {f"original_features{k}": FeatureStatistics(e.feature_dim) for k, e in self.extractors.items()}
            found["original_score"] = self._new_score()
        return Measurements(**found)

    def _new_score(self) -> InceptionScore:
        return InceptionScore(self.extractors[""].classes, self.plan.score_splits)

    @torch.inference_mode()
    def _measure_batch(self, found: Measurements, batch: np.ndarray, numbers: np.ndarray) -> None:
        """Add (B, H, W, 3) uint8 images whose numbers are (B,) to `found`."""
        images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self.device)
        encoded, encode_seconds = self._timed(lambda: self.codec.encode(images))
        ranked, rank_seconds = self._timed(lambda: self._rank(encoded, images))
        tokens = self._cuts.operating(ranked) if self._cuts else ranked
        decoded, decode_seconds = self._timed(lambda: self.codec.decode(tokens))
        pictures = to_uint8(decoded)
        replay_seconds = self._add_cut(found, Point(OPERATING, self._threshold), images, tokens, pictures, numbers)
        self._add_features(found, "", pictures, numbers)
        if self.originals:
            self._add_features(found, "original_", images, numbers)
        for kind, indices in (("global", tokens.kept_globals()), ("patch", tokens.patch_indices[tokens.kept_mask])):
            if f"codes_{kind}" in found:
                found[f"codes_{kind}"].update(indices)
        totals = Totals()
        if self.lpips is not None:
            totals.values["lpips"] = float(self.lpips(images.float() / 255, pictures.float() / 255).double().sum())
        if len(images) == self.plan.batch_size:  # a rate belongs to a batch size: shorter batches are left out
            totals.values |= {"timed": len(images), "encode_seconds": encode_seconds, "decode_seconds": decode_seconds}
            if ranked.ranking is not None:
                totals.values["rank_seconds"] = rank_seconds
        if tokens.side.positions == "replayed":
            totals.values["replay_seconds"] = replay_seconds
        found["totals"].merge(totals)
        wanted = torch.from_numpy(np.isin(numbers, self._shown)).to(self.device)
        found["pictures"].merge(Pictures(_channels_last(pictures[wanted])))
        for point in self._points:
            self._measure_point(found, point, images, ranked, wanted, numbers)
        if self._points:
            found["images"].merge(_contents(batch, ranked))

    def _rank(self, tokens: Tokens, images: Tensor) -> Tokens:
        return self._cuts.rank(self._as_tokenizer(), tokens, images) if self._cuts else tokens

    def _measure_point(
        self,
        found: Measurements,
        point: Point,
        images: Tensor,
        ranked: Tokens,
        wanted: Tensor,
        numbers: np.ndarray,
    ) -> None:
        """Add one point of the curve; (B,) bool `wanted` are the pictures to show."""
        if self._cuts is None:
            return
        tokens = self._cuts.at(ranked, point)
        pictures = to_uint8(self.codec.decode(tokens))
        self._add_cut(found, point, images, tokens, pictures, numbers)
        self._add_features(found, f"{point.name}.", pictures)
        shown = PerImage(
            pictures=_channels_last(pictures[wanted]),
            kept_mask=tokens.kept_mask[wanted].cpu().numpy(),
            tokens=tokens.counts()[wanted].cpu().numpy(),
        )
        found[f"{point.name}.shown"].merge(shown)

    def _add_cut(
        self, found: Measurements, point: Point, images: Tensor, tokens: Tokens, pictures: Tensor, numbers: np.ndarray
    ) -> float:
        """Quality and lengths at one cut; returns how many seconds it took to replay positions."""
        prefix = f"{point.name}." if point.name else ""
        found[f"{prefix}quality"].update(images, pictures)
        fixed = tokens.bits(self.codec.config.bits_per_token)
        coded = self._cuts.bits_coded(self._as_tokenizer(), tokens) if self._cuts else fixed
        values = {
            "tokens": tokens.counts(),
            "patch_tokens": tokens.patch_counts,
            "bits_fixed": fixed,
            "bits_coded": coded,
            "squared_error": squared_error(images, pictures),
        }
        rate = self._cuts.rate_bits(self._as_tokenizer(), tokens, point.threshold) if self._cuts else None
        if rate is not None:
            values["rate_bits"] = rate
        seconds = 0.0
        if self._replay is not None and tokens.side.positions == "replayed":
            states, seconds = self._replay.states(tokens, numbers, operating=not prefix)
            values |= {"replay_state": torch.from_numpy(states), "fallback_bits": fallback_bits(tokens)}
        found[f"{prefix}lengths"].merge(PerImage(**{name: value.cpu().numpy() for name, value in values.items()}))
        return seconds

    def _add_features(
        self, found: Measurements, prefix: str, images: Tensor, numbers: np.ndarray | None = None
    ) -> None:
        """For every Frechet distance and, where the (B,) numbers of the images are given, for the Inception score."""
        for key, extractor in self.extractors.items():
            features, logits = extractor(images)
            found[f"{prefix}features{key}"].update(features)
            if not key and numbers is not None:
                found[f"{prefix}score"].update(logits, self._splits[numbers])

    def _as_tokenizer(self) -> TaTok:
        """The codec where there are cuts: only a `TaTok` has them."""
        return cast(TaTok, self.codec)

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


def _channels_last(pictures: Tensor) -> np.ndarray:
    return pictures.permute(0, 2, 3, 1).cpu().numpy()


def _contents(batch: np.ndarray, ranked: Tokens) -> PerImage:
    """How much there is to say of (B, H, W, 3) uint8 images: the size as PNG, the scores of all patch tokens."""
    found: dict[str, np.ndarray] = {"png_bytes": np.array([png_bytes(image) for image in batch], dtype=np.int64)}
    if ranked.ranking is not None:
        found["total_score"] = ranked.ranking.score_units.sum(1).cpu().numpy() / ranked.ranking.resolution
    return PerImage(**found)
