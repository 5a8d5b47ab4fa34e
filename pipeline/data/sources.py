"""Where pictures come from: class folders, a flat folder, Parquet, WebDataset tar, or the samples in scikit-image.

A source is a local path or a URL of any file system that pyarrow knows. Listing is sorted, so that the same files give
the same plan anywhere. Hidden files and texts are left out without a word; whatever else may hold pictures and is not
used is named.

A *unit* is a small JSON list that says where pictures are; each kind of source has its own. Of raw labels see `labels`.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pyarrow import fs

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location, locate, printable
from pipeline.data import samples
from pipeline.data.labels import raw_label
from pipeline.data.scans import HEAD_BYTES, SOME, Endings, LeftOut, Picture, Scan, Unit, kind_of
from pipeline.data.tables import check_parquet, may_hold_pictures, read_parquet, scan_parquet
from pipeline.data.tars import read_tars, scan_tars

EXPECTED = "expected a folder with pictures, a .parquet or .tar file or a folder of those, their URL, or 'samples'"


@dataclass(frozen=True)
class Source:
    """A listed source."""

    key: str  # data.source | data.heldout_source, for messages
    place: str  # as configured
    kind: str  # folder | parquet | tar | samples
    folder: Location  # what `files` are relative to
    files: tuple[tuple[str, int], ...]  # (relative path, size in bytes), sorted
    rows: tuple[int, ...] = ()  # of each Parquet file
    left_out: tuple[tuple[str, str], ...] = ()  # (path, reason) of what may be pictures and is not in `files`

    def without_listing(self) -> "Source":
        """What reading needs; a listing may be long and need not travel to every worker."""
        return replace(self, files=(), rows=(), left_out=())

    def fingerprint(self) -> str:
        """sha256 of names, sizes and row counts; not of times, nor of where the files are."""
        return hashlib.sha256(json.dumps([self.kind, self.files, self.rows]).encode()).hexdigest()


def check_source(key: str, place: str, data: DataConfig) -> None:
    """See quickly whether a source can work; a large local folder is only walked up to its first picture.

    Raises:
        BadInput: empty, missing, of no known kind, without a picture or the columns that are named, or splits.
    """
    if place == "samples":
        samples.list_tiles(data.image_size)
        return
    location = _existing(key, place)
    if location.info().type == fs.FileType.File:
        open_source(key, place, data)
        return
    if not location.is_local:
        return
    first: dict[str, str] = {}
    for name, _ in location.walk():
        first.setdefault(kind_of(name), name)
        if "folder" in first:
            check_splits(key, place, _folders_with_pictures(location))
            return
    if "parquet" in first:
        check_parquet(location / first["parquet"], data)
    elif "tar" not in first:
        open_source(key, place, data)


def open_source(key: str, place: str, data: DataConfig) -> Source:
    """List a source completely; raises as `check_source`."""
    if place == "samples":
        photographs = samples.photograph_files().items()
        tiles = tuple((f"{name}@{data.image_size}", path.stat().st_size) for name, path in photographs)
        return Source(key, place, "samples", locate(""), tiles)
    location = _existing(key, place)
    info = location.info()
    left_out: LeftOut = []
    if info.type == fs.FileType.File:
        folder, everything = location.parent, [(location.name, info.size)]
    else:
        folder, everything = location, sorted(location.walk(left_out))
    kinds = _kinds_of(folder, everything)
    left_out += [(name, f"neither picture nor text; expected one of {', '.join(SOME)}") for name, _ in kinds["other"]]
    kind, files = _choose(folder, kinds, data, left_out)
    if not files:
        why = f"; of {len(left_out)} left out, {left_out[0][0]!r}: {left_out[0][1]}" if left_out else ""
        raise BadInput(f"{key} {place!r} holds no picture{why}; {EXPECTED}")
    rows = tuple(check_parquet(folder / name, data) for name, _ in files) if kind == "parquet" else ()
    return Source(key, place, kind, folder, tuple(files), rows, tuple(sorted(left_out)))


def scan(source: Source, data: DataConfig) -> Scan:
    """Look at every file and deal the pictures out to shards.

    Raises:
        BadInput: as the scan of the kind, or there is no picture in it.
    """
    names = [name for name, _ in source.files]
    if source.kind == "parquet":
        looked = scan_parquet(source.folder, names, data)
    elif source.kind == "tar":
        looked = scan_tars(source.folder, names, data)
    elif source.kind == "samples":
        looked = _scan_folder(samples.list_tiles(data.image_size), data)
    else:
        check_splits(source.key, source.place, {name.split("/")[0] if "/" in name else "" for name in names})
        looked = _scan_folder(names, data)
    if not looked.ranges:
        raise BadInput(f"{source.key} {source.place!r} holds no picture; {EXPECTED}")
    if source.kind in ("parquet", "tar"):
        looked.warnings += [f"{source.key}: {told}" for told in _splits_together(names)]
    looked.left_out += source.left_out
    return looked


def read(source: Source, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """The pictures of one range, in order, a few at a time in memory."""
    if source.kind == "samples":
        return (Picture(name, samples.read_tile(name, data.image_size), label) for name, label in units)
    if source.kind == "parquet":
        return read_parquet(source.folder, units, data)
    return (read_tars if source.kind == "tar" else _read_folder)(source.folder, units)


def _existing(key: str, place: str) -> Location:
    if not place:
        raise BadInput(f"{key} is empty; {EXPECTED}")
    location = locate(place, key)
    if location.info().type == fs.FileType.NotFound:
        raise BadInput(f"{key} {place!r} does not exist; {EXPECTED}")
    return location


def _kinds_of(folder: Location, files: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """The files of each kind: folder, parquet, tar, text, other."""
    found: dict[str, list[tuple[str, int]]] = {kind: [] for kind in ("folder", "parquet", "tar", "text", "other")}
    endings = Endings()
    for name, size in files:
        if kind_of(name) == "other" and size:
            endings.look(name, partial(_head, folder / name))
    for name, size in files:
        kind = kind_of(name)
        if kind == "other":
            kind = endings.kind(name) if size else "text"
        if kind != "hidden":
            found[kind].append((name, size))
    return found


def _head(place: Location) -> bytes:
    try:
        with place.open() as file:
            return file.read(HEAD_BYTES)
    except (FileNotFoundError, PermissionError):
        return b"\0"  # no text, as far as one can see


def _choose(
    folder: Location, kinds: dict[str, list[tuple[str, int]]], data: DataConfig, left_out: LeftOut
) -> tuple[str, list[tuple[str, int]]]:
    """The kind that holds the most pictures, and its files; a table about pictures is no Parquet file with pictures."""
    there = [kind for kind in ("folder", "parquet", "tar") if kinds[kind]]
    if len(there) < 2:
        return (there[0], kinds[there[0]]) if there else ("folder", [])
    counts = dict.fromkeys(there, 0)
    usable: dict[str, list[tuple[str, int]]] = {kind: [] for kind in there}
    without_labels = replace(data, label_column="", class_name_column="")
    for kind in there:
        for name, size in kinds[kind]:
            try:
                if kind == "parquet" and not may_hold_pictures(folder / name):
                    raise BadInput("a table without a column of pictures")
                pictures = sum(scan_tars(folder, [name], without_labels).rows) if kind == "tar" else 1
            except BadInput as problem:  # nor can it be the source
                left_out.append((name, str(problem)))
                continue
            usable[kind].append((name, size))
            counts[kind] += check_parquet(folder / name, data) if kind == "parquet" else pictures
    chosen = max(there, key=lambda kind: counts[kind])
    what = {"folder": "picture files", "parquet": "Parquet files", "tar": "tar files"}[chosen]
    reason = f"the {counts[chosen]} pictures in {what} are used; expected one kind, or this one as data.source"
    left_out += [(name, reason) for kind in there if kind != chosen for name, _ in usable[kind]]
    return chosen, usable[chosen]


# Folders of picture files; the first folder below the source is the class. Unit: [relative path, class or None].

TRAIN, HELD_OUT = {"train", "training"}, {"dev", "eval", "heldout", "test", "testing", "val", "valid", "validation"}


def check_splits(key: str, place: str, folders: Iterable[str]) -> None:
    """Refuse folders that are splits of a data set and not classes.

    Args:
        key: data.source | data.heldout_source, for the message.
        place: as configured.
        folders: directly below it, with pictures; "" is the place itself.
    """
    splits = {name.lower(): name for name in folders}
    train, held_out = sorted(splits.keys() & TRAIN), sorted(splits.keys() & HELD_OUT)
    if (train and held_out) or (splits and splits.keys() <= TRAIN | HELD_OUT):
        names = [splits[name] for name in [*train, *held_out]]
        advice = f"{key}={posixpath.join(place, names[0])}"
        if train and held_out and key == "data.source":
            advice += f" data.heldout_source={posixpath.join(place, splits[held_out[-1]])}"
        which = "which are splits and no classes" if len(names) > 1 else "which is a split and no class"
        raise BadInput(f"{key} {place!r} holds {' and '.join(names)}, {which}; expected {advice}")


def _folders_with_pictures(location: Location) -> list[str]:
    """What `check_splits` asks for, of a local folder, where it matters; each is walked up to its first picture."""
    entries = [entry.name for entry in os.scandir(location.path) if not entry.name.startswith(".")]
    if not {name.lower() for name in entries} & (TRAIN | HELD_OUT):
        return []
    loose = [""] if any(kind_of(name) == "folder" for name in entries) else []
    return loose + [
        name
        for name in entries
        if os.path.isdir(os.path.join(location.path, name))
        and any(kind_of(file) == "folder" for file, _ in (location / name).walk())
    ]


def _splits_together(names: Iterable[str]) -> list[str]:
    """A warning where Parquet or tar files are of several splits, as `train-0.parquet` beside `test-0.parquet`."""
    parts = {part.lower() for name in names for part in (name.split("/")[0], posixpath.basename(name))}
    words = {re.split(r"[\W\d_]", part)[0] for part in parts}
    train, held_out = words & TRAIN, words & HELD_OUT
    if not (train and held_out):
        return []
    both = " and ".join([*sorted(train), *sorted(held_out)])
    return [f"files of {both} are one source; expected a file or folder of each, data.source and data.heldout_source"]


def _scan_folder(names: Iterable[str], data: DataConfig) -> Scan:
    looked = Scan()
    units: list[Unit] = []
    below: set[str] = set()  # names in the first folder, as long as there is one only
    for name in names:
        first, *others = name.split("/")
        label = raw_label(first, name) if others else None
        looked.add_label(label)
        below.add(others[0] if len(others) > 1 else "")
        units.append([name, label])
    looked.add_ranges(units, data.rows_per_shard)
    if len(looked.names) == 1 and "" not in below and len(below) > 1:
        looked.warnings.append(
            f"all pictures are of one class, {min(looked.names)!r}, the only folder; expected that folder as "
            f"data.source if the classes are {', '.join(sorted(map(printable, below))[:3])}, ..."
        )
    return looked


def _read_folder(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """One file after the other; one that is gone or locked is a problem of that picture only."""
    for name, label in units:
        try:
            yield Picture(printable(name), (folder / name).read(), label)
        except (FileNotFoundError, PermissionError) as error:
            yield Picture(printable(name), b"", label, problem=f"file cannot be read ({type(error).__name__})")
