"""k-means on patches, JPEG and WebP; what they cost is known before anything is measured."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.baselines import (
    CODECS,
    Outside,
    PatchVQ,
    compress,
    fit_kmeans,
    jpeg,
    jpeg_payload_bytes,
    quality_for,
    sample_patches,
    webp,
    webp_payload_bytes,
)
from pipeline.evaluation.evaluation_checks import check_baselines, codewords_for, fixed_bits
from pipeline.evaluation.evaluator import Evaluator, Instruments, merged
from pipeline.evaluation.measurements import Cuts, EvaluationPlan
from pipeline.evaluation.reference import Distance, Extractor, Reference
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.images import to_uint8
from tatok_model.tokenizer import TaTok

CONFIG = TokenizerConfig(16, 4, global_tokens=2, codebook_size=16)
PLAN = EvaluationPlan(count=30, total=30, batch_size=8, range_size=32, grid=0)
Configure = Callable[..., Config]


class FewPatches:
    """Pictures of 4x4 patches that are each one of `count` made ones."""

    def __init__(self, count: int) -> None:
        self.patches = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)

    def images(self, indices: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(indices), 16, 16, 3), np.uint8)
        for place, index in enumerate(indices):
            draw = np.random.default_rng(int(index)).integers(0, len(self.patches), (4, 4))
            pictures[place] = self.patches[draw].transpose(0, 2, 1, 3, 4).reshape(16, 16, 3)
        return pictures


def test_the_codebook_is_as_large_as_the_bits_allow() -> None:
    assert codewords_for(72 * math.log2(1000), 64) == 2371
    assert 64 * math.log2(2371) <= 72 * math.log2(1000) < 64 * math.log2(2372)
    assert [codewords_for(64 * math.log2(k), 64) for k in (3, 1000, 2187)] == [3, 1000, 2187]


def test_patches_that_repeat_are_found_exactly(instruments: Instruments) -> None:
    source = FewPatches(3)
    baseline = fit_kmeans(source, 20, CONFIG, bits=16 * 5)  # 32 codewords for 3 patches
    plan = EvaluationPlan(count=8, total=8, batch_size=4, range_size=8, grid=0)
    found = merged(Evaluator(baseline, instruments, plan, originals=False).measure_all(source), 8).operating
    assert found.quality.results()["psnr"] > 60
    assert found.lengths.bits_fixed.sum() == 8 * 16 * 5


def test_each_patch_gets_its_nearest_codeword() -> None:
    codewords = torch.tensor([0.0, 0.5, 1.0])[:, None].expand(3, 48).contiguous()
    baseline = PatchVQ(replace(CONFIG, global_tokens=0, codebook_size=3), codewords)
    images = torch.full((1, 3, 16, 16), 20, dtype=torch.uint8)
    images[:, :, :4, 4:8] = 120
    images[:, :, 12:, 12:] = 250
    tokens = baseline.encode(images)
    assert tokens.patch_indices[0].tolist() == [0, 1] + [0] * 13 + [2]
    assert tokens.counts().tolist() == [16]
    assert to_uint8(baseline.decode(tokens))[0, 0, 0, :8].tolist() == [0] * 4 + [128] * 4


def test_patches_are_drawn_alike_every_time_and_none_twice() -> None:
    source = FewPatches(1000)
    drawn = sample_patches(source, images=300, used=280, each=16, patch_size=4)
    assert drawn.shape == (280 * 16, 48)
    assert np.array_equal(drawn, sample_patches(source, 300, 280, 16, 4))
    first = {patch.tobytes() for patch in (drawn[:16] * 255).round().astype(np.uint8)}
    picture = source.images(np.array([0]))[0].reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 48)
    assert first == {patch.tobytes() for patch in picture}, "all 16 patches of a picture are those of the picture"


@pytest.mark.parametrize(("images", "bits"), [(20, 16 * 0.5), (2, 16 * 6.0), (0, 80.0)])
def test_codebooks_that_cannot_be_fitted_are_refused(images: int, bits: float) -> None:
    with pytest.raises(BadInput, match=r"needs \d+ codewords for .* expected 2 to \d+"):
        fit_kmeans(FewPatches(3), images, CONFIG, bits)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["filter.threshold=0"],
        ["filter.rule=marginal", "filter.threshold=0"],
        ["filter.rule=count", "filter.threshold=16"],
        ["filter.rule=count", "filter.threshold=5"],
        ["filter.rule=count", "filter.threshold=5", "filter.score=grid"],
        ["filter.rule=count", "filter.threshold=5", "filter.score=entropy", "filter.replay=true"],
    ],
)
def test_bits_of_cuts_of_fixed_length_are_those_of_the_tokens(
    tokenizer: TaTok, configure: Configure, overrides: list[str]
) -> None:
    config = configure(*overrides)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    cuts = Cuts(config.filter)
    tokens = cuts.operating(cuts.rank(tokenizer, tokenizer.encode(images), images))
    assert tokens.bits(4).tolist() == pytest.approx([fixed_bits(config)] * 3)


def test_bits_that_vary_are_not_known(configure: Configure) -> None:
    assert fixed_bits(configure("filter.rule=residual", "filter.threshold=20")) is None
    check_baselines(configure("filter.threshold=0.5", "evaluate.baselines=[kmeans]"), 1)


def test_global_tokens_alone_have_as_many_bits_as_are_kept(configure: Configure) -> None:
    assert fixed_bits(configure("tokenizer.patch_tokens=false")) == 8
    assert fixed_bits(configure("tokenizer.patch_tokens=false", "filter.rule=count", "filter.threshold=1")) == 4


@pytest.mark.parametrize(
    ("overrides", "images", "message"),
    [
        (["evaluate.baselines=[jpeg,kmeans]"], 0, "evaluate.baselines has jpeg, kmeans, chosen or fitted on training"),
        (["evaluate.baselines=[kmeans]"], 1, "needs 22 codewords for 72.0 bits an image; expected 2 to 16"),
        (["evaluate.baselines=[kmeans]", "filter.threshold=0"], 20, "needs 1 codewords for 8.0 bits an image"),
    ],
)
def test_baselines_that_cannot_be_made_are_refused(
    configure: Configure, overrides: list[str], images: int, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        check_baselines(configure(*overrides), images)


CODEC = pytest.mark.parametrize("codec", CODECS)


def made_pictures(count: int, side: int = 32) -> np.ndarray:
    """Smooth colours with some noise: (count, side, side, 3) uint8."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    large = [Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC) for picture in coarse]
    noise = draw.normal(0, 6, (count, side, side, 3))
    return (np.stack(large) + noise).round().clip(0, 255).astype(np.uint8)


