"""`tokens.json`, and which streams a configuration can decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import Config, load_config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.tokens.token_manifest import (
    Stream,
    TokenFile,
    TokenManifest,
    TokenSplit,
    check_stream,
    fingerprint,
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
        ({"rounds": None}, r"is damaged \(KeyError: 'rounds'\)"),
        ({"global_tokens": "many"}, r"is damaged \(ValueError"),
        ({"score": "loudness"}, "has score 'loudness'; expected one of distortion, error"),
        ({"rounds": 0}, "has score 'distortion' and 0 rounds; expected at least 1 round with a score, none without"),
        ({"splits": {}}, r"is damaged \(KeyError: 'train'\)"),
        ({"splits": {"train": 1}}, r"is damaged \(TypeError"),
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
