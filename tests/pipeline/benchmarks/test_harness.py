"""What benchmarks share: fair timings, findings, pictures."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pipeline.benchmarks import benchmark, harness
from pipeline.benchmarks.harness import (
    Findings,
    Goal,
    Ratio,
    Spread,
    check_named,
    emptied,
    in_fresh_process,
    publish,
    rate_table,
    scratch,
    spread_results,
    steady_rate,
    take_pictures,
    take_turns,
)
from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import read_manifest


def test_contenders_take_turns_after_one_call_each_to_warm_up():
    calls = []

    def contender(name, values):
        def measure():
            calls.append(name)
            return values.pop(0)

        return measure

    run = SimpleNamespace(should_stop=False, config=SimpleNamespace(benchmark=SimpleNamespace(repeats=3)))
    found = take_turns(run, {"a": contender("a", [9, 1, 2, 3]), "b": contender("b", [9, 4, 5, 6])})
    assert found == {"a": [1, 2, 3], "b": [4, 5, 6]}  # the warm-up is not counted
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]  # nobody always comes first


def test_a_spread_is_the_median_with_its_extremes():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_clock_runs_from_when_every_worker_has_finished_a_range():
    assert steady_rate([(3.0, 10), (4.0, 10), (5.0, 20), (6.0, 30)], workers=2) == 50 / 2.0
    assert steady_rate([(3.0, 10), (5.0, 20)], workers=1) == 20 / 2.0


def _hold(mib):
    return len(bytearray(mib * 2**20))


def test_the_peak_is_that_of_the_fresh_process_alone():
    ballast = bytearray(300 * 2**20)  # of this process: it must not count
    held, peak = in_fresh_process(_hold, 150)
    assert held == 150 * 2**20
    assert 150 < peak < 290
    assert len(ballast) > 0


def test_without_proc_the_system_is_asked(monkeypatch):
    monkeypatch.setattr(harness.Path, "exists", lambda path: False)
    monkeypatch.setattr(harness.sys, "platform", "linux")
    assert harness._peak() == pytest.approx(harness.resource.getrusage(harness.resource.RUSAGE_SELF).ru_maxrss / 1024)


def test_a_ratio_says_whether_its_goal_is_met_and_by_how_much_not():
    spread = Spread(0.91, 0.85, 0.95)
    assert Ratio("x", spread, "a over b", Goal(0.9)).row().note == "a over b; 0.85 to 0.95; goal: at least 0.9, met"
    assert Goal(1.5).in_words(0.91) == "goal: at least 1.5, missed by 0.59"
    assert Goal(1.2, at_most=True).in_words(1.25) == "goal: at most 1.2, missed by 0.05"
    assert Goal(1.2, at_most=True).is_met(1.2)
    assert Ratio("x", spread, "a over b").row().note == "a over b; 0.85 to 0.95"


def test_ratios_are_of_the_same_round():
    assert Ratio.of("x", [10.0, 100.0, 30.0], [10.0, 50.0, 10.0], "a over b").spread == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="longer"):
        Ratio.of("x", [1.0], [1.0, 2.0], "a over b")


def test_a_table_of_rates_compares_each_with_ours():
    table = rate_table({"ours": [30.0, 29.0, 31.0], "peer": [20.0]}, "ours")
    assert table == [
        ["", "images/s", "lowest", "highest", "ours / it"],
        ["ours", "30", "29", "31", "1.00"],
        ["peer", "20", "20", "20", "1.50"],
    ]


def test_findings_reach_the_summary_the_log_and_the_report(tmp_path, opened_runs, capsys):
    config = load_config("smoke", [f"run.output={tmp_path}", "tracking.uri=", "benchmark.kind=ingest"])
    found = Findings(
        [["", "rate"], ["ours", "3"]],
        [Ratio("ours_to_limit", Spread(0.5, 0.4, 0.6), "ours / limit", Goal(0.9))],
        spread_results("rate", Spread(3.0, 2.0, 4.0)),
        {"pictures": "7"},
        "half the limit",
    )

    class Step:
        check = staticmethod(lambda config: None)

    with opened_runs() as open_run:
        run = open_run("benchmark", Step, config, "a")
        publish(run, lambda: found)
    assert run.results["ours_to_limit_low"] == 0.4
    assert run.results["rate_high"] == 4
    assert json.loads((run.folder / "metrics.jsonl").read_text())["metrics"] == run.results
    report = Path(run.outputs["report"]).read_text()
    for text in (
        "# smoke: ingest",
        "| ours_to_limit | 0.5 | ours / limit; 0.4 to 0.6",
        "| ours | 3 |",
        "| pictures | 7 |",
    ):
        assert text in report
    said = capsys.readouterr().err
    assert "missed by 0.40" in said
    assert said.endswith("half the limit\n")


def test_a_photograph_is_a_jpeg_of_the_usual_size_and_depends_on_its_number_alone():
    first, again, other = (harness.photograph(number) for number in (3, 3, 11))  # both of one photograph
    assert first == again != other
    with Image.open(io.BytesIO(first)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (500, 375))


def test_files_beyond_the_distinct_ones_are_links(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "DISTINCT", 2)
    files = harness.make_photographs(tmp_path / "new", 5)
    assert [path.name for path in files] == [f"{number:06d}.jpg" for number in range(5)]
    assert files == sorted((tmp_path / "new").iterdir())
    assert files[0].samefile(files[2])
    assert files[0].samefile(files[4])
    assert files[1].samefile(files[3])
    assert not files[0].samefile(files[1])


@pytest.fixture
def begun(small, tmp_path):
    """`begun("benchmark.x=1")`: a run of the kind ingest."""

    def make(*more):
        folder = tmp_path / "run"
        folder.mkdir()
        return Run("benchmark", small("ingest", "data.num_workers=1", *more), folder)

    return make


def test_shards_are_made_of_photographs_without_a_word(begun, capsys):
    run = begun("data.source=", "benchmark.pictures=12")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        manifest = read_manifest(run.config.data.shards)
        assert sum(split.rows for split in manifest.splits.values()) == 12
        assert 0 < manifest.splits["heldout"].rows < 12
        assert manifest.image_size == 16
        assert Path(run.config.data.shards).parent == folder
        assert run.inputs["shards"] == {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    assert capsys.readouterr().err == ""
    assert list(run.folder.iterdir()) == []


def test_pictures_that_are_named_are_taken(begun, noise_shards):
    run = begun(f"data.shards={noise_shards}")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        assert not folder.exists()
    assert run.config.data.shards == str(noise_shards)
    assert run.inputs["shards"]["path"] == str(noise_shards)


def test_a_source_that_is_named_is_preprocessed(begun, tmp_path):
    run = begun("data.source=samples", "benchmark.pictures=12", f"run.output={tmp_path}")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        assert not folder.exists()
    assert read_manifest(run.config.data.shards).splits["train"].rows > 12


def test_what_a_killed_run_left_and_what_an_error_leaves_goes_away(begun):
    run = begun()
    (run.folder / "work" / "photographs").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), scratch(run) as folder:
        assert not folder.exists()
        emptied(folder, "shards", "parts")
        (folder / "old").touch()
        emptied(folder, "parts")
        assert [path.name for path in folder.iterdir()] == ["parts"]
        raise ZeroDivisionError
    assert not folder.exists()


def test_named_pictures_that_cannot_be_used_are_refused(small, tmp_path):
    with pytest.raises(BadInput, match="holds no manifest.json"):
        check_named(small("ingest", f"data.shards={tmp_path}"))
    with pytest.raises(BadInput, match=r"data\.source"):
        check_named(small("ingest", "data.source=nowhere"))
    check_named(small("ingest", "data.source="))


@pytest.mark.parametrize(("kind", "section"), [("encode", "evaluate"), ("generation", "generate"), ("ingest", "train")])
def test_a_gpu_that_is_not_there_is_refused(small, monkeypatch, kind, section):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadInput, match=f"{section}.device is 'cuda'"):
        benchmark.check(small(kind, f"{section}.device=cuda"))
