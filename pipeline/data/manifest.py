"""`manifest.json`: what a folder of shards holds. docs/architecture.md has the format."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.described import check_format, read_described
from pipeline.errors import BadInput

FORMAT, VERSION = "tatok-shards", 1
NAME, WRITER = "manifest.json", "jobs/preprocess.py"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split."""

    file: str  # relative to the folder of the manifest
    rows: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    rows: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What was made, from what, and its checksums."""

    image_size: int  # pixels, square
    config: dict[str, Any]  # the data keys that decide bytes
    source_fingerprint: str
    classes: tuple[str, ...]  # name of each label
    splits: dict[str, Split]  # train, heldout
    rejected: int  # rows of rejected.parquet
    fingerprint: str  # of the pictures: sha256 over the shard checksums

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def fingerprint(splits: dict[str, Split]) -> str:
    """sha256 over the shard checksums of all splits, in order."""
    text = json.dumps([[name, [shard.sha256 for shard in splits[name].shards]] for name in SPLITS])
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest in `folder`, a path or URL.

    Raises:
        BadInput: there is none, or it is another program's, of another version, or damaged.
    """
    what = f"{NAME} in {str(folder)!r}"
    values = read_described(folder, NAME, WRITER)
    check_format(values, what, (FORMAT, VERSION), WRITER)
    try:
        manifest = _from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{what} is damaged ({type(error).__name__}: {error})") from None
    if manifest.fingerprint != fingerprint(manifest.splits):
        raise BadInput(f"{what} is damaged: its fingerprint does not match its shards")
    return manifest


def _from_dict(values: dict[str, Any]) -> Manifest:
    splits = {}
    for name in SPLITS:
        part = values["splits"][name]
        shards = tuple(Shard(s["file"], int(s["rows"]), s["sha256"]) for s in part["shards"])
        splits[name] = Split(int(part["rows"]), shards)
    return Manifest(
        image_size=int(values["image_size"]),
        config=dict(values["config"]),
        source_fingerprint=values["source_fingerprint"],
        classes=tuple(values["classes"]),
        splits=splits,
        rejected=int(values["rejected"]),
        fingerprint=values["fingerprint"],
    )


def check_shards(config: Config) -> None:
    """Refuse `data.shards` that cannot serve this configuration; does nothing when it is empty.

    Raises:
        BadInput: as `read_manifest`, or the shards were made for another image size.
    """
    if not config.data.shards:
        return
    made_for = read_manifest(config.data.shards).image_size
    if made_for != config.data.image_size:
        raise BadInput(
            f"data.shards {config.data.shards!r} were made for image size {made_for}; "
            f"expected data.image_size, {config.data.image_size}"
        )
