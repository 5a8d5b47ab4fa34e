"""Reading shards: random access to the pictures of one split.

Needs neither Ray nor torch. A split whose files are small (up to `MEMORY_BYTES`) is kept in memory, encoded; of larger
ones only the row groups that are asked for are read, and the last few are kept, so that sorted or blockwise access is
much faster than access all over the place. One `ShardDataset` serves one thread at a time.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.data.locations import locate
from pipeline.data.manifest import Manifest, Shard, read_manifest
from pipeline.data.pictures import decode
from pipeline.errors import BadInput

MEMORY_BYTES = 512 * 2**20  # splits up to this size are kept in memory
ROW_GROUP_ROWS = 64  # small, because one row group is the least that random access reads
CACHED_GROUPS = 128  # row groups kept of a split that is not in memory: two windows of training's order
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.binary(),  # encoded: JPEG, PNG or WebP
        "height": pa.int32(),
        "width": pa.int32(),
        "label": pa.int32(),  # -1: none
        "label_name": pa.string(),
    }
)


class Damaged(BadInput):
    """A shard or picture is not as preprocess wrote it: whoever reads it meets it, maybe one worker of several."""


class ShardDataset:
    """The pictures of one split by number, 0 to `len - 1`, in the order of the manifest.

    Args:
        folder: path or URL of the folder with `manifest.json`.
        split: train or heldout.
        memory_bytes: up to this size the split is kept in memory.

    Raises:
        BadInput: no such split, an unusable manifest, or a shard that is missing. Reading raises `Damaged`.
    """

    def __init__(self, folder: str | Path, split: str, memory_bytes: int = MEMORY_BYTES) -> None:
        self.manifest: Manifest = read_manifest(folder)
        if split not in self.manifest.splits:
            raise BadInput(f"split {split!r} is not in {str(folder)!r}; expected {' or '.join(self.manifest.splits)}")
        self.split = split
        self._folder = locate(str(folder))
        self._shards = self.manifest.splits[split].shards
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])  # first row of each shard, then the end
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self.in_memory = self._total_bytes() <= memory_bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Decoded pictures: (B, H, W, 3) uint8 RGB, in the order of `indices`."""
        size = self.manifest.image_size
        pictures = np.empty((len(indices), size, size, 3), dtype=np.uint8)
        for position, data in enumerate(self.encoded(indices)):
            try:
                pictures[position] = decode(data)
            except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever broken bytes lead them to
                raise Damaged(
                    f"picture {int(indices[position])} of split {self.split!r} in {self._folder.path!r} cannot be "
                    f"decoded ({' '.join(str(error).split())}); expected {size}x{size} pixels, as preprocess wrote them"
                ) from None
        return pictures

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Class indices: (B,) int32, -1 where there is none."""
        return self._labels[self._checked(indices)]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Where each picture came from; unique in the split."""
        return self._ids.take(pa.array(self._checked(indices))).to_pylist()

    def encoded(self, indices: Sequence[int]) -> list[bytes]:
        """Pictures as stored, in the order of `indices`; every row group is read at most once per call."""
        wanted = self._checked(indices)
        if self.in_memory:
            return [self._images[index].as_py() for index in wanted.tolist()]
        found: list[bytes] = [b""] * len(wanted)
        for position in np.argsort(wanted, kind="stable").tolist():
            shard = int(np.searchsorted(self._starts, wanted[position], side="right")) - 1
            group, row = divmod(int(wanted[position] - self._starts[shard]), ROW_GROUP_ROWS)
            found[position] = self._group(shard, group)[row].as_py()
        return found

    @cached_property
    def _labels(self) -> np.ndarray:
        return self._column("label").to_numpy(zero_copy_only=False)

    @cached_property
    def _ids(self) -> pa.Array:
        return self._column("id")

    @cached_property
    def _images(self) -> pa.Array:
        return self._column("image")

    def _column(self, name: str) -> pa.Array:
        """One column of the whole split as one array."""
        parts = []
        for number, shard in enumerate(self._shards):
            with self._whole(shard):
                parts.append(self._file(number).read(columns=[name]).column(name).combine_chunks())
        return pa.concat_arrays(parts) if parts else pa.array([], SCHEMA.field(name).type)

    def _group(self, shard: int, group: int) -> pa.Array:
        """The pictures of one row group, from the cache of the most recently used."""
        key = (shard, group)
        if key not in self._groups:
            with self._whole(self._shards[shard]):
                found = self._file(shard).read_row_group(group, columns=["image"]).column("image")
                self._groups[key] = found.combine_chunks()
        return _recent(self._groups, key, CACHED_GROUPS)

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self._open(self._shards[shard])
        return _recent(self._files, shard, keep=64)

    def _open(self, shard: Shard) -> pq.ParquetFile:
        place = self._folder / shard.file
        with self._whole(shard):
            file = pq.ParquetFile(place.open())
        if file.metadata.num_rows != shard.rows:
            raise Damaged(f"shard {place.path!r} has {file.metadata.num_rows} rows; expected {shard.rows}")
        return file

    @contextmanager
    def _whole(self, shard: Shard) -> Iterator[None]:
        """Damage shows where it is met: in the footer or in a page, or as a column that is not there."""
        try:
            yield
        except (OSError, KeyError, pa.ArrowException) as error:
            place = (self._folder / shard.file).path
            raise Damaged(f"shard {place!r} cannot be read ({' '.join(str(error).split())})") from None

    def _total_bytes(self) -> int:
        infos = self._folder.filesystem.get_file_info([(self._folder / shard.file).path for shard in self._shards])
        for info in infos:
            if info.type != fs.FileType.File:
                raise BadInput(f"shard {info.path!r} is missing; expected what manifest.json lists")
        return sum(info.size for info in infos)

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"picture {wanted.min()} to {wanted.max()} asked for; expected 0 to {len(self) - 1}")
        return wanted


def _recent(cache: OrderedDict[Any, Any], key: Any, keep: int) -> Any:
    """`cache[key]`, now the most recently used; the oldest beyond `keep` are dropped."""
    cache.move_to_end(key)
    while len(cache) > keep:
        cache.popitem(last=False)
    return cache[key]
