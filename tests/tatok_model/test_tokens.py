import dataclasses
import math
import re

import pytest
import torch

from tatok_model import Tokens
from tatok_model.filtering_rules import QualityLine
from tatok_model.tokens import Ranking, Side, joined


def tokens(b=3, m=2, n=4, kept=None):
    mask = torch.ones(b, n, dtype=torch.bool) if kept is None else kept
    return Tokens(torch.zeros(b, m, dtype=torch.int64), torch.zeros(b, n, dtype=torch.int64), mask)


def test_tokens_are_counted_per_image():
    kept = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    batch = tokens(kept=kept)
    assert batch.counts().tolist() == [6, 3, 2]
    assert batch.bits(bits_per_token=10.0).tolist() == [60.0, 30.0, 20.0]
    assert batch[1:].counts().tolist() == [3, 2]
    assert len(batch[[0]]) == 1


def ranked(score="surprisal", rounds=1):
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 2, 0]])
    units = torch.tensor([[4096, 2048, 1024, 0], [1024, 1024, 1024, 1024]])
    return dataclasses.replace(tokens(b=2), ranking=Ranking(order, units, score, rounds))


def test_one_ranking_is_cut_again_and_again():
    batch = ranked()
    assert batch.cut("count", 2).kept_mask.tolist() == [[True, False, True, False], [False, True, False, True]]
    again = batch.cut("count", 1).cut("relative", 0.5)
    assert again.patch_counts.tolist() == [1, 2]
    assert again.ranking is batch.ranking


UNITS = {"distortion": 2**16, "error": 2**20, "surprisal": 1024, "entropy": 1024, "pixel_entropy": 1024}


def scored(score, line=None):
    """Steps of 4, 2, 1, 0.25 and 1.5, 1, 1, 0.5 of the score's unit."""
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 2, 0]])
    units = torch.tensor([[4, 2, 1, 0.25], [1.5, 1, 1, 0.5]]).mul(UNITS[score]).long()
    return dataclasses.replace(tokens(b=2), ranking=Ranking(order, units, score, 1, line))


@pytest.mark.parametrize("score", UNITS)
def test_a_ranking_knows_how_many_steps_make_its_unit(score):
    assert scored(score).ranking.resolution == UNITS[score]


@pytest.mark.parametrize("score", UNITS)
@pytest.mark.parametrize(
    ("rule", "threshold", "counts"),
    [
        ("marginal", 0.0, [4, 4]),
        ("marginal", 1.0, [3, 3]),  # a step at the level is kept
        ("marginal", 1.25, [2, 1]),
        ("marginal", 4.5, [0, 0]),
        ("residual", 0.0, [4, 4]),
        ("residual", 0.5, [3, 3]),
        ("residual", 1.25, [2, 3]),
        ("residual", 5.0, [1, 0]),
        ("residual", 7.25, [0, 0]),
        ("relative", 0.5, [1, 2]),
        ("relative", 0.82, [2, 3]),
        ("count", 2, [2, 2]),
    ],
)
def test_scores_of_every_unit_are_cut_at_thresholds_in_that_unit(score, rule, threshold, counts):
    cut = scored(score).cut(rule, threshold)
    assert cut.patch_counts.tolist() == counts
    assert scored(score).ranking.counts(rule, threshold).tolist() == counts
    for image, count in enumerate(counts):
        kept = cut.kept_mask[image].nonzero()[:, 0].tolist()
        assert kept == sorted(cut.ranking.order[image, :count].tolist())


@pytest.mark.parametrize("score", ["distortion", "error"])
@pytest.mark.parametrize(
    ("decibels", "counts"),
    [(20.0, [4, 4]), (-10 * math.log10(0.0126), [3, 4]), (-10 * math.log10(0.0226), [2, 3]), (10.0, [0, 0])],
)
def test_decibels_leave_unsaid_what_the_line_allows(score, decibels, counts):
    """A hundredth, and another for each unit: 0.26 units may be left at an error of 0.0126, 1.26 at 0.0226."""
    cut = scored(score, QualityLine(score, 1, 0.01, 0.01)).cut("quality", decibels)
    assert cut.patch_counts.tolist() == counts
    assert cut.side == Side(length=True, positions="sent")


