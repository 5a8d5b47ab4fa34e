"""`tokens.json`, the manifest of a folder of ranked tokens; and how rows are divided into files.

docs/architecture.md has the format. Imports neither torch nor ray, so that a stage's `check` answers at once.

Symbols: N patch positions, M global tokens, K codebook entries.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.checkpoints import find, is_hub_id
from pipeline.core.config import Config, TokensConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.manifest import check_format, parse_values, read_described
from pipeline.data.shards import SPLITS
from tatok_model.filtering_rules import SCORES, QualityLine, line_of

FORMAT, VERSION, OLDEST = "tatok-tokens", 2, 1  # version 1 had scores in bits alone, in a column score_bits
NAME, WRITER = "tokens.json", "jobs/tokenize_images.py"
METADATA = b"tatok_tokens"  # the key in a file's schema metadata
RANGE_ROWS = 1024  # rows per range: seconds of work, a few megabytes of tokens
SHAPING = ("global_tokens", "codebook_size", "image_size", "patch_size")  # in the tokenizer section and in `Stream`


@dataclass(frozen=True)
class Stream:
    """Describes rows of tokens, which mean nothing without it: it is in the metadata of every file."""

    score: str  # a key of `filtering_rules.SCORES`; "" without patch tokens: there is nothing to rank
    rounds: int  # R of the ranking; 0 without patch tokens
    tokenizer_sha256: str  # of model.safetensors
    global_tokens: int  # M
    patch_positions: int  # N
    codebook_size: int  # K
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    line: QualityLine | None = None  # from the score that a cut drops to dB, for the rule `quality`

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the metadata of a file and the beginning of `tokens.json`."""
        unit = SCORES[self.score].unit if self.score else ""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "unit": unit}

    def metadata(self) -> dict[bytes, bytes]:
        """The metadata of an Arrow schema."""
        return {METADATA: json.dumps(self.to_dict(), sort_keys=True).encode()}


@dataclass(frozen=True)
class TokenFile:
    """One Parquet file of a split."""

    file: str  # relative to the folder of `tokens.json`
    rows: int
    sha256: str
    first_row: int  # its first row's number in the split


@dataclass(frozen=True)
class TokenSplit:
    """The files of one split, in order."""

    rows: int
    files: tuple[TokenFile, ...]


