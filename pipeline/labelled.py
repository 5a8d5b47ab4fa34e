"""Labelled pictures in memory: read from a Parquet file, selected by index, augmented.

Shapes: B pictures.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data import parquet
from pipeline.data.locations import locate
from pipeline.data.pictures import BadPicture, decode, prepare
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
    """Every picture of a Parquet file with its class, made square as in a shard.

    Args:
        path: Parquet file.
        data: names the columns and the size.
        classes: labels must be 0 to classes - 1.

    Raises:
        BadInput: not a Parquet file with a column of pictures, no rows, a row that is not a picture, a label that is
            no class.
    """
    place = locate(path)
    rows, side = parquet.check(place, data), data.image_size
    if rows == 0:
        raise BadInput(f"{path!r} has no rows; expected labelled pictures")
    images, labels = np.empty((rows, side, side, 3), np.uint8), np.empty(rows, np.int64)
    for row, picture in enumerate(parquet.read(place.parent, [[place.name, 0, rows]], data)):
        if not isinstance(picture.label, int) or not 0 <= picture.label < classes:
            raise BadInput(
                f"row {row} of {path!r} has the label {picture.label!r}; "
                f"expected data.label_column to hold classes from 0 to {classes - 1}"
            )
        try:
            images[row], labels[row] = decode(prepare(picture.data, data)), picture.label
        except BadPicture as reason:
            raise BadInput(f"row {row} of {path!r} is not a usable picture: {reason}") from None
    return Labelled(torch.from_numpy(images), torch.from_numpy(labels))


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
