"""Outside rows: what JPEG and WebP make of the same pictures, headers not counted.

A 32-pixel JPEG is mostly header, which would make any comparison of bits a joke: only what codes the pixels counts.
That flatters the codecs (tables fitted to each picture cost nothing), never the tokenizer.

Shapes: B pictures, H and W pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.core.errors import BadInput

VP8_FRAME_HEADER = 10  # bytes: frame tag, start code, width and height


@dataclass(frozen=True)
class PictureCodec:
    """How one codec is run and what of its files counts."""

    encode: Callable[[Image.Image, int], bytes]
    payload_bytes: Callable[[bytes], int]
    qualities: range


@dataclass(frozen=True)
class Compressed:
    """What a codec made of a batch.

    Attributes:
        reconstructions: (B, H, W, 3) uint8.
        bits: (B,) int64, of each picture's payload.
    """

    reconstructions: np.ndarray
    bits: np.ndarray


def compress(codec: str, pictures: np.ndarray, quality: int) -> Compressed:
    """Encode and decode pictures one by one.

    Args:
        codec: a key of `CODECS`.
        pictures: (B, H, W, 3) uint8 RGB.
        quality: one of the codec's `qualities`, as Pillow understands it.

    Raises:
        BadInput: the codec is unknown, the quality is outside its range, or the pictures have another shape or type.
    """
    chosen = picture_codec(codec)
    if quality not in chosen.qualities:
        raise BadInput(f"quality is {quality}; expected {chosen.qualities[0]} to {chosen.qualities[-1]} for {codec}")
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise BadInput(f"pictures are {pictures.dtype} {pictures.shape}; expected uint8 (B, H, W, 3)")
    files = [chosen.encode(Image.fromarray(picture), quality) for picture in pictures]
    bits = np.array([8 * chosen.payload_bytes(file) for file in files], dtype=np.int64)
    decoded = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return Compressed(np.array(decoded, dtype=np.uint8).reshape(pictures.shape), bits)


def quality_for(codec: str, pictures: np.ndarray, bits: float) -> int:
    """The highest quality whose mean bits stay at or below `bits`; the lowest quality where the codec goes no lower.

    Found by halving, because mean bits rise with quality: over all qualities of 200 CIFAR-10 and 150 Tiny-ImageNet
    pictures the only fall is 0.2%, from JPEG's 84 to 85.

    Args:
        codec: a key of `CODECS`.
        pictures: (B, H, W, 3) uint8 RGB, none of those that will be measured; at least one.
        bits: wanted mean of a picture.

    Raises:
        BadInput: as `compress`, or there is no picture.
    """
    if len(pictures) == 0:
        raise BadInput("pictures are 0; expected at least 1 to choose a quality by")
    qualities = picture_codec(codec).qualities
    low, high = qualities[0], qualities[-1] + 1  # low fits or is the lowest, high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        fits = compress(codec, pictures, middle).bits.mean() <= bits
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


def png_bytes(picture: np.ndarray) -> int:
    """Size of the smallest PNG that Pillow makes of a (H, W, 3) uint8 picture: how much content it has."""
    return len(_saved(Image.fromarray(picture), "PNG", optimize=True))


def picture_codec(name: str) -> PictureCodec:
    """The codec of that name.

    Raises:
        BadInput: there is none.
    """
    if name not in CODECS:
        raise BadInput(f"codec is {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]


def _saved(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
