"""Paths and URLs behind one interface: a local path or any file system pyarrow knows (s3://, gs://, file://, ...)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import BadInput


@dataclass(frozen=True)
class Location:
    """A file or folder on a file system."""

    filesystem: Any
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}" if name else self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> "Location":
        """The folder that holds this."""
        return Location(self.filesystem, str(PurePosixPath(self.path).parent))

    @property
    def is_local(self) -> bool:
        """True on this machine's own file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def info(self) -> fs.FileInfo:
        """Type and size; the type says when nothing is there."""
        return self.filesystem.get_file_info(self.path)

    def open(self) -> Any:
        """A seekable file object for reading bytes."""
        return self.filesystem.open_input_file(self.path)

    def read(self) -> bytes:
        """All bytes of a file."""
        with self.open() as file:
            return file.read()

    def walk(self) -> Iterator[tuple[str, int]]:
        """(path relative to this folder, size in bytes) of every file below, in no order."""
        selector = fs.FileSelector(self.path, recursive=True)
        prefix = len(self.path.rstrip("/")) + 1
        for info in self.filesystem.get_file_info(selector):
            if info.type == fs.FileType.File:
                yield info.path[prefix:], info.size


def locate(place: str) -> Location:
    """The location that a path or URL names.

    Raises:
        BadInput: a URL whose scheme pyarrow does not know, or that is malformed.
    """
    if "://" not in place:
        return Location(fs.LocalFileSystem(), place)
    try:
        filesystem, path = fs.FileSystem.from_uri(place)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BadInput(
            f"{place!r} is not understood ({' '.join(str(error).split())}); expected a path or a URL "
            "such as s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from None
    return Location(filesystem, path)
