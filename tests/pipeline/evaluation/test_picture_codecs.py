import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.evaluation.picture_codecs import (
    CODECS,
    compress,
    jpeg,
    jpeg_payload_bytes,
    picture_codec,
    quality_for,
    webp,
    webp_payload_bytes,
)

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
    return float(compress(codec, PICTURES, quality).bits.mean())


@CODEC
def test_reconstructions_are_what_pillow_decodes(codec):
    found = compress(codec, PICTURES, 60)
    assert found.reconstructions.shape == PICTURES.shape
    assert found.reconstructions.dtype == np.uint8
    file = io.BytesIO(CODECS[codec].encode(Image.fromarray(PICTURES[2]), 60))
    assert (found.reconstructions[2] == np.asarray(Image.open(file).convert("RGB"))).all()


@CODEC
def test_better_quality_costs_more_bits_and_errs_less(codec):
    found = [compress(codec, PICTURES, quality) for quality in (10, 40, 90)]
    bits = [batch.bits.mean() for batch in found]
    errors = [np.square(batch.reconstructions.astype(float) - PICTURES).mean() for batch in found]
    assert bits[0] < bits[1] < bits[2]
    assert errors[0] > errors[1] > errors[2]


def test_a_jpeg_header_does_not_count_whatever_is_in_it():
    picture = Image.fromarray(PICTURES[0])
    file = jpeg(picture, 20)
    with_comment = file[:2] + b"\xff\xfe\x00\x08\xff\xda\xff\xd9xx" + file[2:]  # a comment that looks like a scan
    payload = jpeg_payload_bytes(file)
    assert 0 < payload < len(file) - 200
    assert jpeg_payload_bytes(with_comment) == payload
    assert (
        file[-2 - payload - 3 : -2 - payload] == b"\x00\x3f\x00"
    )  # the end of the scan's header: a whole baseline scan


def test_a_jpeg_halves_colour_resolution():
    with Image.open(io.BytesIO(jpeg(Image.fromarray(PICTURES[0]), 50))) as file:
        assert [layer[1:3] for layer in file.layer] == [(2, 2), (1, 1), (1, 1)]


def test_a_webp_header_does_not_count():
    file = webp(Image.fromarray(PICTURES[0]), 20)
    payload = webp_payload_bytes(file)
    assert len(file) - 30 - payload in (0, 1)  # the padding byte
    assert file[23:26] == b"\x9d\x01\x2a"  # the start code inside the frame header


def test_a_flat_picture_costs_next_to_nothing():
    flat = np.full((1, 32, 32, 3), 120, dtype=np.uint8)
    assert compress("jpeg", flat, 5).bits[0] <= 8 * 8
    assert compress("webp", flat, 5).bits[0] <= 8 * 40


@CODEC
def test_the_quality_for_some_bits_is_the_last_that_fits(codec):
    bits = (mean_bits(codec, 30) + mean_bits(codec, 50)) / 2
    quality = quality_for(codec, PICTURES, bits)
    assert mean_bits(codec, quality) <= bits < mean_bits(codec, quality + 1)


@CODEC
def test_exactly_the_bits_of_a_quality_give_no_lower_one(codec):
    assert quality_for(codec, PICTURES, mean_bits(codec, 25)) >= 25


@CODEC
def test_a_codec_that_goes_no_lower_stays_at_its_lowest_quality(codec):
    assert quality_for(codec, PICTURES, 1) == CODECS[codec].qualities[0]
    assert quality_for(codec, PICTURES, 1e9) == 100


def test_an_empty_batch_gives_an_empty_batch():
    found = compress("jpeg", PICTURES[:0], 50)
    assert found.reconstructions.shape == (0, 32, 32, 3)
    assert found.bits.shape == (0,)


def test_an_unknown_codec_is_refused():
    with pytest.raises(BadInput, match="codec is 'png'; expected one of jpeg, webp"):
        picture_codec("png")


@pytest.mark.parametrize(("codec", "quality"), [("jpeg", 0), ("webp", -1), ("webp", 101)])
def test_a_quality_outside_the_codecs_range_is_refused(codec, quality):
    with pytest.raises(BadInput, match=f"quality is {quality}; expected [01] to 100 for {codec}"):
        compress(codec, PICTURES, quality)


@pytest.mark.parametrize("pictures", [PICTURES[0], PICTURES[..., :1], PICTURES.astype(np.float32)])
def test_anything_but_a_batch_of_pictures_is_refused(pictures):
    with pytest.raises(BadInput, match=r"expected uint8 \(B, H, W, 3\)"):
        compress("jpeg", pictures, 50)


def test_a_quality_cannot_be_chosen_without_pictures():
    with pytest.raises(BadInput, match="expected at least 1"):
        quality_for("jpeg", PICTURES[:0], 100)


def test_bytes_of_another_format_are_refused():
    one = Image.fromarray(PICTURES[0])
    with pytest.raises(ValueError, match="expected a JPEG"):
        jpeg_payload_bytes(webp(one, 50))
    with pytest.raises(ValueError, match="expected a JPEG"):
        jpeg_payload_bytes(jpeg(one, 50)[:-20])
    with pytest.raises(ValueError, match="expected a lossy WebP"):
        webp_payload_bytes(jpeg(one, 50))
