"""Speed of evaluation on a network too small to be fast: the plan, what is timed and told."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.benchmarks import evaluate_speed
from pipeline.benchmarks.evaluate_speed import bare, evaluator_rate, findings, plan_of
from pipeline.benchmarks.harness import Spread
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.run import Run
from pipeline.evaluation.evaluator import EvaluationSetup, Evaluator
from pipeline.evaluation.measurements import EvaluationPlan
from tatok_model.tokenizer import TaTok


@pytest.fixture
def config(tiny, noise_shards):
    return tiny("evaluate", f"data.shards={noise_shards}", "evaluate.batch_size=4", "evaluate.max_images=0")


@pytest.mark.parametrize(
    ("count", "images", "expected"), [(10000, 256, 1800), (10000, 5000, 4800), (900, 256, 900), (890, 256, 600)]
)
def test_ranges_are_those_of_an_evaluation_where_pictures_suffice(count, images, expected):
    found = plan_of(EvaluationPlan(count, 10000, 100, 600, 8), images)
    assert (found.count, found.range_size, len(found.ranges())) == (expected, expected // 3, 3)
    assert found.range_size % found.batch_size == 0


def test_too_few_pictures_are_refused():
    with pytest.raises(BadInput, match="200 held-out pictures would be measured; expected at least 300"):
        plan_of(EvaluationPlan(200, 200, 100, 600, 8), 256)


def test_the_bare_computation_sees_each_picture_of_a_range_and_codes_lengths_when_asked(
    config, tmp_path, monkeypatch, ray_session
):
    setup = EvaluationSetup.of(Run("benchmark", config, tmp_path))
    setup = dataclasses.replace(setup, plan=plan_of(setup.plan, 8))
    assert (setup.plan.count, setup.plan.range_size) == (24, 8)
    evaluator = Evaluator(
        TaTok(config.tokenizer.architecture()), setup.instruments, setup.plan, False, "cpu", setup.cuts
    )
    seen, coded = [], []
    original = type(setup.cuts).bits_coded
    monkeypatch.setattr(type(setup.cuts), "bits_coded", lambda *given: coded.append(len(given[2])) or original(*given))
    encode = evaluator.codec.encode
    monkeypatch.setattr(evaluator.codec, "encode", lambda images: seen.append(images) or encode(images))
    assert bare(setup, evaluator, torch.device("cpu"))() > 0
    assert coded == []
    assert bare(setup, evaluator, torch.device("cpu"), bits=True)() > 0
    assert sum(coded) == 8
    pictures = setup.pictures.images(setup.plan.indices(np.arange(8)).tolist())
    assert np.array_equal(torch.cat(seen[:2]).permute(0, 2, 3, 1).numpy(), pictures)
    assert evaluator_rate(evaluator, setup) > 0


def test_the_stages_start_is_told_apart():
    rates = {"stage": [90.0, 80.0], "evaluator": [95.0, 95.0], "bare": [100.0, 100.0], "bare_with_bits": [90.0, 90.0]}
    found = findings(rates, Spread.of([10.0]), 85, {})
    assert found.results()["stage_over_bare"] == pytest.approx(0.85)
    assert found.results()["stage_over_bare_high"] == pytest.approx(0.9)
    assert found.results()["start_seconds"] == pytest.approx(9.0)
    assert "missed by 0.05" in found.ratios[0].row().note


@pytest.mark.slow  # 15 s
def test_a_run_compares_the_stage_with_the_bare_computation(measure, config, ray_session):
    found = measure(config).results
    assert found["stage_over_bare"] > 0
    assert found["bare_images_per_second"] > found["bare_with_bits_images_per_second"] * 0.5


def test_a_stop_ends_it(measure, config, ray_session):
    with pytest.raises(Stopped, match="measures anew"):
        measure(config, stop=True)


def test_pictures_that_are_named_are_checked(small):
    with pytest.raises(BadInput, match=r"data\.source"):
        evaluate_speed.check(small("evaluate", "data.source=nowhere"))
    evaluate_speed.check(small("evaluate"))
