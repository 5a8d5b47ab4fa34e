"""JPEG files of 500x375 pixels, the size of a usual ImageNet picture, cut from the photographs inside scikit-image.

Each is a random crop of one of them, maybe mirrored, at a random quality; picture `n` is the same wherever it is made.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.samples import PHOTOGRAPHS, photograph_files

WIDTH, HEIGHT = 500, 375
DISTINCT = 512  # different files; further ones are links to these: who reads them has the same work to do


def make_photographs(folder: Path, count: int) -> list[Path]:
    """`count` files 000000.jpg, 000001.jpg, ... in a new folder, in the order of their names.

    Raises:
        BadInput: scikit-image is not installed, or without one of its photographs.
    """
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.jpg" for number in range(count)]
    with ThreadPoolExecutor() as threads:
        for path, data in zip(files, threads.map(photograph, range(min(count, DISTINCT))), strict=False):
            path.write_bytes(data)
    for path, first in zip(files[DISTINCT:], _forever(files[:DISTINCT]), strict=False):
        os.link(first, path)
    return files


def photograph(number: int) -> bytes:
    """One such file."""
    random = np.random.default_rng([0, number])
    whole = _open(sorted(PHOTOGRAPHS)[number % len(PHOTOGRAPHS)])
    width = random.uniform(0.8, 1) * min(whole.width, whole.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = random.uniform(0, whole.width - width), random.uniform(0, whole.height - height)
    box = (left, top, left + width, top + height)
    picture = whole.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(random.integers(85, 97)))
    return file.getvalue()


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _open(name: str) -> Image.Image:
    with Image.open(photograph_files()[name]) as picture:
        return picture.convert("RGB")


def _forever(files: list[Path]) -> Iterator[Path]:
    while files:
        yield from files
