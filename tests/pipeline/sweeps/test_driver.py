"""Sweeps whose trials are pretended: what the driver, the child runs and the ledger make of what happens."""

import csv
import json
from pathlib import Path

import pytest

from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.sweeps import sweep as sweep_stage
from pipeline.sweeps.driver import ChildRun
from pipeline.sweeps.trials import Ledger, SweepPlan
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok


@pytest.fixture
def sweep(configure, fake_tune, tmp_path):
    """`sweep("sweep.seed=1", resume=True)` runs a sweep in the folder `sweep`; returns the closed run."""

    def run_sweep(*overrides, resume=False):
        run = Run.open("sweep", configure(*overrides), "sweep", resume)
        try:
            sweep_stage.run(run)
        finally:
            run.close()
        return run

    return run_sweep


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry["metrics"].items():
            found.setdefault(name, []).append((entry["step"], value))
    return found


def test_a_sweep_leaves_a_row_for_each_trial_and_threshold_and_the_best_configuration(sweep, tmp_path):
    run = sweep()
    rows = list(csv.DictReader((tmp_path / "sweep" / "table.csv").read_text().splitlines()))
    assert [(row["number"], row["threshold"]) for row in rows[:7]] == [
        ("0", "0.1"), ("0", "0.26"), ("0", "0.42"), ("0", "0.58"), ("0", "0.74"),
        ("0", "0.9"), ("1", "0.1"),
    ]  # fmt: skip
    assert len(rows) == 18
    assert {row["global_tokens"] for row in rows} == {"2", "4", "8"}
    assert set(rows[0]) >= {"tokens", "bits_fixed", "psnr", "rfd_compact_cifar10", "images_per_second", "pareto_front"}
    assert [row["trial"] for row in rows if row["pareto_front"] == "1"] == ["trial-02-global_tokens-8"] * 6
    assert run.results["best_trial"] == 2
    assert run.results["best_objective"] == 22 + 4  # at 12 tokens
    best = load_config(run.outputs["best"])
    assert best.tokenizer.global_tokens == 8
    assert best.tokenizer.checkpoint == str(tmp_path / "sweep" / "trial-02-global_tokens-8-train" / "checkpoint")
    assert f"python jobs/train.py {run.outputs['best']} tokenizer.checkpoint= " in Path(run.outputs["best"]).read_text()
    assert best.filter.threshold == pytest.approx(0.74)
    assert best.sweep.kind == "thresholds"
    assert best.run.output == str(tmp_path)
    page = (tmp_path / "sweep" / "table.md").read_text()
    assert "trial-02-global_tokens-8, PSNR 26.00 dB at 12 tokens" in page
    assert page.count("| trial-") == 18
    assert Path(run.outputs["rate_distortion"]).stat().st_size > 10_000


def test_checkpoints_are_measured_as_they_are_and_the_best_one_is_named(sweep, tmp_path):
    for name, tokens in (("a", 2), ("b", 8)):
        config = TokenizerConfig(32, 8, "nano", tokens, codebook_size=16, codebook_dim=4)
        TaTok(config).save_pretrained(tmp_path / name / "checkpoint")
    paths = f"[{tmp_path / 'a'}, {tmp_path / 'b' / 'checkpoint'}]"
    run = sweep("sweep.kind=thresholds", "sweep.space={}", f"sweep.checkpoints={paths}")
    rows = list(csv.DictReader((tmp_path / "sweep" / "table.csv").read_text().splitlines()))
    assert {(row["trial"], row["global_tokens"]) for row in rows} == {("trial-00-a", "2"), ("trial-01-b", "8")}
    text = Path(run.outputs["best"]).read_text()
    assert "python jobs/evaluate.py" in text
    assert "train.py" not in text
    assert load_config(run.outputs["best"]).tokenizer.checkpoint == str(tmp_path / "b" / "checkpoint")


