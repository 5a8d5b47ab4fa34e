import json
from pathlib import Path

import pytest

from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread, publish, rate_table, ratio, spread_results
from pipeline.core.presets import load_config
from pipeline.tracking import Tracker


def test_a_ratio_says_whether_its_goal_is_met_and_by_how_much_not():
    spread = Spread(0.91, 0.85, 0.95)
    assert Ratio("x", spread, "a over b", Goal(0.9)).row().note == "a over b; 0.85 to 0.95; goal: at least 0.9, met"
    assert Goal(1.5).told(0.91) == "goal: at least 1.5, missed by 0.59"
    assert Goal(1.2, at_most=True).told(1.25) == "goal: at most 1.2, missed by 0.05"
    assert Goal(1.2, at_most=True).is_met(1.2)
    assert Ratio("x", spread, "a over b").row().note == "a over b; 0.85 to 0.95"


def test_ratios_are_of_the_same_round():
    assert ratio([10.0, 100.0, 30.0], [10.0, 50.0, 10.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_a_table_of_rates_compares_each_with_ours():
    table = rate_table("images/s", {"ours": Spread(30.0, 29.0, 31.0), "peer": Spread(20.0, 20.0, 20.0)}, "ours")
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
        with Tracker.start(run) as tracker:
            publish(run, tracker, found)
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
