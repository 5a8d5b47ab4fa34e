"""WebDataset: uncompressed tar files whose members belong together up to the first dot of their name.

Unit: [file, key, offset, size, raw label]: where the picture's bytes are, so that any range can be read on its own. The
label is in `.cls` (index or name) or `.json` (under `data.label_column` or `data.class_name_column`).
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location
from pipeline.data.listing import MAX_CLASSES, Picture, RawLabel, Scan, Unit
from pipeline.data.pictures import extensions

BUFFER_BYTES = 2**20  # remote stores charge by the request: headers of small members arrive many at a time


def scan(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Read the headers and labels of every tar file once.

    Raises:
        BadInput: a file is not a whole, uncompressed tar.
    """
    found = Scan()
    units: list[Unit] = []
    for name in names:
        try:
            units += _scan_file(folder / name, name, data, found)
        except tarfile.TarError as error:
            raise BadInput(
                f"{(folder / name).path!r} cannot be read as tar ({error}); expected a whole, uncompressed tar file"
            ) from None
    found.add_ranges(units, data.rows_per_shard)
    return found


def read(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """Read the recorded places. The id is `file.tar#key`."""
    for name, members in groupby(units, key=lambda unit: unit[0]):
        with (folder / name).open() as file:
            for _, key, offset, size, label in members:
                file.seek(offset)
                yield Picture(f"{name}#{key}", file.read(size), label)


def _scan_file(place: Location, name: str, data: DataConfig, found: Scan) -> list[Unit]:
    units = []
    with ExitStack() as stack:
        file = stack.enter_context(io.BufferedReader(place.open(), BUFFER_BYTES))
        archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        for key, sample in groupby((member for member in archive if member.isreg()), key=_key):
            picture, label, label_name = None, None, ""
            for member in sample:
                ending = member.name.removeprefix(key).lower()
                if ending in (".cls", ".json"):
                    label, label_name = _read_label(archive, member, data)
                elif picture is None and "." + ending.rpartition(".")[2] in extensions():
                    picture = member
            if picture is not None:
                found.add_label(label, label_name)
                units.append([name, key, picture.offset_data, picture.size, label])
        file.seek(archive.offset)  # where tarfile stopped: at the zeros that end a tar or, silently, at a broken header
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of archive")
    return units


def _key(member: tarfile.TarInfo) -> str:
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
