"""Others who decode, resize and encode the pictures of a folder: plain threads, processes, Ray Data as documented.

All of them call Pillow (its JPEG decoder is libjpeg-turbo) with the resize and the encoder settings of our stage, so
that the encoded pictures are equal. None checks its input, keeps labels, splits, or computes checksums.
"""

import io
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.pictures import encode, square

CHUNK = 16  # files that a process is handed at once


def convert(path: Path, data: DataConfig) -> bytes:
    """The bare work on one file: what has to be done whoever does it."""
    with Image.open(path) as picture:
        return encode(square(picture, data.image_size), data.encoding, data.quality)


def convert_all(pool: Executor, files: list[Path], data: DataConfig) -> list[bytes]:
    """The encoded pictures, in order, by threads or processes."""
    return list(pool.map(partial(convert, data=data), files, chunksize=CHUNK))


@contextmanager
def threads(count: int) -> Iterator[Executor]:
    """A pool of plain threads: the limit, as Pillow lets others work while it decodes and resizes."""
    with ThreadPoolExecutor(count) as pool:
        yield pool


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """A pool of plain processes that share nothing with this one."""
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        yield pool


def on_ray_data(ray: Any, source: Path, folder: Path, data: DataConfig) -> None:
    """Ray Data's documented way from image files to Parquet: `read_images`, `map` with Pillow, `write_parquet`.

    Source: "Working with Images" in the documentation of Ray Data.

    Args:
        ray: the connected module.
        source: folder with the image files.
        folder: for the Parquet files; emptied before.
        data: the size and encoding wanted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pictures = ray.data.read_images(str(source), mode="RGB", include_paths=True)
    pictures.map(partial(_transform, data=data)).write_parquet(str(folder))


def _transform(row: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    pixels: np.ndarray = row["image"]  # (H, W, 3) uint8
    row["image"] = encode(square(Image.fromarray(pixels), data.image_size), data.encoding, data.quality)
    return row


def largest_difference(one: bytes, other: bytes) -> int:
    """Grey levels by which the pixels of two encoded pictures differ at most."""
    if one == other:
        return 0
    first, second = (np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16) for data in (one, other))
    return int(np.abs(first - second).max())
