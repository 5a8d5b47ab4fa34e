import pytest

from pipeline.core.errors import BadInput
from pipeline.sweeps.search import Queue, check_search
from pipeline.sweeps.trials import FINISHED, Ledger

RATES = "train.learning_rate: {log_uniform: [1e-4, 1e-2]}, losses.l1: {uniform: [0, 1]}"
COUNTS = "tokenizer.global_tokens: [2, 4], tokenizer.entropy_layers: {int: [1, 2]}"
OPTUNA = ("sweep.search=optuna", "sweep.samples=20", f"sweep.space={{{RATES}, {COUNTS}}}")


@pytest.fixture
def open_queue(plan):
    def make(*overrides, losses=None):
        sweep = plan(*overrides)
        sweep.folder.mkdir(exist_ok=True)
        ledger = Ledger.open(sweep)
        return Queue(sweep, ledger, losses or {}), ledger

    return make


def drain(queue):
    return list(iter(queue.take, None))


def test_trials_come_in_order_and_then_no_more(open_queue):
    queue, ledger = open_queue()
    assert [trial.number for trial in drain(queue)] == [0, 1, 2]
    assert len(ledger.entries) == 3


def test_interrupted_trials_come_first_and_ended_ones_not_again(open_queue):
    queue, ledger = open_queue()
    first, second = queue.take(), queue.take()
    ledger.end(first.number, FINISHED)
    assert [trial.number for trial in drain(open_queue()[0])] == [second.number, 2]


def test_a_closed_queue_hands_out_no_more(open_queue):
    queue, _ = open_queue()
    queue.take()
    queue.close()
    assert queue.take() is None


def test_optuna_finds_what_is_best_more_often_than_chance(open_queue):
    pytest.importorskip("optuna")
    queue, _ = open_queue(*OPTUNA)
    found = []
    while (trial := queue.take()) is not None:
        assert 1e-4 <= trial.values["train.learning_rate"] <= 1e-2
        assert trial.values["tokenizer.global_tokens"] in (2, 4)
        assert isinstance(trial.values["tokenizer.entropy_layers"], int)
        found.append(trial.values["tokenizer.global_tokens"])
        queue.learn(trial, 1.0 if found[-1] == 4 else 2.0)
    assert len(found) == 20
    assert found[10:].count(4) >= 8


def test_optuna_repeats_no_draws_after_a_resume(open_queue):
    pytest.importorskip("optuna")
    queue, ledger = open_queue(*OPTUNA)
    first = queue.take()
    queue.learn(first, None)  # a trial that failed says nothing
    ledger.end(first.number, FINISHED)
    again, _ = open_queue(*OPTUNA, losses={first.number: 1.0})
    second = again.take()
    assert second.number == 1
    assert second.values != first.values


def test_optuna_that_is_not_installed_is_told_before_anything_runs(plan, monkeypatch):
    monkeypatch.setattr("pipeline.sweeps.search.find_spec", lambda name: None)
    check_search(plan())
    with pytest.raises(
        BadInput, match="sweep.search is 'optuna', which is not installed; expected random, or pip install"
    ):
        check_search(plan(*OPTUNA))
