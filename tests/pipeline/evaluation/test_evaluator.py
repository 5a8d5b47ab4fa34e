"""Measuring in this process: ranges merge to what one pass finds."""

import itertools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluator import Evaluator, Instruments, merged
from pipeline.evaluation.measurements import Cuts, EvaluationPlan, EvaluationTotals, Measurements
from tatok_model.losses import LPIPS, _alexnet
from tatok_model.metrics.extractors.small_networks import ResNet20
from tatok_model.metrics.images import psnr, to_uint8
from tatok_model.tokenizer import TaTok

PLAN = EvaluationPlan(count=30, total=30, batch_size=4, range_size=12, grid=3)


def bits(value: Any) -> Any:
    """Everything that was measured, but for times, to the last bit."""
    if isinstance(value, Measurements):
        value = replace(value, totals=EvaluationTotals(timed=value.totals.timed, lpips=value.totals.lpips))
    if isinstance(value, dict):
        return tuple((name, bits(one)) for name, one in value.items())
    if isinstance(value, list):
        return tuple(bits(one) for one in value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if value is None or isinstance(value, int | float):
        return value
    return bits(value.to_arrays() if hasattr(value, "to_arrays") else vars(value))


@pytest.fixture(scope="module")
def evaluator(tokenizer: TaTok, instruments: Instruments) -> Evaluator:
    return Evaluator(tokenizer, instruments, PLAN, originals=True)


def test_ranges_in_any_order_merge_to_the_same_bits(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    torch.manual_seed(0)
    several = replace(instruments, networks=(*instruments.networks, ResNet20()))
    cuts = Cuts(FilterConfig(rule="residual", threshold=20.0), (0.0, 20.0, 40.0))
    evaluator = Evaluator(tokenizer, several, PLAN, originals=True, cuts=cuts)
    parts = [(number, pickle.dumps(part)) for number, part in evaluator.measure_all(heldout)]
    assert len(parts) == 3
    found = set()
    for order in itertools.permutations(parts):
        whole = merged(((number, pickle.loads(data)) for number, data in order), PLAN.count)
        found.add(bits(whole))
    assert len(found) == 1
    assert list(whole.cuts) == ["operating", "curve00", "curve01", "curve02", "all"]
    for sums in whole.cuts.values():
        assert [features.n for features in sums.networks.features] == [len(sums.lengths.tokens)] * 2 == [30] * 2
        assert len(sums.shown.pictures) == 3
    kept = [whole.cuts[name].lengths.tokens for name in ("curve02", "curve01", "curve00", "all")]
    assert all((fewer <= more).all() for fewer, more in itertools.pairwise(kept)), "kept sets nest"
    assert (kept[1] == whole.operating.lengths.tokens).all(), "the operating point is one of the curve"


def test_lengths_do_not_depend_on_the_other_images_of_a_batch(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    cuts = Cuts(FilterConfig(rule="residual", threshold=20.0))
    found = []
    for size in (4, 30):
        plan = replace(PLAN, batch_size=size, range_size=60)
        whole = Evaluator(tokenizer, instruments, plan, originals=False, cuts=cuts).measure(heldout, 0, 30)
        found.append(whole.operating.lengths)
    assert (found[0].tokens == found[1].tokens).all()
    assert np.allclose(found[0].bits_coded, found[1].bits_coded, atol=1e-3)


def test_ranges_find_what_one_pass_over_everything_finds(
    tokenizer: TaTok, instruments: Instruments, evaluator: Evaluator, heldout: ShardDataset
) -> None:
    one_range = replace(PLAN, range_size=32)
    whole = merged(Evaluator(tokenizer, instruments, one_range, originals=True).measure_all(heldout), 30)
    cut = merged(evaluator.measure_all(heldout), 30)
    assert cut.operating.quality.results() == whole.operating.quality.results()
    assert cut.codes["patch"].counts.tolist() == whole.codes["patch"].counts.tolist()
    features = [found.operating.networks.features[0].covariance() for found in (cut, whole)]
    assert torch.allclose(*features, rtol=1e-12, atol=1e-15)


def test_what_is_measured_is_what_the_tokenizer_does(
    tokenizer: TaTok, evaluator: Evaluator, heldout: ShardDataset
) -> None:
    found = merged(evaluator.measure_all(heldout), PLAN.count)
    images = torch.from_numpy(heldout.images(range(30)).transpose(0, 3, 1, 2).copy())
    tokens = tokenizer.encode(images)
    pictures = to_uint8(tokenizer.decode(tokens))
    assert found.operating.quality.results()["psnr"] == pytest.approx(float(psnr(images, pictures).mean()), abs=1e-3)
    assert found.codes["global"].counts.sum() == 30 * 2
    assert found.codes["patch"].counts.sum() == 30 * 16
    assert found.operating.lengths.tokens.tolist() == [18] * 30
    assert found.operating.lengths.bits_fixed.tolist() == [18 * 4] * 30
    assert found.totals.timed == 28, "the last batch has 2 of 4 images and is not timed"
    shown = pictures[[0, 10, 20]].permute(0, 2, 3, 1).numpy()
    assert np.abs(found.operating.shown.pictures.astype(int) - shown).max() <= 1


def test_originals_are_measured_only_when_they_are_wanted(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    found = Evaluator(tokenizer, instruments, PLAN, originals=False).measure(heldout, 0, 4)
    assert found.originals is None
    assert found.images == 4


def test_warming_up_leaves_no_trace(tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset) -> None:
    cold, warm = (Evaluator(tokenizer, instruments, PLAN, originals=True) for _ in range(2))
    warm.warm_up()
    assert bits(warm.measure(heldout, 0, 8)) == bits(cold.measure(heldout, 0, 8))


def test_a_missing_range_is_noticed(evaluator: Evaluator, heldout: ShardDataset) -> None:
    parts = list(evaluator.measure_all(heldout))
    with pytest.raises(RuntimeError, match="12 images were measured; expected 30"):
        merged(iter([parts[0], parts[2]]), 30)
    with pytest.raises(RuntimeError, match="0 images"):
        merged(iter([]), 30)


def test_lpips_is_measured_where_there_are_weights(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    class Doubled(LPIPS):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean((1, 2, 3))

    evaluator = Evaluator(tokenizer, replace(instruments, lpips=Doubled(_alexnet())), PLAN, originals=False)
    found = merged(evaluator.measure_all(heldout), 30)
    images = torch.from_numpy(heldout.images(range(30)).transpose(0, 3, 1, 2).copy())
    difference = (images.float() / 255 - to_uint8(tokenizer.reconstruct(images)).float() / 255).abs()
    assert found.totals.lpips == pytest.approx(30 * float(difference.mean()), rel=1e-3)
