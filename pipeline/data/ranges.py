"""The work of one task: read one range of the plan, check and resize its pictures, write its shards.

A range ends with a small JSON file in `parts/` that lists the shards with their checksums and the rejected pictures. It
is written last and atomically; a task that finds one with the right checksums has nothing to do.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig
from pipeline.data.listing import Picture
from pipeline.data.manifest import SPLITS, Shard
from pipeline.data.pictures import BadPicture, prepare, without_global_limits
from pipeline.data.plan import BY_HASH, Range, label_of
from pipeline.data.sources import Source, read
from pipeline.data.writer import ShardWriter
from pipeline.paths import sha256_file, write_json

READ_AHEAD = 64  # pictures that threads share at a time


@dataclass(frozen=True)
class Work:
    """What the tasks of one run have in common."""

    folder: Path  # run folder, on a file system that all workers share
    key: str  # of the plan
    classes: list[str]
    sources: list[Source]
    data: DataConfig


@dataclass(frozen=True)
class Part:
    """What one range became."""

    key: str  # of the plan
    number: int  # of the range
    shards: dict[str, Shard]  # by split; a split without pictures has none
    rejected: list[tuple[str, str]]  # (path, reason)


def part_from_dict(values: dict[str, Any]) -> Part:
    """The part that `dataclasses.asdict` made plain."""
    shards = {split: Shard(**shard) for split, shard in values["shards"].items()}
    return Part(values["key"], values["number"], shards, [(path, reason) for path, reason in values["rejected"]])


def make_part(task: Range, work: Work, threads: int = 1) -> tuple[Part, bool]:
    """Do the work of one range, unless it is done; returns the part and whether it was made now.

    Args:
        task: the range.
        work: of the run.
        threads: that share it; the bytes do not depend on how many.
    """
    path = work.folder / "parts" / f"{task.number:05d}.json"
    part = _finished(path, work)
    if part:
        return part, False
    part = _make(task, work, threads)
    write_json(path, asdict(part))
    return part, True


def _make(task: Range, work: Work, threads: int) -> Part:
    rejected = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(work.folder, f"shards/{split}-{task.number:05d}.parquet"))
            for split in SPLITS
        }
        pool = None
        if threads > 1:  # Pillow lets others work while it decodes and resizes
            stack.enter_context(without_global_limits())
            pool = stack.enter_context(ThreadPoolExecutor(threads))
        for name, split, row in _rows(task, work, pool):
            if isinstance(row, BadPicture):
                rejected.append((name, str(row)))
            else:
                writers[split].add(row)
    shards = {split: writer.shard for split, writer in writers.items() if writer.shard}
    return Part(work.key, task.number, shards, rejected)


def _rows(
    task: Range, work: Work, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[str, str, dict[str, Any] | BadPicture]]:
    """Name, split, and row or what is wrong, of every picture, in order; few are in memory at a time."""
    indices = {name: index for index, name in enumerate(work.classes)}

    def make(picture: Picture) -> tuple[str, str, dict[str, Any] | BadPicture]:
        try:
            row = _row(picture, label_of(picture.label, indices), work)
        except BadPicture as reason:
            return picture.id, "", reason
        split = split_of(picture.data, work.data.heldout_fraction) if task.split == BY_HASH else task.split
        return picture.id, split, row

    pictures = read(work.sources[task.source], task.units, work.data)
    if pool is None:
        yield from map(make, pictures)
        return
    while some := list(islice(pictures, READ_AHEAD)):
        yield from pool.map(make, some)


def split_of(data: bytes, heldout_fraction: float) -> str:
    """The split of a picture, by a hash of the file: equal files land in the same split, at every image size."""
    draw = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    return "heldout" if draw < heldout_fraction else "train"


def _row(picture: Picture, label: int, work: Work) -> dict[str, Any]:
    if picture.problem:
        raise BadPicture(picture.problem)
    size = work.data.image_size
    return {
        "id": picture.id,
        "image": prepare(picture.data, work.data),
        "height": size,
        "width": size,
        "label": label,
        "label_name": work.classes[label] if label >= 0 else "",
    }


def _finished(path: Path, work: Work) -> Part | None:
    """The part that an earlier attempt left, if it is of this plan and its shards are whole."""
    if not path.exists():
        return None
    part = part_from_dict(json.loads(path.read_bytes()))
    whole = all(_is_whole(work.folder / shard.file, shard) for shard in part.shards.values())
    return part if part.key == work.key and whole else None


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and sha256_file(path) == shard.sha256
