"""Pictures of every kind become square RGB, or a short reason why not."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.core.config import DataConfig
from pipeline.data.pictures import BadPicture, decode, extensions, formats, prepare

SIZE = 16
CONFIG = DataConfig(image_size=SIZE)


def saved(picture: Image.Image, encoding: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, encoding, **options)
    return file.getvalue()


def gradient(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Smooth, so that lossy formats stay close; red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), np.full_like(x, 100)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def prepared(data: bytes, **changes: Any) -> np.ndarray:
    image = decode(prepare(data, DataConfig(**{"image_size": SIZE, **changes})))
    assert image.dtype == np.uint8
    return image.astype(int)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
def test_a_square_rgb_picture_keeps_its_bytes(encoding: str) -> None:
    data = saved(gradient(), encoding)
    assert prepare(data, CONFIG) is data


@pytest.mark.parametrize(
    "encoding", ["BMP", "DDS", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP", "AVIF"]
)
def test_other_formats_are_encoded_anew(encoding: str) -> None:
    data = saved(gradient(32, 32), encoding, **({"sizes": [(32, 32)]} if encoding == "ICO" else {}))
    image = prepared(data)
    assert image.shape == (SIZE, SIZE, 3)
    expected = np.asarray(gradient(32, 32).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(image - expected).mean() < (12 if encoding == "GIF" else 5)  # GIF has 256 colours


@pytest.mark.parametrize(("encoding", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_resized_pictures_are_stored_as_configured_and_always_alike(encoding: str, magic: bytes) -> None:
    data = saved(gradient(40, 30), icc_profile=b"profile", exif=Image.Exif())
    config = DataConfig(image_size=SIZE, encoding=encoding, quality=90)
    assert prepare(data, config).startswith(magic)
    assert prepare(data, config) == prepare(data, config)
    assert b"profile" not in prepare(data, config)


def test_quality_decides_the_size_of_a_jpeg() -> None:
    data = saved(Image.effect_noise((40, 40), 80))
    small, large = (prepare(data, DataConfig(image_size=32, encoding="jpeg", quality=q)) for q in (20, 95))
    assert len(small) < len(large)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
def test_short_side_is_resized_and_the_centre_cropped(width: int, height: int, size: int) -> None:
    picture = gradient(width, height)
    short = min(width, height)
    whole = picture.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(prepared(saved(picture), image_size=size) - expected).max() <= 1


def test_resizing_is_antialiased() -> None:
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(prepared(saved(Image.fromarray(checkers))) - 127).max() <= 2


def test_an_extreme_shape_is_not_blown_up_on_the_way() -> None:
    image = prepared(saved(Image.new("RGB", (200_000, 1), "red")), image_size=64)  # whole: 12.8 million x 64
    assert (image == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(gradient(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(prepared(data), expected)
    assert (prepare(data, CONFIG) is data) == (orientation == 1)


def test_a_turned_tiff_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = prepared(saved(gradient(), "TIFF", exif=exif))
    assert np.array_equal(image, np.asarray(gradient().transpose(Image.Transpose.ROTATE_270)))


def test_broken_exif_does_not_reject_a_good_picture() -> None:
    data = saved(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(data, CONFIG) is data


GREY = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE))


@pytest.mark.parametrize(
    ("picture", "encoding"),
    [
        (GREY, "PNG"),
        (GREY, "JPEG"),
        (Image.fromarray((np.arange(256).reshape(SIZE, SIZE) * 257).astype(np.uint16)), "PNG"),
        (Image.fromarray((np.arange(256).reshape(SIZE, SIZE) * 257).astype(np.uint16)), "TIFF"),
        (Image.fromarray((np.arange(256).reshape(SIZE, SIZE) * 257).astype(np.int32)), "TIFF"),
        (Image.fromarray(np.arange(256, dtype=np.float32).reshape(SIZE, SIZE) / 255), "TIFF"),
        (Image.fromarray(np.arange(256, dtype=np.float32).reshape(SIZE, SIZE)), "TIFF"),
        (GREY.convert("P"), "PNG"),
        (Image.merge("LA", (GREY, Image.new("L", (SIZE, SIZE), 255))), "PNG"),
    ],
    ids=["L", "L-jpeg", "16-bit-png", "16-bit-tiff", "32-bit", "float-of-one", "float-of-255", "P", "LA"],
)
def test_grey_of_any_depth_keeps_its_levels(picture: Image.Image, encoding: str) -> None:
    options = {"quality": 100} if encoding == "JPEG" else {}
    image = prepared(saved(picture, encoding, **options))
    assert image.shape == (SIZE, SIZE, 3)
    assert np.abs(image - np.asarray(GREY)[..., None].astype(int)).max() <= (2 if encoding == "JPEG" else 0)


def test_black_and_white_becomes_rgb() -> None:
    picture = Image.fromarray(np.eye(SIZE, dtype=bool))
    assert np.array_equal(prepared(saved(picture)), np.eye(SIZE, dtype=int)[..., None].repeat(3, -1) * 255)


def test_a_coloured_palette_becomes_rgb() -> None:
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert (prepared(saved(picture)) == [10, 200, 30]).all()


@pytest.mark.parametrize("encoding", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(encoding: str) -> None:
    picture = Image.new("RGBA", (SIZE, SIZE), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, SIZE))
    picture.paste((0, 0, 0, 128), (8, 0, 12, SIZE))
    image = prepared(saved(picture, encoding, **({"lossless": True} if encoding == "WEBP" else {})))
    assert (image[:, :8] == 255).all()
    assert np.abs(image[:, 8:12] - 127).max() <= 1
    assert (image[:, 12:] == [200, 0, 0]).all()


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_a_transparent_colour_is_laid_over_white(mode: str) -> None:
    picture = Image.new(mode, (SIZE, SIZE), 0)
    data = saved(picture, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (prepared(data) == 255).all()


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    picture = Image.new(mode, (SIZE, SIZE), (128, 128, 128))
    assert np.ptp(prepared(saved(picture, "TIFF"))) <= 3  # grey


@pytest.mark.parametrize("encoding", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(encoding: str) -> None:
    picture = Image.new("RGB", (SIZE, SIZE), (250, 120, 10)).convert("CMYK")
    assert np.abs(prepared(saved(picture, encoding)) - [250, 120, 10]).max() <= 6


def _png_16_bit() -> bytes:
    """A square RGB PNG with 16 bits per channel, which Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = b"\x00" + struct.pack(">HHH", 0x8000, 0x4000, 0xFFFF) * SIZE
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * SIZE)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [SIZE, 40])
def test_long_notes_do_not_cost_a_good_png(size: int) -> None:
    """Pillow gives up at texts and profiles that grow beyond a megabyte, before the pixels or after them."""
    plain = saved(gradient(size, size))
    chunk = b"iTXt" + b"notes\x00\x01\x00\x00\x00" + zlib.compress(b"x" * 2 * 2**20)
    notes = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for place in (33, len(plain) - 12):  # after the header, before the end
        for there in (notes, notes[:-1] + b"?"):  # and with a wrong checksum
            assert prepare(plain[:place] + there + plain[place:], CONFIG) == prepare(plain, CONFIG)