PICTURES = made_pictures(6)


def mean_bits(codec: str, quality: int) -> float:
    return float(compress(codec, PICTURES, quality)[1].mean())


@CODEC
def test_reconstructions_are_what_pillow_decodes(codec: str) -> None:
    made, _ = compress(codec, PICTURES, 60)
    assert (made.shape, made.dtype) == (PICTURES.shape, np.uint8)
    file = io.BytesIO(CODECS[codec].encode(Image.fromarray(PICTURES[2]), 60))
    assert (made[2] == np.asarray(Image.open(file).convert("RGB"))).all()


@CODEC
def test_better_quality_costs_more_bits_and_errs_less(codec: str) -> None:
    found = [compress(codec, PICTURES, quality) for quality in (10, 40, 90)]
    costs = [bits.mean() for _, bits in found]
    errors = [np.square(made.astype(float) - PICTURES).mean() for made, _ in found]
    assert costs[0] < costs[1] < costs[2]
    assert errors[0] > errors[1] > errors[2]


def test_a_jpeg_header_does_not_count_whatever_is_in_it() -> None:
    picture = Image.fromarray(PICTURES[0])
    file = jpeg(picture, 20)
    with_comment = file[:2] + b"\xff\xfe\x00\x08\xff\xda\xff\xd9xx" + file[2:]  # a comment that looks like a scan
    payload = jpeg_payload_bytes(file)
    assert 0 < payload < len(file) - 200
    assert jpeg_payload_bytes(with_comment) == payload
    assert (
        file[-2 - payload - 3 : -2 - payload] == b"\x00\x3f\x00"
    )  # the end of the scan's header: a whole baseline scan


