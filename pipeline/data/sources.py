"""Where pictures come from: class folders, a flat folder, Parquet, WebDataset tar, or the samples in scikit-image.

A source is a local path or a URL of any file system that pyarrow knows. Listing is sorted, so that the same files give
the same plan anywhere. Hidden files and files of other kinds are left out.

A *unit* is a small JSON list that says where pictures are; each kind of source has its own. A *raw label* is a class
index, a class name or None; the index of a name is known once everything was looked at.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location, locate
from pipeline.data import samples
from pipeline.data.pictures import extensions

Unit = list[Any]
RawLabel = int | str | None
MAX_CLASSES = 100_000  # a larger "class index" is no class index
EXPECTED = "expected a folder with pictures, a .parquet or .tar file or a folder of those, their URL, or 'samples'"


@dataclass(frozen=True)
class Picture:
    """One picture as it is in its source."""

    id: str  # unique in its source
    data: bytes
    label: RawLabel
    problem: str = ""  # why there are no bytes


@dataclass
class Scan:
    """What a look at a source shows, without decoding pictures."""

    ranges: list[list[Unit]] = field(default_factory=list)  # the units of each shard, in order
    rows: list[int] = field(default_factory=list)  # pictures in each of `ranges`
    names: set[str] = field(default_factory=set)  # class names without an index
    indexed: dict[int, str] = field(default_factory=dict)  # class indices and their names ("" unknown)

    def add_label(self, label: RawLabel, name: str = "") -> None:
        """Note that a label occurs; `name` is that of a class index."""
        if isinstance(label, str):
            self.names.add(label)
        elif label is not None and label >= 0:
            self.indexed[label] = self.indexed.get(label) or name

    def add_ranges(self, units: Sequence[Unit], rows_per_range: int) -> None:
        """Deal out units of one picture each."""
        for start in range(0, len(units), rows_per_range):
            self.ranges.append(list(units[start : start + rows_per_range]))
            self.rows.append(len(self.ranges[-1]))


@dataclass(frozen=True)
class Source:
    """A listed source."""

    key: str  # data.source | data.heldout_source, for messages
    place: str  # as configured
    kind: str  # folder | parquet | tar | samples
    folder: Location  # what `files` are relative to
    files: tuple[tuple[str, int], ...]  # (relative path, size in bytes), sorted
    rows: tuple[int, ...] = ()  # of each Parquet file

    def without_listing(self) -> "Source":
        """What reading needs; a listing may be long and need not travel to every worker."""
        return replace(self, files=(), rows=())

    def fingerprint(self) -> str:
        """sha256 of names, sizes and row counts; not of times, nor of where the files are."""
        return hashlib.sha256(json.dumps([self.kind, self.files, self.rows]).encode()).hexdigest()


def check_source(key: str, place: str, data: DataConfig) -> None:
    """See quickly whether a source can work; a large local folder is only walked up to its first picture.

    Raises:
        BadInput: empty, missing, of no known kind, without a picture, or without the column of pictures.
    """
    if place == "samples":
        samples.list_tiles(data.image_size)
        return
    location = _existing(key, place)
    if location.info().type == fs.FileType.File:
        if _kind(key, place, {_kind_of(location.name)}) == "parquet":
            check_parquet(location, data)
    elif location.is_local:
        first = _first_of_each_kind(location.path)
        if _kind(key, place, first) == "parquet":
            check_parquet(location / first["parquet"], data)


def open_source(key: str, place: str, data: DataConfig) -> Source:
    """List a source completely; raises as `check_source`."""
    if place == "samples":
        photographs = samples.photograph_files().items()
        tiles = tuple((f"{name}@{data.image_size}", path.stat().st_size) for name, path in photographs)
        return Source(key, place, "samples", locate(""), tiles)
    location = _existing(key, place)
    info = location.info()
    if info.type == fs.FileType.File:
        folder, everything = location.parent, [(location.name, info.size)]
    else:
        folder, everything = location, without_runs(sorted(location.walk()))
    kinds = [_kind_of(name) for name, _ in everything]
    kind = _kind(key, place, kinds)
    files = tuple(file for file, its_kind in zip(everything, kinds, strict=True) if its_kind == kind)
    rows = tuple(check_parquet(folder / name, data) for name, _ in files) if kind == "parquet" else ()
    return Source(key, place, kind, folder, files, rows)


RUN = {"summary.json", "config.yaml"}  # what marks a run folder
ARTIFACTS = re.compile(r"(^|/)[0-9a-f]{32}/artifacts/")  # of MLflow's runs


def without_runs(files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Files without what jobs left below the source: run folders, MLflow's artifacts, pages of `jobs/show.py`."""
    names = {name for name, _ in files}
    folders = {name.rpartition("/")[0] for name in names if name.endswith("/summary.json")}
    runs = tuple(f"{folder}/" for folder in folders if names >= {f"{folder}/{file}" for file in RUN})
    shown = {f"{name[:-4]}png" for name in names if name.endswith("show.html")}
    return [
        (name, size)
        for name, size in files
        if not (runs and name.startswith(runs)) and name not in shown and not ARTIFACTS.search(name)
    ]