def test_a_trial_shows_its_training_and_its_curve_over_tokens(sweep, tmp_path):
    sweep()
    found = metrics(tmp_path / "sweep" / "trial-01-global_tokens-4")
    assert found["validation/psnr"] == [(10, 21.0), (20, 21.0)]
    assert found["train/loss"] == [(10, 0.1), (20, 0.05)]
    assert found["curve/psnr"] == [(4 + 2 * i, 21.0 + i) for i in range(6)]
    assert [step for step, _ in found["curve/rfd_compact_cifar10"]] == [4, 6, 8, 10, 12, 14]
    assert found["psnr"] == [(0, 21.0)]
    assert found["objective"] == [(0, 25.0)]
    assert summary(tmp_path / "sweep" / "trial-01-global_tokens-4")["status"] == "finished"
    parent = metrics(tmp_path / "sweep")
    assert parent["trials/objective"] == [(0, 24.0), (1, 25.0), (2, 26.0)]
    assert parent["front/psnr"] == [(4 + 2 * i, 22.0 + i) for i in range(6)]


def test_a_trial_that_fails_or_is_stopped_is_recorded_with_its_reason_and_ends_nothing(sweep, fake_tune, tmp_path):
    fake_tune.acts |= {0: ("failed", "out of memory"), 2: ("stopped", "ASHA: behind")}
    run = sweep()
    assert fake_tune.given == [0, 1, 2]
    assert {name: run.results[f"trials_{name}"] for name in ("finished", "failed", "stopped")} == {
        "finished": 1, "failed": 1, "stopped": 1,
    }  # fmt: skip
    failed = summary(tmp_path / "sweep" / "trial-00-global_tokens-2")
    assert (failed["status"], failed["error"], failed["exit_code"]) == ("failed", "out of memory", 1)
    stopped = summary(tmp_path / "sweep" / "trial-02-global_tokens-8")
    assert (stopped["status"], stopped["error"], stopped["exit_code"]) == ("stopped", "ASHA: behind", 3)
    assert "- trial-00-global_tokens-2: failed: out of memory" in (tmp_path / "sweep" / "table.md").read_text()


def test_a_failed_trial_whose_status_is_set_back_runs_again(sweep, fake_tune, tmp_path):
    fake_tune.acts[1] = ("failed", "a disk was full")
    sweep()
    fake_tune.acts.clear()
    path = tmp_path / "sweep" / "trials.json"
    path.write_text(path.read_text().replace('"failed"', '"running"'))
    assert sweep(resume=True).results["trials_finished"] == 3
    assert fake_tune.given == [0, 1, 2, 1]


def test_a_trial_that_leaves_no_curve_has_failed(sweep, fake_tune, tmp_path):
    fake_tune.acts[1] = ("finished", "")  # and nothing in its folder
    assert sweep().results["trials_finished"] == 2
    failed = summary(tmp_path / "sweep" / "trial-01-global_tokens-4")
    assert failed["status"] == "failed"
    assert "holds no summary.json" in failed["error"]


def test_a_sweep_of_which_no_trial_finishes_fails_with_their_reasons(sweep, fake_tune):
    fake_tune.acts |= dict.fromkeys(range(3), ("failed", "out of memory"))
    with pytest.raises(RuntimeError, match="no trial finished; trial-00-global_tokens-2: out of memory; trial-01"):
        sweep()


def test_after_a_kill_only_what_is_missing_runs_and_the_interrupted_trial_goes_on(sweep, fake_tune, tmp_path):
    fake_tune.acts[1] = "die"
    with pytest.raises(RuntimeError, match="Ray Tune ended before its trials"):
        sweep()
    assert fake_tune.given == [0, 1]
    fake_tune.acts.clear()
    run = sweep(resume=True)
    assert fake_tune.given == [0, 1, 1, 2]
    assert run.results["trials_finished"] == 3
    assert sum(path.name.startswith("trial-01") for path in (tmp_path / "sweep").iterdir()) == 3  # one trial, one run
    assert metrics(tmp_path / "sweep" / "trial-01-global_tokens-4")["curve/psnr"][0] == (4, 21.0)
    assert sweep(resume=True).results["points"] == 18
    assert fake_tune.given == [0, 1, 1, 2]


