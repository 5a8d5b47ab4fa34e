"""What Tune is told and what it says."""

import pickle
import time
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from pipeline.sweeps.tune import QueueSearcher, _scheduler, grace_steps, run_tune


@pytest.fixture
def searcher():
    """A searcher over two trials; `ends` holds what it passed on."""
    tasks, ends = [(4, {"folder": "a"}), (7, {"folder": "b"})], []
    made = QueueSearcher(lambda: tasks.pop(0) if tasks else None, lambda *end: ends.append(end))
    made.ends = ends
    return made


def test_trials_are_handed_out_until_there_are_none(searcher):
    assert [searcher.suggest("x"), searcher.suggest("y")] == [{"folder": "a"}, {"folder": "b"}]
    assert searcher.suggest("z") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("result", "error", "end"),
    [
        ({"outcome": "finished", "reason": ""}, False, ("finished", "")),
        ({"outcome": "failed", "reason": "out of memory"}, False, ("failed", "out of memory")),
        (None, True, ("failed", "its worker died; see Ray's log")),
        ({"step": 3, "psnr": 9.876}, False, ("stopped", "ASHA: after step 3 its validation PSNR, 9.88 dB, was behind")),
    ],
)
def test_ends_are_passed_on_with_the_number_of_the_trial(searcher, result, error, end):
    searcher.suggest("x")
    searcher.suggest("y")
    searcher.on_trial_complete("y", result, error)
    assert searcher.ends == [(7, *end)]


def test_tune_may_pickle_what_it_is_given(searcher):
    assert isinstance(pickle.loads(pickle.dumps(searcher)), QueueSearcher)


def test_asha_grants_every_trial_its_grace_and_lets_none_reach_its_own_end(configure):
    assert _scheduler(configure()) is None
    config = configure("sweep.scheduler=asha", "sweep.reduction=2")
    assert grace_steps(config) == config.train.validate_every == 10
    assert grace_steps(configure("sweep.scheduler=asha", "sweep.grace_steps=15")) == 15
    scheduler = _scheduler(config)
    assert scheduler._max_t > config.train.max_steps
    assert scheduler._reduction_factor == 2


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
    tasks = [(number, {"number": number, "folder": str(tmp_path)}) for number in (0, 1)]
    ends = []

    def end(number, outcome, reason):
        ends.append((number, outcome))
        (tmp_path / "ended").touch()

    run_tune(configure("train.max_failures=0"), tmp_path, 2, 2, lambda: tasks.pop(0) if tasks else None, end).join()
    assert ends == [(0, "finished"), (1, "finished")]
