"""Which pictures are measured, where their tokens are cut, what they cost there; a reader has to be able to replay."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import EvaluateConfig, FilterConfig
from pipeline.core.errors import BadInput
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluator import Evaluator, Instruments, ReplayCheck, fallback_bits, merged
from pipeline.evaluation.measurements import (
    NARROW,
    SPLIT_IMAGES,
    WIDE,
    Cut,
    CutLengths,
    Cuts,
    EvaluationPlan,
    Measurements,
    make_plan,
    score_split_of,
)
from pipeline.evaluation.reference import Distance, Extractor, Reference
from pipeline.evaluation.results import cut_results
from tatok_model.filtering_rules import CHECK_BITS
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens, log2_binomial

REPLAY_PLAN = EvaluationPlan(count=30, total=30, batch_size=8, range_size=16, grid=0)
FILTER = FilterConfig(score="entropy", rule="count", threshold=6, replay=True)


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
    split_of = score_split_of(plan.count)
    assert np.bincount(split_of).tolist() == [SPLIT_IMAGES + 5] * 2
    assert 0.4 < split_of[: plan.count // 2].mean() < 0.6


@pytest.mark.parametrize(("total", "max_images"), [(0, 0), (1, 0), (50, 1)])
def test_fewer_than_two_pictures_are_refused(total: int, max_images: int) -> None:
    with pytest.raises(BadInput, match="expected at least 2"):
        make_plan(total, 192, EvaluateConfig(max_images=max_images))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_nothing_is_ranked_where_everything_is_kept(tokenizer: TaTok, images: torch.Tensor) -> None:
    cuts = Cuts(FilterConfig())
    tokens = tokenizer.encode(images)
    assert cuts.rank(tokenizer, tokens, images) is tokens
    assert cuts.operating(tokens) is tokens
    assert cuts.curve(tokenizer) == []


def test_a_curve_ends_with_all_tokens(tokenizer: TaTok, images: torch.Tensor) -> None:
    cuts = Cuts(FilterConfig(rule="count", threshold=5), (2, 9))
    assert [point.name for point in cuts.curve(tokenizer)] == ["curve00", "curve01", "all"]
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    counts = [cuts.at(ranked, point).patch_counts.tolist() for point in cuts.curve(tokenizer)]
    assert counts == [[2] * 5, [9] * 5, [16] * 5]
    assert cuts.operating(ranked).patch_counts.tolist() == [5] * 5


def test_coded_bits_replace_the_patch_codes_and_nothing_else(tokenizer: TaTok, images: torch.Tensor) -> None:
    cuts = Cuts(FilterConfig(rule="count", threshold=5, coding_rounds=1))
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    cut = cuts.operating(ranked)
    codes = tokenizer.code_lengths(cut, torch.zeros_like(cut.patch_indices))
    expected = 2 * 4 + codes + math.log2(math.comb(16, 5))
    torch.testing.assert_close(cuts.bits_coded(tokenizer, cut), expected, atol=1e-9, rtol=0)


def test_replayed_tokens_are_coded_in_the_rounds_of_their_ranking(tokenizer: TaTok, images: torch.Tensor) -> None:
    cuts = Cuts(FilterConfig(score="entropy", rounds=16, rule="count", threshold=16, replay=True))
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    some = cuts.at(ranked, Cut("curve00", 15))
    chain = cuts.bits_coded(tokenizer, some) - 2 * 4 - 32
    places = ranked.ranking.order.argsort(1)
    torch.testing.assert_close(chain, tokenizer.code_lengths(some, places), atol=1e-9, rtol=0)


@pytest.mark.parametrize("score", ["distortion", "error"])
def test_at_one_water_level_the_rate_is_half_a_bit_a_code_dimension_for_each_doubling(
    tokenizer: TaTok, images: torch.Tensor, score: str
) -> None:
    cuts = Cuts(FilterConfig(score=score, rule="marginal", threshold=0.05))
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    cut = cuts.operating(ranked)
    scores = ranked.ranking.score_units.double() / ranked.ranking.resolution
    expected = [sum(math.log2(s / 0.05) for s in row if s >= 0.05) for row in scores.tolist()]
    assert cuts.rate_bits(tokenizer, cut, cuts.operating_point).tolist() == pytest.approx(expected)
    assert max(expected) > 0


@pytest.mark.parametrize(("score", "rule"), [("surprisal", "marginal"), ("distortion", "residual"), ("grid", "count")])
def test_there_is_no_rate_where_there_is_no_water_level(
    tokenizer: TaTok, images: torch.Tensor, score: str, rule: str
) -> None:
    cuts = Cuts(FilterConfig(score=score, rule=rule, threshold=3))
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    assert cuts.rate_bits(tokenizer, cuts.operating(ranked), cuts.operating_point) is None


@pytest.fixture
def tokens(tokenizer: TaTok, heldout: ShardDataset) -> Tokens:
    images = torch.from_numpy(heldout.images(range(8)).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        return tokenizer.rank(tokenizer.encode(images), "entropy", 1).cut("count", 6, replay=True)


def damaged(tokens: Tokens, image: int) -> Tokens:
    """One image keeps other positions than its ranking begins with."""
    kept = tokens.kept_mask.clone()
    kept[image] = kept[image].flip(0) if not torch.equal(kept[image], kept[image].flip(0)) else kept[image].roll(1)
    return replace(tokens, kept_mask=kept)


def test_an_image_that_is_not_replayed_is_found(tokenizer: TaTok, tokens: Tokens) -> None:
    check = ReplayCheck(tokenizer, REPLAY_PLAN)
    states, seconds = check.states(tokens, np.arange(8), operating=True)
    assert states.tolist() == [1] * 8
    assert seconds > 0
    states, _ = check.states(damaged(tokens, 3), np.arange(8), operating=True)
    assert states.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_a_sample_that_is_spread_over_the_images_is_verified(tokenizer: TaTok, tokens: Tokens) -> None:
    check = ReplayCheck(tokenizer, replace(REPLAY_PLAN, count=128, total=128))
    states, _ = check.states(tokens, np.arange(8), operating=False)
    assert states.tolist() == [1, -1] * 4
    states, seconds = check.states(tokens[:1], np.array([1]), operating=False)
    assert (states.tolist(), seconds) == ([-1], 0.0)


def test_a_fallback_costs_what_sent_positions_cost(tokens: Tokens) -> None:
    extra = fallback_bits(tokens)
    assert extra.tolist() == pytest.approx([float(log2_binomial(16, torch.tensor(6))) - CHECK_BITS] * 8)


def test_images_that_were_not_verified_pay_their_share() -> None:
    states, extra = np.array([1, 0, -1, 1, 1]), np.array([8.0, 8.0, 4.0, 8.0, 8.0])
    lengths = CutLengths(replay_state=states, fallback_bits=extra)
    assert lengths.fallback_share == 0.25
    assert lengths.charged(np.full(5, 100.0)).tolist() == [100, 108, 101, 100, 100]
    assert CutLengths(replay_state=np.array([-1])).fallback_share == 0
    assert CutLengths().charged(states) is states


def test_an_evaluation_tells_fallbacks_and_charges_them(
    tokenizer: TaTok,
    instruments: Instruments,
    extractor: Extractor,
    heldout: ShardDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = Reference(np.zeros(192), np.eye(192), None, None, None)
    distances = [Distance(extractor, origin)]

    def measured() -> Measurements:
        evaluator = Evaluator(tokenizer, instruments, REPLAY_PLAN, originals=False, cuts=Cuts(FILTER, (4.0,)))
        return merged(evaluator.measure_all(heldout), 30)

    found = measured()
    results = cut_results(found.operating, distances, 256)
    assert (results["replay_checked_images"], results["replay_fallback_share"]) == (30, 0)
    assert results["bits_fixed"] == 8 * 4 + CHECK_BITS
    assert cut_results(found.cuts["curve00"], distances, 256)["replay_checked_images"] == 30
    assert found.totals.replay > 0
    every_other = lambda self, tokens, numbers, operating: (numbers % 2, 1.0)  # noqa: E731
    monkeypatch.setattr(ReplayCheck, "states", every_other)
    found = measured()
    results = cut_results(found.operating, distances, 256)
    lengths = found.operating.lengths
    assert results["replay_fallback_share"] == 0.5
    extra = float(log2_binomial(16, torch.tensor(6))) - CHECK_BITS
    assert results["bits_fixed"] == pytest.approx(8 * 4 + CHECK_BITS + extra / 2)
    assert results["bits_coded"] == pytest.approx(found.operating.lengths.bits_coded.mean() + extra / 2)
    assert lengths.charged(lengths.bits_fixed)[:2].tolist() == pytest.approx([64 + extra, 64])
