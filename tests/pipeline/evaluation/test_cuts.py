"""Where tokens are cut for measuring, and what they cost there."""

import math

import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.evaluation.measurements import Cuts, Measurements, PerImage, Point
from pipeline.evaluation.results import content_results, length_results, table
from tatok_model.tokenizer import TaTok


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
    some = cuts.at(ranked, Point("curve00", 15))
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
    assert cuts.rate_bits(tokenizer, cut, 0.05).tolist() == pytest.approx(expected)
    assert max(expected) > 0


@pytest.mark.parametrize(("score", "rule"), [("surprisal", "marginal"), ("distortion", "residual"), ("grid", "count")])
def test_there_is_no_rate_where_there_is_no_water_level(
    tokenizer: TaTok, images: torch.Tensor, score: str, rule: str
) -> None:
    cuts = Cuts(FilterConfig(score=score, rule=rule, threshold=3))
    ranked = cuts.rank(tokenizer, tokenizer.encode(images), images)
    assert cuts.rate_bits(tokenizer, cuts.operating(ranked), 3) is None


def test_lengths_are_means_and_percentiles() -> None:
    tokens = torch.arange(1, 102).numpy()
    found = length_results(tokens, tokens * 10.0, tokens * 9.0, pixels=100)
    assert (found["tokens_per_image"], found["tokens_p05"], found["tokens_p50"], found["tokens_p95"]) == (51, 6, 51, 96)
    assert found["generator_steps"] == 51
    assert (found["bits_per_pixel"], found["bits_coded_per_pixel"]) == pytest.approx((5.1, 4.59))


def measured(tokens: list[int], errors: list[int]) -> Measurements:
    content = PerImage(png_bytes=torch.tensor([100, 200, 300, 400]).numpy())
    lengths = PerImage(tokens=torch.tensor(tokens).numpy(), squared_error=torch.tensor(errors).numpy())
    return Measurements(images=content, lengths=lengths)


def test_lengths_that_follow_the_content_are_told_by_rank_correlation() -> None:
    found = content_results(measured([3, 5, 8, 9], [1, 1, 1, 1]))
    assert found["spearman_tokens_png"] == pytest.approx(1)
    assert found["spearman_tokens_png_low"] <= found["spearman_tokens_png_high"] <= 1


def test_at_one_length_errors_are_told_instead() -> None:
    assert content_results(measured([5] * 4, [9, 7, 4, 1]))["spearman_error_png"] == pytest.approx(-1)
    assert content_results(measured([5] * 4, [7] * 4)) == {}


def test_the_table_has_a_line_for_each_cut() -> None:
    values = dict.fromkeys(("tokens_per_image", "bits_fixed", "bits_coded", "psnr", "ssim", "rfd_x"), 1.5)
    header, line = table([("count 4", values)], ["rfd_x"])
    assert header == ["cut", "tokens", "bits_fixed", "bits_coded", "psnr", "ssim", "rfd_x"]
    assert line == ["count 4", *["1.5"] * 6]
