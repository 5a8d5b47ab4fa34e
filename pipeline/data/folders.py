"""Folders of picture files; the first folder below the source is the class. Unit: [relative path, class or None]."""

from collections.abc import Iterable, Iterator

from pipeline.config import DataConfig
from pipeline.data.listing import Picture, Scan, Unit
from pipeline.data.locations import Location


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
