"""Fixtures for tests of stages: shards that are written without Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_plain_shards() -> Callable[..., Path]:
    """`write_plain_shards(folder, 16, train=[png, ...], heldout=[...])`: shards of 16-pixel pictures."""
    from pipeline.data.shards import Manifest, ShardWriter, Split, fingerprint

    def write(folder: Path, side: int, **pictures: list[bytes]) -> Path:
        (folder / "shards").mkdir(parents=True)
        splits = {}
        for split, files in pictures.items():
            with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
                for number, file in enumerate(files):
                    row = {"id": f"{split}{number}", "image": file, "height": side, "width": side}
                    writer.add({**row, "label": -1, "label_name": ""})
            assert writer.shard is not None
            splits[split] = Split(len(files), (writer.shard,))
        config = {"image_size": side, "encoding": "png", "quality": 95}
        manifest = Manifest(side, config, "made", (), splits, 0, fingerprint(splits))
        (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
        return folder

    return write
