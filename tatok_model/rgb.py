"""Pictures of every mode that Pillow reads as upright 8-bit RGB; the library and the shards use the same. No torch."""

import numpy as np
from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    """How the picture has to be turned to stand upright, by its EXIF data; None: not at all."""
    try:
        return TURNS.get(int(picture.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # noqa: BLE001 - broken EXIF in a good picture
        return None


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB with 8 bits: what is transparent on white, 16 bits and floats scaled; the picture itself where it is that."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode.startswith("I"):
        return Image.fromarray(_from_16_bit(np.asarray(picture))).convert("RGB")
    if picture.mode == "F":
        return Image.fromarray(_from_float(np.asarray(picture))).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def _from_16_bit(grey: np.ndarray) -> np.ndarray:
    """(H, W) integers, 0 to 65535, to uint8; Pillow's own conversion would clip at 255."""
    return ((np.clip(grey.astype(np.int64), 0, 65535) + 128) // 257).astype(np.uint8)


def _from_float(grey: np.ndarray) -> np.ndarray:
    """(H, W) floats to uint8: 0 to 1 if nothing is above 1, else 0 to 255."""
    grey = np.nan_to_num(grey.astype(np.float64))
    return np.clip(np.rint(grey * 255 if grey.max() <= 1 else grey), 0, 255).astype(np.uint8)
