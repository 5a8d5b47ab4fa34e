"""What the kinds of sources have in common: the pictures they give and what a look at them finds.

A *unit* is a small JSON list that says where pictures are, e.g. `["cat/1.jpg", "cat"]`; each kind of source has its
own. A *raw label* is a class index, a class name or None; the index of a name is known once everything was looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.config import DataConfig
from pipeline.core.files import Location

Unit = list[Any]
RawLabel = int | str | None
MAX_CLASSES = 100_000  # a larger "class index" is no class index


@dataclass(frozen=True)
class Picture:
    """One picture as found."""

    id: str  # unique in its source
    data: bytes
    label: RawLabel
    problem: str = ""  # why there are no bytes


@dataclass
class Scan:
    """What a look at a source found, without decoding pictures."""

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


# Folders of picture files; the first folder below the source is the class. Unit: [relative path, class or None].


def scan(names: Iterable[str], data: DataConfig) -> Scan:
    """Look at a sorted list of relative paths."""
    found = Scan()
    units = [[name, name.split("/")[0] if "/" in name else None] for name in names]
    for _, label in units:
        found.add_label(label)
    found.add_ranges(units, data.rows_per_shard)
    return found


def read(folder: Location, units: list[Unit]) -> Iterator[Picture]:
    """Read the files one after the other; one that is gone or locked is a problem of that picture only."""
    for name, label in units:
        try:
            yield Picture(name, (folder / name).read(), label)
        except (FileNotFoundError, PermissionError) as error:
            yield Picture(name, b"", label, problem=f"file cannot be read ({type(error).__name__})")