def scan(source: Source, data: DataConfig) -> Scan:
    """Look at every file and deal the pictures out to shards.

    Raises:
        BadInput: as the scan of the kind, or there is no picture in it.
    """
    names = [name for name, _ in source.files]
    if source.kind == "parquet":
        looked = _scan_parquet(source.folder, names, data)
    elif source.kind == "tar":
        looked = _scan_tars(source.folder, names, data)
    else:
        looked = _scan_folder(samples.list_tiles(data.image_size) if source.kind == "samples" else names, data)
    if not looked.ranges:
        raise BadInput(f"{source.key} {source.place!r} holds no picture; {EXPECTED}")
    return looked


def read(source: Source, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """The pictures of one range, in order, a few at a time in memory."""
    if source.kind == "samples":
        return (Picture(name, samples.read_tile(name, data.image_size), label) for name, label in units)
    if source.kind == "parquet":
        return read_parquet(source.folder, units, data)
    return (_read_tars if source.kind == "tar" else _read_folder)(source.folder, units)


def _existing(key: str, place: str) -> Location:
    if not place:
        raise BadInput(f"{key} is empty; {EXPECTED}")
    location = locate(place)
    if location.info().type == fs.FileType.NotFound:
        raise BadInput(f"{key} {place!r} does not exist; {EXPECTED}")
    return location


def _kind(key: str, place: str, kinds: Iterable[str | None]) -> str:
    """Pictures count before Parquet files, and those before tar files, where several are in one folder."""
    there = set(kinds)
    for kind in ("folder", "parquet", "tar"):
        if kind in there:
            return kind
    raise BadInput(f"{key} {place!r} holds no picture; {EXPECTED}")


def _kind_of(name: str) -> str | None:
    if name.startswith(".") or "/." in name:
        return None
    ending = os.path.splitext(name)[1].lower()  # pathlib takes ten times as long, and there may be millions
    if ending in (".parquet", ".tar"):
        return ending[1:]
    return "folder" if ending in extensions() else None


def _first_of_each_kind(folder: str) -> dict[str, str]:
    """Kind -> a relative path, by walking until a picture is found, which decides the kind of the folder."""
    first: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        if set(names) >= RUN and parent != folder:  # what a job left is no picture of the source
            folders.clear()
            continue
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder)
            kind = _kind_of(path)
            if kind:
                first.setdefault(kind, path)
            if kind == "folder":
                return first
    return first


# Folders of picture files; the first folder below the source is the class. Unit: [relative path, class or None].


def _scan_folder(names: Iterable[str], data: DataConfig) -> Scan:
    looked = Scan()
    units = [[name, name.split("/")[0] if "/" in name else None] for name in names]
    for _, label in units:
        looked.add_label(label)
    looked.add_ranges(units, data.rows_per_shard)
    return looked


