"""Writing one shard, a row group at a time: memory stays flat and the file appears whole or not at all."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import Shard
from pipeline.data.shards import ROW_GROUP_ROWS, SCHEMA
from pipeline.paths import sha256_file


class ShardWriter:
    """Adds rows of `SCHEMA` to a file; equal rows give equal bytes under the same pyarrow.

    As a context: `shard` is set when it ends well; after an error, or without rows, no file is left.

    Args:
        folder: of the manifest; exists, on this machine's file system.
        file: the shard's name, relative to `folder`.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.shard: Shard | None = None
        self._folder, self._file = folder, file
        self._path = folder / file
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._rows: list[dict[str, Any]] = []
        self._written = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP_ROWS:
            self._write_group()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._rows:
            self._write_group()
        if self._writer is None:
            return
        try:
            self._writer.close()
            if kind is None:
                with open(self._temporary, "rb") as file:
                    os.fsync(file.fileno())
                self.shard = Shard(self._file, self._written, sha256_file(self._temporary))
                os.replace(self._temporary, self._path)
        finally:  # also where closing fails: on full storage, what is half written would keep others from their room
            self._temporary.unlink(missing_ok=True)

    def _write_group(self) -> None:
        if self._writer is None:
            # Pictures are compressed already. Statistics and dictionaries would only repeat the columns.
            codecs = {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names}
            self._writer = pq.ParquetWriter(
                self._temporary, SCHEMA, compression=codecs, use_dictionary=["label_name"], write_statistics=False
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA), row_group_size=ROW_GROUP_ROWS)
        self._written += len(self._rows)
        self._rows = []
