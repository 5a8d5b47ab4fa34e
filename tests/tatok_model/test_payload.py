import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tatok_model import Codec, TaTok, TokenizerConfig
from tatok_model.codec.payload import grid_schedule, kept_of, rank_of, ranking_schedule
from tatok_model.tokens import Ranking


@pytest.mark.parametrize("positions", [0, 1, 2, 7])
def test_the_ranks_of_all_sets_are_the_whole_numbers_below_the_binomial(positions: int) -> None:
    for count in range(positions + 1):
        masks = [np.isin(np.arange(positions), kept) for kept in itertools.combinations(range(positions), count)]
        assert sorted(map(rank_of, masks)) == list(range(math.comb(positions, count)))


def test_a_rank_is_the_sum_of_binomials_of_its_positions() -> None:
    kept = np.array([0, 1, 0, 1, 0, 0, 1], dtype=bool)
    assert rank_of(kept) == math.comb(1, 1) + math.comb(3, 2) + math.comb(6, 3)


@given(st.lists(st.booleans(), max_size=300))
def test_a_rank_gives_its_set_back(kept: list[bool]) -> None:
    mask = np.array(kept, dtype=bool)
    rank = rank_of(mask)
    assert 0 <= rank < math.comb(len(kept), sum(kept))
    assert kept_of(rank, len(kept), sum(kept)).tolist() == kept


@given(st.data())
def test_a_set_gives_its_rank_back(data: st.DataObject) -> None:
    positions = data.draw(st.integers(0, 300))
    count = data.draw(st.integers(0, positions))
    rank = data.draw(st.integers(0, math.comb(positions, count) - 1))
    mask = kept_of(rank, positions, count)
    assert mask.sum() == count
    assert rank_of(mask) == rank


def test_256_positions_take_less_than_a_millisecond() -> None:
    mask = np.random.default_rng(0).random(256) < 0.3
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        kept_of(rank_of(mask), 256, int(mask.sum()))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_what_is_no_mask_or_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kept_mask is int64 \(3,\); expected bool"):
        rank_of(np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"kept_mask is bool \(1, 3\); expected bool \(N,\)"):
        rank_of(np.zeros((1, 3), dtype=bool))
    with pytest.raises(ValueError, match="count is 5; expected 0 to 4"):
        kept_of(0, 4, 5)
    with pytest.raises(ValueError, match="rank is 6; expected 0 to 5 for 2 of 4 positions"):
        kept_of(6, 4, 2)
    with pytest.raises(ValueError, match="rank is -1"):
        kept_of(-1, 4, 2)


@given(st.integers(0, 2**16 - 1), st.integers(1, 20))
def test_every_round_has_its_share_of_the_kept_positions(bits, rounds):
    kept = torch.tensor([[bool(bits >> i & 1) for i in range(16)]])
    numbers = grid_schedule(kept, rounds)[kept]
    counts = torch.bincount(numbers, minlength=rounds)
    assert counts.sum() == kept.sum()
    assert len(counts) == rounds
    assert counts.max() - counts.min() <= 1


def test_the_schedule_is_that_of_the_byte_format():
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
