"""Labelled pictures in memory: read from a Parquet file or from shards, selected by index, augmented.

Shapes: B pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data import parquet
from pipeline.data.locations import locate
from pipeline.data.pictures import BadPicture, decode, prepare
from pipeline.data.shards import ShardDataset
from pipeline.errors import BadInput

MAX_SHIFT = 4  # pixels
READ = 256  # pictures of shards read at a time


@dataclass(frozen=True)
class Labelled:
    """Pictures of one size and their classes."""

    images: Tensor  # (B, side, side, 3) uint8 RGB
    labels: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """How many there are, as far as the labels tell."""
        return int(self.labels.max()) + 1

    def take(self, indices: Tensor) -> "Labelled":
        """The pictures at (B,) int64 `indices`, in their order."""
        indices = indices.to(self.labels.device)
        return Labelled(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Labelled":
        """The same on another device."""
        return Labelled(self.images.to(device), self.labels.to(device))


def read_labelled(path: str, data: DataConfig, split: str = "train", classes: int | None = None) -> Labelled:
    """Every picture of a Parquet file, made square as in a shard, or of a split of shards, with its class.

    Args:
        path: Parquet file, or folder of shards.
        data: names the columns and the size.
        split: train or heldout, of shards.
        classes: labels must be 0 to classes - 1; None: any from 0.

    Raises:
        BadInput: neither shards nor a Parquet file with a column of pictures, no rows, a row that is not a picture, a
            label that is no class.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    rows = _of_shards(path, split) if Path(path).is_dir() else _of_parquet(path, data)
    for row, (image, label) in enumerate(rows):
        if not isinstance(label, int) or not 0 <= label < (classes or label + 1):
            expected = "classes from 0" + (f" to {classes - 1}" if classes else "")
            raise BadInput(
                f"row {row} of {path!r} has the label {label!r}; expected data.label_column to hold {expected}"
            )
        images.append(image)
        labels.append(label)
    if not labels:
        raise BadInput(f"{path!r} has no rows; expected labelled pictures")
    return Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _of_parquet(path: str, data: DataConfig) -> Iterator[tuple[np.ndarray, object]]:
    place = locate(path)
    rows = parquet.check(place, data)
    for row, picture in enumerate(parquet.read(place.parent, [[place.name, 0, rows]], data)):
        try:
            yield decode(prepare(picture.data, data)), picture.label
        except BadPicture as reason:
            raise BadInput(f"row {row} of {path!r} is not a usable picture: {reason}") from None


def _of_shards(folder: str, split: str) -> Iterator[tuple[np.ndarray, object]]:
    pictures = ShardDataset(folder, split)
    for start in range(0, len(pictures), READ):
        numbers = range(start, min(start + READ, len(pictures)))
        yield from zip(pictures.images(numbers), pictures.labels(numbers).tolist(), strict=True)


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