def test_a_sweep_that_tune_leaves_between_trials_is_not_taken_for_a_whole_one(sweep, fake_tune):
    fake_tune.acts[0] = "last"
    with pytest.raises(RuntimeError, match="Ray Tune ended before its trials; --resume"):
        sweep()
    fake_tune.acts.clear()
    assert sweep(resume=True).results["trials_finished"] == 3
    assert fake_tune.given == [0, 1, 2]


def test_a_draw_that_cannot_be_configured_is_a_failed_trial(sweep, fake_tune, tmp_path):
    pytest.importorskip("optuna")
    keys = ("sweep.search=optuna", "sweep.samples=12", "sweep.space={tokenizer.patch_size: {int: [4, 8]}}")
    run = sweep(*keys)  # 5, 6 and 7 do not divide 32 pixels
    assert 0 < run.results["trials_failed"] == 12 - len(fake_tune.given) < 12
    assert run.results["trials_finished"] == len(fake_tune.given)
    assert "failed: tokenizer.image_size is 32; expected a multiple" in (tmp_path / "sweep" / "table.md").read_text()


def test_a_stop_leaves_what_was_running_to_a_resume(sweep, fake_tune, configure, tmp_path):
    fake_tune.acts[1] = "stop"
    with pytest.raises(Stopped, match="--resume runs the trials that are missing"):
        sweep()
    ledger = Ledger.open(SweepPlan.of(configure(), tmp_path / "sweep"))
    assert [(entry.trial.number, entry.status) for entry in ledger.entries] == [(0, "finished"), (1, "running")]
    left = summary(tmp_path / "sweep" / "trial-01-global_tokens-4")
    assert (left["status"], left["exit_code"]) == ("stopped", 3)
    assert left["error"] == "the sweep was stopped; it goes on with --resume"
    fake_tune.acts.clear()
    assert sweep(resume=True).results["trials_finished"] == 3
    assert fake_tune.given == [0, 1, 1, 2]


def test_no_best_trial_is_named_where_all_spend_more_than_the_budget(sweep, tmp_path):
    run = sweep("sweep.budget_tokens=3")
    assert "best_trial" not in run.results
    assert "best" not in run.outputs
    assert "No best trial" in (tmp_path / "sweep" / "table.md").read_text()


def test_several_rules_are_told_apart(sweep, tmp_path):
    run = sweep("sweep.cuts={relative: [0.2, 0.5], count: [4, 8]}", "sweep.space={tokenizer.global_tokens: [4]}")
    assert run.results["points"] == 4
    found = metrics(tmp_path / "sweep" / "trial-00-global_tokens-4")
    assert found["curve_relative/psnr"] == found["curve_count/psnr"] == [(4, 20.0), (6, 21.0)]


@pytest.mark.parametrize(
    ("inputs", "images", "sentence"),
    [({}, 32, "measured shards unknown"), (None, 7, "measured images 7; expected 32, as the trials")],
)
def test_a_control_measured_on_other_pictures_is_refused_before_anything_runs(
    sweep, fake_tune, shards, tmp_path, inputs, images, sentence
):
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    inputs = {"shards": {"sha256": fingerprint}} if inputs is None else inputs
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "summary.json").write_text(json.dumps({"inputs": inputs, "results": {"images": images}}))
    with pytest.raises(BadInput, match=sentence):
        sweep("sweep.objective=bd_rate", f"sweep.control={tmp_path / 'control'}")
    assert fake_tune.given == []


