import json

import pytest

from pipeline.core.errors import BadInput
from pipeline.sweeps.trials import FAILED, FINISHED, RUNNING, Ledger


@pytest.fixture
def begun(plan):
    sweep = plan()
    sweep.folder.mkdir()
    return sweep


def test_what_was_noted_is_read_again(begun):
    ledger = Ledger.open(begun)
    first, second, third = begun.trials()
    for trial in (second, first, third):
        ledger.begin(trial)
    ledger.begin(first)  # it goes on
    ledger.end(0, FINISHED)
    ledger.end(2, FAILED, "out of memory")
    again = Ledger.open(begun)
    assert [entry.trial for entry in again.of(FINISHED)] == [first]
    assert [entry.trial for entry in again.of(RUNNING)] == [second]
    assert [(entry.trial.number, entry.reason) for entry in again.of(FAILED)] == [(2, "out of memory")]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("sweep.seed=1", "sweep.seed is 1; expected 0, as this run was begun, or a new run.name"),
        ("sweep.space={tokenizer.global_tokens: [2]}", "sweep.space is .* as this run was begun"),
        ("sweep.cuts={relative: [0.5]}", "sweep.cuts is"),
        ("train.max_steps=7", "train.max_steps is 7; expected 20, as this run was begun"),
        ("train.learning_rate=0.5", "train.learning_rate is 0.5"),
        ("tokenizer.codebook_size=32", "tokenizer.codebook_size is 32"),
        ("evaluate.max_images=3", "evaluate.max_images is 3"),
    ],
)
def test_a_sweep_that_was_begun_otherwise_does_not_go_on(begun, plan, change, sentence):
    Ledger.open(begun).begin(begun.trials()[0])
    with pytest.raises(BadInput, match=sentence):
        Ledger.open(plan(change))


def test_other_keys_may_change(begun, plan):
    Ledger.open(begun).begin(begun.trials()[0])
    Ledger.open(plan("sweep.at_once=1", "sweep.register=other", "train.num_workers=1", "evaluate.batch_size=8"))


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"format": "other", "version": 1, "begun": {}, "trials": []})])
def test_a_damaged_ledger_is_refused(begun, text):
    (begun.folder / "trials.json").write_text(text)
    with pytest.raises(BadInput, match="is damaged; expected a file of format tatok-trials"):
        Ledger.open(begun)
