"""`tokens.json`, which streams a configuration can decode, and the ranges that hold every picture once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import Config, TokensConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.presets import load_config
from pipeline.tokens.token_manifest import (
    RowRange,
    Stream,
    TokenFile,
    TokenManifest,
    TokenSplit,
    check_stream,
    fingerprint,
    ranges_of_files,
    ranges_of_pictures,
    read_token_manifest,
    stream_of,
)
from tatok_model.filtering_rules import QualityLine


@pytest.fixture
def manifest(stream: Stream) -> TokenManifest:
    files = TokenFile("tokens/train-00000.parquet", 5, "1" * 64, 0), TokenFile("tokens/train-00001.parquet", 2, "2", 5)
    splits = {"train": TokenSplit(7, files), "heldout": TokenSplit(0, ())}
    return TokenManifest(stream, {"batch_size": 4}, "3" * 64, ("ant", "bee"), splits, fingerprint(splits))


@pytest.fixture
def write(manifest: TokenManifest, tmp_path: Path) -> Callable[..., Path]:
    """Writes the manifest with some values changed; None takes one out."""

    def write(**changes: Any) -> Path:
        values = {**manifest.to_dict(), **changes}
        (tmp_path / "tokens.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        return tmp_path

    return write


def test_a_manifest_is_read_as_it_was_written(manifest: TokenManifest, write: Callable[..., Path]) -> None:
    assert read_token_manifest(write()) == manifest


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "tatok-shards"}, "is not of format 'tatok-tokens'; expected one by jobs/tokenize_images.py"),
        ({"version": 3}, "has version 3; expected 1 to 2"),
        ({"rounds": None}, r"is damaged \(rounds: Field required\)"),
        ({"global_tokens": "many"}, r"is damaged \(global_tokens: Input should be a valid integer"),
        ({"score": "loudness"}, "has score 'loudness'; expected one of distortion, error"),
        ({"rounds": 0}, "has score 'distortion' and 0 rounds; expected at least 1 round with a score, none without"),
        ({"splits": {}}, "is damaged: its fingerprint does not match its files"),
        ({"splits": {"train": 1}}, r"is damaged \(splits\.train: "),
        ({"fingerprint": "0"}, "is damaged: its fingerprint does not match its files"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    write: Callable[..., Path], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput, match=f"tokens.json in '.*' {sentence}"):
        read_token_manifest(write(**changes))


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            BadInput, match="holds no tokens.json; expected a folder written by jobs/tokenize_images.py"
        ):
            read_token_manifest(place)
    (tmp_path / "tokens.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokens.json in '.*' cannot be read"):
        read_token_manifest(tmp_path)


def test_a_stream_is_what_the_configuration_asks_for(overrides: list[str], checkpoint: Path, stream: Stream) -> None:
    config = load_config("smoke", overrides)
    asked = stream_of(config, sha256_file(checkpoint / "model.safetensors"))
    assert {**asked.to_dict(), "tokenizer_sha256": ""} == {**stream.to_dict(), "tokenizer_sha256": ""}
    check_stream(config, asked)


def test_the_quality_line_of_the_score_and_rounds_is_part_of_the_stream(overrides: list[str], write: Any) -> None:
    lines = QualityLine("error", 1, 0.1, 0.2), QualityLine("distortion", 1, 0.3, 0.4)
    found = stream_of(load_config("smoke", overrides), "0" * 64, lines)
    assert found.line == lines[1]
    write(line=found.to_dict()["line"])
    assert read_token_manifest(write(line=found.to_dict()["line"])).stream.line == lines[1]
    with pytest.raises(BadInput, match="is damaged"):
        read_token_manifest(write(line={"score": "error"}))
    asked = [*overrides, "filter.rule=quality", "tokenizer.checkpoint="]
    reachable, beyond = (load_config("smoke", [*asked, f"filter.threshold={decibels}"]) for decibels in (5, 6))
    check_stream(reachable, found)
    with pytest.raises(BadInput, match="filter.threshold: threshold is 6 dB .*; expected at most 5.2"):
        check_stream(beyond, found)


def test_without_patch_tokens_there_is_no_score(overrides: list[str]) -> None:
    found = stream_of(load_config("smoke", [*overrides, "tokenizer.patch_tokens=false", "filter.score=grid",
                                            "filter.rule=count"]), "")  # fmt: skip
    assert (found.score, found.rounds, found.patch_positions) == ("", 0, 16)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokenizer.global_tokens=3", "has global_tokens 2; expected tokenizer.global_tokens, 3"),
        ("tokenizer.patch_size=2", "has patch_size 4; expected tokenizer.patch_size, 2"),
        ("tokenizer.patch_tokens=false", "has patch tokens; expected tokenizer.patch_tokens: false"),
        ("filter.score=entropy", "is ranked by distortion; expected filter.score, entropy"),
        ("filter.rounds=8", "is ranked in 1 rounds; expected filter.rounds, 8: another R is another order"),
        ("tokenizer.checkpoint=owner/name", None),
        ("filter.threshold=0.5", r"is of a tokenizer with sha256 000000000000\.\.\.; expected that of"),
    ],
)
def test_a_stream_that_cannot_be_decoded_as_configured_is_refused(
    overrides: list[str], stream: Stream, override: str, sentence: str | None
) -> None:
    config: Config = load_config("smoke", [*overrides, override])
    if sentence is None:  # a hub's weights are compared once they are here
        check_stream(config, stream)
        return
    with pytest.raises(BadInput, match=f"tokens.path '' {sentence}"):
        check_stream(config, stream)


STREAM = Stream("surprisal", 1, "0" * 64, 2, 16, 16, 16, 4)


def places(ranges: list[RowRange], split: str) -> list[int]:
    return [row for task in ranges if task.split == split for row in task.places().tolist()]


def stored(ranges: list[RowRange]) -> TokenManifest:
    """The manifest of the files that ranges of pictures become."""
    splits = {}
    for name in ("train", "heldout"):
        tasks = [task for task in ranges if task.split == name]
        files = tuple(TokenFile(task.name, task.stop - task.start, "", task.start) for task in tasks)
        splits[name] = TokenSplit(sum(file.rows for file in files), files)
    return TokenManifest(STREAM, {}, "", (), splits, "")


@given(total=st.integers(1, 20_000), most=st.integers(0, 20_000), batch=st.integers(1, 3000))
def test_ranges_hold_every_chosen_picture_once_in_whole_batches(total: int, most: int, batch: int) -> None:
    ranges = ranges_of_pictures({"train": total, "heldout": 1}, TokensConfig(max_images=most, batch_size=batch))
    found = places(ranges, "train")
    assert len(found) == min(most or total, total)
    assert np.all(np.diff(found) > 0), "each once, in order"
    assert found[0] == 0
    assert found[-1] < total
    assert [task.number for task in ranges] == list(range(len(ranges)))
    assert all((task.stop - task.start) % batch == 0 for task in ranges if task.stop < task.count)


@given(total=st.integers(1, 20_000), most=st.integers(0, 20_000))
def test_ranges_of_files_hold_the_rows_that_were_chosen(total: int, most: int) -> None:
    manifest = stored(ranges_of_pictures({"train": total, "heldout": 0}, TokensConfig(batch_size=32)))
    ranges = ranges_of_files(manifest, TokensConfig(max_images=most))
    count = min(most or total, total)
    assert places(ranges, "train") == (np.arange(count) * total // count).tolist()
    for task in ranges:
        file = manifest.splits["train"].files[task.index]
        local = task.places() - file.first_row
        assert 0 <= local.min() <= local.max() < file.rows


def test_one_split_can_be_asked_for() -> None:
    rows = {"train": 5, "heldout": 3}
    assert {task.split for task in ranges_of_pictures(rows, TokensConfig(split="heldout"))} == {"heldout"}
    assert [task.name for task in ranges_of_pictures(rows, TokensConfig())] == ["train-00000", "heldout-00000"]


def test_a_split_without_pictures_is_refused() -> None:
    with pytest.raises(BadInput, match="tokens.split is 'heldout', which holds no picture; expected one of train"):
        ranges_of_pictures({"train": 5, "heldout": 0}, TokensConfig(split="heldout"))
