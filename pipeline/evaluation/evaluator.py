"""Measuring one range of pictures, and all ranges of a plan, in this process or on Ray Data actors.

Shapes: B images, H and W pixels.
"""

import io
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.checkpoints import load_lpips
from pipeline.core.cluster import connect, names_cluster, pick_device, pick_workers_device
from pipeline.core.console import progress
from pipeline.core.errors import Stopped
from pipeline.core.ranges import Stopwatch, map_on_actors
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.measurements import (
    Contents,
    Cut,
    CutLengths,
    Cuts,
    CutSums,
    EvaluationPlan,
    EvaluationTotals,
    Measurements,
    NetworkSums,
    Shown,
    make_plan,
    score_split_of,
    score_splits,
)
from pipeline.evaluation.reference import Extractor, load_extractors
from pipeline.training.order import read_ahead
from pipeline.training.validation import spread
from tatok_model.codec.bytestream import Codec
from tatok_model.codec.header import unseal
from tatok_model.losses import LPIPS
from tatok_model.metrics.extractors.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import squared_error, to_uint8
from tatok_model.metrics.scores import CodeUsage, InceptionScore
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens
from tatok_model.vit import one_thread

OPERATING_SAMPLE, CURVE_SAMPLE = 1024, 64  # images, evenly spread, verified at a cut: one at a time