def test_mlflow_has_a_parent_with_closed_children_and_what_the_compare_page_needs(sweep, fake_tune, database):
    from mlflow import MlflowClient

    keys = (f"tracking.uri={database}", "tracking.system_metrics=false", "tracking.flush_seconds=0.2")
    fake_tune.acts |= {0: ("stopped", "ASHA: behind"), 1: "die"}
    with pytest.raises(RuntimeError, match="Ray Tune ended"):
        sweep(*keys)
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("tatok").experiment_id
    before = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {run.info.status for run in before.values()} == {"KILLED", "FAILED"}  # nothing is left running
    fake_tune.acts.pop(1)
    run = sweep(*keys, resume=True)
    after = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: run.info.run_id for name, run in after.items() if name in before} == {
        name: run.info.run_id for name, run in before.items()
    }
    parent = after.pop("sweep")
    assert parent.info.run_id == run.mlflow_run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["global_tokens"] == "2, 4, 8"
    assert {child.data.tags["mlflow.parentRunId"] for child in after.values()} == {parent.info.run_id}
    stopped = after.pop("trial-00-global_tokens-2")
    assert (stopped.info.status, stopped.data.tags["reason"]) == ("KILLED", "ASHA: behind")
    assert sorted(after) == ["trial-01-global_tokens-4", "trial-02-global_tokens-8"]
    for child in after.values():
        assert child.info.status == "FINISHED"
        assert child.data.params["tokenizer.global_tokens"] == child.data.tags["global_tokens"]
        assert {"curve/psnr", "curve/rfd_compact_cifar10", "validation/psnr", "psnr", "objective"} <= set(
            child.data.metrics
        )
        assert {"stage", "preset", "threshold", "data_fingerprint", "commit", "sweep"} <= set(child.data.tags)
        history = client.get_metric_history(child.info.run_id, "curve/psnr")
        assert [point.step for point in history] == [4, 6, 8, 10, 12, 14]  # tokens: the chart is a curve
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"table.csv", "table.md", "best.yaml", "pictures"} <= kept


def line(step: int, psnr: float | None) -> str:
    return json.dumps({"time": 1.0, "step": step, "metrics": {"validation/psnr": psnr}}) + "\n"


def logged(folder: Path) -> list[tuple[int, float | None]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["metrics"]["validation/psnr"]) for entry in map(json.loads, lines)]


@pytest.fixture
def begin(plan, configure):
    """Opens the child of the first trial, whose training folder is there; closes all at the end."""
    sweep = plan()
    run = Run.open("sweep", configure(), "sweep", resume=False)
    trial, opened = sweep.trials()[0], []
    sweep.training_folder(trial).mkdir()

    def make() -> ChildRun:
        opened.append(ChildRun(sweep, trial, run, None, {}))
        return opened[-1]

    yield make, sweep.training_folder(trial) / "metrics.jsonl"
    for child in opened:
        child.run.close()
    run.close()


def test_a_step_that_is_repeated_after_a_kill_is_copied_once(begin):
    make, source = begin
    child = make()
    source.write_text(line(1, 10.0) + line(2, 11.0))
    child.look()
    child.run.close()  # killed
    with open(child.run.folder / "metrics.jsonl", "a") as file:
        file.write('{"time": 1.0, "st')
    again = make()
    source.write_text(line(1, 10.0))  # a training that goes on rewinds to its checkpoint
    again.look()
    source.write_text(line(1, 10.0) + line(2, 11.5) + line(3, 12.0))
    again.look()
    assert logged(again.run.folder) == [(1, 10.0), (2, 11.0), (3, 12.0)]


def test_what_is_no_number_stays_none(begin):
    make, source = begin
    source.write_text(line(1, None))
    child = make()
    child.look()
    assert logged(child.run.folder) == [(1, None)]


def test_a_child_that_is_left_says_that_it_goes_on(begin):
    make, _ = begin
    child = make()
    child.leave()
    summary = json.loads((child.run.folder / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("stopped", 3)
    assert summary["error"] == "the sweep was stopped; it goes on with --resume"
    assert summary["stage"] == "trial"
