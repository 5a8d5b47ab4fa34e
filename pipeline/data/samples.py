"""Photographs that ship inside the scikit-image package, cut into square tiles: `data.source=samples`.

Only files that are in the installed wheel are used, so nothing is downloaded. Tiles of one photograph do not overlap;
nearly flat tiles (the black around the retina, say) are left out: they teach nothing and many of them are equal.
"""

import importlib.util
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.errors import BadInput

PHOTOGRAPHS = {  # name: file in skimage/data
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
LEAST_RANGE = 32  # levels, 0-255, that one channel of a tile must span to be kept


def list_tiles(image_size: int) -> list[str]:
    """Names of all tiles of `image_size` x `image_size` pixels that show something, e.g. `cat/003-010.png`.

    The numbers are row and column in the photograph's grid of tiles. Raises:
        BadInput: as `photograph_files`, or the photographs are smaller than one tile.
    """
    tiles = [tile for name in PHOTOGRAPHS for tile in _tiles_of(name, image_size)]
    if not tiles:
        raise BadInput(f"data.source is 'samples' with data.image_size {image_size}; expected at most 1411 pixels")
    return tiles


def read_tile(name: str, image_size: int) -> bytes:
    """A tile of `list_tiles` as a PNG; equal bytes at every call."""
    photograph, place = name.removesuffix(".png").split("/")
    top, left = (int(number) * image_size for number in place.split("-"))
    file = io.BytesIO()
    Image.fromarray(_pixels(photograph)[top : top + image_size, left : left + image_size]).save(file, "PNG")
    return file.getvalue()


def photograph_files() -> dict[str, Path]:
    """Where each photograph is in the installed scikit-image.

    Raises:
        BadInput: scikit-image is not installed, or without one of these files.
    """
    package = importlib.util.find_spec("skimage")  # finding is a hundred times faster than importing
    if package is None or package.origin is None:
        raise BadInput("data.source is 'samples', which needs scikit-image; expected it to be installed")
    folder = Path(package.origin).parent / "data"
    files = {name: folder / file for name, file in PHOTOGRAPHS.items()}
    for path in files.values():
        if not path.is_file():
            raise BadInput(
                f"data.source is 'samples', but scikit-image has no {path.name}; expected scikit-image>=0.25"
            )
    return files


def _tiles_of(name: str, size: int) -> list[str]:
    pixels = _pixels(name)
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    if not rows or not columns:
        return []
    grid = pixels[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
    spans = grid.max(axis=(1, 3)).astype(int) - grid.min(axis=(1, 3))  # (rows, columns, channels)
    return [f"{name}/{row:03d}-{column:03d}.png" for row, column in np.argwhere(spans.max(axis=-1) >= LEAST_RANGE)]


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _pixels(name: str) -> np.ndarray:
    """A whole photograph, (H, W, 3) uint8."""
    with Image.open(photograph_files()[name]) as picture:
        return np.asarray(picture.convert("RGB"))