@pytest.mark.parametrize(
    ("score", "rule", "threshold", "replay", "side"),
    [
        ("surprisal", "count", 2, False, math.log2(6)),
        ("distortion", "count", 2, False, math.log2(6)),
        ("distortion", "marginal", 0.02, False, None),
        ("distortion", "relative", 1.0, False, 0),
        ("error", "residual", 0.003, False, None),
        ("error", "count", 4, False, 0),
        ("surprisal", "residual", 1.0, False, None),
        ("surprisal", "count", 4, False, 0),
        ("surprisal", "count", 0, False, 0),
        ("surprisal", "relative", 1.0, False, 0),
        ("surprisal", "relative", 0.0, False, 0),
        ("surprisal", "marginal", 0.0, False, 0),
        ("entropy", "count", 2, True, 32),
        ("entropy", "count", 2, False, math.log2(6)),
        ("grid", "count", 2, False, 0),
        ("random", "count", 2, False, 0),
        ("pixel_entropy", "count", 2, False, math.log2(6)),
    ],
)
def test_length_and_positions_are_counted_in_bits(score, rule, threshold, replay, side):
    cut = ranked(score).cut(rule, threshold, replay)
    plain = cut.counts().double() * 10
    if side is None:
        side = math.log2(5) + torch.tensor([math.log2(math.comb(4, int(t))) for t in cut.patch_counts]).double()
    torch.testing.assert_close(cut.bits(10.0) - plain, torch.zeros(2).double() + side, atol=1e-6, rtol=0)


def test_replay_with_a_varying_length_sends_length_and_check():
    cut = ranked("entropy").cut("relative", 0.5, replay=True)
    assert (cut.bits(0.0) - 32).tolist() == pytest.approx([math.log2(5)] * 2)


def test_images_without_patch_tokens_are_cut_to_leading_global_tokens():
    tokens = Tokens(torch.zeros(2, 3).long(), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool())
    assert tokens.cut_globals(2).counts().tolist() == [2, 2]
    assert len(tokens.kept_globals()) == 6
    assert len(tokens.cut_globals(2).kept_globals()) == 4
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"count is {count}; expected 0 to 3, the global tokens"):
            tokens.cut_globals(count)


def test_tokens_without_a_ranking_are_not_cut():
    with pytest.raises(ValueError, match="these tokens hold one cut and no ranking"):
        tokens().cut("count", 1)


