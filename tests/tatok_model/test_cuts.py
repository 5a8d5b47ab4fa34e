"""Every score under every cut rule, on a tokenizer, without and with a decoder trunk."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from tatok_model.filtering_rules import RULES, SCORES, QualityLine

SCORED = [name for name, score in SCORES.items() if score.unit]
PAIRS = [(score, rule) for score in SCORED for rule in RULES if rule != "quality" or SCORES[score].in_signal]
GROWS = {"relative": True, "count": True, "quality": True, "residual": False, "marginal": False}
RESOLUTIONS = {name: SCORES[name].resolution for name in SCORED}


@pytest.fixture(scope="module", params=[0, 2, 3], ids=["no trunk", "trunk of 2", "trunk of 3"])
def tokenizer(request, opinionated):
    return opinionated(trunk_layers=request.param)


@pytest.fixture(scope="module")
def ranked(tokenizer, images):
    """`ranked("error", 2)`: every patch token known and ranked, with a line to dB where there can be one."""
    tokens = tokenizer.encode(images)

    @cache
    def rank(score, rounds=1):
        found = tokenizer.rank(tokens, score, rounds, images)
        return replace(found, ranking=replace(found.ranking, line=line_of(found.ranking)))

    return rank


def line_of(ranking):
    """20 dB where everything is kept; the image of which most would be left unsaid has 7 dB without patch tokens."""
    if not SCORES[ranking.score].in_signal:
        return None
    return QualityLine(ranking.score, ranking.rounds, 0.01, (10**-0.7 - 0.01) / most_left(ranking))


def most_left(ranking):
    return int(ranking.score_units.sum(dim=1).max()) / RESOLUTIONS[ranking.score]


def thresholds(ranking, rule):
    """From one end of a rule to the other, upwards."""
    steps = (ranking.score_units.unique().double() / RESOLUTIONS[ranking.score]).tolist()
    levels = [(low + high) / 2 for low, high in pairwise(steps)]
    shares = [0.0, 0.2, 0.5, 0.51, 0.8, 0.9, 1.0]
    return {
        "relative": shares,
        "residual": [share * most_left(ranking) for share in shares],
        "marginal": [0.0, *(levels[int(share * (len(levels) - 1))] for share in shares), steps[-1] * 1.01],
        "count": [0, 1, 5, 6, 15, 16],
        "quality": [6.9, 9.0, 10.0, 10.1, 13.0, 15.0, 20.0],
    }[rule]


def middle(ranking, rule):
    """A threshold at which images keep some of their tokens."""
    return thresholds(ranking, rule)[3]


@pytest.mark.parametrize(
    ("score", "rule", "rounds"),
    [(*pair, rounds) for pair in PAIRS for rounds in (1, 4) if rounds == 1 or SCORES[pair[0]].in_rounds],
)
def test_kept_sets_nest_from_none_to_all(ranked, score, rule, rounds):
    tokens = ranked(score, rounds)
    assert tokens.ranking.score_units.min() > 0
    masks = [tokens.cut(rule, threshold).kept_mask for threshold in thresholds(tokens.ranking, rule)]
    if not GROWS[rule]:
        masks.reverse()
    assert not masks[0].any()
    assert masks[-1].all()
    for smaller, larger in pairwise(masks):
        assert (larger | ~smaller).all()
    assert len({int(mask.sum()) for mask in masks}) > 4


@pytest.mark.parametrize(("score", "rule"), PAIRS)
def test_an_image_is_cut_alone_as_in_a_batch(tokenizer, ranked, images, score, rule):
    together = ranked(score)
    threshold = middle(together.ranking, rule)
    kept = together.cut(rule, threshold).kept_mask
    assert kept.any()
    assert not kept.all()
    for number in range(len(images)):
        image = images[number : number + 1]
        alone = tokenizer.rank(tokenizer.encode(image), score, 1, image)
        alone = replace(alone, ranking=replace(alone.ranking, line=together.ranking.line))
        assert torch.equal(alone.cut(rule, threshold).kept_mask[0], kept[number])


@pytest.mark.parametrize(("score", "rule"), PAIRS)
def test_a_dropped_code_changes_neither_the_picture_nor_q(tokenizer, ranked, score, rule):
    tokens = ranked(score)
    cut = tokens.cut(rule, middle(tokens.ranking, rule))
    kept, codes = cut.kept_mask, cut.patch_indices
    other = replace(cut, patch_indices=codes.where(kept, (codes + 7) % 16))
    absent = replace(cut, patch_indices=codes.where(kept, -1))
    assert not torch.equal(codes, other.patch_indices)
    for changed in (other, absent):
        assert torch.equal(tokenizer.decode(cut), tokenizer.decode(changed))
        assert torch.equal(tokenizer.patch_logits(cut, kept, ~kept), tokenizer.patch_logits(changed, kept, ~kept))


def test_a_kept_code_does_change_the_picture_and_q(tokenizer, ranked):
    cut = ranked("distortion").cut("count", 6)
    kept, codes = cut.kept_mask, cut.patch_indices
    other = replace(cut, patch_indices=((codes + 7) % 16).where(kept, codes))
    different = (tokenizer.decode(cut) - tokenizer.decode(other)).abs().amax(dim=(1, 2, 3))
    assert (different > 1e-3).all()
    assert not torch.allclose(tokenizer.patch_logits(cut, kept, ~kept), tokenizer.patch_logits(other, kept, ~kept))


@pytest.mark.parametrize("score", ["distortion", "error"])
@pytest.mark.parametrize("rounds", [1, 4])
def test_a_cut_by_decibels_is_the_cut_by_what_the_line_lets_go(ranked, score, rounds):
    tokens = ranked(score, rounds)
    line = tokens.ranking.line
    for decibels in (6.0, 8.5, 11.0, 14.25, 19.9, 20.0):
        by_quality, by_residual = (
            tokens.cut("quality", decibels),
            tokens.cut("residual", line.residual_at(decibels)),
        )
        assert torch.equal(by_quality.kept_mask, by_residual.kept_mask)
        assert by_quality.side == by_residual.side


@pytest.mark.parametrize("score", ["distortion", "error"])
def test_one_level_for_all_images_leaves_the_least_of_all_cuts_with_as_many_tokens(ranked, score):
    """Reverse water-filling: `marginal` against `count`, on the same scores and at the same number of tokens."""
    ranking = ranked(score).ranking
    counts = ranking.counts("marginal", middle(ranking, "marginal"))
    left = ranking.score_units.sum() - sum(
        ranking.score_units[image, :count].sum() for image, count in enumerate(counts.tolist())
    )
    fewest = ranking.score_units.flatten().sort().values[: ranking.score_units.numel() - int(counts.sum())].sum()
    assert left == fewest
