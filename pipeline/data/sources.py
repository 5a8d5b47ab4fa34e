"""Where pictures come from: class folders, a flat folder, Parquet, WebDataset tar, or the samples in scikit-image.

A source is a local path or a URL of any file system that pyarrow knows. Listing is sorted, so that the same files give
the same plan anywhere. Hidden files and files of other kinds are left out.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pyarrow import fs

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location, locate
from pipeline.data import listing, parquet, samples, tars
from pipeline.data.listing import Picture, Scan, Unit
from pipeline.data.pictures import extensions

EXPECTED = "expected a folder with pictures, a .parquet or .tar file or a folder of those, their URL, or 'samples'"


@dataclass(frozen=True)
class Source:
    """A listed source."""

    place: str  # as configured
    kind: str  # folder | parquet | tar | samples
    folder: Location  # what `files` are relative to
    files: tuple[tuple[str, int], ...]  # (relative path, size in bytes), sorted
    rows: tuple[int, ...] = ()  # of each Parquet file

    @property
    def names(self) -> list[str]:
        """The relative paths."""
        return [name for name, _ in self.files]

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
            parquet.check(location, data)
    elif location.is_local:
        first = _first_of_each_kind(location.path)
        if _kind(key, place, first) == "parquet":
            parquet.check(location / first["parquet"], data)


def open_source(key: str, place: str, data: DataConfig) -> Source:
    """List a source completely; raises as `check_source`."""
    if place == "samples":
        photographs = samples.photograph_files().items()
        tiles = tuple((f"{name}@{data.image_size}", path.stat().st_size) for name, path in photographs)
        return Source(place, "samples", locate(""), tiles)
    location = _existing(key, place)
    info = location.info()
    if info.type == fs.FileType.File:
        folder, everything = location.parent, [(location.name, info.size)]
    else:
        folder, everything = location, sorted(location.walk())
    kinds = [_kind_of(name) for name, _ in everything]
    kind = _kind(key, place, kinds)
    files = tuple(file for file, its_kind in zip(everything, kinds, strict=True) if its_kind == kind)
    rows = tuple(parquet.check(folder / name, data) for name, _ in files) if kind == "parquet" else ()
    return Source(place, kind, folder, files, rows)


def scan(key: str, source: Source, data: DataConfig) -> Scan:
    """Look at every file and deal the pictures out to shards.

    Raises:
        BadInput: as the scan of the kind, or there is no picture in it.
    """
    if source.kind == "samples":
        found = listing.scan(samples.list_tiles(data.image_size), data)
    elif source.kind == "folder":
        found = listing.scan(source.names, data)
    else:
        kind = {"parquet": parquet, "tar": tars}[source.kind]
        found = kind.scan(source.folder, source.names, data)
    if not found.ranges:
        raise BadInput(f"{key} {source.place!r} holds no picture; {EXPECTED}")
    return found


def read(source: Source, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """The pictures of one range, in order, a few at a time in memory."""
    if source.kind == "samples":
        return (Picture(name, samples.read_tile(name, data.image_size), label) for name, label in units)
    if source.kind == "parquet":
        return parquet.read(source.folder, units, data)
    return {"folder": listing, "tar": tars}[source.kind].read(source.folder, units)


def _existing(key: str, place: str) -> Location:
    if not place:
        raise BadInput(f"{key} is empty; {EXPECTED}")
    location = locate(place)
    if location.info().type == fs.FileType.NotFound:
        raise BadInput(f"{key} {place!r} does not exist; {EXPECTED}")
    return location


def _kind(key: str, place: str, kinds: Iterable[str | None]) -> str:
    """Pictures count before Parquet files, and those before tar files, where several are in one folder."""
    found = set(kinds)
    for kind in ("folder", "parquet", "tar"):
        if kind in found:
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
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder)
            kind = _kind_of(path)
            if kind:
                first.setdefault(kind, path)
            if kind == "folder":
                return first
    return first