class ReplayCheck:
    """Finds images whose kept positions a reader could not replay, by writing streams of a sample of the plan.

    Args:
        tokenizer: on the device that measures, in evaluation mode.
        plan: says how many images are measured.
    """

    def __init__(self, tokenizer: TaTok, plan: EvaluationPlan) -> None:
        self._codec = Codec(tokenizer)
        self._operating, self._curve = (spread(plan.count, most) for most in (OPERATING_SAMPLE, CURVE_SAMPLE))

    def states(self, tokens: Tokens, numbers: np.ndarray, operating: bool) -> tuple[np.ndarray, float]:
        """For one cut with replayed positions: (B,) int64, 1 replayed, 0 not, -1 not verified; and seconds.

        `numbers` are the images' (B,) numbers in the plan. The operating point has the larger sample.
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
    """(B,) float64: the extra bits of an image whose positions are sent instead of replayed."""
    sent, positions = replace(tokens.side, positions="sent"), tokens.patch_indices.shape[1]
    return sent.bits(tokens.patch_counts, positions) - tokens.side.bits(tokens.patch_counts, positions)


@dataclass(frozen=True)
class Instruments:
    """The networks of the metrics."""

    networks: tuple[FeatureExtractor, ...]  # one per Frechet distance; the first also gives the Inception score
    lpips: LPIPS | None = None


class Evaluator:
    """Encodes and decodes images and compares the reconstructions with them; uses neither Ray nor MLflow.

    Args:
        codec: `TaTok` or a baseline, an `nn.Module`; it is moved to `device` and put into evaluation mode.
        instruments: moved to `device`.
        plan: says which images belong to a range.
        originals: whether to compute features of the originals too.
        device: of all computation.
        cuts: at which thresholds tokens are cut.
    """

    def __init__(
        self,
        codec: Any,
        instruments: Instruments,
        plan: EvaluationPlan,
        originals: bool,
        device: str | torch.device = "cpu",
        cuts: Cuts | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.codec = codec.to(self.device).eval()
        self.networks = [network.to(self.device).eval() for network in instruments.networks]
        self.lpips = instruments.lpips.to(self.device) if instruments.lpips else None
        self.plan, self.originals, self.cuts = plan, originals, cuts or Cuts()
        self._splits = torch.from_numpy(score_split_of(plan.count))
        self._curve = self.cuts.curve(codec)
        replays = self.cuts.filter.replay and codec.config.patch_tokens
        self._replay = ReplayCheck(codec, plan) if replays else None

    def warm_up(self) -> None:
        """Measure one whole batch of noise, so that no set-up is timed."""
        side, batch = self.codec.config.image_size, self.plan.batch_size
        noise = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        self._measure_batch(self._empty(), noise, np.arange(batch))

    def measure(self, source: ShardDataset, start: int, stop: int) -> Measurements:
        """Measure the plan's images `start` to `stop` - 1, while a thread reads the next batches."""
        found = self._empty()
        started = time.perf_counter()
        batches = np.split(np.arange(start, stop), range(self.plan.batch_size, stop - start, self.plan.batch_size))

        def load(number: int) -> tuple[np.ndarray, np.ndarray]:
            return source.images(self.plan.indices(batches[number]).tolist()), batches[number]

        for images, numbers in read_ahead(load, 0, len(batches)):
            self._measure_batch(found, images, numbers)
        found.totals.seconds = time.perf_counter() - started
        return found

    def measure_all(self, source: ShardDataset) -> Iterator[tuple[int, Measurements]]:
        """Every range of the plan with its number, on one thread: floating-point sums depend on the thread count."""
        for number, (start, stop) in enumerate(self.plan.ranges()):
            with one_thread():
                found = self.measure(source, start, stop)
            yield number, found

    def _empty(self) -> Measurements:
        shape = self.codec.config
        kinds = [kind for kind in ("global", "patch") if getattr(shape, f"{kind}_tokens")]
        return Measurements(
            {cut.name: CutSums(self._no_features()) for cut in (self.cuts.operating_point, *self._curve)},
            {kind: CodeUsage(shape.codebook_size) for kind in kinds},
            self._no_features() if self.originals else None,
            Contents() if self._curve else None,
        )

    def _no_features(self) -> NetworkSums:
        score = InceptionScore(self.networks[0].classes, score_splits(self.plan.count))
        return NetworkSums(score, [FeatureStatistics(network.feature_dim) for network in self.networks])

    @torch.inference_mode()
    def _measure_batch(self, found: Measurements, batch: np.ndarray, numbers: np.ndarray) -> None:
        """Add (B, H, W, 3) uint8 images whose numbers in the plan are (B,)."""
        images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self.device)
        watch = Stopwatch(self.device.type)
        with watch.timed("encode"):
            encoded = self.codec.encode(images)
        with watch.timed("rank"):
            ranked = self.cuts.rank(self.codec, encoded, images)
        tokens = self.cuts.operating(ranked)
        with watch.timed("decode"):
            decoded = self.codec.decode(tokens)
        pictures = to_uint8(decoded)
        totals = EvaluationTotals()
        totals.replay = self._add_cut(found, self.cuts.operating_point, images, tokens, pictures, numbers)
        if len(images) == self.plan.batch_size:
            totals.timed, totals.encode, totals.decode = len(images), watch.seconds["encode"], watch.seconds["decode"]
            totals.rank = watch.seconds["rank"] if ranked.ranking is not None else 0.0
        if self.lpips is not None:
            totals.lpips = float(self.lpips(images.float() / 255, pictures.float() / 255).double().sum())
        found.totals.merge(totals)
        if ranked.ranking is not None:
            limits = _array(ranked.ranking.limits(self.cuts.filter.rule))
            found.limits = np.concatenate([found.limits, limits]) if len(found.limits) else limits
        for kind, usage in found.codes.items():
            usage.update(tokens.kept_globals() if kind == "global" else tokens.patch_indices[tokens.kept_mask])
        if found.originals:
            self._add_features(found.originals, images, numbers)
        for cut in self._curve:
            tokens = self.cuts.at(ranked, cut)
            self._add_cut(found, cut, images, tokens, to_uint8(self.codec.decode(tokens)), numbers)
        if found.contents:
            found.contents.merge(_contents(batch, ranked))

    def _add_cut(
        self, found: Measurements, cut: Cut, images: Tensor, tokens: Tokens, pictures: Tensor, numbers: np.ndarray
    ) -> float:
        """Add (B, 3, H, W) uint8 reconstructions of one cut; returns how many seconds it took to replay positions."""
        sums = found.cuts[cut.name]
        sums.quality.update(images, pictures)
        seconds, states, extra = 0.0, None, None
        if self._replay is not None and tokens.side.positions == "replayed":
            states, seconds = self._replay.states(tokens, numbers, cut == self.cuts.operating_point)
            extra = _array(fallback_bits(tokens))
        rate = self.cuts.rate_bits(self.codec, tokens, cut)
        lengths = CutLengths(
            tokens=_array(tokens.counts()),
            bits_fixed=_array(tokens.bits(self.codec.config.bits_per_token)),
            bits_coded=_array(self.cuts.bits_coded(self.codec, tokens)),
            squared_error=_array(squared_error(images, pictures)),
            rate_bits=None if rate is None else _array(rate),
            replay_state=states,
            fallback_bits=extra,
        )
        sums.lengths.merge(lengths)
        self._add_features(sums.networks, pictures, numbers)
        shown = torch.from_numpy(np.isin(numbers, self.plan.shown())).to(self.device)
        drawn = pictures[shown].permute(0, 2, 3, 1), tokens.kept_mask[shown], tokens.counts()[shown]
        sums.shown.merge(Shown(*(_array(values) for values in drawn)))
        return seconds

    def _add_features(self, sums: NetworkSums, images: Tensor, numbers: np.ndarray) -> None:
        for number, (network, statistics) in enumerate(zip(self.networks, sums.features, strict=True)):
            features, logits = network(images)
            statistics.update(features)
            if number == 0:
                sums.score.update(logits, self._splits[numbers])


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _contents(batch: np.ndarray, ranked: Tokens) -> Contents:
    """PNG sizes and total scores of (B, H, W, 3) uint8 images."""
    sizes = []
    for picture in batch:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", optimize=True)
        sizes.append(len(file.getvalue()))
    score = None if ranked.ranking is None else _array(ranked.ranking.score_units.sum(1)) / ranked.ranking.resolution
    return Contents(np.array(sizes, dtype=np.int64), score)


# A whole plan.


