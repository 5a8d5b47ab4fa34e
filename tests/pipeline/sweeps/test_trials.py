"""The trials of a sweep, how their stages are configured, and the ledger."""

import json

import pytest

from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.sweeps.trials import FAILED, FINISHED, RUNNING, Ledger, Trial
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok


def test_trials_are_the_points_of_the_space_and_named_after_them(plan):
    found = plan("sweep.space={tokenizer.global_tokens: [2, 4], train.learning_rate: [0.001]}").trials()
    assert [trial.name for trial in found] == [
        "trial-00-global_tokens-2-learning_rate-0.001",
        "trial-01-global_tokens-4-learning_rate-0.001",
    ]


def test_a_name_is_one_of_a_folder_and_not_too_long():
    name = Trial(3, {f"losses.{key * 20}": "a/b c" for key in "xyz"}).name
    assert name.startswith("trial-03-xxxx")
    assert len(name) <= 80
    assert "/" not in name
    assert " " not in name


def test_stages_of_a_trial_are_configured_alike_but_for_where_they_are(plan, tmp_path):
    sweep = plan()
    trial = sweep.trials()[2]
    training = sweep.training_of(trial)
    evaluation = sweep.evaluation_of(trial, "relative", "x/checkpoint")
    assert training.tokenizer.global_tokens == evaluation.tokenizer.global_tokens == 8
    assert training.train == sweep.config.train
    assert training.tracking.uri == evaluation.tracking.uri == ""  # the child run shows them
    assert (training.run.output, training.preset) == (str(tmp_path / "sweep"), trial.name)
    assert evaluation.evaluate.thresholds == sweep.cuts["relative"]
    assert evaluation.tokenizer.checkpoint == "x/checkpoint"
    assert sweep.evaluation_folder(trial, "relative") == tmp_path / "sweep" / f"{evaluation.preset}-evaluate"
    assert sweep.training_folder(trial) == tmp_path / "sweep" / f"{training.preset}-train"


def test_every_rule_has_an_evaluation_with_its_own_thresholds(plan):
    sweep = plan("sweep.cuts={relative: [0.5], count: [4, 8]}")
    trial = sweep.trials()[0]
    assert sweep.evaluation_of(trial, "relative", "").filter.threshold == sweep.config.filter.threshold
    counted = sweep.evaluation_of(trial, "count", "")
    assert (counted.filter.rule, counted.filter.threshold, counted.evaluate.thresholds) == ("count", 4, (4, 8))
    assert sweep.cuts_in_words == "relative 0.5; count 4, 8"


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        (
            "{tokenizer.global_token: [2]}",
            r"unknown key 'tokenizer.global_token' \(did you mean 'tokenizer.global_tokens'",
        ),
        ("{preset.x: [2]}", "sweep.space has 'preset.x'; expected section.key"),
        ("{tokenizer.global_tokens: [2, many]}", "tokenizer.global_tokens is 'many'; expected a whole number"),
        ("{tokenizer.patch_size: [8, 5]}", "image_size is 32; expected a multiple of patch_size, 5"),
    ],
)
def test_a_key_or_value_that_no_configuration_has_is_refused(plan, space, sentence):
    sweep = plan(f"sweep.space={space}")
    with pytest.raises(BadInput, match=sentence):
        [sweep.config_of(trial) for trial in sweep.trials()]


def test_a_threshold_outside_the_range_of_its_rule_is_refused(plan):
    sweep = plan("sweep.cuts={relative: [0.5, 1.5]}")
    with pytest.raises(BadInput, match=r"sweep.cuts of the rule relative: .*threshold is 1.5; expected a share"):
        sweep.evaluation_of(sweep.trials()[0], "relative", "")


def test_trained_tokenizers_may_differ_in_architecture(shards, tmp_path):
    paths = []
    for global_tokens in (2, 5):
        config = TokenizerConfig(32, 8, "nano", global_tokens, codebook_size=16, codebook_dim=4)
        TaTok(config).save_pretrained(tmp_path / f"m{global_tokens}" / "checkpoint")
        paths.append(str(tmp_path / f"m{global_tokens}" / "checkpoint"))
    config = load_config(
        "smoke", [f"data.shards={shards}", f"sweep.checkpoints=[{', '.join(paths)}]", "sweep.cuts={count: [4]}"]
    )
    from pipeline.sweeps.trials import SweepPlan

    sweep = SweepPlan.of(config, tmp_path / "sweep")
    assert [trial.name for trial in sweep.trials()] == ["trial-00-m2", "trial-01-m5"]
    assert [sweep.config_of(trial).tokenizer.global_tokens for trial in sweep.trials()] == [2, 5]
    evaluation = sweep.evaluation_of(sweep.trials()[1], "count", paths[1])
    assert (evaluation.tokenizer.checkpoint, evaluation.tokenizer.size) == (paths[1], "nano")


def test_a_search_that_learns_lists_no_trials_but_samples_its_ends(plan):
    sweep = plan(
        "sweep.search=optuna", "sweep.samples=7", "sweep.space={train.learning_rate: {log_uniform: [1e-4, 1e-2]}}"
    )
    assert (sweep.trials(), sweep.total) == ([], 7)
    assert [trial.values["train.learning_rate"] for trial in sweep.samples()] == [1e-4, 1e-2]


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
