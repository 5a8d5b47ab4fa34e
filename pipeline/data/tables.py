"""Pictures in Parquet files, in a column of bytes or {bytes, path}, with labels in another one.

Unit: [file, first row, end row].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import Location, printable
from pipeline.data.labels import RawLabel, index_of, raw_label
from pipeline.data.scans import Picture, Scan, Unit

READ_ROWS = 64  # rows held in memory at a time


def check_parquet(place: Location, data: DataConfig) -> int:
    """Look at a file's footer; returns its number of rows.

    Raises:
        BadInput: not a Parquet file, without a usable column of pictures, with paths in the place of pictures, or
            without a label column that is named.
    """
    with _open_parquet(place) as file:
        names, where = file.schema_arrow.names, repr(place.path)
        if data.image_column not in names:
            raise BadInput(
                f"{where} has no column {data.image_column!r}; "
                f"expected data.image_column to be one of {', '.join(names)}"
            )
        kind = file.schema_arrow.field(data.image_column).type
        if not _is_of_bytes(kind):
            raise BadInput(
                f"column {data.image_column!r} of {where} holds {kind}; "
                "expected data.image_column to name bytes or {bytes, path}"
            )
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and _has_no_bytes(file, data.image_column):
            raise BadInput(
                f"column {data.image_column!r} of {where} holds paths and no bytes; "
                "expected the bytes of the pictures in it, or the folder of the pictures as data.source"
            )
        for key in ("label_column", "class_name_column"):
            named = getattr(data, key)
            if named not in ("", getattr(DataConfig, key), *names):
                raise BadInput(
                    f"{where} has no column {named!r}; expected data.{key} to be one of {', '.join(names)}, "
                    f"or data.{key}= for none"
                )
        return file.metadata.num_rows


def may_hold_pictures(place: Location) -> bool:
    """False of a table about pictures, without a column of bytes; raises BadInput where it cannot be read."""
    with _open_parquet(place) as file:
        return any(_is_of_bytes(column.type) for column in file.schema_arrow)


def _is_of_bytes(kind: pa.DataType) -> bool:
    """Bytes, or a structure that has some under `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _has_no_bytes(file: pq.ParquetFile, column: str) -> bool:
    """True where there are rows and the statistics say that none has bytes."""
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        chunks = (row_group.column(number) for number in range(row_group.num_columns))
        chunk = next((chunk for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"), None)
        if chunk is None or not chunk.statistics or chunk.statistics.null_count != row_group.num_rows:
            return False
    return file.metadata.num_rows > 0


def scan_parquet(folder: Location, names: Sequence[str], data: DataConfig) -> Scan:
    """Count rows by the footers and read the label columns only."""
    looked = Scan()
    space = 0  # rows that still fit into the last range
    others: set[str] = set()  # columns that are neither picture nor label
    texts: set[str] = set()  # of the label column
    for name in names:
        rows = check_parquet(folder / name, data)
        others |= _scan_labels(folder / name, data, looked, texts)
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
    numbers = {text: index_of(text) for text in texts}
    for text, number in numbers.items():
        looked.add_label(text if None in numbers.values() else number)
    if others and not looked.names and not looked.indexed and (data.label_column or data.class_name_column):
        looked.warnings.append(
            f"no picture has a label: {data.label_column!r} and {data.class_name_column!r} are no columns, or empty; "
            f"expected data.label_column to name the one of {', '.join(sorted(others))} that holds it, if one does"
        )
    return looked


def read_parquet(folder: Location, units: list[Unit], data: DataConfig) -> Iterator[Picture]:
    """Read rows by row groups, a few at a time. The id is `file.parquet#row`."""
    for name, start, stop in units:
        with _open_parquet(folder / name) as file:
            for row, values in _rows_of(file, start, stop, data):
                picture, problem = values[data.image_column], ""
                if isinstance(picture, dict):
                    if not picture["bytes"] and picture.get("path"):
                        problem = f"the row holds the path {picture['path']!r} and no bytes"
                    picture = picture["bytes"]
                label = _row_label(values, data, f"row {row} of {name!r}")
                yield Picture(printable(f"{name}#{row}"), picture or b"", label, problem)


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


def _scan_labels(place: Location, data: DataConfig, looked: Scan, texts: set[str]) -> set[str]:
    """Note every label of a file, texts of the label column aside; returns the columns of neither picture nor label."""
    with _open_parquet(place) as file:
        columns = _label_columns(file, data)
        for group in range(file.num_row_groups if columns else 0):
            table = file.read_row_group(group, columns=columns)
            with suppress(pa.ArrowNotImplementedError, pa.ArrowInvalid):  # of lists and the like Arrow makes no groups
                table = table.group_by(columns).aggregate([])
            for values in table.to_pylist():
                label = _row_label(values, data, f"column {columns[0]!r} of {place.path!r}")
                if isinstance(label, str) and columns[0] == data.label_column:
                    texts.add(label)
                else:
                    looked.add_label(label, _class_name(values.get(data.class_name_column)))
        return set(file.schema_arrow.names) - {data.image_column, *columns}


def _label_columns(file: pq.ParquetFile, data: DataConfig) -> list[str]:
    """The label columns that the file has."""
    names = dict.fromkeys((data.label_column, data.class_name_column))
    return [name for name in names if name in file.schema_arrow.names]


def _row_label(values: dict[str, Any], data: DataConfig, where: str) -> RawLabel:
    """The label column's value if there is one, else the class name."""
    column = data.label_column if data.label_column in values else data.class_name_column
    return raw_label(values.get(column), where, "label_column" if column == data.label_column else "class_name_column")


def _class_name(value: Any) -> str:
    """The name of a class that has an index; "" where the value is not text."""
    with suppress(BadInput):
        name = raw_label(value, "")
        return name if isinstance(name, str) else ""
    return ""


@contextmanager
def _open_parquet(place: Location) -> Iterator[pq.ParquetFile]:
    """Damage shows where it is met: in the footer, in a page, in a text that is not UTF-8."""
    try:
        with place.open() as raw, pq.ParquetFile(raw) as file:
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(
            f"{place.path!r} cannot be read as Parquet ({' '.join(str(error).split())}); expected a whole Parquet file"
        ) from None
