"""All kinds in a row: what the report holds, and that one that fails does not end it."""

from pathlib import Path

import pytest

from pipeline.benchmarks import every_kind
from pipeline.core.errors import BadInput
from pipeline.core.stages import BENCHMARKS

SETTINGS = ("benchmark.mean_tokens=4", "benchmark.images=20", "train.device=cpu")


def test_every_kind_there_is_comes():
    assert {*every_kind.KINDS, "all"} == set(BENCHMARKS)


def test_one_report_sets_each_figure_against_what_the_device_can_do(measure, tiny, monkeypatch):
    monkeypatch.setattr(every_kind, "KINDS", ("encode", "generation", "ingest"))
    monkeypatch.setattr(every_kind, "COPIED", {"cpu": 2**24})
    run = measure(tiny("all", *SETTINGS, "data.shards=/nowhere"))
    found = run.results
    assert found["copy_bytes_per_second"] > 1e8
    assert found["product_flops"] > 1e8
    report = Path(run.outputs["report"]).read_text()
    rate = found["encode_encode_images_per_second_batch8"]
    share = rate * every_kind.encode_flops(run.config.tokenizer) / found["product_flops"]
    assert f"{share:.1%}" in next(line for line in report.splitlines() if line.startswith("| encode |"))
    assert "| generate, tatok |" in report
    assert "| generate, patch_only |" in report
    assert "# smoke: generation" in report, "the kinds' own reports follow"
    assert "Not measured: ingest: BadInput: " in report
    assert (run.folder / "smoke-benchmark-encode" / "summary.json").is_file()


def test_kinds_that_would_begin_too_late_are_named(measure, tiny, monkeypatch):
    monkeypatch.setattr(every_kind, "KINDS", ("encode", "generation"))
    monkeypatch.setattr(every_kind, "SECONDS", 0.01)
    report = Path(measure(tiny("all", *SETTINGS)).outputs["report"]).read_text()
    assert "Not measured: generation: 0.01 s were over" in report


def test_what_no_kind_can_work_with_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(every_kind, "KINDS", ("encode", "evaluate"))
    with pytest.raises(BadInput, match="tokenizer.checkpoint '/nowhere' does not exist"):
        every_kind.check(tiny("all", "tokenizer.checkpoint=/nowhere"))
