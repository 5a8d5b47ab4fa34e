"""Pictures of every mode that Pillow reads as upright 8-bit RGB; the library and the shards use the same. No torch."""

from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG: colour profile and texts
NOTE_ERRORS = (SyntaxError, UnidentifiedImageError, ValueError)  # what Pillow raises at long or broken ones
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
RAW_LEVELS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies the levels of a PNG, but not the transparent one


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    """How the picture has to be turned to stand upright, by its EXIF data; None: not at all."""
    try:
        return TURNS.get(int(picture.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # noqa: BLE001 - broken EXIF in a good picture
        return None


def without_notes(data: bytes) -> bytes:
    """A PNG without colour profile and texts, at which Pillow gives up with `NOTE_ERRORS`; other bytes as they are."""
    if not data.startswith(PNG):
        return data
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in NOTES:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def load(picture: Image.Image) -> Image.Image:
    """Decode completely, and put right what Pillow hands on as it is in the file.

    Returns:
        The picture itself, or grey levels of 8 bits in the place of deeper ones of a TIFF.
    """
    tiles: Any = getattr(picture, "tile", None)
    raw = tiles[0].args if tiles else ""
    picture.load()
    clear = picture.info.get("transparency")
    if isinstance(raw, str) and raw in RAW_LEVELS and isinstance(clear, int):
        picture.info["transparency"] = clear * RAW_LEVELS[raw]
    elif raw == "RGB;16B" and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(level >> 8 for level in clear)
    tags: Any = getattr(picture, "tag_v2", None)
    if tags is None or not _is_deep(picture):
        return picture
    levels = np.asarray(picture)
    if picture.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        levels = levels.view(np.uint32)
    grey = _to_8_bit(levels, top=4095 if tags.get(BITS) == (12,) else None)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)  # 0: white is zero


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB with 8 bits: what is transparent on white, 16 bits and floats scaled; the picture itself where it is that."""
    if _is_deep(picture):
        levels = np.asarray(picture)
        grey = _to_8_bit(levels)
        clear = picture.info.get("transparency")
        if isinstance(clear, int):
            grey[levels == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.has_transparency_data:
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def _is_deep(picture: Image.Image) -> bool:
    """Grey of more than 8 bits, which Pillow's own conversion would clip at 255."""
    return picture.mode == "F" or picture.mode.startswith("I")


def _to_8_bit(levels: np.ndarray, top: float | None = None) -> np.ndarray:
    """(H, W) numbers to uint8; what is not a number and what is negative becomes 0.

    `top` becomes 255. Without it: integers have 16 bits, floats go to 1 or to 255, give or take what sharpening adds,
    and what is larger goes to its own maximum.
    """
    if levels.dtype.kind == "f":
        levels = np.nan_to_num(levels.astype(np.float64), posinf=np.inf)
        usual: tuple[tuple[int, int], ...] = ((1, 2), (255, 510))  # scale, and the most that is taken for it
    else:
        levels = levels.astype(np.int64)
        usual = ((65535, 65535),)
    most = levels[np.isfinite(levels)].max(initial=0)
    top = top or next((scale for scale, limit in usual if most <= limit), most)
    return np.clip(np.rint(levels * (255 / top)), 0, 255).astype(np.uint8)
