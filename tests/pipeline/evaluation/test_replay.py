"""Replayed positions are verified, and paid for where a reader could not repeat the ranking."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluator import (
    Evaluator,
    Instruments,
    ReplayCheck,
    charged,
    fallback_bits,
    fallback_share,
    measure_here,
    merged,
)
from pipeline.evaluation.measurements import Cuts, Measurements, Plan
from pipeline.evaluation.results import bits_of, cut_results
from tatok_model.filtering_rules import CHECK_BITS
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens, log2_binomial

PLAN = Plan(count=30, total=30, batch_size=8, range_size=16, grid=0)
FILTER = FilterConfig(score="entropy", rule="count", threshold=6, replay=True)


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
    check = ReplayCheck(tokenizer, PLAN)
    states, seconds = check.states(tokens, np.arange(8), operating=True)
    assert states.tolist() == [1] * 8
    assert seconds > 0
    states, _ = check.states(damaged(tokens, 3), np.arange(8), operating=True)
    assert states.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_a_sample_that_is_spread_over_the_images_is_verified(tokenizer: TaTok, tokens: Tokens) -> None:
    check = ReplayCheck(tokenizer, replace(PLAN, count=128, total=128))
    states, _ = check.states(tokens, np.arange(8), operating=False)
    assert states.tolist() == [1, -1] * 4
    states, seconds = check.states(tokens[:1], np.array([1]), operating=False)
    assert (states.tolist(), seconds) == ([-1], 0.0)


def test_a_fallback_costs_what_sent_positions_cost(tokens: Tokens) -> None:
    extra = fallback_bits(tokens)
    assert extra.tolist() == pytest.approx([float(log2_binomial(16, torch.tensor(6))) - CHECK_BITS] * 8)


def test_images_that_were_not_verified_pay_their_share() -> None:
    states, extra = np.array([1, 0, -1, 1, 1]), np.array([8.0, 8.0, 4.0, 8.0, 8.0])
    assert fallback_share(states) == 0.25
    assert charged(np.full(5, 100.0), states, extra).tolist() == [100, 108, 101, 100, 100]
    assert fallback_share(np.array([-1])) == 0


def test_an_evaluation_tells_fallbacks_and_charges_them(
    tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> Measurements:
        evaluator = Evaluator(tokenizer, instruments, PLAN, originals=False, cuts=Cuts(FILTER, (4.0,)))
        return merged(measure_here(evaluator, heldout), 30)

    found = measured()
    results = cut_results(found, "", [], 256)
    assert (results["replay_checked_images"], results["replay_fallback_share"]) == (30, 0)
    assert results["bits_fixed"] == 8 * 4 + CHECK_BITS
    assert cut_results(found, "curve00.", [], 256)["replay_checked_images"] == 30
    assert found["totals"].values["replay_seconds"] > 0
    every_other = lambda self, tokens, numbers, operating: (numbers % 2, 1.0)  # noqa: E731
    monkeypatch.setattr(ReplayCheck, "states", every_other)
    found = measured()
    results = cut_results(found, "", [], 256)
    assert results["replay_fallback_share"] == 0.5
    extra = float(log2_binomial(16, torch.tensor(6))) - CHECK_BITS
    assert results["bits_fixed"] == pytest.approx(8 * 4 + CHECK_BITS + extra / 2)
    assert results["bits_coded"] == pytest.approx(found["lengths"]["bits_coded"].mean() + extra / 2)
    assert bits_of(found["lengths"], "bits_fixed")[:2].tolist() == pytest.approx([64 + extra, 64])
