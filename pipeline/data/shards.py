"""Shards: the Parquet files of a split, `manifest.json` that lists them, and random access to their pictures.

Needs neither Ray nor torch. docs/architecture.md has the formats.
"""

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import locate, sha256_file, write_atomically, write_json
from pipeline.core.manifest import check_format, parse_values, read_described
from pipeline.core.ranges import Shard
from pipeline.data.pictures import decode

FORMAT, VERSION = "tatok-shards", 1
NAME, WRITER = "manifest.json", "jobs/preprocess.py"
SPLITS = ("train", "heldout")
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
REJECTED = pa.schema({"path": pa.string(), "reason": pa.string()})
ROW_GROUP_ROWS = 64  # small, because one row group is the least that random access reads
MEMORY_BYTES = 512 * 2**20  # splits up to this size are kept in memory
CACHED_GROUPS = 128  # row groups kept of a split that is not in memory: two windows of training's order


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    rows: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What was made, from what, and its checksums."""

    image_size: int  # pixels, square
    config: dict[str, Any]  # the data keys that decide bytes
    source_fingerprint: str
    classes: tuple[str, ...]  # name of each label
    splits: dict[str, Split]  # train, heldout
    rejected: int  # rows of rejected.parquet
    fingerprint: str  # of the pictures: sha256 over the shard checksums

    @classmethod
    def of(
        cls,
        image_size: int,
        config: dict[str, Any],
        source_fingerprint: str,
        classes: tuple[str, ...],
        shards: Sequence[tuple[str, Shard]],
        rejected: int = 0,
    ) -> "Manifest":
        """With what follows from the shards, which come in order, each with its split."""
        files = {name: tuple(shard for split, shard in shards if split == name) for name in SPLITS}
        splits = {name: Split(sum(shard.rows for shard in files[name]), files[name]) for name in SPLITS}
        return cls(image_size, config, source_fingerprint, classes, splits, rejected, fingerprint(splits))

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def fingerprint(splits: dict[str, Split]) -> str:
    """sha256 over the shard checksums of all splits, in order."""
    text = json.dumps([[name, [shard.sha256 for shard in splits[name].shards]] for name in SPLITS])
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest, rejected: Sequence[tuple[str, str]] = ()) -> None:
    """Write `rejected.parquet`, then `manifest.json`, which marks the shards in `folder` as complete."""
    write_rejected(folder, rejected)
    write_json(folder / NAME, manifest.to_dict())


def write_rejected(folder: Path, rejected: Sequence[tuple[str, str]]) -> None:
    """The pictures that could not be used: (path, reason) of each."""
    rows = [{"path": path, "reason": reason} for path, reason in rejected]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, REJECTED), file, compression="ZSTD")
    write_atomically(folder / "rejected.parquet", file.getvalue())


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest in `folder`, a path or URL.

    Raises:
        BadInput: there is none, or it is another program's, of another version, or damaged.
    """
    what = f"{NAME} in {str(folder)!r}"
    values = read_described(folder, NAME, WRITER, "data.shards")
    check_format(values, what, (FORMAT, VERSION), WRITER)
    manifest = parse_values(Manifest, values, what)
    if set(manifest.splits) != set(SPLITS) or manifest.fingerprint != fingerprint(manifest.splits):
        raise BadInput(f"{what} is damaged: its fingerprint does not match its shards")
    return manifest


def check_shards(config: Config) -> None:
    """Refuse `data.shards` that cannot serve this configuration; does nothing when it is empty.

    Raises:
        BadInput: as `read_manifest`, or the shards were made for another image size.
    """
    if not config.data.shards:
        return
    made_for = read_manifest(config.data.shards).image_size
    if made_for != config.data.image_size:
        raise BadInput(
            f"data.shards {config.data.shards!r} were made for image size {made_for}; "
            f"expected data.image_size, {config.data.image_size}"
        )


