"""Every mode and depth that Pillow reads becomes 8-bit RGB with the levels that the file holds."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tatok_model.rgb import load, to_rgb, without_notes
from tatok_model.tiles import as_pixels

SIDE = 4
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 17  # 0 to 255
DEEP = RAMP * 257  # 0 to 65535


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(bits: int, kind: int, row: bytes, *more: bytes) -> bytes:
    """A PNG whose rows are all alike, of any depth; `more` chunks stand before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * SIDE))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def tiff(levels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian grey TIFF of any depth."""
    data = levels.tobytes()
    tags = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIDE),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(to_rgb(load(Image.open(io.BytesIO(data))))).astype(int)


def grey(data: bytes) -> list[int]:
    """The first row, which is as red as it is green and blue."""
    pixels = rgb(data)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


CLEAR = struct.Struct(">H")


@pytest.mark.parametrize(
    ("bits", "row", "clear", "expected"),
    [
        (1, b"\x50", 1, [0, 255, 0, 255]),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (2, b"\x1b", 0, [255, 85, 170, 255]),
        (4, b"\x01\x5f", 5, [0, 17, 255, 255]),
        (4, b"\x01\x5f", 17, [0, 17, 85, 255]),  # a level that it cannot hold
        (8, b"\x00\x55\xaa\xff", 85, [0, 255, 170, 255]),
        (16, struct.pack(">4H", 0, 257, 25700, 65535), 25700, [0, 1, 255, 255]),
        (16, struct.pack(">4H", 0, 257, 25700, 65535), 100, [0, 1, 100, 255]),
        (16, struct.pack(">4H", 300, 5000, 25700, 60000), 0, [1, 19, 100, 233]),
    ],
)
def test_of_grey_of_any_depth_the_transparent_level_alone_is_white(
    bits: int, row: bytes, clear: int, expected: list[int]
) -> None:
    assert grey(png(bits, 0, row, chunk(b"tRNS", CLEAR.pack(clear)))) == expected
    opaque = grey(png(bits, 0, row))
    assert [a for a, b in zip(opaque, expected, strict=True) if b != 255] == [b for b in expected if b != 255]


def test_of_16_bit_colour_the_transparent_one_alone_is_white() -> None:
    row = struct.pack(">12H", 0, 0, 0, 0x8000, 0x4000, 7, 0xFFFF, 0, 0, 0x0100, 0, 0)
    for clear, white in (((0x8000, 0x4000, 7), 1), ((0xFFFF, 0, 0), 2), ((0x0100, 0, 0), 3)):
        expected = [[0, 0, 0], [128, 64, 0], [255, 0, 0], [1, 0, 0]]
        expected[white] = [255, 255, 255]
        assert rgb(png(16, 2, row, chunk(b"tRNS", struct.pack(">3H", *clear))))[0].tolist() == expected


def test_16_bit_grey_with_alpha_is_laid_over_white() -> None:
    row = struct.pack(">8H", 0, 65535, 25700, 65535, 25700, 0, 0, 32768)
    assert np.abs(np.array(grey(png(16, 4, row))) - [0, 100, 255, 127]).max() <= 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(DEEP.astype("<u2"), 16), RAMP),
        (tiff(DEEP.astype("<u2"), 16, photometric=0), 255 - RAMP),
        (tiff(RAMP.astype("<u1"), 8, photometric=0), 255 - RAMP),
        (tiff(DEEP.astype("<i4"), 32, sample_format=2), RAMP),
        (tiff((DEEP * 65537).astype("<u4"), 32), RAMP),
        (tiff((RAMP / 255).astype("<f4"), 32, sample_format=3), RAMP),
        (tiff((RAMP / 255).astype("<f4"), 32, photometric=0, sample_format=3), 255 - RAMP),
        (tiff((RAMP * 1.0).astype("<f4"), 32, sample_format=3), RAMP),
        (tiff((DEEP * 1.0).astype("<f4"), 32, sample_format=3), RAMP),
    ],
    ids=["u2", "u2-white-is-zero", "u1-white-is-zero", "i4", "u4", "of-1", "of-1-white-is-zero", "of-255", "of-65535"],
)
def test_grey_tiffs_keep_their_levels(data: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(rgb(data), expected[..., None].repeat(3, -1))


def test_12_bits_reach_white() -> None:
    levels = [0, 1000, 4095, 2048] * SIDE
    packed = b"".join(
        (first << 12 | second).to_bytes(3, "big") for first, second in zip(levels[::2], levels[1::2], strict=True)
    )
    assert grey(tiff(np.frombuffer(packed, np.uint8), 12)) == [0, 62, 255, 128]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.0, 0.5, 1.0, 1.04], [0, 128, 255, 255]),  # sharpened: a little above 1
        ([-3.0, 0.0, 100.0, 258.0], [0, 0, 100, 255]),
        ([0.0, 0.5, np.nan, np.inf], [0, 128, 0, 255]),
        ([0.0, 500.0, 1000.0, 250.0], [0, 128, 255, 64]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_what_they_hold(levels: list[float], expected: list[int]) -> None:
    picture = to_rgb(Image.fromarray(np.array([levels] * SIDE, np.float32)))
    assert np.asarray(picture)[0, :, 1].tolist() == expected


def _picture(mode: str) -> Image.Image:
    """(200, 100, 50), or grey of 200, as this mode holds it; half of the opacity where it has one."""
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        colour = Image.new("RGBA", (SIDE, SIDE), (200, 100, 50, 128) if "R" in mode or "P" in mode else (200,) * 3)
        colour.putalpha(128)
        return colour.convert("LA").convert("La") if mode == "La" else colour.convert(mode)
    if mode in ("L", "1"):
        return Image.new(mode, (SIDE, SIDE), 200)
    if mode == "F" or mode.startswith("I"):
        return Image.new(mode, (SIDE, SIDE), 200 if mode == "F" else 200 * 257)
    colour = Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
    if mode != "LAB":
        return colour.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else colour.convert(mode)
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (("RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P", "LAB"), [200, 100, 50]),
        (("L", "F", "I", "I;16", "I;16L", "I;16B"), [200, 200, 200]),
        (("RGBA", "RGBa", "PA"), [227, 177, 152]),
        (("LA", "La"), [227, 227, 227]),
        (("1",), [255, 255, 255]),
    ],
)
def test_every_mode_keeps_its_colour(modes: tuple[str, ...], expected: list[int]) -> None:
    for mode in modes:
        made = to_rgb(_picture(mode))
        assert (made.mode, made.size) == ("RGB", (SIDE, SIDE)), mode
        assert np.abs(np.asarray(made).astype(int) - expected).max() <= 2, mode


LONG = 2 * 2**20  # more than Pillow takes of a compressed text
NOTES: dict[str, Callable[[], bytes]] = {
    "profile": lambda: chunk(b"iCCP", b"wide\0\0" + zlib.compress(bytes(LONG))),
    "zTXt": lambda: chunk(b"zTXt", b"notes\0\0" + zlib.compress(b"x" * LONG)),
    "iTXt": lambda: chunk(b"iTXt", b"notes\0\1\0\0\0" + zlib.compress(b"x" * LONG)),
    "tEXt": lambda: chunk(b"tEXt", b"notes\0" + b"x" * (70 * 2**20)),
    "broken": lambda: chunk(b"tEXt", b"notes\0x")[:-1] + b"?",
    "unknown": lambda: chunk(b"zTXt", b"notes\0\7x"),
}


@pytest.mark.parametrize("name", NOTES)
def test_without_its_long_notes_a_png_keeps_its_pixels_and_its_other_chunks(name: str, tmp_path: Path) -> None:
    kept = chunk(b"tRNS", CLEAR.pack(85)), chunk(b"gAMA", struct.pack(">I", 45455))
    bare = png(8, 0, b"\x00\x55\xaa\xff", *kept)
    noted = png(8, 0, b"\x00\x55\xaa\xff", NOTES[name](), *kept)
    assert without_notes(noted) == bare
    (tmp_path / "noted.png").write_bytes(noted)
    assert (as_pixels(tmp_path / "noted.png")[:, 0] * 255).round().tolist() == [[0, 255, 170, 255]] * 3
    assert without_notes(bare) == bare
    assert grey(bare) == [0, 255, 170, 255]
    assert without_notes(bare[:50]) == bare[:50]
    assert without_notes(b"\xff\xd8 no PNG") == b"\xff\xd8 no PNG"
