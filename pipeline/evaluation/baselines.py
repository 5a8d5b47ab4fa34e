"""What a tokenizer has to beat: a k-means codebook of patches that spends the same bits on an image.

No network: N patches, one codeword each, K_b = floor(2^(bits / N)) codewords fitted to patches of the training split.

Shapes: B images, N patches, P patch side, K_b codewords, V = 3 P P values of a patch.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.cluster import pick_device
from pipeline.core.console import progress, say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.actors import Bench
from pipeline.evaluation.evaluation_checks import check_kmeans, codewords_for, sampled
from pipeline.evaluation.evaluator import ImageSource, Instruments
from pipeline.evaluation.information import measure_information
from pipeline.evaluation.measurements import Plan
from pipeline.evaluation.picture_codecs import compress, quality_for
from pipeline.evaluation.results import Distance, baseline_results, frechet
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens
from tatok_model.vit import patchify, unpatchify

ITERATIONS = 25  # of Lloyd's algorithm; on CIFAR-10 mini-batches are faster and end 0.05 dB lower
READ = 256  # images read at a time
SEED = 0


class PatchVQ(nn.Module):
    """Nearest codeword for each patch, in pixel space; encodes and decodes as `TaTok` does.

    Args:
        config: image_size, patch_size and codebook_size count.
        codewords: (K_b, V) floats in [0, 1].
    """

    codewords: Tensor

    def __init__(self, config: TokenizerConfig, codewords: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codewords", codewords)

    def encode(self, images: Tensor) -> Tokens:
        """(B, 3, H, W) uint8 to N patch tokens each."""
        patches = patchify(images.float() / 255, self.config.patch_size)  # (B, N, V)
        # argmin |p - c|^2 = argmax p.c - |c|^2 / 2
        scores = patches @ self.codewords.T - self.codewords.square().sum(1) / 2  # (B, N, K_b)
        indices = scores.argmax(-1)
        empty = torch.zeros(len(images), 0, dtype=torch.int64, device=images.device)
        return Tokens(empty, indices, torch.ones_like(indices, dtype=torch.bool))

    def decode(self, tokens: Tokens) -> Tensor:
        """(B, 3, H, W) floats in [0, 1]."""
        return unpatchify(self.codewords[tokens.patch_indices], self.config.patch_size)


def fit_kmeans(source: ImageSource, images: int, config: TokenizerConfig, bits: float) -> PatchVQ:
    """Fit codewords to patches of the training split.

    Args:
        source: the training split.
        images: how many pictures it has.
        config: image and patch size.
        bits: what an image may cost.

    Raises:
        BadInput: as `check_kmeans`.
    """
    check_kmeans(bits, images, config.patch_positions)
    count, (used, each) = codewords_for(bits, config.patch_positions), sampled(images, config.patch_positions)
    say(f"kmeans baseline: fitting {count} codewords to {used * each} patches of {used} training images")
    codewords = _cluster(sample_patches(source, images, used, each, config.patch_size), count)
    shape = TokenizerConfig(config.image_size, config.patch_size, global_tokens=0, codebook_size=count)
    return PatchVQ(shape, codewords)


def sample_patches(source: ImageSource, images: int, used: int, each: int, patch_size: int) -> np.ndarray:
    """Patches to fit to: (used * each, V) float32 in [0, 1], drawn by a fixed seed from evenly spread pictures.

    Args:
        source: the training split.
        images: how many pictures it has.
        used: of how many of them patches are taken.
        each: how many of each.
        patch_size: P.
    """
    draw = np.random.default_rng(SEED)
    chosen = np.arange(used) * images // used
    taken = []
    for indices in np.split(chosen, range(READ, used, READ)):
        pictures = source.images(indices).transpose(0, 3, 1, 2)  # (READ, 3, H, W)
        patches = patchify(torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255, patch_size).numpy()
        places = draw.random(patches.shape[:2]).argsort(axis=1)[:, :each]
        taken.append(np.take_along_axis(patches, places[..., None], axis=1).reshape(-1, patches.shape[2]))
    return np.concatenate(taken)


def _cluster(patches: np.ndarray, count: int) -> Tensor:
    """(K_b, V) float32 codewords of (patches, V), by Lloyd's algorithm from random patches."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    fitted = KMeans(count, init="random", n_init=1, max_iter=ITERATIONS, tol=0, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different patches than codewords: no harm done
        fitted.fit(patches)
    return torch.from_numpy(fitted.cluster_centers_.astype(np.float32)).clamp(0, 1)


# Outside rows: JPEG and WebP at the bits of a tokenizer, measured on the same pictures by the same instruments.

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


# What stands beside a tokenizer's own numbers where it is asked for: baselines at equal bits, information in bits.


def baselines_results(
    run: Run, bench: Bench, distances: list[Distance], cuts: list[tuple[str, dict[str, float]]]
) -> dict[str, float]:
    """The baselines that are asked for, at the bits of the operating point, the first of the named `cuts`.

    Picture codecs are measured at the bits of every cut: `baseline_jpeg_curve00_psnr` stands beside `curve00_psnr`.
    """
    wanted = run.config.evaluate.baselines
    results: dict[str, float] = {}
    training = ShardDataset(run.config.data.shards, "train")
    if "kmeans" in wanted:
        results |= _kmeans_results(run, bench, distances, training, cuts[0][1]["bits_fixed"])
    outside = Outside(bench.pictures, bench.plan, bench.instruments, distances, training, len(training))
    for codec in (kind for kind in wanted if kind != "kmeans"):
        with progress(codec, bench.plan.count * len(cuts), "images") as shown:
            for name, cut in cuts:
                prefix = f"baseline_{codec}_" + (f"{name}_" if name else "")
                found = outside.measure(codec, cut["bits_fixed"], shown.advance)
                results |= {f"{prefix}{metric}": value for metric, value in found.items()}
                if run.should_stop:
                    raise Stopped("evaluation was asked to stop; --resume measures anew")
    return results


def information_results(run: Run, bench: Bench, tokenizer: Any, blind: TaTok | None) -> dict[str, float]:
    """Redundancy and mutual information, in this process: one position a round is slow however it is shared out."""
    device = pick_device("evaluate", run.config.evaluate.device)
    places = bench.plan.indices(np.arange(bench.plan.count))

    with progress("information", len(places), "images") as shown:

        def advance(count: int) -> None:
            shown.advance(count)
            if run.should_stop:
                raise Stopped("evaluation was asked to stop; --resume measures anew")

        size = bench.plan.batch_size
        return measure_information(tokenizer, blind, bench.pictures, places, size, advance, device)


def _kmeans_results(
    run: Run, bench: Bench, distances: list[Distance], pictures: ShardDataset, bits: float
) -> dict[str, float]:
    """Fit the baseline to the training split and measure it as the tokenizer was measured.

    Bits that vary between images are known only now: where no codebook can spend them, the row is left out.
    """
    started = time.monotonic()
    try:
        baseline = fit_kmeans(pictures, len(pictures), run.config.tokenizer.architecture(), bits)
    except BadInput as reason:
        say(f"the kmeans baseline is left out: {reason}")
        return {}
    seconds = time.monotonic() - started
    found = bench.measure("kmeans baseline", baseline, originals=False)
    return {**baseline_results(found, distances), "baseline_kmeans_fit_seconds": seconds}
