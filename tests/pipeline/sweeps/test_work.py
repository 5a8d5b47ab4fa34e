"""A trial's work with pretended stages: what is finished is not repeated, what is reported to Tune, how it ends."""

import fcntl
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.core.errors import BadInput, Stopped
from pipeline.sweeps import trial_work


@pytest.fixture
def stages(monkeypatch):
    """Stages that note their call and leave a summary; `fail` holds what one of them raises."""
    calls, fail = [], {}

    def run_nested(stage, config):
        calls.append((stage, config.tokenizer.checkpoint))
        folder = Path(config.run.output) / f"{config.preset}-{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        if stage in fail:
            raise fail[stage]
        lines = [{"time": 1.0, "step": s, "metrics": {"validation/psnr": 20.0 + s}} for s in (10, 20)]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"time": 1.0, "validation/psnr'
        )
        (folder / "summary.json").write_text(json.dumps({"status": "finished"}))

    monkeypatch.setattr(trial_work, "run_nested", run_nested)
    return SimpleNamespace(calls=calls, fail=fail)


@pytest.fixture
def task(plan):
    sweep = plan("sweep.cuts={relative: [0.5], count: [4]}")
    trial = sweep.trials()[0]
    evaluations = [sweep.evaluation_of(trial, rule, "") for rule in sweep.cuts]
    return trial_work.task_of(sweep.folder / trial.name, sweep.training_of(trial), evaluations)


def test_a_trial_trains_and_then_evaluates_what_it_trained_by_every_rule(stages, task, plan):
    trial_work.work(task)
    checkpoint = str(plan().training_folder(plan().trials()[0]) / "checkpoint")
    assert stages.calls == [("train", ""), ("evaluate", checkpoint), ("evaluate", checkpoint)]


def test_what_is_finished_is_not_done_again(stages, task):
    stages.fail["evaluate"] = Stopped("asked to")
    with pytest.raises(Stopped):
        trial_work.work(task)
    stages.fail.clear()
    trial_work.work(task)
    assert [stage for stage, _ in stages.calls] == ["train", "evaluate", "evaluate", "evaluate"]


def test_a_given_checkpoint_is_evaluated_and_nothing_trained(stages, task):
    evaluation = task["evaluations"][0]
    evaluation["tokenizer"]["checkpoint"] = "given"
    trial_work.work({**task, "training": None, "evaluations": [evaluation]})
    assert stages.calls == [("evaluate", "given")]


@pytest.fixture
def reports(monkeypatch):
    found = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=SimpleNamespace(report=found.append)))
    monkeypatch.setattr(trial_work, "LOOK_SECONDS", 0.01)
    return found


def test_tune_hears_of_validations_and_of_the_end(stages, task, reports):
    trial_work.in_tune(task)
    assert reports[-1]["outcome"] == "finished"
    assert {(report["step"], report["psnr"]) for report in reports} <= {(0, float("-inf")), (10, 30.0), (20, 40.0)}


@pytest.mark.parametrize(
    ("problem", "outcome", "reason"),
    [
        (ValueError("two\nlines"), "failed", "ValueError: two lines"),
        (BadInput("x is 1; expected 2"), "failed", "x is 1; expected 2"),
        (Stopped("after step 3"), "interrupted", "after step 3"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_a_trial_that_does_not_finish_says_why(stages, task, reports, problem, outcome, reason):
    stages.fail["train"] = problem
    trial_work.in_tune(task)
    assert (reports[-1]["outcome"], reports[-1]["reason"]) == (outcome, reason)
    assert type(problem).__name__ in (Path(task["folder"]) / "output.txt").read_text()


def test_what_is_written_past_python_is_kept_with_the_trial_too(tmp_path, capfd):
    with trial_work._output_to(tmp_path / "trial" / "output.txt"):
        os.write(2, b"as Ray does\n")
    os.write(2, b"afterwards\n")
    assert (tmp_path / "trial" / "output.txt").read_text() == "as Ray does\n"
    assert capfd.readouterr().err == "afterwards\n"


def test_a_folder_that_a_killed_worker_still_holds_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_work, "LOCK_SECONDS", 0.3)
    trial_work._wait_for(tmp_path / "new")
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not trial_work._is_free(tmp_path)
        trial_work._wait_for(tmp_path)  # and given up: opening the run then says who holds it
    assert trial_work._is_free(tmp_path)


def test_a_torn_summary_is_of_no_finished_run(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "fin')
    assert not trial_work.is_finished(tmp_path)
