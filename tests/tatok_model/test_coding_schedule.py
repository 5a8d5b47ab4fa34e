import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tatok_model.codec.payload import grid_schedule, ranking_schedule
from tatok_model.tokens import Ranking


@given(st.integers(0, 2**16 - 1), st.integers(1, 20))
def test_every_round_has_its_share_of_the_kept_positions(bits, rounds):
    kept = torch.tensor([[bool(bits >> i & 1) for i in range(16)]])
    numbers = grid_schedule(kept, rounds)[kept]
    counts = torch.bincount(numbers, minlength=rounds)
    assert counts.sum() == kept.sum()
    assert len(counts) == rounds
    assert counts.max() - counts.min() <= 1


def test_the_schedule_is_that_of_the_byte_format():
    from tatok_model import TaTok, TokenizerConfig
    from tatok_model.codec.bytestream import Codec

    codec = Codec(TaTok(TokenizerConfig(image_size=32, patch_size=4)).eval(), coding_rounds=5)
    kept = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    schedule = grid_schedule(kept, 5)
    for image in range(3):
        for number, positions in enumerate(codec._model.rounds(kept[image].numpy())):
            assert (schedule[image, positions] == number).all()


@pytest.mark.parametrize(("rounds", "expected"), [(1, [0, 0, 0, 0]), (2, [1, 0, 1, 0]), (4, [2, 1, 3, 0])])
def test_a_replaying_decoder_codes_in_the_rounds_of_the_ranking(rounds, expected):
    order = torch.tensor([[3, 1, 0, 2]])
    assert ranking_schedule(Ranking(order, torch.zeros_like(order), "entropy", rounds)).tolist() == [expected]
