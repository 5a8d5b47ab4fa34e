"""Tokens as Arrow tables and Parquet files: the full ranked stream, which can be cut again at every threshold.

A row holds an image's patch tokens in the order of its ranking. Scores are whole numbers of score units, but stored
in the score's unit, which the metadata name; up to 2^24 score units are exact in float32.

Shapes: B images, M global tokens, N patch positions, K codebook entries.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.core.errors import BadInput
from pipeline.core.files import locate
from pipeline.tokens.token_manifest import METADATA, Stream, TokenFile, stream_from_dict
from tatok_model.filtering_rules import SCORES, Score
from tatok_model.tokens import Ranking, Tokens

ROW_GROUP_ROWS = 512  # what random access reads at least: half a megabyte at N = 256
INTEGERS, NUMBERS = (pa.list_(pa.field("element", kind())) for kind in (pa.int32, pa.float32))  # as Parquet names it
SCHEMA = pa.schema(
    {
        "id": pa.string(),  # as in the shards
        "label": pa.int32(),  # -1: none
        "global_indices": INTEGERS,  # M codebook entries
        "patch_indices": INTEGERS,  # N codebook entries, the most informative first
        "patch_positions": INTEGERS,  # their positions in raster order
        "scores": NUMBERS,  # theirs, in the score's unit
    }
)


def to_table(tokens: Tokens, ids: Sequence[str], labels: np.ndarray, stream: Stream) -> pa.Table:
    """Rows of `SCHEMA`, with `stream` in the metadata.

    Args:
        tokens: B images as `TaTok.rank` returns them, or as `TaTok.encode` does where there are no patch tokens.
        ids: B names of pictures.
        labels: (B,) class indices, -1 where there is none.
        stream: describes the tokens.

    Raises:
        ValueError: tokens that are cut, or ranked otherwise than in the stream.
    """
    ranking = tokens.ranking
    ranked = (ranking.score, ranking.rounds) if ranking else ("", 0)
    if ranked != (stream.score, stream.rounds):
        raise ValueError(f"tokens are ranked by {ranked}; expected {(stream.score, stream.rounds)}, as the stream says")
    whole = bool((tokens.kept_mask == (ranking is not None)).all())  # without patch tokens the mask is all False
    if tokens.global_counts is not None or not whole:
        raise ValueError("tokens are cut; expected all of them: a stream holds the full ranking")
    if ranking is None:
        codes = order = units = torch.zeros(len(tokens), 0, dtype=torch.int64)
    else:
        codes, order, units = tokens.patch_indices.gather(1, ranking.order), ranking.order, ranking.score_units
    columns = {
        "id": pa.array(ids, pa.string()),
        "label": pa.array(np.asarray(labels, dtype=np.int32)),
        "global_indices": _lists(tokens.global_indices, INTEGERS),
        "patch_indices": _lists(codes, INTEGERS),
        "patch_positions": _lists(order, INTEGERS),
        "scores": _lists(units.double() / (ranking.resolution if ranking else 1), NUMBERS),
    }
    return pa.table(columns, SCHEMA.with_metadata(stream.metadata()))


def from_table(table: pa.Table) -> tuple[Tokens, list[str], np.ndarray]:
    """Inverse of `to_table`: tokens with their ranking and every patch token kept, ids, (B,) int32 labels.

    Raises:
        BadInput: other columns, missing or foreign metadata, or values that such a stream cannot have.
    """
    stream = stream_in(table, "the table")
    if "score_bits" in table.column_names:  # version 1
        table = table.rename_columns({"score_bits": "scores"})
    if not table.schema.equals(SCHEMA):
        raise BadInput(f"columns are {_columns(table.schema)}; expected {_columns(SCHEMA)}")
    ranked = stream.patch_positions if stream.score else 0
    globals_ = _matrix(table, "global_indices", stream.global_tokens)
    codes, order = _matrix(table, "patch_indices", ranked), _matrix(table, "patch_positions", ranked)
    score = SCORES[stream.score] if stream.score else Score()
    units = _matrix(table, "scores", ranked).astype(np.float64) * score.resolution
    for name, values in (("global_indices", globals_), ("patch_indices", codes)):
        if values.size and not 0 <= values.min() <= values.max() < stream.codebook_size:
            raise BadInput(f"{name} hold {values.min()} to {values.max()}; expected 0 to {stream.codebook_size - 1}")
    if not np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(ranked), order.shape)):
        raise BadInput(f"patch_positions are no permutation; expected 0 to {ranked - 1}, each once in every row")
    if not ((units >= 0) & (units == np.rint(units)) & np.isfinite(units)).all():
        raise BadInput(
            "scores are not what a ranking gives; "
            f"expected whole numbers of 1/{score.resolution} {score.unit}, 0 or more"
        )
    tokens = _tokens(stream, *(torch.from_numpy(values.astype(np.int64)) for values in (globals_, codes, order, units)))
    return tokens, table.column("id").to_pylist(), table.column("label").to_numpy()


def stream_in(table: pa.Table, what: str) -> Stream:
    """The stream that a table's metadata describes; `what` names it in messages.

    Raises:
        BadInput: no metadata of ours, or as `stream_from_dict`.
    """
    try:
        values = json.loads((table.schema.metadata or {})[METADATA])
    except (KeyError, ValueError):
        values = None
    return stream_from_dict(values, f"metadata of {what}")


def to_parquet(table: pa.Table) -> bytes:
    """The bytes of a token file; equal tables give equal bytes under the same pyarrow."""
    file = io.BytesIO()
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "compression": "ZSTD"}
    pq.write_table(table.combine_chunks(), file, row_group_size=ROW_GROUP_ROWS, **options)
    return file.getvalue()


def read_token_file(folder: str, file: TokenFile, stream: Stream) -> pa.Table:
    """The rows of one file that `tokens.json` lists.

    Args:
        folder: of the manifest, a path or URL.
        file: of the manifest.
        stream: of the manifest.

    Raises:
        BadInput: the file is missing, truncated or changed, or is of another stream.
    """
    place = locate(folder) / file.file
    try:
        data = place.read()
    except OSError:
        raise BadInput(f"token file {place.path!r} is missing; expected what tokens.json lists") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise BadInput(f"token file {place.path!r} does not match its checksum; expected it whole, as it was written")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise BadInput(f"token file {place.path!r} cannot be read ({' '.join(str(error).split())})") from None
    if stream_in(table, f"token file {place.path!r}") != stream:
        raise BadInput(f"token file {place.path!r} is of another stream; expected the one that tokens.json describes")
    if len(table) != file.rows:
        raise BadInput(f"token file {place.path!r} has {len(table)} rows; expected {file.rows}")
    return table


def _tokens(
    stream: Stream, globals_: torch.Tensor, codes: torch.Tensor, order: torch.Tensor, units: torch.Tensor
) -> Tokens:
    """Tokens from (B, M) entries and (B, N) entries, positions and score units in ranking order, or (B, 0)."""
    shape = (len(globals_), stream.patch_positions)
    patches = torch.zeros(shape, dtype=torch.int64)
    if not stream.score:
        return Tokens(globals_, patches, torch.zeros(shape, dtype=torch.bool))
    ranking = Ranking(order, units, stream.score, stream.rounds, stream.line)
    return Tokens(globals_, patches.scatter(1, order, codes), torch.ones(shape, dtype=torch.bool), ranking)


def lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType = INTEGERS) -> pa.Array:
    """An Arrow array of lists with these lengths from their concatenated numbers."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values).cast(kind.value_type), type=kind)


def _lists(values: torch.Tensor, kind: pa.DataType) -> pa.Array:
    """(B, L) numbers as an Arrow array of B lists."""
    return lists(values.cpu().numpy().ravel(), np.full(len(values), values.shape[1]), kind)


def _matrix(table: pa.Table, name: str, length: int) -> np.ndarray:
    """A column of B lists as (B, length) numbers."""
    column = table.column(name).combine_chunks()
    sizes = column.value_lengths().to_numpy(zero_copy_only=False)
    if column.null_count or not (sizes == length).all():
        raise BadInput(f"{name} has rows of other lengths; expected {length} in every row")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), length)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