@pytest.mark.parametrize(
    ("score", "arguments", "message"),
    [
        ("surprisal", ("count", 5), "threshold is 5; expected 0 to 4 whole tokens"),
        ("surprisal", ("relative", 1.5), r"threshold is 1\.5; expected a share"),
        ("surprisal", ("count", 1, True), "replay is set with score 'surprisal'; expected entropy"),
        ("distortion", ("count", 1, True), "replay is set with score 'distortion'; expected entropy"),
        ("grid", ("residual", 1.0), "expected count for the score 'grid'"),
        (
            "distortion",
            ("quality", 20),
            r"has no line from distortion in 1 rounds to dB; expected one that jobs/calibrate\.py has fitted",
        ),
        ("surprisal", ("quality", 20), "expected the score distortion or error, not 'surprisal', to predict dB from"),
        ("error", ("quality", 0), "threshold is 0; expected more than 0 dB for the rule quality"),
        ("distortion", ("quality", -1), "threshold is -1; expected more than 0 dB for the rule quality"),
    ],
)
def test_cuts_that_cannot_be_are_refused(score, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        ranked(score).cut(*arguments)
    assert "\n" not in str(caught.value)


def test_more_decibels_than_all_tokens_give_are_refused_with_the_most_there_are():
    batch = scored("distortion", QualityLine("distortion", 1, 10**-2.137, 0.5))
    sentence = (
        "threshold is 21.4 dB for the rule quality; expected at most 21.3 dB, which this tokenizer reaches with all"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        batch.cut("quality", 21.4)
    assert batch.cut("quality", 21.3).patch_counts.tolist() == [4, 4]


def test_a_ranking_follows_its_images():
    part = ranked()[[1]]
    assert part.ranking.order.tolist() == [[1, 3, 2, 0]]
    assert part.to("cpu").cut("count", 1).kept_mask.tolist() == [[False, True, False, False]]


def test_values_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="positions is 'guessed'; expected one of derived, sent, replayed"):
        Side(positions="guessed")
    order = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \(B, N\) both"):
        Ranking(order, order[:1], "surprisal", 1)
    with pytest.raises(ValueError, match="score is 'best'"):
        Ranking(order, order, "best", 1)
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        Ranking(order, order, "surprisal", 0)
    with pytest.raises(ValueError, match=r"ranking is of \(2, 4\); expected \(3, 4\)"):
        dataclasses.replace(tokens(), ranking=Ranking(order, order, "surprisal", 1))


def test_shapes_that_do_not_belong_together_are_refused():
    indices = torch.zeros(3, 4, dtype=torch.int64)
    kept = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected \(B, M\) and \(B, N\)"):
        Tokens(indices[0], indices, kept)
    with pytest.raises(ValueError, match=r"kept_mask is torch\.int64"):
        Tokens(indices, indices, indices)
    with pytest.raises(ValueError, match="expected as many"):
        Tokens(indices[:2], indices, kept)


def test_batches_are_joined_with_their_rankings():
    whole = ranked()
    found = joined([whole[:1], whole[1:]])
    assert torch.equal(found.patch_indices, whole.patch_indices)
    assert torch.equal(found.ranking.order, whole.ranking.order)
    assert torch.equal(found.ranking.score_units, whole.ranking.score_units)
    assert torch.equal(found.cut("count", 1).kept_mask, whole.cut("count", 1).kept_mask)
    counted = dataclasses.replace(tokens(), global_counts=torch.tensor([0, 1, 2]))
    assert joined([counted[:2], counted[2:]]).global_counts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kinds", [0, 2])
def test_batches_of_different_kinds_are_not_joined(kinds):
    others = [ranked(), dataclasses.replace(ranked(), ranking=None)], [ranked(), ranked().cut("count", 1)]
    for batches in others if kinds else [[]]:
        with pytest.raises(ValueError, match=f"are of {kinds} kinds; expected at least one, all of one cut"):
            joined(batches)


@pytest.mark.parametrize("rule", ["marginal", "residual", "quality"])
def test_limits_are_where_a_picture_keeps_everything_and_nothing(rule):
    """Just beyond them the count does not change, just inside it does."""
    units = torch.tensor([[900, 500, 300, 100], [80, 80, 40, 20]]) * UNITS["distortion"]
    line = QualityLine("distortion", 1, 0.01, 0.0001, 0.00001)
    ranking = Ranking(torch.arange(4).expand(2, -1), units, "distortion", 1, line)
    limits = ranking.limits(rule)
    if rule != "quality":
        by_rule = {"marginal": [[100, 900], [20, 80]], "residual": [[100, 1800], [20, 220]]}
        assert limits.tolist() == by_rule[rule]
    else:
        assert limits[0].tolist() == pytest.approx([-10 * math.log10(0.01 + 0.01 + 0.017), -10 * math.log10(0.19)])
    for row, (everything, nothing) in enumerate(limits.tolist()):
        inwards = math.copysign(1e-6, nothing - everything)
        counts = [everything - inwards, everything + inwards, nothing - inwards, nothing + inwards]
        every, fewer, some, none = (int(ranking.counts(rule, threshold)[row]) for threshold in counts)
        assert every == 4 > fewer > 0 < some < 4 > none == 0
