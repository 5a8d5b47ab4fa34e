"""The end of a stage whose workers made shards of pictures: `rejected.parquet`, and `manifest.json`, written last.

What comes out is a folder like those of preprocess: other stages and tools read it.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.data.manifest import SPLITS, Manifest, Shard, Split, fingerprint
from pipeline.data.preprocess import REJECTED
from pipeline.paths import write_atomically, write_json
from pipeline.tokenizing.plan import Range

if TYPE_CHECKING:  # torch stands behind it: a stage's `check` answers without
    from pipeline.tokenizing.parts import Part


def write_shards_manifest(
    folder: Path,
    ranges: list[Range],
    parts: "list[Part]",
    image_size: int,
    config: dict[str, Any],
    source_fingerprint: str,
    classes: tuple[str, ...],
) -> Manifest:
    """Mark the shards in `folder` as complete.

    Args:
        folder: of the run.
        ranges: of the plan.
        parts: what they became, in their order.
        image_size: pixels, square.
        config: everything that decides bytes.
        source_fingerprint: of what the pictures were made from.
        classes: name of each label.
    """
    file = io.BytesIO()
    pq.write_table(REJECTED.empty_table(), file, compression="ZSTD")
    write_atomically(folder / "rejected.parquet", file.getvalue())
    splits = {}
    for name in SPLITS:
        shards: tuple[Shard, ...] = tuple(p.file for task, p in zip(ranges, parts, strict=True) if task.split == name)
        splits[name] = Split(sum(shard.rows for shard in shards), shards)
    found = Manifest(image_size, config, source_fingerprint, classes, splits, 0, fingerprint(splits))
    write_json(folder / "manifest.json", found.to_dict())
    return found
