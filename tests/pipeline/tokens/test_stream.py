"""Tokens as tables and files: nothing is lost, and nothing foreign is taken for tokens."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import BadInput
from pipeline.tokens.stream import SCHEMA, from_table, read_token_file, to_parquet, to_table
from pipeline.tokens.token_manifest import METADATA, Stream, TokenFile
from tatok_model.filtering_rules import SCORES, QualityLine
from tatok_model.tokens import Ranking, Tokens

STREAM = Stream("surprisal", 1, "0" * 64, 2, 16, 16, 16, 4)


def made_tokens(seed: int, batch: int = 3, stream: Stream = STREAM) -> Tokens:
    """Random ones as `TaTok.rank` gives them."""
    draw = torch.Generator().manual_seed(seed)
    n = stream.patch_positions
    globals_ = torch.randint(stream.codebook_size, (batch, stream.global_tokens), generator=draw)
    patches = torch.randint(stream.codebook_size, (batch, n), generator=draw)
    order = torch.rand(batch, n, generator=draw).argsort(dim=1)
    units = torch.randint(2**24, (batch, n), generator=draw)
    ranking = Ranking(order, units, stream.score, stream.rounds)
    return Tokens(globals_, patches, torch.ones(batch, n, dtype=torch.bool), ranking)


def made_table(seed: int = 0, batch: int = 3) -> pa.Table:
    return to_table(made_tokens(seed, batch), [str(i) for i in range(batch)], np.arange(batch) - 1, STREAM)


def changed(name: str, values: list[list[float]]) -> pa.Table:
    """A table of one row, of which one column is another."""
    table = made_table(batch=1)
    return table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))


def assert_same(found: Tokens, expected: Tokens) -> None:
    for name in ("global_indices", "patch_indices", "kept_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert (found.ranking is None) == (expected.ranking is None)
    if found.ranking is not None and expected.ranking is not None:
        assert torch.equal(found.ranking.order, expected.ranking.order)
        assert torch.equal(found.ranking.score_units, expected.ranking.score_units)
        assert (found.ranking.score, found.ranking.rounds) == (expected.ranking.score, expected.ranking.rounds)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(0, 5),
    m=st.integers(0, 3),
    side=st.integers(1, 4),
    k=st.integers(2, 2**17),
    score=st.sampled_from(["distortion", "error", "surprisal", "entropy", "pixel_entropy", "grid"]),
)
def test_a_round_trip_changes_nothing(seed: int, batch: int, m: int, side: int, k: int, score: str) -> None:
    stream = Stream(score, 1, "0" * 64, m, side**2, k, 4 * side, 4)
    tokens = made_tokens(seed, batch, stream)
    ids, labels = [f"folder/{i}.png" for i in range(batch)], np.arange(batch) - 1
    data = to_parquet(to_table(tokens, ids, labels, stream))
    table = pa.parquet.read_table(pa.BufferReader(data))
    found, found_ids, found_labels = from_table(table)
    assert_same(found, tokens)
    assert found_ids == ids
    assert found_labels.tolist() == labels.tolist()


def test_a_slice_of_a_table_is_those_images() -> None:
    found, ids, labels = from_table(made_table(batch=5).slice(1, 3))
    assert_same(found, made_tokens(0, 5)[1:4])
    assert (ids, labels.tolist()) == (["1", "2", "3"], [0, 1, 2])


def test_rows_are_in_the_order_of_the_ranking_and_scores_in_their_unit() -> None:
    tokens = made_tokens(0)
    assert tokens.ranking is not None
    row = made_table().to_pylist()[0]
    assert row["patch_positions"] == tokens.ranking.order[0].tolist()
    assert row["patch_indices"] == tokens.patch_indices[0, tokens.ranking.order[0]].tolist()
    assert [1024 * bits for bits in row["scores"]] == tokens.ranking.score_units[0].tolist()


def test_a_stream_of_version_1_is_read_as_the_bits_that_it_holds() -> None:
    tokens, table = made_tokens(0), made_table()
    facts = {**STREAM.to_dict(), "version": 1}
    del facts["unit"], facts["line"]
    old = table.rename_columns({"scores": "score_bits"}).replace_schema_metadata({METADATA: json.dumps(facts).encode()})
    assert_same(from_table(old)[0], tokens)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_stored_in_their_own_unit(score: str) -> None:
    stream = replace(STREAM, score=score)
    tokens = made_tokens(0, stream=stream)
    table = to_table(tokens, ["a", "b", "c"], np.zeros(3), stream)
    assert json.loads(table.schema.metadata[METADATA])["unit"] == SCORES[score].unit
    stored = table.column("scores").to_pylist()[0][0]
    assert stored == int(tokens.ranking.score_units[0, 0]) / SCORES[score].resolution


def test_a_quality_line_travels_with_the_stream_and_its_tokens() -> None:
    line = QualityLine("error", 1, 0.001, 0.004)
    stream = replace(STREAM, score="error", line=line)
    made = made_tokens(0, stream=stream)
    tokens = replace(made, ranking=replace(made.ranking, line=line))
    data = to_parquet(to_table(tokens, ["a", "b", "c"], np.zeros(3), stream))
    found = from_table(pa.parquet.read_table(pa.BufferReader(data)))[0]
    assert found.ranking.line == line
    assert torch.equal(found.cut("quality", 15.0).kept_mask, tokens.cut("residual", line.residual_at(15.0)).kept_mask)


def test_tokens_that_are_only_global_have_empty_lists() -> None:
    stream = replace(STREAM, score="", rounds=0)
    tokens = made_tokens(0)
    tokens = Tokens(tokens.global_indices, torch.zeros(3, 16).long(), torch.zeros(3, 16).bool())
    table = to_table(tokens, ["a", "b", "c"], np.zeros(3), stream)
    assert table.column("patch_indices").to_pylist() == [[], [], []]
    assert_same(from_table(table)[0], tokens)


def test_equal_tokens_are_equal_bytes_however_they_are_chunked() -> None:
    whole = made_table(batch=4)
    assert to_parquet(pa.concat_tables([whole.slice(0, 1), whole.slice(1)])) == to_parquet(whole)


@pytest.mark.parametrize("rule", ["relative", "residual", "marginal", "count"])
def test_a_stored_stream_is_cut_as_the_tokens_were(rule: str) -> None:
    tokens = made_tokens(0)
    threshold = {"relative": 0.4, "residual": 60000.0, "marginal": 9000.0, "count": 5.0}[rule]
    assert_same(from_table(made_table())[0].cut(rule, threshold), tokens.cut(rule, threshold))


def test_tokens_that_are_cut_are_not_stored() -> None:
    with pytest.raises(ValueError, match="tokens are cut; expected all of them"):
        to_table(made_tokens(0).cut("count", 3), ["a", "b", "c"], np.zeros(3), STREAM)
    with pytest.raises(ValueError, match="tokens are cut; expected all of them"):
        to_table(replace(made_tokens(0), global_counts=torch.ones(3).long()), ["a", "b", "c"], np.zeros(3), STREAM)


@pytest.mark.parametrize("facts", [{"rounds": 8}, {"score": "entropy"}, {"score": "", "rounds": 0}])
def test_tokens_of_another_ranking_than_the_streams_are_not_stored(facts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"tokens are ranked by \('surprisal', 1\); expected"):
        to_table(made_tokens(0), ["a", "b", "c"], np.zeros(3), replace(STREAM, **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (lambda: made_table().replace_schema_metadata(None), "metadata of the table is not of format 'tatok-tokens'"),
        (lambda: made_table().replace_schema_metadata({METADATA: b"{"}), "metadata of the table is not of format"),
        (lambda: made_table().drop_columns(["label"]), "columns are id: string, global_indices: .*; expected id"),
        (lambda: changed("global_indices", [[3]]), "global_indices has rows of other lengths; expected 2 in every"),
        (lambda: changed("global_indices", [None]), "global_indices has rows of other lengths"),  # type: ignore[list-item]
        (lambda: changed("global_indices", [[3, 16]]), "global_indices hold 3 to 16; expected 0 to 15"),
        (lambda: changed("patch_indices", [[-1] * 16]), "patch_indices hold -1 to -1; expected 0 to 15"),
        (lambda: changed("patch_positions", [[0] * 16]), "patch_positions are no permutation; expected 0 to 15"),
        (lambda: changed("scores", [[-1.0] * 16]), "scores are not what a ranking gives"),
        (lambda: changed("scores", [[0.3] * 16]), "scores are not what a ranking gives"),
        (lambda: changed("scores", [[float("nan")] * 16]), "scores are not what a ranking gives"),
        (lambda: changed("scores", [[float("inf")] * 16]), "scores are not what a ranking gives"),
    ],
)
def test_a_foreign_table_is_refused(table: Callable[[], pa.Table], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        from_table(table())


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., TokenFile]:
    """Writes a file and returns its entry in the manifest."""

    def store(data: bytes, rows: int = 3) -> TokenFile:
        (tmp_path / "file.parquet").write_bytes(data)
        return TokenFile("file.parquet", rows, hashlib.sha256(data).hexdigest(), 0)

    return store


def test_a_file_is_read_as_it_was_written(stored: Callable[..., TokenFile], tmp_path: Path) -> None:
    table = read_token_file(str(tmp_path), stored(to_parquet(made_table())), STREAM)
    assert table.equals(made_table(), check_metadata=True)


def test_a_truncated_missing_or_foreign_file_is_refused(stored: Callable[..., TokenFile], tmp_path: Path) -> None:
    data = to_parquet(made_table())
    file, place = stored(data), str(tmp_path)
    (tmp_path / "file.parquet").write_bytes(data[:-7])
    with pytest.raises(BadInput, match=r"token file '.*file.parquet' does not match its checksum; expected it whole"):
        read_token_file(place, file, STREAM)
    (tmp_path / "file.parquet").unlink()
    with pytest.raises(BadInput, match=r"token file '.*file.parquet' is missing"):
        read_token_file(place, file, STREAM)
    with pytest.raises(BadInput, match=r"token file '.*file.parquet' cannot be read"):
        read_token_file(place, stored(b"this is a text"), STREAM)
    with pytest.raises(BadInput, match="is of another stream; expected the one that tokens.json describes"):
        read_token_file(place, stored(data), replace(STREAM, rounds=8))
    with pytest.raises(BadInput, match="has 3 rows; expected 4"):
        read_token_file(place, stored(data, rows=4), STREAM)
