import pytest

from pipeline.core.errors import BadInput
from pipeline.sweeps.search import find_room


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
