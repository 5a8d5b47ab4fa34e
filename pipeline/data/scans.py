"""What a look at a source gives, whatever kind it is: pictures, where they are, and what is left out; what a file is.

A file's ending says what it is, or the first bytes of a few files of that ending. A *unit* is a small JSON list that
says where pictures are; each kind of source has its own. Of raw labels see `labels`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.data.labels import RawLabel
from pipeline.data.pictures import extensions

Unit = list[Any]
LeftOut = list[tuple[str, str]]  # (path, reason)
SOME = (".png", ".jpg", ".webp", ".parquet", ".tar")
MAGIC = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")  # formats with first bytes of their own
LOOKS = 8  # files of an ending that are looked into: a store charges by the request, and there may be a text a picture
HEAD_BYTES = 512


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
    left_out: LeftOut = field(default_factory=list)  # what may be pictures and is not in `ranges`
    warnings: list[str] = field(default_factory=list)  # sentences

    def add_label(self, label: RawLabel, name: str = "") -> None:
        """Note that a label occurs; `name` is that of a class index.

        Raises:
            BadInput: the index has another name.
        """
        if isinstance(label, str):
            self.names.add(label)
        elif label is not None and label >= 0:
            known = self.indexed.get(label, "")
            if known and name and known != name:
                raise BadInput(
                    f"class {label} is {known!r} and {name!r}; expected one name, or data.class_name_column= for none"
                )
            self.indexed[label] = known or name

    def add_ranges(self, units: Sequence[Unit], rows_per_range: int) -> None:
        """Deal out units of one picture each."""
        for start in range(0, len(units), rows_per_range):
            self.ranges.append(list(units[start : start + rows_per_range]))
            self.rows.append(len(self.ranges[-1]))


def ending_of(name: str) -> str:
    """`.png` of `a/b.PNG`."""
    return os.path.splitext(name)[1].lower()  # pathlib takes ten times as long, and there may be millions


def kind_of(name: str) -> str:
    """`folder` (a picture file), parquet, tar, `hidden`, or `other`, by the name alone."""
    if (name.startswith(".") or "/." in name) and any(part.strip(".") and part[0] == "." for part in name.split("/")):
        return "hidden"  # not for `./` and `../`, which tar writes
    ending = ending_of(name)
    if ending in (".parquet", ".tar"):
        return ending[1:]
    return "folder" if ending in extensions() else "other"


def _of_bytes(head: bytes) -> str:
    """`folder` (a picture), `text` or `other`."""
    if b"\0" not in head:
        return "text"
    accepts = [Image.OPEN[name][1] for name in MAGIC]
    return "folder" if any(accept and accept(head[:16]) for accept in accepts) else "other"


class Endings:
    """What files of an unknown ending are: pictures if one of the first few is one, else texts if all are."""

    def __init__(self) -> None:
        self._seen: dict[str, list[str]] = {}

    def look(self, name: str, head: Callable[[], bytes]) -> None:
        """Look into a file, unless enough of its ending were looked into."""
        seen = self._seen.setdefault(ending_of(name), [])
        if len(seen) < LOOKS:
            seen.append(_of_bytes(head()))

    def kind(self, name: str) -> str:
        """`folder` (a picture), `text` or `other`."""
        ending = ending_of(name)
        drawing = ending == ".svg" or ending in Image.EXTENSION  # a text, but of something to see
        return next(
            (kind for kind in ("folder", "other") if kind in self._seen.get(ending, ())), "other" if drawing else "text"
        )