def test_16_bit_colour_becomes_8_bit() -> None:
    stored = prepare(_png_16_bit(), CONFIG)
    assert stored != _png_16_bit()
    assert np.abs(decode(stored).astype(int) - [0x80, 0x40, 0xFF]).max() <= 1


def test_of_an_animation_the_first_frame_is_used() -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    for encoding in ("GIF", "PNG", "WEBP"):
        data = saved(frames[0], encoding, save_all=True, append_images=frames[1:])
        assert prepare(data, CONFIG) != data
        assert np.abs(prepared(data) - [255, 0, 0]).max() <= 6  # WebP is lossy


def bomb(side: int) -> bytes:
    """A small PNG of many equal pixels."""
    return saved(Image.new("1", (side, side)))


def test_a_zip_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(20_000)
    assert len(data) < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadPicture, match=r"^20000x20000 pixels, more than data.max_pixels 64000000$"):
        prepare(data, CONFIG)


def test_the_limit_is_ours_and_not_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert prepared(bomb(64), max_pixels=64 * 64).shape == (SIZE, SIZE, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(BadPicture, match="64x64 pixels, more than data.max_pixels 4095"):
        prepare(bomb(64), DataConfig(image_size=SIZE, max_pixels=4095))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("missing", [1, 5, 12, 60, 0.5, 0.9])
def test_a_truncated_file_is_refused(encoding: str, missing: float) -> None:
    data = saved(NOISE, encoding)
    cut = len(data) - int(missing if missing >= 1 else missing * len(data))
    with pytest.raises(BadPicture):
        prepare(data[:cut], CONFIG)


def _broken_png() -> bytes:
    data = bytearray(saved(NOISE))
    data[60] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "^empty file$"),
        (lambda: b"this is a text and no picture", "^not a picture in a known format$"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "^not a picture in a known format$"),
        (lambda: b"\xff\xd8\xff\xe0" + bytes(30), "."),
        (lambda: saved(NOISE)[:-5], "truncated"),
        (_broken_png, "."),
    ],
    ids=["empty", "text", "eps", "jpeg-header", "png-end", "png-bit"],
)
def test_what_is_no_picture_gets_a_short_reason_that_is_always_the_same(make: Callable[[], bytes], reason: str) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadPicture, match=reason) as caught:
            prepare(make(), CONFIG)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


@given(st.data())
def test_damage_anywhere_either_gives_a_picture_or_a_reason(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    damaged = bytearray(saved(NOISE, encoding))
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadPicture):
        assert prepared(bytes(damaged)).shape == (SIZE, SIZE, 3)


def test_formats_that_need_other_programs_are_not_looked_for() -> None:
    assert {"JPEG", "PNG", "TIFF", "WEBP"} <= set(formats())
    assert "EPS" not in formats()
    assert {".jpg", ".jpeg", ".png", ".tif", ".webp"} <= extensions()
    assert not {".eps", ".h5", ".txt"} & extensions()
