"""Pictures in WebDataset archives: uncompressed tar files whose members belong together up to the first dot of a name.

Members of a key may lie anywhere in the file. The label is in `.cls` (index or name) or `.json` (under
`data.label_column` or `data.class_name_column`). Unit: [file, key, offset, size, raw label]: where the picture's bytes
are, so that any range can be read on its own.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location, printable
from pipeline.data.labels import RawLabel, index_of, raw_label
from pipeline.data.scans import HEAD_BYTES, Endings, Picture, Scan, Unit, kind_of

BUFFER_BYTES = 2**20  # remote stores charge by the request: headers of small members arrive many at a time
MOST_LINKS = 40  # from a link to what it means


def scan_tars(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Read the headers and labels of every tar file once; raises BadInput where one is not whole and uncompressed."""
    looked = Scan()
    units: list[Unit] = []
    for name in names:
        try:
            units += _TarScan(name, data, looked).units_of(folder / name)
        except tarfile.TarError as error:
            raise BadInput(
                f"{(folder / name).path!r} cannot be read as tar ({error}); expected a whole, uncompressed tar file"
            ) from None
    looked.add_ranges(units, data.rows_per_shard)
    folders = {posixpath.dirname(key) for _, key, *_ in units}
    if len(folders) > 1 and not looked.names and not looked.indexed:
        some = ", ".join(sorted(map(printable, folders))[:3])
        looked.warnings.append(
            "no picture has a label, as there is no .cls or .json; expected the tar files unpacked, "
            f"if {some}, ... are the classes"
        )
    return looked


