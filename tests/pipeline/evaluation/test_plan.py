"""The cut of the held-out images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import BadInput
from pipeline.evaluation.measurements import NARROW, SPLIT_IMAGES, WIDE, make_plan


@given(st.integers(2, 30_000), st.integers(0, 30_000), st.integers(1, 700))
def test_every_picture_is_in_exactly_one_range_and_no_batch_but_the_last_is_short(
    total: int, max_images: int, batch_size: int
) -> None:
    config = EvaluateConfig(max_images=max(max_images, 2) if max_images else 0, batch_size=batch_size)
    plan = make_plan(total, 192, config)
    ranges = plan.ranges()
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == plan.count
    assert all((stop - start) % plan.batch_size == 0 for start, stop in ranges[:-1])
    indices = plan.indices(np.arange(plan.count))
    assert len(np.unique(indices)) == plan.count
    assert 0 <= indices.min() <= indices.max() < total


def test_a_part_of_the_split_is_spread_evenly_over_it() -> None:
    plan = make_plan(100, 192, EvaluateConfig(max_images=4, grid_images=2))
    assert plan.indices(np.arange(4)).tolist() == [0, 25, 50, 75]
    assert plan.shown().tolist() == [0, 2]


def test_wide_features_are_returned_less_often() -> None:
    sizes = [make_plan(50_000, width, EvaluateConfig(batch_size=64)).range_size for width in (192, 2048)]
    assert sizes == [NARROW, WIDE]


def test_no_more_pictures_are_shown_than_measured() -> None:
    assert make_plan(3, 192, EvaluateConfig(grid_images=8)).shown().tolist() == [0, 1, 2]
    assert make_plan(3, 192, EvaluateConfig(grid_images=0)).shown().tolist() == []


def test_the_inception_score_is_taken_over_equal_splits_that_mix_the_set() -> None:
    plan = make_plan(2 * SPLIT_IMAGES + 10, 192, EvaluateConfig())
    split_of = plan.score_split_of()
    assert np.bincount(split_of).tolist() == [SPLIT_IMAGES + 5] * 2
    assert 0.4 < split_of[: plan.count // 2].mean() < 0.6


@pytest.mark.parametrize(("total", "max_images"), [(0, 0), (1, 0), (50, 1)])
def test_fewer_than_two_pictures_are_refused(total: int, max_images: int) -> None:
    with pytest.raises(BadInput, match="expected at least 2"):
        make_plan(total, 192, EvaluateConfig(max_images=max_images))
