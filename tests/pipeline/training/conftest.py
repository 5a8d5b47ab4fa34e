"""A tiny training run: 32-pixel pictures of two colours, 16 codes, one or two dozen steps."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.presets import config_from_dict
from pipeline.data.shards import Manifest, ShardWriter, Split, fingerprint


def picture(number: int) -> bytes:
    """A smooth picture that differs from the others."""
    y, x = np.mgrid[0:32, 0:32] / 32
    phase = np.array([0.3, 1.1, 2.3]) * (number + 1)
    values = 127 + 100 * np.sin(6.28 * (x[..., None] * (1 + number % 3) + y[..., None]) + phase)
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_split(folder: Path, split: str, pictures: list[bytes]) -> Split:
    with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
        for number, data in enumerate(pictures):
            size = {"height": 32, "width": 32}
            writer.add({"id": f"{number}.png", "image": data, **size, "label": -1, "label_name": ""})
    return Split(len(pictures), (writer.shard,))


def write_shards(folder: Path, train: list[bytes], heldout: list[bytes]) -> Path:
    (folder / "shards").mkdir()
    splits = {"train": write_split(folder, "train", train), "heldout": write_split(folder, "heldout", heldout)}
    manifest = Manifest(32, {}, "made", (), splits, 0, fingerprint(splits))
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    pictures = [picture(number) for number in range(32)]
    return write_shards(tmp_path_factory.mktemp("shards"), pictures[:24], pictures[24:])


@pytest.fixture
def four_photographs(tmp_path) -> Path:
    """Shards with the same four tiles of photographs in both splits."""
    from pipeline.data.samples import list_tiles, read_tile

    names = list_tiles(32)
    tiles = [read_tile(name, 32) for name in names[:: len(names) // 4][:4]]
    folder = tmp_path / "four"
    folder.mkdir()
    return write_shards(folder, tiles, tiles)


@pytest.fixture
def damaged_shards(tmp_path) -> Path:
    """Shards whose first training picture is none."""
    pictures = [picture(number) for number in range(16)]
    folder = tmp_path / "damaged_shards"
    folder.mkdir()
    return write_shards(folder, [b"no picture", *pictures[1:8]], pictures[8:])


@pytest.fixture
def configure(shards, tmp_path):
    """`configure(train={"max_steps": 5})`: the tiny configuration with changes by section."""

    def make(**sections) -> Config:
        values = {
            "run": {"output": str(tmp_path)},
            "data": {"shards": str(shards)},
            "tokenizer": {"patch_size": 8, "global_tokens": 2, "codebook_size": 16, "codebook_dim": 4},
            "train": {
                "max_steps": 8, "global_batch_size": 8, "warmup_steps": 2, "log_every": 2, "validate_every": 4,
                "validation_images": 8, "checkpoint_every": 4, "grid_images": 2,
            },
            "tracking": {"uri": ""},
        }  # fmt: skip
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes}
        return config_from_dict(values)

    return make


@pytest.fixture
def run_training(carry_out):
    """`run_training(config, name)` trains in this process; returns the closed run."""
    from pipeline.training import train

    return partial(carry_out, "train", train)
