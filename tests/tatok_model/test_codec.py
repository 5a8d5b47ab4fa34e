import dataclasses
import math

import pytest
import torch

from tatok_model.codec.bytestream import Codec, model_id
from tatok_model.codec.header import payload_bits, unseal
from tatok_model.vit import one_thread

SIZES = {"patch_size": 4, "codebook_size": 100}
CUTS = [("count", 0), ("count", 20), ("count", 64), ("relative", 0.5), ("residual", 200.0)]


@pytest.fixture(scope="module")
def tokenizer(opinionated):
    return opinionated(**SIZES)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return tokenizer.encode(images)


def same(one, other):
    kept = one.kept_mask
    return (
        torch.equal(one.global_indices, other.global_indices)
        and torch.equal(kept, other.kept_mask)
        and torch.equal(one.patch_indices[kept], other.patch_indices[kept])
    )


@pytest.mark.parametrize("entropy_coded", [False, True])
@pytest.mark.parametrize(
    ("score", "rounds", "replay", "rule", "threshold"),
    [("surprisal", 1, False, *cut) for cut in CUTS]
    + [("entropy", 4, True, *cut) for cut in CUTS]
    + [("grid", 1, False, *cut) for cut in CUTS if cut[0] == "count"],  # its steps have no bits
)
def test_a_round_trip_gives_the_same_tokens_and_pictures(
    tokenizer, tokens, score, rounds, replay, rule, threshold, entropy_coded
):
    cut = tokenizer.rank(tokens, score, rounds).cut(rule, threshold, replay)
    codec = Codec(tokenizer)
    found = codec.from_bytes(codec.to_bytes(cut, entropy_coded))
    assert same(cut, found)
    assert torch.equal(tokenizer.decode(cut), tokenizer.decode(found))
    with pytest.raises(ValueError, match="hold one cut and no ranking"):
        found.cut("count", 1)


def test_fixed_streams_take_what_bits_fixed_says_and_at_most_64_bits_more(tokenizer, tokens):
    cut = tokenizer.rank(tokens).cut("relative", 0.5)
    for data, bits in zip(Codec(tokenizer).to_bytes(cut), cut.bits(math.log2(100)).tolist(), strict=True):
        assert bits <= payload_bits(data) <= bits + 64


def test_coded_streams_take_what_q_says(tokenizer, tokens):
    cut = tokenizer.rank(tokens).cut("count", 40)
    codec = Codec(tokenizer, coding_rounds=8)
    schedule = torch.zeros(6, 64, dtype=torch.int64)
    for image in range(6):
        for number, positions in enumerate(codec._model.rounds(cut.kept_mask[image].numpy())):
            schedule[image, positions] = number
    ideal = tokenizer.code_lengths(cut, schedule)
    rest = 4 * math.log2(100) + cut.side.bits(cut.patch_counts, 64)
    for data, codes, fixed in zip(codec.to_bytes(cut, entropy_coded=True), ideal.tolist(), rest.tolist(), strict=True):
        assert codes + fixed <= payload_bits(data) <= 1.02 * codes + fixed + 64


def test_rounds_hold_every_kept_position_once(tokenizer, tokens):
    kept = tokenizer.rank(tokens).cut("count", 21).kept_mask[0].numpy()
    rounds = Codec(tokenizer, coding_rounds=5)._model.rounds(kept)
    assert sorted(position for part in rounds for position in part) == kept.nonzero()[0].tolist()
    assert {len(part) for part in rounds} == {4, 5}


def test_replayed_positions_cost_a_check_and_nothing_more(tokenizer, tokens):
    ranked = tokenizer.rank(tokens, "entropy", 4)
    codec = Codec(tokenizer)
    replayed = codec.to_bytes(ranked.cut("count", 32, replay=True))
    sent = codec.to_bytes(ranked.cut("count", 32))
    assert all(unseal(data)[0].side.positions == "replayed" for data in replayed)
    gained = [payload_bits(one) - payload_bits(other) for one, other in zip(sent, replayed, strict=True)]
    assert min(gained) >= math.log2(math.comb(64, 32)) - 32 - 16


def test_an_image_that_a_replay_does_not_reach_has_its_positions_sent(tokenizer, tokens):
    ranked = tokenizer.rank(tokens, "entropy", 4)
    order = ranked.ranking.order.clone()
    order[2] = order[2].flip(0)  # as if another machine had ranked the third image
    foreign = dataclasses.replace(ranked, ranking=dataclasses.replace(ranked.ranking, order=order))
    cut = foreign.cut("count", 20, replay=True)
    codec = Codec(tokenizer)
    streams = codec.to_bytes(cut)
    assert [unseal(data)[0].side.positions for data in streams] == ["replayed"] * 2 + ["sent"] + ["replayed"] * 3
    assert same(cut, codec.from_bytes(streams))


def test_streams_of_another_tokenizer_are_refused(tokenizer, tokens, opinionated):
    streams = Codec(tokenizer).to_bytes(tokenizer.rank(tokens).cut("count", 20))
    other = opinionated(**SIZES)
    with torch.no_grad():
        other.fill_gate.add_(0.1)
    assert model_id(other) != model_id(tokenizer)
    with pytest.raises(ValueError, match="expected"):
        Codec(other).from_bytes(streams)


def test_what_needs_an_entropy_model_is_refused_without_one(tokens, opinionated):
    without = opinionated(**SIZES, entropy_layers=0)
    codec = Codec(without)
    with pytest.raises(ValueError, match="this tokenizer has no entropy model"):
        codec.to_bytes(tokens, entropy_coded=True)
    assert same(tokens, codec.from_bytes(codec.to_bytes(tokens)))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
