"""Benchmarks that take seconds: the smoke preset with few pictures and no tracking."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import benchmark
from pipeline.core.presets import load_config
from pipeline.data.shards import Manifest, ShardWriter, Split, fingerprint


@pytest.fixture
def small(tmp_path):
    """`small("ingest", "benchmark.x=1")`: a configuration of that kind."""

    def make(kind, *more):
        sizes = ["benchmark.batch_size=8", "benchmark.batch_sizes=[8]", "benchmark.images=8", "benchmark.repeats=1"]
        common = [f"benchmark.kind={kind}", f"run.output={tmp_path}", "tracking.uri=", "data.image_size=16"]
        return load_config("smoke", [*common, *sizes, *more])

    return make


@pytest.fixture
def measure(carry_out):
    """`measure(config)` runs its benchmark in this process; returns the closed run."""
    return lambda config, **how: carry_out("benchmark", benchmark, config, benchmark.default_name(config), **how)


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory):
    """A folder of shards with 32 pictures of 16 pixels in each split, made without Ray."""
    folder = tmp_path_factory.mktemp("benchmarking") / "shards"
    (folder / "shards").mkdir(parents=True)
    splits, draw = {}, np.random.default_rng(0)
    for split in ("train", "heldout"):
        with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
            for number in range(32):
                file = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
                row = {"id": f"{split}{number}", "image": file.getvalue(), "height": 16, "width": 16}
                writer.add({**row, "label": -1, "label_name": ""})
        splits[split] = Split(32, (writer.shard,))
    config = {"image_size": 16, "encoding": "png", "quality": 95}
    manifest = Manifest(16, config, "made", (), splits, 0, fingerprint(splits))
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return folder