class ShardWriter:
    """Adds rows of `SCHEMA` to a file; equal rows give equal bytes under the same pyarrow.

    Writes a row group at a time: memory stays flat, and the file appears whole or not at all. As a context: `shard` is
    set when it ends well; after an error, or without rows, no file is left.

    Args:
        folder: of the manifest; exists, on this machine's file system.
        file: the shard's name, relative to `folder`.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.shard: Shard | None = None
        self._folder, self._file = folder, file
        self._path = folder / file
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._rows: list[dict[str, Any]] = []
        self._written = 0
        self._writer: pq.ParquetWriter | None = None

    @classmethod
    def write(cls, folder: Path, file: str, rows: Iterable[dict[str, Any]]) -> Shard:
        """A shard of all `rows`, at least one."""
        with cls(folder, file) as writer:
            for row in rows:
                writer.add(row)
        if writer.shard is None:
            raise RuntimeError(f"{file} has no rows; expected some")
        return writer.shard

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP_ROWS:
            self._write_group()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._rows:
            self._write_group()
        if self._writer is None:
            return
        try:
            self._writer.close()
            if kind is None:
                with open(self._temporary, "rb") as file:
                    os.fsync(file.fileno())
                self.shard = Shard(self._file, self._written, sha256_file(self._temporary))
                os.replace(self._temporary, self._path)
        finally:  # also where closing fails: on full storage, what is half written would keep others from their room
            self._temporary.unlink(missing_ok=True)

    def _write_group(self) -> None:
        if self._writer is None:
            # Pictures are compressed already. Statistics and dictionaries would only repeat the columns.
            codecs = {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names}
            self._writer = pq.ParquetWriter(
                self._temporary, SCHEMA, compression=codecs, use_dictionary=["label_name"], write_statistics=False
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA), row_group_size=ROW_GROUP_ROWS)
        self._written += len(self._rows)
        self._rows = []


class Damaged(BadInput):
    """A shard or picture is not as preprocess wrote it: whoever reads it meets it, maybe one worker of several."""


class ShardDataset:
    """The pictures of one split by number, 0 to `len - 1`, in the order of the manifest.

    A split whose files are small is kept in memory, encoded; of larger ones only the row groups that are asked for are
    read, and the last few are kept, so that sorted or blockwise access is much faster than access all over the place.
    Serves one thread at a time.

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
            raise BadInput(f"split {split!r} is not in {str(folder)!r}; expected {' or '.join(SPLITS)}")
        self.split = split
        self._folder = locate(str(folder))
        self._shards = self.manifest.splits[split].shards
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])  # first row of each shard, then the end
        self._columns: dict[str, pa.Array] = {}
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
        return self._take("label", indices).to_numpy(zero_copy_only=False)

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Where each picture came from; unique in the split."""
        return self._take("id", indices).to_pylist()

    def encoded(self, indices: Sequence[int]) -> list[bytes]:
        """Pictures as stored, in the order of `indices`; every row group is read at most once per call."""
        wanted = self._checked(indices)
        if self.in_memory:
            column = self._column("image")
            return [column[index].as_py() for index in wanted.tolist()]
        pictures: list[bytes] = [b""] * len(wanted)
        for position in np.argsort(wanted, kind="stable").tolist():
            shard = int(np.searchsorted(self._starts, wanted[position], side="right")) - 1
            group, row = divmod(int(wanted[position] - self._starts[shard]), ROW_GROUP_ROWS)
            pictures[position] = self._group(shard, group)[row].as_py()
        return pictures

    def _take(self, name: str, indices: Sequence[int]) -> pa.Array:
        return self._column(name).take(pa.array(self._checked(indices)))

    def _column(self, name: str) -> pa.Array:
        """One column of the whole split as one array, kept."""
        if name not in self._columns:
            parts = []
            for number, shard in enumerate(self._shards):
                with self._whole(shard):
                    parts.append(self._file(number).read(columns=[name]).column(name).combine_chunks())
            self._columns[name] = pa.concat_arrays(parts) if parts else pa.array([], SCHEMA.field(name).type)
        return self._columns[name]

    def _group(self, shard: int, group: int) -> pa.Array:
        """The pictures of one row group, from the cache of the most recently used."""
        key = (shard, group)
        if key not in self._groups:
            with self._whole(self._shards[shard]):
                column = self._file(shard).read_row_group(group, columns=["image"]).column("image")
                self._groups[key] = column.combine_chunks()
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
