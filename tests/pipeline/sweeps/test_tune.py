"""Trials as Ray Tune asks for them, and what one does wherever it runs, with pretended stages."""

import json
import math
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.search import Searcher

from pipeline.core.errors import BadInput, Stopped
from pipeline.core.run import Run
from pipeline.sweeps import driver, sweep, tune
from pipeline.sweeps.driver import TrialSearcher
from pipeline.sweeps.trials import FINISHED, Ledger
from pipeline.sweeps.tune import _scheduler, run_tune

RATES = "train.learning_rate: {log_uniform: [1e-4, 1e-2]}, losses.l1: {uniform: [0, 1]}"
COUNTS = "tokenizer.global_tokens: [2, 4], tokenizer.entropy_layers: {int: [1, 2]}"
LEVELS = "tokenizer.fsq_levels: {choice: [[4, 4], [8, 2]]}"
OPTUNA = ("sweep.search=optuna", "sweep.samples=20", f"sweep.space={{{RATES}, {COUNTS}, {LEVELS}}}")


class FakeChild:
    """Takes the place of a child run; `loss` is what its trial is worth."""

    def __init__(self, plan, trial, *others):
        self.trial, self.began, self.loss, self.closed = trial, time.monotonic(), None, ()

    def measured(self):
        return None if self.loss is None else -self.loss

    def close(self, *how):
        self.closed = how


@pytest.fixture
def open_searcher(plan, configure, monkeypatch):
    """`open_searcher("sweep.samples=3")`: a searcher over the sweep's ledger, with children that do nothing."""
    monkeypatch.setattr(driver, "ChildRun", FakeChild)

    def make(*overrides):
        made = plan(*overrides)
        made.folder.mkdir(exist_ok=True)
        return TrialSearcher(Run("sweep", configure(*overrides), made.folder), made, Ledger.open(made), None, {})

    return make


def begin(searcher, name="x"):
    """The trial that begins next; None where none does."""
    return None if searcher.suggest(name) == Searcher.FINISHED else searcher._children[name].trial


def test_trials_come_in_order_and_then_no_more(open_searcher):
    searcher = open_searcher()
    assert [begin(searcher, name).number for name in "abc"] == [0, 1, 2]
    assert begin(searcher) is None
    assert len(searcher.ledger.entries) == 3


def test_interrupted_trials_come_first_and_ended_ones_not_again(open_searcher):
    searcher = open_searcher()
    first, second = begin(searcher, "a"), begin(searcher, "b")
    searcher.ledger.end(first.number, FINISHED)
    again = open_searcher()
    assert [begin(again, name).number for name in "cd"] == [second.number, 2]
    assert begin(again) is None


def test_none_begins_after_a_stop_request(open_searcher):
    searcher = open_searcher()
    begin(searcher)
    searcher.run.request_stop()
    assert begin(searcher) is None


@pytest.mark.parametrize(
    ("result", "error", "end"),
    [
        ({"outcome": "finished", "reason": ""}, False, ("finished", "")),
        ({"outcome": "failed", "reason": "out of memory"}, False, ("failed", "out of memory")),
        (None, True, ("failed", "its worker died; see Ray's log")),
        ({"step": 3, "psnr": 9.876}, False, ("stopped", "ASHA: after step 3 its validation PSNR, 9.88 dB, was behind")),
    ],
)
def test_the_end_of_a_trial_is_noted_with_its_reason(open_searcher, result, error, end):
    searcher = open_searcher()
    begin(searcher, "x"), begin(searcher, "y")
    child = searcher._children["y"]
    searcher.on_trial_complete("y", result, error)
    assert child.closed == end
    assert [(e.status, e.reason) for e in searcher.ledger.entries] == [("running", ""), end]


def test_tune_may_pickle_what_it_is_given(open_searcher):
    assert isinstance(pickle.loads(pickle.dumps(open_searcher())), TrialSearcher)


def test_optuna_finds_what_is_best_more_often_than_chance(open_searcher):
    pytest.importorskip("optuna")
    searcher, found = open_searcher(*OPTUNA), []
    while (trial := begin(searcher)) is not None:
        assert 1e-4 <= trial.values["train.learning_rate"] <= 1e-2
        assert trial.values["tokenizer.global_tokens"] in (2, 4)
        assert trial.values["tokenizer.fsq_levels"] in ([4, 4], [8, 2])
        assert isinstance(trial.values["tokenizer.entropy_layers"], int)
        found.append(trial.values["tokenizer.global_tokens"])
        searcher._children["x"].loss = 1.0 if found[-1] == 4 else 2.0
        searcher.on_trial_complete("x", {"outcome": "finished", "reason": ""})
    assert len(found) == 20
    assert found[10:].count(4) >= 8


