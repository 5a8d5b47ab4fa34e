"""Parquet files with pictures in a column of bytes or {bytes, path}. Unit: [file, first row, end row]."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location
from pipeline.data.listing import MAX_CLASSES, Picture, RawLabel, Scan, Unit

READ_ROWS = 64  # rows held in memory at a time


def check(place: Location, data: DataConfig) -> int:
    """Look at a file's footer; returns its number of rows.

    Raises:
        BadInput: not a Parquet file, or without a usable column of pictures.
    """
    with _open(place) as file:
        schema = file.schema_arrow
        if data.image_column not in schema.names:
            raise BadInput(
                f"{place.path!r} has no column {data.image_column!r}; "
                f"expected data.image_column to be one of {', '.join(schema.names)}"
            )
        kind = schema.field(data.image_column).type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise BadInput(
                f"column {data.image_column!r} of {place.path!r} holds {kind}; "
                "expected data.image_column to name bytes or {bytes, path}"
            )
        return file.metadata.num_rows


def scan(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Count rows by the footers and read the label columns only."""
    found = Scan()
    space = 0  # rows that still fit into the last range
    for name in names:
        rows = check(folder / name, data)
        _scan_labels(folder / name, data, found)
        start = 0
        while start < rows:
            if space == 0:
                found.ranges.append([])
                found.rows.append(0)
                space = data.rows_per_shard
            stop = min(rows, start + space)
            found.ranges[-1].append([name, start, stop])
            found.rows[-1] += stop - start
            space -= stop - start
            start = stop
    return found


def read(folder: Location, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """Read rows by row groups, a few at a time. The id is `file.parquet#row`."""
    for name, start, stop in units:
        with _open(folder / name) as file, _whole(folder / name):
            for row, values in _rows(file, start, stop, data):
                picture = values[data.image_column]
                if isinstance(picture, dict):
                    picture = picture["bytes"]
                yield Picture(f"{name}#{row}", picture or b"", _label(values, data))


def _rows(file: pq.ParquetFile, start: int, stop: int, data: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _scan_labels(place: Location, data: DataConfig, found: Scan) -> None:
    with _open(place) as file, _whole(place):
        columns = _label_columns(file, data)
        if not columns:
            return
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            for values in table.group_by(columns).aggregate([]).to_pylist():
                label = _label(values, data)
                if isinstance(label, int) and label >= MAX_CLASSES:
                    raise BadInput(
                        f"column {data.label_column!r} of {place.path!r} holds {label}; "
                        f"expected class indices below {MAX_CLASSES}"
                    )
                found.add_label(label, values.get(data.class_name_column) or "")


def _label_columns(file: pq.ParquetFile, data: DataConfig) -> list[str]:
    """Those of the two label columns that are there and hold class indices or names."""
    usable = []
    for name in dict.fromkeys((data.label_column, data.class_name_column)):
        kind = file.schema_arrow.field(name).type if name in file.schema_arrow.names else pa.null()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            usable.append(name)
    return usable


def _label(values: dict[str, Any], data: DataConfig) -> RawLabel:
    """The label column's value if there is one, else the class name."""
    column = data.label_column if data.label_column in values else data.class_name_column
    return values.get(column)


def _open(place: Location) -> pq.ParquetFile:
    with _whole(place):
        return pq.ParquetFile(place.open())


@contextmanager
def _whole(place: Location) -> Iterator[None]:
    """Damage shows where it is met: in the footer, in a page, in a text that is not UTF-8."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(
            f"{place.path!r} cannot be read as Parquet ({' '.join(str(error).split())}); expected a whole Parquet file"
        ) from None
