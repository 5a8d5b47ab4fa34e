"""What a tokenizer has to beat at the bits it spends: a k-means codebook of patches, and JPEG and WebP.

k-means: no network, N patches, one codeword each, K_b = floor(2^(bits / N)) codewords fitted to training patches.

JPEG and WebP: headers are not counted. A 32-pixel JPEG is mostly header, which would make any comparison of bits a
joke: only what codes the pixels counts. That flatters the codecs (tables fitted to each picture cost nothing), never
the tokenizer.

Shapes: B images, H and W pixels, N patches, P patch side, K_b codewords, V = 3 P P values of a patch.
"""

import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.core.console import progress, say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluation_checks import check_kmeans, codewords_for, sampled
from pipeline.evaluation.evaluator import EvaluationSetup, Instruments
from pipeline.evaluation.measurements import OPERATING, Cuts, EvaluationPlan
from pipeline.evaluation.reference import Distance
from pipeline.evaluation.results import baseline_results
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality
from tatok_model.tokens import Tokens
from tatok_model.vit import patchify, unpatchify

ITERATIONS = 25  # of Lloyd's algorithm; on CIFAR-10 mini-batches are faster and end 0.05 dB lower
READ = 256  # images read at a time
SEED = 0
CHOOSING = 512  # training pictures, evenly spread, by which a quality is chosen
VP8_FRAME_HEADER = 10  # bytes: frame tag, start code, width and height


class PatchVQ(nn.Module):
    """Nearest codeword for each patch, in pixel space; encodes and decodes as `TaTok` does.

    Args:
        config: image_size, patch_size and codebook_size count.
        codewords: (K_b, V) floats in [0, 1].
    """

    codewords: Tensor
    entropy_model = None  # nothing that could code its tokens

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


def fit_kmeans(source: ShardDataset, images: int, config: TokenizerConfig, bits: float) -> PatchVQ:
    """Codewords for the bits that an image may cost, fitted to patches of a training split with so many `images`.

    Raises:
        BadInput: as `check_kmeans`.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    check_kmeans(bits, images, config.patch_positions)
    count, (used, each) = codewords_for(bits, config.patch_positions), sampled(images, config.patch_positions)
    say(f"kmeans baseline: fitting {count} codewords to {used * each} patches of {used} training images")
    fitted = KMeans(count, init="random", n_init=1, max_iter=ITERATIONS, tol=0, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different patches than codewords: no harm done
        fitted.fit(sample_patches(source, images, used, each, config.patch_size))
    codewords = torch.from_numpy(fitted.cluster_centers_.astype(np.float32)).clamp(0, 1)
    shape = TokenizerConfig(config.image_size, config.patch_size, global_tokens=0, codebook_size=count)
    return PatchVQ(shape, codewords)


def sample_patches(source: ShardDataset, images: int, used: int, each: int, patch_size: int) -> np.ndarray:
    """Patches to fit to: (used * each, V) float32 in [0, 1], drawn by a fixed seed.

    Of a split of so many `images`, evenly spread ones are `used`, and `each` patches of every one.
    """
    draw = np.random.default_rng(SEED)
    chosen = np.arange(used) * images // used
    taken = []
    for indices in np.split(chosen, range(READ, used, READ)):
        pictures = source.images(indices.tolist()).transpose(0, 3, 1, 2)  # (READ, 3, H, W)
        patches = patchify(torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255, patch_size).numpy()
        places = draw.random(patches.shape[:2]).argsort(axis=1)[:, :each]
        taken.append(np.take_along_axis(patches, places[..., None], axis=1).reshape(-1, patches.shape[2]))
    return np.concatenate(taken)


# JPEG and WebP.


@dataclass(frozen=True)
class PictureCodec:
    """How one codec is run and what of its files counts."""

    encode: Callable[[Image.Image, int], bytes]
    payload_bytes: Callable[[bytes], int]
    qualities: range


def compress(codec: str, pictures: np.ndarray, quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode and decode (B, H, W, 3) uint8 pictures one by one, at a quality as Pillow understands it.

    Returns:
        (B, H, W, 3) uint8 reconstructions; (B,) int64 bits of each picture's payload.
    """
    chosen = CODECS[codec]
    files = [chosen.encode(Image.fromarray(picture), quality) for picture in pictures]
    bits = np.array([8 * chosen.payload_bytes(file) for file in files], dtype=np.int64)
    decoded = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return np.array(decoded, dtype=np.uint8).reshape(pictures.shape), bits


def quality_for(codec: str, pictures: np.ndarray, bits: float) -> int:
    """The highest quality whose mean bits stay at or below `bits`; the lowest quality where the codec goes no lower.

    Found by halving, because mean bits rise with quality: over all qualities of 200 CIFAR-10 and 150 Tiny-ImageNet
    pictures the only fall is 0.2%, from JPEG's 84 to 85.

    Pictures are (B, H, W, 3) uint8, at least one, and none of those that will be measured; `bits` is the wanted mean.
    """
    qualities = CODECS[codec].qualities
    low, high = qualities[0], qualities[-1] + 1  # low fits or is the lowest, high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        fits = compress(codec, pictures, middle)[1].mean() <= bits
        low, high = (middle, high) if fits else (low, middle)
    return low


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """Baseline JPEG with half the colour resolution each way (4:2:0) and Huffman tables fitted to the picture."""
    return _saved(picture, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, progressive=False)


