"""Labelled pictures in memory: read from a Parquet file, selected by index, augmented.

Shapes: B pictures.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow import ArrowInvalid
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.errors import BadInput

MAX_SHIFT = 4  # pixels


@dataclass(frozen=True)
class Labelled:
    """Pictures of one size and their classes."""

    images: Tensor  # (B, side, side, 3) uint8 RGB
    labels: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Labelled":
        """The pictures at (B,) int64 `indices`, in their order."""
        indices = indices.to(self.labels.device)
        return Labelled(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Labelled":
        """The same on another device."""
        return Labelled(self.images.to(device), self.labels.to(device))


def read_labelled(path: str, data: DataConfig, classes: int) -> Labelled:
    """Every picture of a Parquet file, at `data.image_size`, with its class.

    Args:
        path: local Parquet file.
        data: names the columns and the size; pictures of another size are resized without keeping their aspect ratio.
        classes: labels must be 0 to classes - 1.

    Raises:
        BadInput: not a Parquet file, a column missing, no rows, a row that is not a picture, a label out of range.
    """
    columns = [data.image_column, data.label_column]
    try:
        file = pq.ParquetFile(path)
    except ArrowInvalid:
        raise BadInput(f"{path!r} cannot be read as Parquet; expected a labelled Parquet file") from None
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise BadInput(f"{path!r} has no column {missing[0]!r}; expected one of {', '.join(file.schema_arrow.names)}")
    table = file.read(columns)
    if table.num_rows == 0:
        raise BadInput(f"{path!r} has no rows; expected labelled pictures")
    labels = np.asarray(table[data.label_column].to_pylist(), dtype=np.float64)  # a missing label becomes nan
    wrong = np.flatnonzero(~np.isin(labels, np.arange(classes)))
    if len(wrong):
        raise BadInput(
            f"row {wrong[0]} of {path!r} has the label {labels[wrong[0]]:g}; expected a class from 0 to {classes - 1}"
        )
    images = np.stack([_decode(value, path, row, data.image_size) for row, value in enumerate(table[columns[0]])])
    return Labelled(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _decode(value: Any, path: str, row: int, side: int) -> np.ndarray:
    stored = value.as_py()
    stored = stored["bytes"] if isinstance(stored, dict) else stored
    try:
        with Image.open(io.BytesIO(stored)) as picture:
            rgb = picture.convert("RGB")
    except (OSError, TypeError) as error:  # TypeError: the cell is empty
        raise BadInput(f"row {row} of {path!r} is not a picture: {error}") from None
    return np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every picture by up to 4 pixels, borders reflected, and mirror half of them.

    Args:
        images: (B, side, side, 3) uint8.
        generator: decides the shifts; one on the CPU serves every device.
    """
    count, side = images.shape[:2]
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = (_reflect(offset + torch.arange(side), side) for offset in shift)  # (B, side) each
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each, rows, columns = (indices.to(images.device) for indices in (torch.arange(count), rows, columns))
    return images[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(indices: Tensor, side: int) -> Tensor:
    """Indices beyond a border, counted back from it."""
    last = side - 1
    return last - (last - indices.abs()).abs()