class EvaluationActor:
    """A Ray Data actor: loads and warms up the models once, then measures ranges.

    Args:
        shared: reference to the arguments of `Evaluator`, which the driver has loaded.
        shards: folder of the shards, which every node has to see.
    """

    def __init__(self, shared: Any, shards: str) -> None:
        import ray

        self._pictures = ShardDataset(shards, "heldout")
        self._evaluator = Evaluator(*ray.get(shared))
        self._evaluator.warm_up()

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """Measure one range; the returned row holds its pickled sums."""
        found = self._evaluator.measure(self._pictures, row["start"], row["stop"])
        return {"number": row["number"], "measurements": pickle.dumps(found)}


@dataclass(frozen=True)
class EvaluationSetup:
    """Everything that measuring needs besides the codec: the same for a tokenizer and its baselines."""

    run: Run
    pictures: ShardDataset  # the held-out split
    plan: EvaluationPlan
    extractors: list[Extractor]  # behind the Frechet distances; the first is the main one
    instruments: Instruments
    device: str
    in_process: bool  # one worker measures everything, in this process

    @classmethod
    def of(cls, run: Run) -> "EvaluationSetup":
        """From `run.config`; `data.shards` names existing shards.

        Raises:
            BadInput: too few held-out pictures, unusable weights, more workers than the cluster has room for.
        """
        config, section = run.config, run.config.evaluate
        pictures = ShardDataset(config.data.shards, "heldout")
        extractors = load_extractors(section)
        plan = make_plan(len(pictures), extractors[0].network.feature_dim, section)
        files = section.lpips_backbone, section.lpips_heads
        lpips = load_lpips("evaluate.lpips", *files, config.data.image_size) if all(files) else None
        instruments = Instruments(tuple(extractor.network for extractor in extractors), lpips)
        in_process = min(section.num_workers, len(plan.ranges())) == 1 and not names_cluster()
        if in_process:
            device = pick_device("evaluate", section.device).type
        else:
            device = pick_workers_device("evaluate", section.device, section.num_workers)
        return cls(run, pictures, plan, extractors, instruments, device, in_process)

    @property
    def cuts(self) -> Cuts:
        """The configured ones."""
        return Cuts(self.run.config.filter, self.run.config.evaluate.thresholds)

    @property
    def pixels(self) -> int:
        """Of an image, height times width."""
        return self.run.config.data.image_size**2

    def originals_shown(self) -> np.ndarray:
        """(B, H, W, 3) uint8: the pictures of `EvaluationPlan.shown`."""
        return self.pictures.images(self.plan.indices(self.plan.shown()).tolist())

    def measure(self, label: str, codec: Any, originals: bool, cuts: Cuts) -> Measurements:
        """Measure a codec on every picture of the plan; arguments as of `Evaluator`.

        Raises:
            Stopped: the run was asked to stop.
        """
        parts = (self.parts_here if self.in_process else self.parts_on_actors)(codec, originals, cuts)
        with progress(label, self.plan.count, "images") as shown:

            def followed() -> Iterator[tuple[int, Measurements]]:
                for number, part in parts:
                    shown.advance(part.images)
                    if self.run.should_stop:
                        raise Stopped("evaluation was asked to stop; --resume measures anew")
                    yield number, part

            return merged(followed(), self.plan.count)

    def parts_here(self, codec: Any, originals: bool, cuts: Cuts) -> Iterator[tuple[int, Measurements]]:
        """Every range of the plan with its number, in this process."""
        evaluator = Evaluator(codec, self.instruments, self.plan, originals, self.device, cuts)
        with one_thread():
            evaluator.warm_up()
        yield from evaluator.measure_all(self.pictures)

    def parts_on_actors(self, codec: Any, originals: bool, cuts: Cuts) -> Iterator[tuple[int, Measurements]]:
        """Every range of the plan with its number, as actors finish them."""
        ray = connect()
        shared = ray.put((codec, self.instruments, self.plan, originals, self.device, cuts))
        ranges = [{"number": i, "start": start, "stop": stop} for i, (start, stop) in enumerate(self.plan.ranges())]
        pool = ray.data.ActorPoolStrategy(size=min(self.run.config.evaluate.num_workers, len(ranges)))
        arguments = shared, self.run.config.data.shards
        for row in map_on_actors(ray, ranges, EvaluationActor, arguments, pool, self.device):
            yield row["number"], pickle.loads(row["measurements"])


def merged(parts: Iterator[tuple[int, Measurements]], expected: int) -> Measurements:
    """The sum of all ranges, added in the order of their numbers, in whatever order they arrive.

    Raises:
        RuntimeError: the ranges do not hold `expected` images: one is missing.
    """
    total: Measurements | None = None
    waiting: dict[int, Measurements] = {}
    upcoming = 0  # number of the range that is added next
    for number, part in parts:
        waiting[number] = part
        while upcoming in waiting:
            if total is None:
                total = waiting.pop(upcoming)
            else:
                total.merge(waiting.pop(upcoming))
            upcoming += 1
    if total is None or total.images != expected:
        raise RuntimeError(f"{total.images if total else 0} images were measured; expected {expected}")
    return total