def jpeg_payload_bytes(file: bytes) -> int:
    """Entropy-coded bytes of the scan: all segments (DQT, DHT, SOF, SOS, ...) and the closing EOI are header.

    Bytes that are stuffed after 0xFF count: they are sent.

    Raises:
        ValueError: the bytes are not a JPEG file with one scan.
    """
    at = 2  # after SOI
    while file[at : at + 1] == b"\xff":
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4])
        at += 2 + length
        if marker == 0xDA and file.endswith(b"\xff\xd9"):  # start of scan, end of image
            return len(file) - 2 - at
    raise ValueError(f"the file begins {file[:4]!r} and has no whole scan; expected a JPEG")


def webp(picture: Image.Image, quality: int) -> bytes:
    """Lossy WebP (VP8) by the slowest, best search."""
    return _saved(picture, "WEBP", quality=quality, method=6, lossless=False)


def webp_payload_bytes(file: bytes) -> int:
    """Bytes of the VP8 chunk after its frame header of 10: RIFF and chunk headers and the padding byte do not count.

    Probabilities and quantiser settings inside the first partition are arithmetic-coded with the pixels and do.

    Raises:
        ValueError: the bytes are not a plain lossy WebP file.
    """
    if file[:4] != b"RIFF" or file[8:16] != b"WEBPVP8 ":
        raise ValueError(f"the file begins {file[:16]!r}; expected a lossy WebP without extensions")
    return int.from_bytes(file[16:20], "little") - VP8_FRAME_HEADER


CODECS = {
    "jpeg": PictureCodec(jpeg, jpeg_payload_bytes, range(1, 101)),  # libjpeg takes 0 for 1
    "webp": PictureCodec(webp, webp_payload_bytes, range(101)),
}


def _saved(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@dataclass(frozen=True)
class Outside:
    """What a picture codec is measured on and by."""

    source: ShardDataset  # held-out pictures, measured as `plan` says
    plan: EvaluationPlan
    instruments: Instruments
    distances: list[Distance]
    training: ShardDataset  # at least one picture: the quality is chosen on these, as k-means is fitted to them

    def measure(self, codec: str, bits: float, advance: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """The codec at the quality whose mean bits on training pictures are nearest below `bits`, or at its lowest.

        `advance` is told how many pictures were measured.

        Returns:
            `bits_per_image`, as they came out on the measured pictures; `quality`, PSNR, SSIM and every Frechet
            distance.
        """
        used = min(CHOOSING, len(self.training))
        chosen = quality_for(codec, self.training.images((np.arange(used) * len(self.training) // used).tolist()), bits)
        quality, spent = ImageQuality(), 0
        features = [FeatureStatistics(network.feature_dim) for network in self.instruments.networks]
        for first in range(0, self.plan.count, self.plan.batch_size):
            numbers = np.arange(first, min(first + self.plan.batch_size, self.plan.count))
            pictures = self.source.images(self.plan.indices(numbers).tolist())
            made, made_bits = compress(codec, pictures, chosen)
            originals, decoded = (_channels_first(batch) for batch in (pictures, made))
            quality.update(originals, decoded)
            spent += int(made_bits.sum())
            with torch.inference_mode():
                for network, statistics in zip(self.instruments.networks, features, strict=True):
                    statistics.update(network.cpu()(decoded)[0])
            advance(len(numbers))
        found = {"bits_per_image": spent / self.plan.count, "quality": float(chosen), **quality.results()}
        return found | {one.name: one.of(own) for one, own in zip(self.distances, features, strict=True)}


def _channels_first(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


# What is asked for, by its names in summary.json.


def baselines_results(
    run: Run, setup: EvaluationSetup, distances: list[Distance], cuts: dict[str, dict[str, float]]
) -> dict[str, float]:
    """The baselines that are asked for, at the bits of the operating point.

    Picture codecs are measured at the bits of every cut: `baseline_jpeg_curve00_psnr` stands beside `curve00_psnr`.
    `cuts` are the tokenizer's metrics at each cut, by its name.
    """
    wanted = run.config.evaluate.baselines
    results: dict[str, float] = {}
    training = ShardDataset(run.config.data.shards, "train")
    if "kmeans" in wanted:
        results |= _kmeans_results(run, setup, distances, training, cuts[OPERATING]["bits_fixed"])
    outside = Outside(setup.pictures, setup.plan, setup.instruments, distances, training)
    for codec in (kind for kind in wanted if kind != "kmeans"):
        with progress(codec, setup.plan.count * len(cuts), "images") as shown:
            for name, cut in cuts.items():
                prefix = f"baseline_{codec}_" + ("" if name == OPERATING else f"{name}_")
                found = outside.measure(codec, cut["bits_fixed"], shown.advance)
                results |= {f"{prefix}{metric}": value for metric, value in found.items()}
                if run.should_stop:
                    raise Stopped("evaluation was asked to stop; --resume measures anew")
    return results


def _kmeans_results(
    run: Run, setup: EvaluationSetup, distances: list[Distance], pictures: ShardDataset, bits: float
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
    found = setup.measure("kmeans baseline", baseline, originals=False, cuts=Cuts())
    return {**baseline_results(found.operating, distances), "baseline_kmeans_fit_seconds": seconds}