def test_a_jpeg_halves_colour_resolution() -> None:
    with Image.open(io.BytesIO(jpeg(Image.fromarray(PICTURES[0]), 50))) as file:
        assert [layer[1:3] for layer in file.layer] == [(2, 2), (1, 1), (1, 1)]


def test_a_webp_header_does_not_count() -> None:
    file = webp(Image.fromarray(PICTURES[0]), 20)
    payload = webp_payload_bytes(file)
    assert len(file) - 30 - payload in (0, 1)  # the padding byte
    assert file[23:26] == b"\x9d\x01\x2a"  # the start code inside the frame header


def test_a_flat_picture_costs_next_to_nothing() -> None:
    flat = np.full((1, 32, 32, 3), 120, dtype=np.uint8)
    assert compress("jpeg", flat, 5)[1][0] <= 8 * 8
    assert compress("webp", flat, 5)[1][0] <= 8 * 40


@CODEC
def test_the_quality_for_some_bits_is_the_last_that_fits(codec: str) -> None:
    bits = (mean_bits(codec, 30) + mean_bits(codec, 50)) / 2
    quality = quality_for(codec, PICTURES, bits)
    assert mean_bits(codec, quality) <= bits < mean_bits(codec, quality + 1)
    assert quality_for(codec, PICTURES, mean_bits(codec, 25)) >= 25


@CODEC
def test_a_codec_that_goes_no_lower_stays_at_its_lowest_quality(codec: str) -> None:
    assert quality_for(codec, PICTURES, 1) == CODECS[codec].qualities[0]
    assert quality_for(codec, PICTURES, 1e9) == 100


def test_bytes_of_another_format_are_refused() -> None:
    one = Image.fromarray(PICTURES[0])
    with pytest.raises(ValueError, match="expected a JPEG"):
        jpeg_payload_bytes(webp(one, 50))
    with pytest.raises(ValueError, match="expected a JPEG"):
        jpeg_payload_bytes(jpeg(one, 50)[:-20])
    with pytest.raises(ValueError, match="expected a lossy WebP"):
        webp_payload_bytes(jpeg(one, 50))


@pytest.fixture(scope="module")
def outside(
    tokenizer: TaTok, instruments: Instruments, extractor: Extractor, heldout: ShardDataset, shards: Path
) -> Outside:
    found = merged(Evaluator(tokenizer, instruments, PLAN, originals=True).measure_all(heldout), 30)
    reference = Reference.of(found.originals.features[0], None, {"images": 30})
    return Outside(heldout, PLAN, instruments, [Distance(extractor, reference)], ShardDataset(shards, "train"))


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_more_bits_make_better_pictures_and_are_not_overspent(outside: Outside, codec: str) -> None:
    told: list[int] = []
    few, many = (outside.measure(codec, bits, told.append) for bits in (300, 1200))
    assert few["bits_per_image"] <= 1.1 * 300  # the quality is of other pictures
    assert few["bits_per_image"] < many["bits_per_image"] <= 1.1 * 1200
    assert few["psnr"] < many["psnr"]
    assert few["rfd_compact_cifar10"] > many["rfd_compact_cifar10"]
    assert told == [8, 8, 8, 6] * 2


def test_the_lowest_quality_stands_where_a_codec_goes_no_lower(outside: Outside, heldout: ShardDataset) -> None:
    found = outside.measure("jpeg", 1)
    assert found["quality"] == 1
    assert found["bits_per_image"] == compress("jpeg", heldout.images(np.arange(30).tolist()), 1)[1].mean() > 1


def test_the_quality_is_chosen_on_training_pictures_only(outside: Outside, shards: Path) -> None:
    """None of the measured pictures is looked at before it is measured."""
    pictures = ShardDataset(shards, "train").images(range(20))
    assert outside.measure("jpeg", 600)["quality"] == quality_for("jpeg", pictures, 600)
