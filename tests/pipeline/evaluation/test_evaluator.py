"""Measuring in this process: ranges merge to what one pass finds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluator import Evaluator, Instruments, measure_here, merged
from pipeline.evaluation.measurements import Cuts, Measurements, Pictures, Plan, Totals
from tatok_model.losses import LPIPS, _alexnet
from tatok_model.metrics.extractors.small_networks import ResNet20
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import psnr, to_uint8
from tatok_model.tokenizer import TaTok

PLAN = Plan(count=30, total=30, batch_size=4, range_size=12, grid=3)
TIMES = ("seconds", "encode_seconds", "rank_seconds", "decode_seconds", "replay_seconds")


def without_times(found: Measurements) -> bytes:
    for name in TIMES:
        found["totals"].values.pop(name, None)
    return found.to_bytes()


@pytest.fixture(scope="module")
def evaluator(tokenizer: TaTok, instruments: Instruments) -> Evaluator:
    return Evaluator(tokenizer, instruments, PLAN, originals=True)


def test_ranges_in_any_order_merge_to_the_same_bits(evaluator: Evaluator, heldout: ShardDataset) -> None:
    parts = [(number, part.to_bytes()) for number, part in measure_here(evaluator, heldout)]
    assert len(parts) == 3
    found = set()
    for order in itertools.permutations(parts):
        arriving = ((number, Measurements.from_bytes(data)) for number, data in order)
        found.add(without_times(merged(arriving, PLAN.count)))
    assert len(found) == 1


def test_a_curve_s_ranges_in_any_order_merge_to_the_same_bits(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    torch.manual_seed(0)
    several = replace(instruments, more=(ResNet20(),))
    cuts = Cuts(FilterConfig(rule="residual", threshold=20.0), (0.0, 20.0, 40.0))
    evaluator = Evaluator(tokenizer, several, PLAN, originals=True, cuts=cuts)
    parts = [(number, part.to_bytes()) for number, part in measure_here(evaluator, heldout)]
    found = []
    for order in (parts, parts[::-1]):
        whole = merged(((number, Measurements.from_bytes(data)) for number, data in order), PLAN.count)
        found.append(without_times(whole))
    assert found[0] == found[1]
    again = Measurements.from_bytes(found[0])
    for point in ("curve00.", "curve01.", "curve02.", "all."):
        assert again[f"{point}features@resnet20_cifar10"].n == len(again[f"{point}lengths"]["tokens"]) == 30
        assert len(again[f"{point}shown"]["pictures"]) == 3
    kept = [again[f"{point}.lengths"]["tokens"] for point in ("curve02", "curve01", "curve00", "all")]
    assert all((fewer <= more).all() for fewer, more in itertools.pairwise(kept)), "kept sets nest"
    assert (kept[1] == again["lengths"]["tokens"]).all(), "the operating point is one of the curve"


def test_lengths_do_not_depend_on_the_other_images_of_a_batch(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    cuts = Cuts(FilterConfig(rule="residual", threshold=20.0))
    found = []
    for size in (4, 30):
        plan = replace(PLAN, batch_size=size, range_size=60)
        whole = Evaluator(tokenizer, instruments, plan, originals=False, cuts=cuts).measure(heldout, 0, 30)
        found.append(whole["lengths"])
    assert (found[0]["tokens"] == found[1]["tokens"]).all()
    assert np.allclose(found[0]["bits_coded"], found[1]["bits_coded"], atol=1e-3)


def test_ranges_find_what_one_pass_over_everything_finds(
    tokenizer: TaTok, instruments: Instruments, evaluator: Evaluator, heldout: ShardDataset
) -> None:
    one_range = replace(PLAN, range_size=32)
    whole = merged(measure_here(Evaluator(tokenizer, instruments, one_range, originals=True), heldout), 30)
    cut = merged(measure_here(evaluator, heldout), 30)
    assert cut["quality"].results() == whole["quality"].results()
    assert cut["codes_patch"].counts.tolist() == whole["codes_patch"].counts.tolist()
    assert torch.allclose(cut["features"].covariance(), whole["features"].covariance(), rtol=1e-12, atol=1e-15)


def test_what_is_measured_is_what_the_tokenizer_does(
    tokenizer: TaTok, evaluator: Evaluator, heldout: ShardDataset
) -> None:
    found = merged(measure_here(evaluator, heldout), PLAN.count)
    images = torch.from_numpy(heldout.images(range(30)).transpose(0, 3, 1, 2).copy())
    tokens = tokenizer.encode(images)
    pictures = to_uint8(tokenizer.decode(tokens))
    assert found["quality"].results()["psnr"] == pytest.approx(float(psnr(images, pictures).mean()), abs=1e-3)
    assert found["codes_global"].counts.sum() == 30 * 2
    assert found["codes_patch"].counts.sum() == 30 * 16
    totals = found["totals"].values
    assert found["lengths"]["tokens"].tolist() == [18] * 30
    assert found["lengths"]["bits_fixed"].tolist() == [18 * 4] * 30
    assert totals["timed"] == 28, "the last batch has 2 of 4 images and is not timed"
    shown = pictures[[0, 10, 20]].permute(0, 2, 3, 1).numpy()
    assert np.abs(found["pictures"].images.astype(int) - shown).max() <= 1


def test_originals_are_measured_only_when_they_are_wanted(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    found = Evaluator(tokenizer, instruments, PLAN, originals=False).measure(heldout, 0, 4)
    assert "original_features" not in found
    assert found.images == 4


def test_warming_up_leaves_no_trace(tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset) -> None:
    cold, warm = (Evaluator(tokenizer, instruments, PLAN, originals=True) for _ in range(2))
    warm.warm_up()
    assert without_times(warm.measure(heldout, 0, 8)) == without_times(cold.measure(heldout, 0, 8))


def test_a_missing_range_is_noticed(evaluator: Evaluator, heldout: ShardDataset) -> None:
    parts = list(measure_here(evaluator, heldout))
    with pytest.raises(RuntimeError, match="12 images were measured; expected 30"):
        merged(iter([parts[0], parts[2]]), 30)
    with pytest.raises(RuntimeError, match="0 images"):
        merged(iter([]), 30)


def test_measurements_of_different_things_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"cannot merge \['totals'\] into \['features'\]"):
        Measurements(features=FeatureStatistics(2)).merge(Measurements(totals=Totals(tokens=1)))


def test_lpips_is_measured_where_there_are_weights(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset
) -> None:
    class Doubled(LPIPS):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean((1, 2, 3))

    evaluator = Evaluator(tokenizer, replace(instruments, lpips=Doubled(_alexnet())), PLAN, originals=False)
    found = merged(measure_here(evaluator, heldout), 30)
    images = torch.from_numpy(heldout.images(range(30)).transpose(0, 3, 1, 2).copy())
    difference = (images.float() / 255 - to_uint8(tokenizer.reconstruct(images)).float() / 255).abs()
    assert found["totals"].values["lpips"] == pytest.approx(30 * float(difference.mean()), rel=1e-3)


def test_pictures_and_totals_survive_the_way_between_processes() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    found = Measurements.from_bytes(Measurements(pictures=Pictures(images), totals=Totals(bits=0.1)).to_bytes())
    assert np.array_equal(found["pictures"].images, images)
    assert found["totals"].values == {"bits": 0.1}