def test_optuna_repeats_no_draws_after_a_resume(open_searcher, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(driver, "points_of", lambda plan, trial: [])
    searcher = open_searcher(*OPTUNA)
    first = begin(searcher)
    searcher.on_trial_complete("x", {"outcome": "finished", "reason": ""})  # one without an objective says nothing
    second = begin(open_searcher(*OPTUNA))
    assert second.number == 1
    assert second.values != first.values


def test_optuna_that_is_not_installed_is_refused_before_anything_runs(configure, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    sweep.check(configure())
    with pytest.raises(BadInput, match="sweep.search is 'optuna', which is not installed; expected random, or pip"):
        sweep.check(configure(*OPTUNA))


def test_asha_grants_every_trial_its_grace_and_lets_none_reach_its_own_end(configure):
    assert _scheduler(configure()) is None
    scheduler = _scheduler(configure("sweep.scheduler=asha", "sweep.reduction=2"))
    assert scheduler._brackets[0]._rungs[-1][0] == configure().train.validate_every == 10
    longer = _scheduler(configure("sweep.scheduler=asha", "sweep.grace_steps=15"))
    assert longer._brackets[0]._rungs[-1][0] == 15
    assert scheduler._max_t > configure().train.max_steps
    assert scheduler._reduction_factor == 2


class TwoTrials(Searcher):
    """Two tasks, and the outcomes of their trials."""

    def __init__(self, folder):
        super().__init__(metric="psnr", mode="max")
        self.folder, self.outcomes = folder, []
        self.tasks = [{"number": number, "folder": str(folder)} for number in (0, 1)]

    def set_search_properties(self, *given, **spec):
        return True

    def suggest(self, trial_id):
        return self.tasks.pop(0) if self.tasks else Searcher.FINISHED

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.outcomes.append((result or {}).get("outcome"))
        (self.folder / "ended").touch()

    def save_to_dir(self, checkpoint_dir, session_str="default"):
        """Nothing is resumed."""


@pytest.mark.slow
def test_a_trial_that_ends_does_not_take_ray_datas_actors_from_the_one_beside_it(
    ray_session, configure, tmp_path, monkeypatch
):
    def trial(task):  # a function inside a test: Ray sends it by value
        import ray
        from ray import tune
        from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker

        def wait_for(name):
            while not (Path(task["folder"]) / name).exists():
                time.sleep(0.05)

        if task["number"] == 1:
            wait_for("made by 0")
        tracker = get_or_create_actor_location_tracker()
        ray.get(tracker.get_actor_locations.remote(("a",)))
        (Path(task["folder"]) / f"made by {task['number']}").touch()
        wait_for("made by 1")
        if task["number"] == 1:
            wait_for("ended")
            for _ in range(50):  # the placement group of the other one goes a little after it
                ray.get(tracker.get_actor_locations.remote(("a",)))
                time.sleep(0.1)
        tune.report({"step": 1, "psnr": 1.0, "outcome": "finished", "reason": ""})

    monkeypatch.setattr("pipeline.sweeps.tune.in_tune", trial)
    searcher, looks = TwoTrials(tmp_path), []
    run_tune(configure("train.max_failures=0"), tmp_path, 2, 2, searcher, lambda: looks.append(1))
    assert searcher.outcomes == ["finished", "finished"]
    assert len(looks) > 1


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

    monkeypatch.setattr(tune, "run_nested", run_nested)
    return SimpleNamespace(calls=calls, fail=fail)


@pytest.fixture
def task(plan):
    sweep = plan("sweep.cuts={relative: [0.5], count: [4]}")
    return sweep.task_of(sweep.trials()[0])


def test_a_trial_trains_and_then_evaluates_what_it_trained_by_every_rule(stages, task, plan):
    tune.work(task)
    checkpoint = str(plan().training_folder(plan().trials()[0]) / "checkpoint")
    assert stages.calls == [("train", ""), ("evaluate", checkpoint), ("evaluate", checkpoint)]


def test_what_is_finished_is_not_done_again(stages, task, tmp_path):
    stages.fail["evaluate"] = Stopped("asked to")
    with pytest.raises(Stopped):
        tune.work(task)
    stages.fail.clear()
    (tmp_path / "sweep" / f"{task['evaluations'][0]['preset']}-evaluate" / "summary.json").write_text('{"status": "fin')
    tune.work(task)
    assert [stage for stage, _ in stages.calls] == ["train", "evaluate", "evaluate", "evaluate"]


def test_a_given_checkpoint_is_evaluated_and_nothing_trained(stages, task):
    evaluation = task["evaluations"][0]
    evaluation["tokenizer"]["checkpoint"] = "given"
    tune.work({**task, "training": None, "evaluations": [evaluation]})
    assert stages.calls == [("evaluate", "given")]


@pytest.fixture
def reports(monkeypatch):
    found = []
    monkeypatch.setattr(tune.tune, "report", found.append)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0.01)
    return found


def test_tune_hears_of_validations_and_of_the_end(stages, task, reports):
    tune.in_tune(task)
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
    tune.in_tune(task)
    assert (reports[-1]["outcome"], reports[-1]["reason"]) == (outcome, reason)
    assert type(problem).__name__ in (Path(task["folder"]) / "output.txt").read_text()


def test_what_is_written_past_python_is_kept_with_the_trial_too(tmp_path, capfd):
    with tune._output_to(tmp_path / "trial" / "output.txt"):
        os.write(2, b"as Ray does\n")
    os.write(2, b"afterwards\n")
    assert (tmp_path / "trial" / "output.txt").read_text() == "as Ray does\n"
    assert capfd.readouterr().err == "afterwards\n"


def test_only_whole_lines_are_read_and_each_of_them_once(tmp_path):
    lines = tune.GrowingMetrics(tmp_path)

    def write(*steps, torn=""):
        made = [json.dumps({"time": 1.0, "step": step, "metrics": {"psnr": None}}) + "\n" for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(made) + torn)

    assert lines.new() == []
    write(1, torn='{"step": 2')
    (entry,) = lines.new()
    assert (entry.step, math.isnan(entry.metrics["psnr"])) == (1, True)
    write(1, 2)
    assert [entry.step for entry in lines.new()] == [2]
    write(5)  # written anew
    assert [entry.step for entry in lines.new()] == [5]