def read_tars(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """Read the recorded places. The id is `file.tar#key`."""
    for name, members in groupby(units, key=lambda unit: unit[0]):
        with (folder / name).open() as file:
            for _, key, offset, size, label in members:
                file.seek(offset)
                yield Picture(printable(f"{name}#{key}"), file.read(size), label)


class _TarScan:
    """What one tar file holds.

    Args:
        name: of the file, in its source.
        data: which entries of `.json` members are labels.
        looked: where labels, warnings and what is left out are noted.
    """

    def __init__(self, name: str, data: DataConfig, looked: Scan) -> None:
        self._name, self._data, self._looked = name, data, looked
        self._files: dict[str, tarfile.TarInfo] = {}  # by their names: of several with one name the last one counts
        self._links: list[tarfile.TarInfo] = []
        self._labels: dict[str, dict[str, tuple[RawLabel, str]]] = {}  # stem: ending: (label, name of a class index)
        self._endings = Endings()

    def units_of(self, place: Location) -> list[Unit]:
        """The pictures, in the order of their keys."""
        with ExitStack() as stack:
            file = stack.enter_context(io.BufferedReader(place.open(), BUFFER_BYTES))
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            for member in archive:
                if member.isdir() or kind_of(member.name) == "hidden":
                    continue
                if member.islnk() or member.issym():
                    self._links.append(member)
                elif member.isreg():
                    self._add(archive, member.name, member)
                else:
                    self._leave_out(member.name, "neither file nor folder")
            file.seek(archive.offset)  # here tarfile stopped: at the zeros of the end or, silently, at a broken header
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of archive")
            self._follow_links(archive)
        keys: dict[str, list[str]] = {}
        for name in self._files:
            keys.setdefault(_tar_key(name), []).append(name)
        return [unit for key, names in keys.items() for unit in self._units_of_key(key, names)]

    def _add(self, archive: tarfile.TarFile, name: str, member: tarfile.TarInfo) -> None:
        if name in self._files and kind_of(name) == "folder":
            self._leave_out(name, "a later member of the archive has the same name")
        self._files[name] = member
        stem, ending = posixpath.splitext(name)
        if ending.lower() in (".cls", ".json"):
            file = archive.extractfile(member)
            content = file.read() if file else b""
            self._labels.setdefault(stem, {})[ending.lower()] = self._label_of(name, content)
        elif kind_of(name) == "other" and member.size:
            file = archive.extractfile(member)
            self._endings.look(name, lambda: file.read(HEAD_BYTES) if file else b"")

    def _follow_links(self, archive: tarfile.TarFile) -> None:
        """Take what a link means under the link's name; what it means may come after it."""
        links = {posixpath.normpath(link.name): _target(link) for link in self._links}
        files = {posixpath.normpath(name): member for name, member in self._files.items()}
        for link in self._links:
            target = _target(link)
            for _ in range(MOST_LINKS):
                target = links.get(target, target)
            if target in files:
                self._add(archive, link.name, files[target])
            else:
                self._leave_out(link.name, f"link to {printable(link.linkname)!r}, which is no file of the archive")

    def _units_of_key(self, key: str, names: list[str]) -> list[Unit]:
        """Usually one. Where all the pictures of a key have more dots in their names, each is one of its own."""
        pictures = [name for name in names if kind_of(name) == "folder"]
        if not pictures:
            kinds = {name: self._endings.kind(name) for name in names if self._files[name].size}
            pictures = [name for name in kinds if kinds[name] == "folder"]
            for name in kinds if not pictures else ():
                if kinds[name] == "other":
                    self._leave_out(name, "its key has no picture, and this is neither picture nor text")
        plain = [name for name in pictures if posixpath.splitext(name)[0] == key]
        chosen: dict[str, str] = {}
        for name in plain or pictures:
            chosen.setdefault(key if plain or len(pictures) == 1 else posixpath.splitext(name)[0], name)
        for name in pictures:
            if name not in chosen.values():
                self._leave_out(name, "another picture has this key; expected one a key")
        return [self._unit(stem, key, name) for stem, name in chosen.items()]

    def _unit(self, stem: str, key: str, name: str) -> Unit:
        """A picture with the label of its own name, else of its key."""
        labels = self._labels.get(posixpath.splitext(name)[0]) or self._labels.get(key, {})
        (label, _), (other, class_name) = labels.get(".cls", (None, "")), labels.get(".json", (None, ""))
        if isinstance(label, int) and isinstance(other, int) and label != other:
            raise BadInput(
                f"{self._name}#{printable(key)} has the label {label} in .cls and {other} in .json; expected one label"
            )
        label = other if label is None else label
        self._looked.add_label(label, class_name)
        member = self._files[name]
        return [self._name, stem, member.offset_data, member.size, label]

    def _label_of(self, name: str, content: bytes) -> tuple[RawLabel, str]:
        """(label, name of a class index); (None, "") if the file says nothing that we understand."""
        text = content.decode("utf-8-sig", errors="backslashreplace").strip()
        where = repr(f"{self._name}#{name}")
        if not name.lower().endswith(".json"):
            return _as_index(raw_label(text, where)), ""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError):
            self._looked.warnings.append(f"{where} is no JSON; its picture has no label from it")
            return None, ""
        if not isinstance(values, dict):
            return None, ""
        class_name = values.get(self._data.class_name_column)
        class_name = printable(class_name) if isinstance(class_name, str) else ""
        label = _as_index(raw_label(values.get(self._data.label_column), f"{self._data.label_column!r} of {where}"))
        return (label, class_name) if label is not None else (class_name or None, "")

    def _leave_out(self, name: str, reason: str) -> None:
        self._looked.left_out.append((f"{self._name}#{name}", reason))


def _as_index(label: RawLabel) -> RawLabel:
    """A text that is an index as one."""
    index = index_of(label) if isinstance(label, str) else None
    return label if index is None else index


def _target(link: tarfile.TarInfo) -> str:
    """The name of what a link means: of a hard link in the archive, of a symbolic one from its own folder."""
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _tar_key(name: str) -> str:
    folder, slash, name = name.rpartition("/")
    return folder + slash + name.partition(".")[0]
