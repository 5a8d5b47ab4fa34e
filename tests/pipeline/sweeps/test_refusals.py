"""What a sweep refuses before anything runs, and how many trials there is room for."""

import socket

import pytest

from pipeline.core.errors import BadInput
from pipeline.sweeps import sweep
from pipeline.sweeps.sweep import find_room
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok


def test_a_sweep_that_can_run_is_accepted_and_named_after_its_preset(configure):
    sweep.check(configure())
    assert sweep.default_name(configure()) == "sweep_smoke-sweep"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sweep.space={tokenizer.global_token: [2]}"], "unknown key 'tokenizer.global_token' .did you mean"),
        (["sweep.space={losses.l1: {uniform: [1, 0]}}"], r"expected \[low, high\] with low below high"),
        (["sweep.cuts={relative: [2]}"], "sweep.cuts of the rule relative: .*expected a share from 0 to 1"),
        (["sweep.cuts={count: [99]}"], "sweep.cuts of the rule count: filter.threshold is 99; expected at most 16"),
        (["sweep.cuts={most: [1]}"], "rule is 'most'; expected one of relative"),
        (["tokenizer.entropy_layers=0"], "filter.score is 'distortion' with tokenizer.entropy_layers 0"),
        (
            ["sweep.space={tokenizer.entropy_layers: [1, 0]}"],
            "filter.score is 'distortion' with tokenizer.entropy_layers 0",
        ),
        (["sweep.objective=bd_rate", "sweep.control=/nowhere"], "'/nowhere' holds no summary.json"),
        (["train.num_workers=64", "train.global_batch_size=64"], "num_workers is 64, which needs 64 CPUs"),
        (
            ["sweep.scheduler=asha", "sweep.grace_steps=5"],
            "validate_every 10; expected validations before train.max_steps",
        ),
        (["sweep.scheduler=asha", "train.validate_every=0"], "validate_every 0; expected validations before"),
        (["sweep.scheduler=asha", "sweep.grace_steps=20"], "expected validations before train.max_steps, 20"),
        (["tracking.uri=ftp://x"], "tracking.uri is 'ftp://x'; expected sqlite"),
    ],
)
def test_what_cannot_work_is_one_sentence(configure, overrides, sentence):
    with pytest.raises(BadInput, match=sentence) as raised:
        sweep.check(configure(*overrides))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sweep.kind=all"], "sweep.kind is 'all'; expected thresholds or architecture"),
        (["sweep.search=grid"], "sweep.search is 'grid'; expected random or optuna"),
        (["sweep.scheduler=pbt"], "sweep.scheduler is 'pbt'; expected none or asha"),
        (["sweep.rate=bytes"], "sweep.rate is 'bytes'; expected tokens_per_image, bits_fixed or bits_coded"),
        (["sweep.samples=0"], "sweep.samples is 0; expected at least 1"),
        (["sweep.budget_tokens=-1"], "sweep.budget_tokens is -1; expected at least 0"),
        (["sweep.reduction=1"], "sweep.reduction is 1; expected at least 2"),
        (["sweep.objective=bd_rate"], "sweep.control is ''; expected the run folder of jobs/evaluate.py"),
        (["sweep.space={}"], "sweep.space is {}; expected at least one key to vary"),
        (["sweep.kind=thresholds"], "sweep.space is .*; expected none with the kind thresholds"),
        (["sweep.checkpoints=[x]"], "sweep.checkpoints is .*; expected none with the kind architecture"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(configure, overrides, sentence):
    with pytest.raises(BadInput, match=sentence):
        configure(*overrides)


def test_a_server_that_does_not_answer_is_told_before_anything_runs(configure):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"http://anna:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BadInput, match="where no server answers .*; expected a running MLflow server") as raised:
            sweep.check(configure(f"tracking.uri={address}"))
    assert "secret" not in str(raised.value)


THRESHOLDS = ("sweep.kind=thresholds", "sweep.space={}")


def test_a_checkpoint_that_is_none_or_lacks_an_entropy_model_is_refused(configure, tmp_path):
    with pytest.raises(BadInput, match=r"tokenizer.checkpoint '/nowhere' does not exist"):
        sweep.check(configure(*THRESHOLDS, "sweep.checkpoints=[/nowhere]"))
    plain = TokenizerConfig(32, 8, "nano", 2, codebook_size=16, codebook_dim=4, entropy_layers=0)
    TaTok(plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(BadInput, match="filter.score is 'distortion' with tokenizer.entropy_layers 0"):
        sweep.check(configure(*THRESHOLDS, f"sweep.checkpoints=[{tmp_path / 'plain'}]"))
    with_one = TokenizerConfig(32, 8, "nano", 2, codebook_size=16, codebook_dim=4)
    TaTok(with_one).save_pretrained(tmp_path / "with")
    with pytest.raises(BadInput, match="^of sweep.checkpoints '.*/plain': filter.score is 'distortion'"):
        sweep.check(configure(*THRESHOLDS, f"sweep.checkpoints=[{tmp_path / 'with'}, {tmp_path / 'plain'}]"))


def test_checks_import_neither_torch_nor_ray(run_python, repository):
    code = "import sys, pipeline.sweeps.sweep; print({'torch', 'ray'} & set(sys.modules))"
    assert run_python(code, PYTHONPATH=str(repository)).stdout == "set()\n"


def test_what_was_not_trained_yet_would_be_trained_first_where_that_is_asked_for(configure, tmp_path):
    with pytest.raises(BadInput, match=f"{str(tmp_path)!r} holds no tokenizer of this configuration; .* or --make"):
        sweep.check(configure(*THRESHOLDS))
    sweep.check(configure(*THRESHOLDS, "run.make=true"))
    with pytest.raises(BadInput, match="sweep.scheduler is 'asha'; expected none with the kind thresholds"):
        sweep.check(configure(*THRESHOLDS, "sweep.scheduler=asha", "run.make=true"))


def test_trials_that_train_in_their_own_process_take_a_cpu_each(configure):
    room = find_room([configure()], total=9, cpus=4, gpus=0)
    assert room.at_once == 4
    assert room.sentence.startswith("9 trials, 4 at once: a trial takes 1 of 4 CPUs")


def test_no_more_trials_run_than_there_are(configure):
    assert find_room([configure()], total=3, cpus=8, gpus=0).at_once == 3


def test_workers_decide_how_many_trials_fit(configure):
    config = configure("train.num_workers=2", "train.cpus_per_worker=1.5")
    assert find_room([config], total=9, cpus=8, gpus=0).at_once == 2
    evaluating = configure("evaluate.num_workers=4")
    assert find_room([config, evaluating], total=9, cpus=8, gpus=0).at_once == 2


def test_fractions_of_cpus_add_up(configure):
    config = configure("train.num_workers=2", "train.cpus_per_worker=0.5")
    assert find_room([config], total=9, cpus=2, gpus=0).at_once == 2


def test_a_limit_is_kept_and_named(configure):
    room = find_room([configure("sweep.at_once=2")], total=9, cpus=4, gpus=0)
    assert room.at_once == 2
    assert "as sweep.at_once says; there is room for 4" in room.sentence


def test_gpus_are_shared_out_among_the_workers(configure):
    assert find_room([configure("train.num_workers=2")], total=9, cpus=64, gpus=8).at_once == 4
    assert find_room([configure()], total=9, cpus=64, gpus=8).at_once == 1  # all would use the first GPU
    assert find_room([configure("train.device=cpu")], total=9, cpus=4, gpus=8).at_once == 4


def test_a_trial_that_does_not_fit_is_refused_with_its_arithmetic(configure):
    with pytest.raises(
        BadInput, match=r"a trial needs 4 CPUs \(training takes 4 x 1 CPUs, evaluation 1\) and there are 2"
    ):
        find_room([configure("train.num_workers=4")], total=3, cpus=2, gpus=0)
