"""The reader against the mock: what is timed and told."""

from pathlib import Path

import pytest

from pipeline.benchmarks import harness, ingest_speed
from pipeline.core.errors import BadInput, Stopped


@pytest.fixture
def here(monkeypatch):
    """What would run in fresh processes runs in this one: 100 MiB for the mock, 110 for readers."""
    monkeypatch.setattr(
        harness,
        "in_fresh_process",
        lambda work, config, size: (work(config, size), 100.0 if size is None else 110.0),
    )


def test_both_ways_of_reading_are_compared_with_the_mock(small, measure, here):
    config = small(
        "ingest", "data.source=", "benchmark.pictures=24", "benchmark.images=16", "train.global_batch_size=8"
    )
    run = measure(config)
    found = run.results
    for name in ("in_memory", "from_files"):
        ratio = found[f"{name}_images_per_second"] / found["mock_images_per_second"]
        assert found[f"{name}_to_mock"] == pytest.approx(ratio)
        assert found[f"{name}_first_batch_seconds"] > 0
        assert found[f"{name}_p99_wait_seconds"] >= 0
        assert found[f"{name}_alone_images_per_second"] > 0
        assert found[f"{name}_peak_over_mock_mib"] == 10
    assert found["mock_p99_wait_seconds"] < found["in_memory_first_batch_seconds"]
    report = Path(run.outputs["report"]).read_text()
    assert "goal: at least 0.95" in report
    assert "| waits | 4 batches |" in report
    assert set(run.inputs) == {"shards"}
    assert not (run.folder / "work").exists()


def test_a_stop_ends_it(small, measure, here):
    with pytest.raises(Stopped, match="measures anew"):
        measure(small("ingest", "data.source=", "benchmark.pictures=24"), stop=True)


def test_shards_that_are_none_are_refused(small, tmp_path):
    with pytest.raises(BadInput, match="holds no manifest.json"):
        ingest_speed.check(small("ingest", f"data.shards={tmp_path}"))
