"""Bytes of a picture to a square RGB picture, or the reason why not.

What happens, in order: the header is read and the pixel count checked before anything is decoded; the picture is
decoded whole (a truncated file is refused, not padded); turned as its EXIF orientation says; brought to 8-bit RGB, with
transparency over white; its short side resized to `image_size` (bicubic, antialiased) and its centre cropped. Colour
profiles are ignored and only the first frame of an animation is used. A picture that needs none of this keeps its
bytes, but for texts and profiles at which Pillow gives up.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.core.config import DataConfig
from tatok_model.rgb import NOTE_ERRORS, load, to_rgb, turn_of, without_notes

PNG_LEVEL = 2  # as small as the default 6 with photographs (117 against 117 KB at 256 pixels) in 40% of the time
KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # what every reader of the shards understands
NEEDS_A_PROGRAM = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow names these, other programs decode them
PNG_END = b"IEND\xaeB`\x82"


class BadPicture(Exception):
    """The bytes are not a picture that can be used; the message is short and the same on every machine."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which they are tried: frequent ones first."""
    Image.init()
    return (*KEPT_FORMATS, *(name for name in Image.ID if name not in (*KEPT_FORMATS, *NEEDS_A_PROGRAM)))


@cache
def extensions() -> frozenset[str]:
    """File name endings that mean a picture, lower case with the dot."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats())


def decode(data: bytes) -> np.ndarray:
    """Pixels of a picture from a shard: (H, W, 3) uint8 RGB."""
    with Image.open(io.BytesIO(data), formats=KEPT_FORMATS) as picture:
        return np.asarray(picture.convert("RGB"))


def prepare(data: bytes, config: DataConfig) -> bytes:
    """The square RGB picture that goes into a shard, encoded.

    Args:
        data: a file of any format in `formats()`.
        config: uses image_size, max_pixels, encoding and quality.

    Returns:
        `data` itself where nothing had to change and the format is JPEG, PNG or WebP, but for texts and a profile that
        are too long for Pillow; else newly encoded bytes.

    Raises:
        BadPicture: empty, unknown, truncated, broken or larger than max_pixels.
    """
    if not data:
        raise BadPicture("empty file")
    try:
        with without_global_limits():
            return _prepare(data, config)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture("not a picture in a known format") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever broken bytes lead them to
        raise BadPicture(_explain(error)) from None


def encode(picture: Image.Image, encoding: str, quality: int) -> bytes:
    """Encode without metadata: png, or jpeg (full colour resolution) or webp at `quality`."""
    picture.info.clear()
    options: dict[str, dict[str, int]] = {
        "png": {"compress_level": PNG_LEVEL},
        "jpeg": {"quality": quality, "subsampling": 0},
        "webp": {"quality": quality},
    }
    file = io.BytesIO()
    picture.save(file, encoding, **options[encoding])
    return file.getvalue()


def _prepare(data: bytes, config: DataConfig) -> bytes:
    try:
        picture = _open(data, config.max_pixels)
    except NOTE_ERRORS:
        bare = without_notes(data)
        if bare == data:
            raise
        data, picture = bare, _open(bare, config.max_pixels)
    size = config.image_size
    turn = turn_of(picture)
    if turn is None and picture.size == (size, size) and _is_plain(picture, data):
        return data
    if turn is not None:
        picture = picture.transpose(turn)
    return encode(square(to_rgb(picture), size), config.encoding, config.quality)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Decode completely, once the header says that it is not too much."""
    picture = Image.open(io.BytesIO(data), formats=formats())
    if picture.width * picture.height > max_pixels:
        raise BadPicture(f"{picture.width}x{picture.height} pixels, more than data.max_pixels {max_pixels}")
    loaded = load(picture)
    if picture.format == "PNG" and PNG_END not in data:
        raise BadPicture("image file is truncated (no end of PNG)")  # Pillow overlooks a few missing bytes
    return loaded


@contextmanager
def without_global_limits() -> Iterator[None]:
    """Lift Pillow's process-wide pixel limit, as `data.max_pixels` is ours, and its warnings about odd metadata.

    `prepare` does it for itself; threads that call it need it around all of them, or the last to leave would put back
    what another one had set.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _explain(error: Exception) -> str:
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return (text or type(error).__name__)[:200]


def _is_plain(picture: Image.Image, data: bytes) -> bool:
    """True if any reader sees the same 8-bit RGB pixels in the original bytes."""
    return (
        picture.format in KEPT_FORMATS
        and picture.mode == "RGB"
        and not picture.has_transparency_data
        and getattr(picture, "n_frames", 1) == 1
        and not (picture.format == "PNG" and data[24] != 8)  # bits per channel in the PNG header
    )


def square(picture: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, then the centre, in one step that never makes the whole resized picture.

    The same pixels as torchvision's Resize (antialias) and CenterCrop: the long side is rounded down.
    """
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    short = min(width, height)
    scale_x, scale_y = width / (size * width // short), height / (size * height // short)  # source per resized pixel
    left = round((size * width // short - size) / 2) * scale_x
    top = round((size * height // short - size) / 2) * scale_y
    right, bottom = min(left + size * scale_x, width), min(top + size * scale_y, height)  # float error
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
