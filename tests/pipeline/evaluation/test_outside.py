"""JPEG and WebP rows at the bits of a tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards import ShardDataset
from pipeline.evaluation.baselines import Outside
from pipeline.evaluation.evaluator import Evaluator, Instruments, measure_here, merged
from pipeline.evaluation.measurements import Plan
from pipeline.evaluation.picture_codecs import compress, quality_for
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.results import Distance
from tatok_model.tokenizer import TaTok

PLAN = Plan(count=30, total=30, batch_size=8, range_size=32, grid=0)


@pytest.fixture(scope="module")
def outside(tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset, shards: Path) -> Outside:
    found = merged(measure_here(Evaluator(tokenizer, instruments, PLAN, originals=True), heldout), 30)
    reference = Reference.of(found["original_features"], found["original_score"].result(), {"images": 30})
    distances = [Distance("", "rfd_compact_cifar10", reference)]
    return Outside(heldout, PLAN, instruments, distances, ShardDataset(shards, "train"), 20)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_more_bits_make_better_pictures_and_are_not_overspent(outside: Outside, codec: str) -> None:
    told: list[int] = []
    few, many = (outside.measure(codec, bits, told.append) for bits in (300, 1200))
    assert few["bits_per_image"] <= 1.1 * 300  # the quality is of other pictures
    assert few["bits_per_image"] < many["bits_per_image"] <= 1.1 * 1200
    assert few["psnr"] < many["psnr"]
    assert few["rfd_compact_cifar10"] > many["rfd_compact_cifar10"]
    assert told == [8, 8, 8, 6] * 2


def test_the_lowest_quality_stands_where_a_codec_goes_no_lower(outside: Outside, heldout: ShardDataset) -> None:
    found = outside.measure("jpeg", 1)
    assert found["quality"] == 1
    assert found["bits_per_image"] == compress("jpeg", heldout.images(np.arange(30).tolist()), 1).bits.mean() > 1


def test_the_quality_is_chosen_on_training_pictures_only(outside: Outside, shards: Path) -> None:
    """None of the measured pictures is looked at before it is measured."""
    pictures = ShardDataset(shards, "train").images(range(20))
    assert outside.measure("jpeg", 600)["quality"] == quality_for("jpeg", pictures, 600)
