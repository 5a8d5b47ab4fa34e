import copy
import math

import pytest
import torch
from torch import Tensor

from tatok_model.metrics.scores import CodeUsage, InceptionScore, inception_score


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def score_of(logits: Tensor, split: Tensor | None = None, splits: int = 1) -> InceptionScore:
    score = InceptionScore(logits.shape[1], splits)
    score.update(logits, split)
    return score


def test_sure_and_evenly_spread_images_score_the_number_of_classes() -> None:
    assert inception_score(torch.eye(7) * 1000) == pytest.approx(7)


def test_images_that_all_look_alike_score_one() -> None:
    assert inception_score(draws(1, 1, 9).expand(20, 9)) == pytest.approx(1)


def test_the_score_is_the_exponential_of_the_mean_divergence() -> None:
    logits = draws(2, 50, 6)
    p = logits.double().softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1)
    assert inception_score(logits) == pytest.approx(math.exp(divergence.mean()), rel=1e-12)


def test_splits_are_scored_apart_and_averaged() -> None:
    logits = draws(3, 11, 4)
    apart = [inception_score(logits[:4]), inception_score(logits[4:8]), inception_score(logits[8:])]
    assert inception_score(logits, splits=3) == pytest.approx(sum(apart) / 3)
    assert inception_score(logits, splits=3) != pytest.approx(inception_score(logits))


def test_merged_parts_score_as_the_whole_whoever_saw_which_image() -> None:
    logits, split = draws(4, 30, 5), torch.arange(30) // 15
    whole = score_of(logits, split, splits=2)
    odd, even = score_of(logits[1::2], split[1::2], 2), score_of(logits[::2], split[::2], 2)
    merged = InceptionScore.from_arrays(odd.to_arrays())
    merged.merge(even)
    torch.testing.assert_close(merged.per_split(), whole.per_split())
    assert merged.result() == pytest.approx(whole.result())


def test_a_constant_added_to_an_image_s_logits_changes_nothing() -> None:
    logits = draws(5, 20, 5)
    assert inception_score(logits + torch.arange(20.0)[:, None]) == pytest.approx(inception_score(logits), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "split", "words"),
    [
        (torch.zeros(2, 4), None, r"must be \(B, 3\), got \(2, 4\)"),
        (torch.zeros(3), None, r"must be \(B, 3\), got \(3,\)"),
        (torch.tensor([[0.0, float("nan"), 0.0]]), None, "NaN or infinity"),
        (torch.zeros(2, 3), torch.tensor([0]), "split must be 2 numbers from 0 to 1"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), r"from 0 to 1, got \[0, 2\]"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"from 0 to 1, got \[-1, 0\]"),
    ],
)
def test_bad_logits_or_splits_are_refused(logits: Tensor, split: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InceptionScore(3, splits=2).update(logits, split)


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes and 1 split, got 1 classes and 1 splits"):
        InceptionScore(1)
    with pytest.raises(ValueError, match="3 classes in 1 splits into 4 classes in 1 splits"):
        InceptionScore(4).merge(InceptionScore(3))
    with pytest.raises(ValueError, match=r"every split needs an image, got \[2, 0\]"):
        score_of(torch.zeros(2, 3), splits=2).result()
    with pytest.raises(ValueError, match="every split needs an image"):
        inception_score(torch.zeros(2, 3), splits=3)
    with pytest.raises(ValueError, match=r"must be \(B, C\), got \(3,\)"):
        inception_score(torch.zeros(3))


def usage_of(size: int, *indices: int) -> CodeUsage:
    usage = CodeUsage(size)
    usage.update(torch.tensor(indices, dtype=torch.int64))
    return usage


def test_usage_is_the_share_of_entries_and_perplexity_their_effective_number() -> None:
    even = usage_of(8, 0, 1, 2, 3)
    assert even.usage == 0.5
    assert even.perplexity == pytest.approx(4)
    uneven = usage_of(8, *[0] * 97, 1, 2, 3)
    assert uneven.usage == 0.5
    assert 1 < uneven.perplexity < 1.3


def test_before_the_first_index_nothing_is_used() -> None:
    nothing = usage_of(8)
    assert (nothing.usage, nothing.perplexity) == (0, 0)


def test_merged_counts_are_those_of_the_whole() -> None:
    merged = CodeUsage.from_arrays(usage_of(5, 1, 1, 4).to_arrays())
    merged.merge(usage_of(5, 0, 1))
    assert merged.counts.tolist() == [1, 3, 0, 0, 1]


def test_a_state_taken_as_arrays_no_longer_changes() -> None:
    score, usage = score_of(draws(6, 4, 3)), usage_of(4, 1)
    states = [score.to_arrays(), usage.to_arrays()]
    before = copy.deepcopy(states)
    score.update(draws(7, 4, 3))
    usage.update(torch.tensor([2]))
    for state, earlier in zip(states, before, strict=True):
        assert all((state[name] == earlier[name]).all() for name in state)


def test_token_grids_count_like_lists() -> None:
    usage = CodeUsage(4)
    usage.update(torch.tensor([[[0, 3]], [[3, 3]]], dtype=torch.int32))
    assert usage.counts.tolist() == [1, 0, 0, 3]


def test_indices_outside_the_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 0 to 3, got 0 to 4"):
        usage_of(4, 0, 4)
    with pytest.raises(ValueError, match="must be 0 to 3, got -1 to 0"):
        usage_of(4, 0, -1)
    with pytest.raises(ValueError, match=r"must be integers, got torch\.float32"):
        CodeUsage(4).update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be integers, got torch\.bool"):
        CodeUsage(4).update(torch.zeros(3, dtype=torch.bool))


def test_codebooks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        CodeUsage(0)
    with pytest.raises(ValueError, match="cannot merge a codebook of 3 into one of 4"):
        CodeUsage(4).merge(CodeUsage(3))
