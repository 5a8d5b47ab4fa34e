import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tatok_model.generation.sequences import Sequences
from tatok_model.tokens import Tokens


def tokens_of(seed: int, batch: int, m: int, n: int, share: float) -> Tokens:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(batch, n, generator=random) < share
    codes = torch.randint(0, 9, (batch, n), generator=random)
    return Tokens(torch.randint(0, 9, (batch, m), generator=random), codes * kept, kept)


@given(st.integers(0, 1000), st.integers(0, 5), st.integers(0, 3), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_tokens_come_back(seed: int, batch: int, m: int, share: float) -> None:
    tokens = tokens_of(seed, batch, m, 16, share)
    sequences = Sequences.from_tokens(tokens)
    back = sequences.to_tokens(16, m)
    assert torch.equal(back.kept_mask, tokens.kept_mask)
    assert torch.equal(back.patch_indices, tokens.patch_indices)
    assert torch.equal(back.global_indices, tokens.global_indices)
    assert torch.equal(sequences.lengths(), tokens.counts())


@given(st.integers(0, 1000))
def test_places_ascend_and_padding_is_zero(seed: int) -> None:
    sequences = Sequences.from_tokens(tokens_of(seed, 6, 2, 16, 0.5))
    for places, codes, count in zip(sequences.places, sequences.codes, sequences.counts, strict=True):
        assert torch.equal(places[:count], places[:count].sort().values.unique())
        assert not places[count:].any()
        assert not codes[count:].any()
    assert sequences.places.shape[1] == int(sequences.counts.max())


def test_some_images_are_padded_to_their_own_longest() -> None:
    sequences = Sequences.from_tokens(tokens_of(0, 8, 2, 16, 0.4))
    shortest = sequences.counts.argsort()[:3]
    part = sequences[shortest]
    assert part.codes.shape[1] == int(sequences.counts[shortest].max())
    assert torch.equal(part.to_tokens(16, 2).kept_mask, sequences.to_tokens(16, 2).kept_mask[shortest])


def test_global_tokens_that_lost_their_tail_come_back_short() -> None:
    tokens = Tokens(
        torch.arange(12).reshape(2, 6),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.bool),
        global_counts=torch.tensor([4, 4]),
    )
    sequences = Sequences.from_tokens(tokens)
    assert sequences.global_indices.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    back = sequences.to_tokens(4, 6)
    assert back.global_indices.shape == (2, 6)
    assert back.counts().tolist() == [4, 4]


def test_tails_of_different_length_are_refused() -> None:
    tokens = tokens_of(0, 2, 3, 4, 0.0)
    uneven = Tokens(tokens.global_indices, tokens.patch_indices, tokens.kept_mask, global_counts=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="expected as many in all of them"):
        Sequences.from_tokens(uneven)


def test_copies_to_the_cpu_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from a GPU that is not could be read before it has arrived."""
    asked = []

    def recorded(part: torch.Tensor, device: object, non_blocking: bool = False) -> torch.Tensor:
        asked.append((torch.device(device).type, non_blocking))  # type: ignore[arg-type]
        return part

    sequences = Sequences.from_tokens(tokens_of(0, 2, 3, 4, 0.5))
    monkeypatch.setattr(torch.Tensor, "to", recorded)
    sequences.to("cpu")
    sequences.to(torch.device("cuda"))
    assert asked == [("cpu", False)] * 4 + [("cuda", True)] * 4


def test_parts_that_do_not_fit_together_are_refused() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="codes"):
        Sequences(zeros, zeros, zeros[:, :2], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="counts"):
        Sequences(zeros, zeros, zeros, torch.zeros(3, dtype=torch.int64))
