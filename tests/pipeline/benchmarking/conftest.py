"""Benchmarks that take seconds: the smoke preset with few pictures and no tracking."""

import pytest

from pipeline.benchmarking import stage
from pipeline.config import load_config


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
    return lambda config, **how: carry_out("benchmark", stage, config, stage.default_name(config), **how)
