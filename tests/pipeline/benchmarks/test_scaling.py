"""Workers and sizes: when the clock runs, what efficiency and growth mean, and one run of everything."""

from pathlib import Path

import pytest

from pipeline.benchmarks import scaling
from pipeline.benchmarks.scaling import OURS, PLAIN, SizeTaken
from pipeline.core.errors import BadInput, Stopped


def test_efficiency_is_against_as_many_single_workers_and_growth_is_for_a_picture():
    rates = {
        ("preprocess", OURS, 1): [10.0, 20.0],
        ("preprocess", PLAIN, 1): [10.0, 20.0],
        ("preprocess", OURS, 2): [18.0, 36.0],
        ("preprocess", PLAIN, 2): [20.0, 40.0],
    }
    seconds = {"preprocess": 1.0, "tokenize": 2.0}
    sizes = [SizeTaken(100, seconds, {"preprocess": 50.0, "tokenize": 100.0})]
    sizes += [SizeTaken(1000, {"preprocess": 10.0, "tokenize": 40.0}, {"preprocess": 55.0, "tokenize": 130.0})]
    found = scaling._findings(rates, sizes, {})
    told = {ratio.name: ratio for ratio in found.ratios}
    assert told["preprocess_tatok_2_workers_efficiency"].spread.median == pytest.approx(0.9)
    assert told["preprocess_2_workers_to_processes"].spread.median == pytest.approx(0.9)
    assert told["preprocess_memory_growth"].row().note.endswith("goal: at most 1.2, met")
    assert told["tokenize_memory_growth"].row().note.endswith("goal: at most 1.2, missed by 0.10")
    assert told["preprocess_time_growth"].spread.median == 1
    assert told["tokenize_time_growth"].spread.median == 2
    assert found.results()["tokenize_1000_peak_mib"] == 130


def test_only_workers_that_there_are_cpus_for_are_measured(small, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert scaling._workers(small("scaling", "benchmark.workers=[4,2,1]")) == [1, 2]
    assert scaling._workers(small("scaling", "benchmark.workers=[4]")) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmark.pictures=7", "benchmark.pictures is 7; expected at least"),
        ("benchmark.sizes=[10,10]", "benchmark.sizes is \\[10, 10\\]; expected two different"),
    ],
)
def test_a_benchmark_that_can_tell_nothing_is_refused(small, text, message):
    with pytest.raises(BadInput, match=message):
        scaling.check(small("scaling", text))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data reads its own old settings
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_both_stages_are_measured_with_workers_and_with_pictures(small, measure, ray_session):
    config = small("scaling", "benchmark.pictures=64", "benchmark.sizes=[20,60]", "benchmark.workers=[1,2]")
    run = measure(config)
    for stage in ("preprocess", "tokenize"):
        for workers in (1, 2):
            assert run.results[f"{stage}_tatok_{workers}_workers_images_per_second"] > 0
            assert run.results[f"{stage}_{workers}_workers_to_processes"] > 0
        assert run.results[f"{stage}_60_peak_mib"] > 20
        assert 0.5 < run.results[f"{stage}_memory_growth"] < 1.5
    assert "| tokenize, whole | 60 |" in Path(run.outputs["report"]).read_text()
    assert not (run.folder / "work").exists()
    with pytest.raises(Stopped, match="measures anew"):
        measure(config, resume=True, stop=True)