def _read_folder(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """One file after the other; one that is gone or locked is a problem of that picture only."""
    for name, label in units:
        try:
            yield Picture(name, (folder / name).read(), label)
        except (FileNotFoundError, PermissionError) as error:
            yield Picture(name, b"", label, problem=f"file cannot be read ({type(error).__name__})")


# Parquet files with pictures in a column of bytes or {bytes, path}. Unit: [file, first row, end row].

READ_ROWS = 64  # rows held in memory at a time


def check_parquet(place: Location, data: DataConfig) -> int:
    """Look at a file's footer; returns its number of rows.

    Raises:
        BadInput: not a Parquet file, or without a usable column of pictures.
    """
    with _open_parquet(place) as file:
        schema = file.schema_arrow
        if data.image_column not in schema.names:
            raise BadInput(
                f"{place.path!r} has no column {data.image_column!r}; "
                f"expected data.image_column to be one of {', '.join(schema.names)}"
            )
        kind = schema.field(data.image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise BadInput(
                f"column {data.image_column!r} of {place.path!r} holds {kind}; "
                "expected data.image_column to name bytes or {bytes, path}"
            )
        return file.metadata.num_rows


def _scan_parquet(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Count rows by the footers and read the label columns only."""
    looked = Scan()
    space = 0  # rows that still fit into the last range
    for name in names:
        rows = check_parquet(folder / name, data)
        _scan_labels(folder / name, data, looked)
        start = 0
        while start < rows:
            if space == 0:
                looked.ranges.append([])
                looked.rows.append(0)
                space = data.rows_per_shard
            stop = min(rows, start + space)
            looked.ranges[-1].append([name, start, stop])
            looked.rows[-1] += stop - start
            space -= stop - start
            start = stop
    return looked


def read_parquet(folder: Location, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """Read rows by row groups, a few at a time. The id is `file.parquet#row`."""
    for name, start, stop in units:
        with _open_parquet(folder / name) as file:
            for row, values in _rows_of(file, start, stop, data):
                picture = values[data.image_column]
                if isinstance(picture, dict):
                    picture = picture["bytes"]
                yield Picture(f"{name}#{row}", picture or b"", _column_label(values, data))


def _rows_of(file: pq.ParquetFile, start: int, stop: int, data: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values) of the rows from `start` to before `stop`."""
    columns = [data.image_column, *_label_columns(file, data)]
    first = 0  # row at which the row group, then the batch begins
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        if end <= start or first >= stop:
            first = end
            continue
        for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
            low, high = max(start - first, 0), min(stop - first, len(batch))
            if low < high:
                yield from enumerate(batch.slice(low, high - low).to_pylist(), first + low)
            first += len(batch)


def _scan_labels(place: Location, data: DataConfig, looked: Scan) -> None:
    with _open_parquet(place) as file:
        columns = _label_columns(file, data)
        for group in range(file.num_row_groups if columns else 0):
            table = file.read_row_group(group, columns=columns)
            for values in table.group_by(columns).aggregate([]).to_pylist():
                label = _column_label(values, data)
                if isinstance(label, int) and label >= MAX_CLASSES:
                    raise BadInput(
                        f"column {data.label_column!r} of {place.path!r} holds {label}; "
                        f"expected class indices below {MAX_CLASSES}"
                    )
                looked.add_label(label, values.get(data.class_name_column) or "")


def _label_columns(file: pq.ParquetFile, data: DataConfig) -> list[str]:
    """Those of the two label columns that are there and hold class indices or names."""
    usable = []
    for name in dict.fromkeys((data.label_column, data.class_name_column)):
        kind = file.schema_arrow.field(name).type if name in file.schema_arrow.names else pa.null()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            usable.append(name)
    return usable


def _column_label(values: dict[str, Any], data: DataConfig) -> RawLabel:
    """The label column's value if there is one, else the class name."""
    column = data.label_column if data.label_column in values else data.class_name_column
    return values.get(column)


@contextmanager
def _open_parquet(place: Location) -> Iterator[pq.ParquetFile]:
    """Damage shows where it is met: in the footer, in a page, in a text that is not UTF-8."""
    try:
        with pq.ParquetFile(place.open()) as file:
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(
            f"{place.path!r} cannot be read as Parquet ({' '.join(str(error).split())}); expected a whole Parquet file"
        ) from None


# WebDataset: uncompressed tar files whose members belong together up to the first dot of their name. The label is in
# `.cls` (index or name) or `.json` (under `data.label_column` or `data.class_name_column`).
# Unit: [file, key, offset, size, raw label]: where the picture's bytes are, so that any range can be read on its own.

BUFFER_BYTES = 2**20  # remote stores charge by the request: headers of small members arrive many at a time


def _scan_tars(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Read the headers and labels of every tar file once; raises BadInput where one is not whole and uncompressed."""
    looked = Scan()
    units: list[Unit] = []
    for name in names:
        try:
            units += _scan_tar(folder / name, name, data, looked)
        except tarfile.TarError as error:
            raise BadInput(
                f"{(folder / name).path!r} cannot be read as tar ({error}); expected a whole, uncompressed tar file"
            ) from None
    looked.add_ranges(units, data.rows_per_shard)
    return looked


def _read_tars(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """Read the recorded places. The id is `file.tar#key`."""
    for name, members in groupby(units, key=lambda unit: unit[0]):
        with (folder / name).open() as file:
            for _, key, offset, size, label in members:
                file.seek(offset)
                yield Picture(f"{name}#{key}", file.read(size), label)


def _scan_tar(place: Location, name: str, data: DataConfig, looked: Scan) -> list[Unit]:
    units = []
    with ExitStack() as stack:
        file = stack.enter_context(io.BufferedReader(place.open(), BUFFER_BYTES))
        archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        for key, sample in groupby((member for member in archive if member.isreg()), key=_tar_key):
            picture, label, label_name = None, None, ""
            for member in sample:
                ending = member.name.removeprefix(key).lower()
                if ending in (".cls", ".json"):
                    label, label_name = _read_label(archive, member, data)
                elif picture is None and "." + ending.rpartition(".")[2] in extensions():
                    picture = member
            if picture is not None:
                looked.add_label(label, label_name)
                units.append([name, key, picture.offset_data, picture.size, label])
        file.seek(archive.offset)  # where tarfile stopped: at the zeros that end a tar or, silently, at a broken header
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of archive")
    return units


def _tar_key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, data: DataConfig) -> tuple[RawLabel, str]:
    """(label, name of a class index); (None, "") if the file says nothing that we understand."""
    file = archive.extractfile(member)
    text = file.read().decode("utf-8", errors="replace").strip() if file else ""
    if member.name.endswith(".cls"):
        return _as_label(text), ""
    try:
        values: Any = json.loads(text)
    except ValueError:
        return None, ""
    if not isinstance(values, dict):
        return None, ""
    name = values.get(data.class_name_column)
    name = name if isinstance(name, str) else ""
    label = _as_label(values.get(data.label_column))
    return (label, name) if label is not None else (name or None, "")


def _as_label(value: Any) -> RawLabel:
    """A class index (also as text) or name."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() else value or None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return None if isinstance(value, int) and value >= MAX_CLASSES else value
