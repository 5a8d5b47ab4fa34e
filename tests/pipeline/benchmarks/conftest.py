"""Benchmarks that take seconds: the smoke preset with few pictures and no tracking."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import benchmark
from pipeline.core.presets import load_config


@pytest.fixture
def small(tmp_path):
    """`small("ingest", "benchmark.x=1")`: a configuration of that kind."""

    def make(kind, *more):
        sizes = ["benchmark.batch_size=8", "benchmark.batch_sizes=[8]", "benchmark.images=8", "benchmark.repeats=1"]
        common = [f"benchmark.kind={kind}", f"run.output={tmp_path}", "tracking.uri=", "data.image_size=16"]
        return load_config("smoke", [*common, *sizes, *more])

    return make


@pytest.fixture
def tiny(small):
    """The same, with a network too small to be fast."""
    shape = ("patch_size=8", "global_tokens=2", "codebook_size=16", "codebook_dim=8", "entropy_width=32", "size=nano")
    return lambda kind, *more: small(kind, *(f"tokenizer.{value}" for value in shape), *more)


@pytest.fixture
def measure(carry_out):
    """`measure(config)` runs its benchmark in this process; returns the closed run."""
    return lambda config, **how: carry_out("benchmark", benchmark, config, benchmark.default_name(config), **how)


@pytest.fixture(scope="session")
def noise_shards(write_plain_shards, tmp_path_factory):
    """A folder of shards with 32 pictures of 16 pixels in each split."""
    draw = np.random.default_rng(0)

    def png():
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    folder = tmp_path_factory.mktemp("benchmarking") / "shards"
    return write_plain_shards(folder, 16, train=[png() for _ in range(32)], heldout=[png() for _ in range(32)])