@dataclass(frozen=True)
class TokenManifest:
    """All token files of a folder, their stream and origin, and checksums."""

    stream: Stream
    config: dict[str, Any]  # the keys of the tokens section that decide rows
    data_fingerprint: str  # of the shards
    classes: tuple[str, ...]  # name of each label
    splits: dict[str, TokenSplit]  # train, heldout
    fingerprint: str  # of the tokens: sha256 over the file checksums

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the file, those of the stream beside the others."""
        values = asdict(self)
        del values["stream"]
        return {**self.stream.to_dict(), **values}


def stream_of(config: Config, tokenizer_sha256: str, lines: Iterable[QualityLine] = ()) -> Stream:
    """The `Stream` that a configuration makes with a tokenizer of these weights and quality lines."""
    section, has_patches = config.tokenizer, config.tokenizer.patch_tokens  # only patch tokens are ranked
    return Stream(
        score=config.filter.score if has_patches else "",
        rounds=config.filter.rounds if has_patches else 0,
        tokenizer_sha256=tokenizer_sha256,
        patch_positions=section.patch_positions,
        line=line_of(lines, config.filter.score, config.filter.rounds) if has_patches else None,
        **{name: getattr(section, name) for name in SHAPING},
    )


def fingerprint(splits: dict[str, TokenSplit]) -> str:
    """sha256 over the file checksums of both splits, in order."""
    text = json.dumps([[name, [file.sha256 for file in splits[name].files]] for name in SPLITS])
    return hashlib.sha256(text.encode()).hexdigest()


def stream_from_dict(values: Any, what: str) -> Stream:
    """Inverse of `Stream.to_dict`.

    Args:
        values: as read from JSON.
        what: where they were read, for messages.

    Raises:
        BadInput: values of another program or version, or damaged ones.
    """
    check_format(values, what, (FORMAT, VERSION), WRITER, OLDEST)
    stream = parse_values(Stream, values, what)
    if stream.score and stream.score not in SCORES:
        raise BadInput(f"{what} has score {stream.score!r}; expected one of {', '.join(SCORES)}")
    if stream.rounds < 0 or bool(stream.rounds) != bool(stream.score):
        raise BadInput(
            f"{what} has score {stream.score!r} and {stream.rounds} rounds; expected at least 1 round with a score, "
            "none without"
        )
    return stream


def read_token_manifest(folder: str | Path) -> TokenManifest:
    """The manifest of the tokens in `folder`, a path or URL.

    Raises:
        BadInput: there is no manifest, or one of another program or version, or a damaged one.
    """
    what = f"{NAME} in {str(folder)!r}"
    values = read_described(folder, NAME, WRITER, "tokens.path")
    stream = stream_from_dict(values, what)
    manifest = parse_values(TokenManifest, {**values, "stream": stream}, what)
    if set(manifest.splits) != set(SPLITS) or manifest.fingerprint != fingerprint(manifest.splits):
        raise BadInput(f"{what} is damaged: its fingerprint does not match its files")
    return manifest


def check_stream(config: Config, stream: Stream) -> None:
    """Refuse a stream of another tokenizer, score or R than configured, or one that the rule `quality` cannot cut.

    A tokenizer on the hub is compared by `check_tokenizer` once it is downloaded.

    Raises:
        BadInput: naming the first difference.
    """
    wanted = stream_of(config, stream.tokenizer_sha256)
    path = config.tokens.path
    for name in SHAPING:
        if getattr(stream, name) != getattr(wanted, name):
            raise BadInput(
                f"tokens.path {path!r} has {name} {getattr(stream, name)}; "
                f"expected tokenizer.{name}, {getattr(wanted, name)}"
            )
    if bool(stream.score) != bool(wanted.score):
        has = "has patch tokens" if stream.score else "has only global tokens"
        raise BadInput(
            f"tokens.path {path!r} {has}; expected tokenizer.patch_tokens: {str(bool(wanted.score)).lower()}"
        )
    if stream.score != wanted.score:
        raise BadInput(f"tokens.path {path!r} is ranked by {stream.score}; expected filter.score, {wanted.score}")
    if stream.rounds != wanted.rounds:
        raise BadInput(
            f"tokens.path {path!r} is ranked in {stream.rounds} rounds; expected filter.rounds, {wanted.rounds}: "
            "another R is another order"
        )
    if config.filter.rule == "quality" and stream.score:
        if stream.line is None:
            raise BadInput(
                f"filter.rule is 'quality' and tokens.path {path!r} has no line from {stream.score} to dB; "
                "expected a stream made after jobs/calibrate.py had fitted one"
            )
        try:
            stream.line.check(config.filter.threshold)
        except ValueError as error:
            raise BadInput(f"filter.threshold: {error}") from None
    checkpoint = config.tokenizer.checkpoint
    if checkpoint and not is_hub_id(checkpoint):
        check_tokenizer(config, stream, sha256_file(find(checkpoint) / "model.safetensors"))


def check_tokenizer(config: Config, stream: Stream, sha256: str) -> None:
    """Raises BadInput unless the weights with this checksum made the stream."""
    if sha256 != stream.tokenizer_sha256:
        raise BadInput(
            f"tokens.path {config.tokens.path!r} is of a tokenizer with sha256 {stream.tokenizer_sha256[:12]}...; "
            f"expected that of tokenizer.checkpoint {config.tokenizer.checkpoint!r}, {sha256[:12]}..."
        )


# Which pictures or rows go into which file depends on their number and the batch size, never on the number of workers,
# so that every worker would write the same bytes for a range.


@dataclass(frozen=True)
class View:
    """A picture or an augmented copy of it, each a row of its own."""

    name: str  # at the end of the row's id; empty: the picture itself
    mirrored: bool = False  # left to right
    copy: int = 0  # 1, 2, ...: shifted and mirrored at random, seeded by this number; 0: not


def views_of(split: str, config: TokensConfig) -> list[View]:
    """The views of each picture of a split, in the order of their rows; held-out pictures have one."""
    views = [View("")]
    if split == "train":
        views += [View("@flip", mirrored=True)] * config.flip
        views += [View(f"@crop{number}", copy=number) for number in range(1, config.crops + 1)]
    return views


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of those chosen from a split, numbered 0 to count - 1; see `ranges.Range`.

    A picture has one row for each of its views; all of them are in one range.
    """

    number: int  # over both splits; names the part
    split: str  # train | heldout
    index: int  # within the split; names the file
    start: int  # number of the first row
    stop: int  # one past the last
    count: int  # rows chosen from the split
    total: int  # rows in the split
    views: int = 1  # rows of each picture

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start

    def places(self) -> np.ndarray:
        """(rows,) indices of the rows in the split: spread evenly over it, because shards may be sorted by class."""
        return np.arange(self.start, self.stop) * self.total // self.count

    def pictures(self) -> np.ndarray:
        """(rows / views,) indices of the pictures in the split, spread evenly like `places`."""
        return np.arange(self.start // self.views, self.stop // self.views) * self.total // self.count

    @property
    def name(self) -> str:
        """Name of the file, without folder and extension."""
        return f"{self.split}-{self.index:05d}"


def ranges_of_pictures(rows: dict[str, int], config: TokensConfig) -> list[RowRange]:
    """Ranges of about `RANGE_ROWS` rows, in whole batches of pictures.

    Args:
        rows: pictures in each split.
        config: which splits, how many of each, in which batches, with which views.

    Raises:
        BadInput: there is no picture in the configured splits.
    """
    ranges: list[RowRange] = []
    for split, total, count in _chosen(rows, config):
        views = len(views_of(split, config))
        batch, rows_chosen = config.batch_size * views, count * views
        size = -(-RANGE_ROWS // batch) * batch  # rounded up to whole batches
        for index, start in enumerate(range(0, rows_chosen, size)):
            stop = min(start + size, rows_chosen)
            ranges.append(RowRange(len(ranges), split, index, start, stop, rows_chosen, total * views, views))
    return ranges


def ranges_of_files(manifest: TokenManifest, config: TokensConfig) -> list[RowRange]:
    """One range for each token file that has rows among those chosen; raises as `ranges_of_pictures`."""
    ranges: list[RowRange] = []
    rows = {name: split.rows for name, split in manifest.splits.items()}
    for split, total, count in _chosen(rows, config):
        for index, file in enumerate(manifest.splits[split].files):
            first, end = file.first_row, file.first_row + file.rows
            start, stop = (-(-row * count // total) for row in (first, end))  # inverse of `places`, rounded up
            if start < stop:
                ranges.append(RowRange(len(ranges), split, index, start, stop, count, total))
    return ranges


def _chosen(rows: dict[str, int], config: TokensConfig) -> list[tuple[str, int, int]]:
    """(split, pictures in it, pictures chosen) of the splits that have any."""
    wanted = SPLITS if config.split == "both" else (config.split,)
    chosen = [(name, rows[name], min(config.max_images or rows[name], rows[name])) for name in wanted if rows[name]]
    if not chosen:
        raise BadInput(f"tokens.split is {config.split!r}, which holds no picture; expected one of {', '.join(SPLITS)}")
    return chosen
