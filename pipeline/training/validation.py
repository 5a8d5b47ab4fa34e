"""Validation while a tokenizer trains, on some held-out pictures: PSNR, a Frechet distance, codebook usage.

With an entropy model also the adaptive part: whether the decoder uses the global tokens, and how well q predicts.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shards import ShardDataset
from pipeline.training import distributed
from tatok_model.codec.payload import grid_schedule
from tatok_model.metrics.extractors.extractor import FeatureExtractor
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.images import ImageQuality, psnr, to_uint8
from tatok_model.metrics.scores import CodeUsage, partners
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

BATCH = 64  # pictures per forward pass
ORDER_SEED = 0  # of the order in which pictures are measured
IMAGES = 256  # at most, for the adaptive part: the entropy model runs some twenty times on each
ROUNDS = 8  # in which the codes of an image are predicted, each from the rounds before
SEED = 0  # of the exchange of global tokens between images
LEAST_GAIN = 0.3  # dB; if wrong global tokens cost less than this, the decoder ignores them


def spread(total: int, count: int) -> np.ndarray:
    """(min(count, total),) int64, evenly spaced from 0 to below `total`."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)


def quarter(model: TaTok, tokens: Tokens) -> Tokens:
    """Tokens cut to the most important quarter of the patch tokens."""
    return model.rank(tokens, "distortion").cut("count", model.config.patch_positions // 4)


def measure(model: TaTok, images: Tensor) -> dict[str, float]:
    """Sums of the adaptive part over B >= 2 random images, (B, 3, H, W) uint8; needs an entropy model."""
    tokens = model.encode(images)
    some = quarter(model, tokens)
    hidden = torch.ones(len(images), dtype=torch.bool, device=images.device)  # global tokens, of every image
    schedule = grid_schedule(tokens.kept_mask, ROUNDS)
    sums = {
        "images": float(len(images)),
        "psnr_quarter": _psnr(model, images, some),
        "psnr_globals_only": _psnr(model, images, some.cut("count", 0)),
        "psnr_quarter_shuffled": _psnr(model, images, exchanged(some)),
        "bits_one_pass": float(model.code_lengths(tokens, torch.zeros_like(schedule)).sum()),
        "bits_chain": float(model.code_lengths(tokens, schedule).sum()),
    }
    if model.config.global_tokens and model.config.entropy_globals:
        sums["bits_blind"] = float(model.code_lengths(tokens, schedule, hidden).sum())
    return sums


def exchanged(tokens: Tokens) -> Tokens:
    """The same patch tokens, each image with the global tokens of another one."""
    return replace(tokens, global_indices=tokens.global_indices[torch.from_numpy(partners(len(tokens), SEED))])


def metrics(sums: dict[str, float], unigram_bits: float) -> dict[str, float]:
    """Metrics of the adaptive part by their logged names.

    Args:
        sums: of `measure`, over all images.
        unigram_bits: per image, of the patch codes coded by the frequencies of the entries.
    """
    means = {name: value / sums["images"] for name, value in sums.items() if name != "images"}
    means["bits_unigram"] = unigram_bits
    means["bits_redundancy"] = means["bits_one_pass"] - means["bits_chain"]
    if "bits_blind" in means:
        means["bits_mutual"] = means.pop("bits_blind") - means["bits_chain"]
    return {f"validation/{name}": value for name, value in means.items()}


def warnings(metrics: dict[str, float], globals_exist: bool) -> list[str]:
    """Warnings that the model does not learn to be adaptive, from metrics by their logged names."""
    texts = []
    loss_db = metrics["validation/psnr_quarter"] - metrics["validation/psnr_quarter_shuffled"]
    if globals_exist and loss_db < LEAST_GAIN:
        texts.append(
            f"global tokens are ignored: those of other images cost {loss_db:.2f} dB at a quarter of the patch tokens; "
            f"expected at least {LEAST_GAIN} dB"
        )
    one_pass, unigram = metrics["validation/bits_one_pass"], metrics["validation/bits_unigram"]
    if one_pass >= unigram:
        texts.append(
            f"the entropy model is no better than counting codes: {one_pass:.0f} bits an image; expected fewer than "
            f"{unigram:.0f}"
        )
    return texts


def distortion_maps(model: TaTok, tokens: Tokens) -> Tensor:
    """(B, 3, H, W) uint8 maps of the `distortion` score of each patch: black where q predicts its code vector exactly.

    White is the variance of the codebook: what a q would score that knows nothing.
    """
    ranking, codes = model.rank(tokens, "distortion").ranking, model.code_vectors()[1]
    if ranking is None or codes is None:
        raise ValueError("the tokens were not ranked")
    values = torch.zeros_like(ranking.score_units).scatter(1, ranking.order, ranking.score_units) / ranking.resolution
    grey = (values / codes.var(dim=0, correction=0).sum()).clamp(0, 1) * 255
    side, patch = model.config.grid_size, model.config.patch_size
    maps = grey.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return maps.expand(-1, 3, -1, -1).to(torch.uint8)


def _psnr(model: TaTok, images: Tensor, tokens: Tokens) -> float:
    """Sum of the images' PSNR in dB."""
    return float(psnr(images.cpu(), to_uint8(model.decode(tokens)).cpu()).sum())


class TokenizerValidator:
    """Measures a tokenizer on `count` held-out pictures, evenly spread over the split, divided among the workers.

    Evenly, because the split may be sorted by class; in random order, because `measure` exchanges global tokens within
    a batch.

    Args:
        pictures: the held-out split.
        count: how many of its pictures to use.
        grid: how many of them to show.
        extractor: the network behind the Frechet distance.
        device: of the models.
    """

    def __init__(
        self, pictures: ShardDataset, count: int, grid: int, extractor: FeatureExtractor, device: torch.device
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
        adaptive: list[dict[str, float]] = []
        for images in self._batches():
            # Images of the adaptive part on all workers, if each has measured as many as this one.
            measured = sum(part["images"] for part in adaptive) * distributed.world_size()
            if model.entropy_model is not None and len(images) > 1 and measured < IMAGES:
                adaptive.append(measure(model, images))
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
        values = {f"validation/{name}": value for name, value in quality.results().items()}
        for kind, of_this_worker in usage.items():
            counted = distributed.merged(of_this_worker)
            if counted.counts.sum():
                values[f"validation_codebook/usage_{kind}"] = counted.usage
                values[f"validation_codebook/perplexity_{kind}"] = counted.perplexity
        if sums := distributed.summed(adaptive):
            perplexity = values["validation_codebook/perplexity_patch"]
            values |= metrics(sums, model.config.patch_positions * math.log2(perplexity))
        if self._originals is not None and reconstructed.n > 1:
            distance = frechet_distance(
                self._originals.mean(), self._originals.covariance(), reconstructed.mean(), reconstructed.covariance()
            )
            values[f"validation/rfd_{self.extractor.name}"] = float(distance)
        return values

    def warnings(self, model: TaTok, latest: dict[str, float]) -> list[str]:
        """As the function `warnings`, where `latest` has the adaptive part."""
        return warnings(latest, model.config.global_tokens > 0) if "validation/psnr_quarter" in latest else []

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
            some = quarter(model, tokens)
            others = exchanged(some) if len(images) > 1 else some
            rows += [to_uint8(model.decode(part)) for part in (some, others, some.cut("count", 0))]
            rows.append(distortion_maps(model, tokens))
        return [batch.permute(0, 2, 3, 1).cpu().numpy() for batch in rows]

    def _batches(self) -> Any:
        mine = self.indices[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), BATCH):
            yield self._load(mine[start : start + BATCH])

    def _load(self, indices: np.ndarray) -> Tensor:
        images = np.ascontiguousarray(self.pictures.images(indices.tolist()).transpose(0, 3, 1, 2))
        return torch.from_numpy(images).to(self.device)
