import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tatok_model.codec.bytestream import Format, from_bytes, to_bytes
from tatok_model.codec.header import FIXED, payload_bits, unseal
from tatok_model.filtering_rules import QualityLine
from tatok_model.ranking import grid_order, random_order, rank_in_rounds
from tatok_model.tokens import Ranking, Side, Tokens

MODEL = b"weights!"
FORM = Format(global_tokens=2, patch_positions=16, codebook_size=10, model_id=MODEL)


def noise(*key: int) -> np.random.Generator:
    return np.random.default_rng([abs(int(part)) for part in key])


class FakeModel:
    """q and a replay that look at everything they may look at: a leak or a wrong order changes what they say."""

    def __init__(self, k: int, rounds: int = 3, secret: int = 0, spread: float = 3.0) -> None:
        self.k, self.coding_rounds, self.secret, self.spread = k, rounds, secret, spread

    def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
        places = kept_mask.nonzero()[0]
        return [places[start :: self.coding_rounds] for start in range(self.coding_rounds)]

    def logits(self, global_indices, patch_indices, known, positions) -> np.ndarray:
        assert not patch_indices[~known].any()
        rng = self._noise(global_indices, patch_indices, known)
        return (rng.normal(size=(len(known), self.k))[positions] * self.spread).astype(np.float32)

    def next_positions(self, global_indices, patch_indices, placed, count) -> np.ndarray:
        assert not patch_indices[~placed].any()
        scores = self._noise(global_indices, patch_indices, placed).random(len(placed))
        scores[placed] = -1
        return (-scores).argsort()[:count]

    def _noise(self, *arrays: np.ndarray) -> np.random.Generator:
        return noise(self.secret, *(zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in arrays))

    def kept(self, image: Tokens, rounds: int, count: int) -> np.ndarray:
        """(N,) bool: what an encoder would keep of a batch of one."""
        codes, n = image.patch_indices[0].numpy(), image.patch_indices.shape[1]
        order: list[int] = []
        for number in range(rounds):
            placed = np.isin(np.arange(n), order)
            size = (number + 1) * n // rounds - number * n // rounds
            shown = np.where(placed, codes, 0)
            order += self.next_positions(image.global_indices[0].numpy(), shown, placed, size).tolist()
        return np.isin(np.arange(n), order[:count])


def ranking(order: torch.Tensor, score: str, rounds: int = 1) -> Ranking:
    return Ranking(order, torch.ones_like(order), score, rounds)


def batch(form: Format, b: int, seed: int = 0, score: str = "surprisal") -> Tokens:
    """Everything kept, with an order that fits the score."""
    rng = noise(seed)
    m, n, k = form.global_tokens, form.patch_positions, form.codebook_size
    codes = torch.from_numpy(rng.integers(0, k, (b, m + n)))
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (b, 1)), axis=1))
    if score == "grid":
        order = grid_order(n).expand(b, n)
    elif score == "random":
        order = random_order(codes[:, :m], n)
    kept = torch.ones(b, n, dtype=torch.bool)
    return Tokens(codes[:, :m].clone(), codes[:, m:].clone(), kept, ranking(order, score))


def keep(tokens: Tokens, counts: list[int], side: Side) -> Tokens:
    """The first positions of each order."""
    assert tokens.ranking is not None
    places = torch.arange(tokens.patch_indices.shape[1])
    kept = torch.zeros_like(tokens.kept_mask)
    kept = kept.scatter(1, tokens.ranking.order, places < torch.tensor(counts)[:, None])
    return replace(tokens, kept_mask=kept, side=side)


def assert_same(found: Tokens, tokens: Tokens) -> None:
    assert torch.equal(found.kept_mask, tokens.kept_mask)
    assert torch.equal(found.patch_indices, tokens.patch_indices.where(tokens.kept_mask, 0))
    if tokens.global_counts is None:
        assert torch.equal(found.global_indices, tokens.global_indices)
        assert found.global_counts is None
    else:
        places = torch.arange(tokens.global_indices.shape[1])
        expected = tokens.global_indices.where(places < tokens.global_counts[:, None], 0)
        assert torch.equal(found.global_indices, expected)
        assert torch.equal(found.global_counts, tokens.global_counts)
    assert found.ranking is None


def assert_short(streams: list[bytes], tokens: Tokens, form: Format) -> None:
    allowed = tokens.bits(math.log2(form.codebook_size)) + 64
    for data, bits in zip(streams, allowed.tolist(), strict=True):
        assert payload_bits(data) <= bits


@st.composite
def cases(draw: st.DrawFn, score: str) -> tuple[Format, Tokens, list[int]]:
    form = Format(draw(st.integers(0, 9)), draw(st.integers(1, 70)), draw(st.integers(1, 20_000)), MODEL)
    b = draw(st.integers(1, 3))
    tokens = batch(form, b, draw(st.integers(0, 999)), score)
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, form.global_tokens), min_size=b, max_size=b))
        tokens = replace(tokens, global_counts=torch.tensor(counts))
        places = torch.arange(form.global_tokens)
        said = tokens.global_indices.where(places < tokens.global_counts[:, None], 0)
        if score == "random":  # a reader keys the order by what it is told
            tokens = replace(tokens, ranking=ranking(random_order(said, form.patch_positions), score))
    patches = st.sampled_from([0, form.patch_positions]) | st.integers(0, form.patch_positions)
    return form, tokens, draw(st.lists(patches, min_size=b, max_size=b))


@settings(deadline=None)
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from(["distortion", "error", "surprisal"]))
def test_sent_positions_come_back_with_their_codes(data: st.DataObject, length: bool, coded: bool, score: str) -> None:
    form, tokens, counts = data.draw(cases(score))
    tokens = keep(tokens, counts if length else counts[:1] * len(counts), Side(length, "sent"))
    model = FakeModel(form.codebook_size) if coded else None
    streams = to_bytes(tokens, form, model, coded)
    found = from_bytes(streams, form, model)
    assert_same(found, tokens)
    assert found.side == tokens.side
    if not coded:
        assert_short(streams, tokens, form)
        assert to_bytes(found, form, ranked_by=(score, 1)) == streams
        assert unseal(streams[0])[0].score == score


@settings(deadline=None)
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from(["grid", "random"]))
def test_derived_positions_come_back_with_their_codes(
    data: st.DataObject, length: bool, coded: bool, score: str
) -> None:
    form, tokens, counts = data.draw(cases(score))
    tokens = keep(tokens, counts if length else counts[:1] * len(counts), Side(length, "derived"))
    model = FakeModel(form.codebook_size) if coded else None
    streams = to_bytes(tokens, form, model, coded)
    found = from_bytes(streams, form, model)
    assert_same(found, tokens)
    assert found.side == tokens.side
    if not coded:
        assert_short(streams, tokens, form)


@settings(deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_replayed_positions_come_back_with_their_codes(data: st.DataObject, length: bool, coded: bool) -> None:
    form, tokens, counts = data.draw(cases("entropy"))
    rounds = data.draw(st.integers(1, form.patch_positions))
    tokens = replace(tokens, global_counts=None)
    counts = counts if length else counts[:1] * len(counts)
    model = FakeModel(form.codebook_size)
    kept = np.array([model.kept(tokens[[i]], rounds, count) for i, count in enumerate(counts)])
    tokens = replace(tokens, kept_mask=torch.from_numpy(kept), side=Side(length, "replayed"))
    streams = to_bytes(tokens, form, model, coded, ranked_by=("entropy", rounds))
    found = from_bytes(streams, form, model)
    assert_same(found, tokens)
    assert found.side == tokens.side
    header = unseal(streams[0])[0]
    assert (header.score, header.rounds) == ("entropy", rounds)
    if not coded:
        assert_short(streams, tokens, form)


@pytest.mark.parametrize("score", ["distortion", "surprisal"])
@pytest.mark.parametrize(
    ("rule", "threshold", "side"),
    [
        ("relative", 0.6, Side(True, "sent")),
        ("residual", 0.02, Side(True, "sent")),
        ("count", 5, Side(False, "sent")),
        ("count", 16, Side(False, "derived")),
        ("count", 0, Side(False, "derived")),
    ],
)
def test_what_a_cut_leaves_comes_back(score: str, rule: str, threshold: float, side: Side) -> None:
    tokens = batch(FORM, 4)
    order, units = rank_in_rounds(lambda placed: tokens.patch_indices * 100, 4, 16, 1, torch.device("cpu"))
    tokens = replace(tokens, ranking=Ranking(order, units, score, 1)).cut(rule, threshold)
    assert tokens.side == side
    streams = to_bytes(tokens, FORM)
    assert_short(streams, tokens, FORM)
    found = from_bytes(streams, FORM)
    assert_same(found, tokens)
    with pytest.raises(ValueError, match="hold one cut and no ranking"):
        found.cut("count", 3)


def test_a_cut_by_quality_comes_back_and_tells_its_score() -> None:
    tokens = batch(FORM, 4)
    order, units = rank_in_rounds(lambda placed: tokens.patch_indices * 6000, 4, 16, 1, torch.device("cpu"))
    line = QualityLine("distortion", 1, 0.01, 0.01)
    tokens = replace(tokens, ranking=Ranking(order, units, "distortion", 1, line)).cut("quality", 17.0)
    assert len(set(tokens.patch_counts.tolist())) > 1
    streams = to_bytes(tokens, FORM)
    assert_short(streams, tokens, FORM)
    assert_same(from_bytes(streams, FORM), tokens)
    assert {unseal(data)[0].score for data in streams} == {"distortion"}


def test_a_stream_does_not_depend_on_the_rest_of_the_batch() -> None:
    tokens = keep(batch(FORM, 5), [1, 2, 3, 16, 0], Side(True, "sent"))
    streams = to_bytes(tokens, FORM)
    assert to_bytes(tokens[[3]], FORM) == streams[3:4]
    assert_same(from_bytes(streams[1:3], FORM), tokens[1:3])


def test_dropped_codes_leave_no_trace() -> None:
    tokens = keep(batch(FORM, 1), [5], Side(True, "sent"))
    spoilt = replace(tokens, patch_indices=tokens.patch_indices.where(tokens.kept_mask, -7))
    assert to_bytes(spoilt, FORM) == to_bytes(tokens, FORM)


def test_no_images_are_no_streams() -> None:
    assert to_bytes(batch(FORM, 1)[:0], FORM) == []
    found = from_bytes([], FORM)
    assert found.global_indices.shape == (0, 2)
    assert found.kept_mask.shape == (0, 16)
    assert found.kept_mask.dtype == torch.bool


def test_the_bytes_of_version_1_stay_as_they_are() -> None:
    tokens = keep(batch(FORM, 1, score="grid"), [3], Side(False, "derived"))
    tokens = replace(tokens, global_indices=torch.tensor([[1, 2]]), patch_indices=torch.arange(16)[None] % 10)
    data = to_bytes(tokens, FORM)[0]
    # magic, version 1, no flags, derived; model; M, N, K; T = 3, one round, no coding rounds; the score
    header = "5461546b0100007765696768747321020010000a0000000300010000000467726964"
    payload = math.ceil(0.12020 * 2**24)  # as K = 10: global codes 1 2, then codes 0 2 0 at positions 0 2 10
    assert data.hex() == f"{header}{payload:06x}e21ff2e0"


@pytest.mark.parametrize(("k", "spread"), [(1000, 3.0), (1000, 12.0), (16384, 3.0), (256, 0.0)])
def test_entropy_coded_streams_are_within_2_percent_of_the_ideal(k: int, spread: float) -> None:
    form = Format(8, 64, k, MODEL)
    model = FakeModel(k, spread=spread)
    tokens = keep(batch(form, 1), [48], Side(True, "sent"))
    codes, known, ideal = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=bool), 0.0
    for positions in model.rounds(tokens.kept_mask[0].numpy()):  # codes drawn from q, as a good model has them
        logits = model.logits(tokens.global_indices[0].numpy(), codes, known, positions).astype(np.float64)
        q = np.exp(logits - logits.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        for row, position in enumerate(positions):
            codes[position] = noise(k, position).choice(k, p=q[row])
            ideal -= math.log2(q[row, codes[position]])
        known[positions] = True
    tokens = replace(tokens, patch_indices=torch.from_numpy(codes)[None])
    streams = to_bytes(tokens, form, model, True)
    assert_same(from_bytes(streams, form, model), tokens)
    rest = 8 * math.log2(k) + float(tokens.side.bits(tokens.patch_counts, 64))
    assert payload_bits(streams[0]) <= 1.02 * ideal + rest + 64


def replayed(rounds: int = 4, b: int = 3, count: int = 7) -> tuple[Tokens, FakeModel]:
    model = FakeModel(FORM.codebook_size)
    tokens = batch(FORM, b, score="entropy")
    kept = np.array([model.kept(tokens[[i]], rounds, count) for i in range(b)])
    order = tokens.ranking.order
    side = Side(True, "replayed")
    return replace(
        tokens, kept_mask=torch.from_numpy(kept), ranking=ranking(order, "entropy", rounds), side=side
    ), model


@pytest.mark.parametrize("coded", [False, True])
def test_an_image_whose_replay_differs_has_its_positions_sent(coded: bool) -> None:
    tokens, model = replayed()
    kept = tokens.kept_mask.clone()
    kept[1] = ~kept[1]
    tokens = replace(tokens, kept_mask=kept)
    streams = to_bytes(tokens, FORM, model, coded)
    assert [unseal(data)[0].side.positions for data in streams] == ["replayed", "sent", "replayed"]
    found = from_bytes(streams, FORM, model)
    assert_same(found, tokens)
    assert found.side == Side(True, "sent")


@pytest.mark.parametrize("coded", [False, True])
def test_a_reader_whose_model_says_something_else_notices(coded: bool) -> None:
    tokens, model = replayed()
    other = FakeModel(FORM.codebook_size, secret=1)
    streams = to_bytes(tokens, FORM, model, coded)
    with pytest.raises(ValueError, match="the models here do not compute what the writer's did"):
        from_bytes(streams, FORM, other)


def test_a_code_model_that_says_something_else_is_noticed_too() -> None:
    tokens = keep(batch(FORM, 1), [9], Side(True, "sent"))
    streams = to_bytes(tokens, FORM, FakeModel(10), True)
    with pytest.raises(ValueError, match="the models here do not compute"):
        from_bytes(streams, FORM, FakeModel(10, secret=1))


def test_positions_that_change_places_within_a_round_do_no_harm() -> None:
    tokens, model = replayed()

    class Backwards(FakeModel):
        def next_positions(self, *args) -> np.ndarray:
            return super().next_positions(*args)[::-1]

    streams = to_bytes(tokens, FORM, model)
    assert_same(from_bytes(streams, FORM, Backwards(10)), tokens)


def test_missing_and_foreign_models_are_named() -> None:
    tokens, model = replayed()
    with pytest.raises(ValueError, match="positions are replayed; expected a replay"):
        to_bytes(tokens, FORM)
    with pytest.raises(ValueError, match="positions are replayed; expected a replay"):
        from_bytes(to_bytes(tokens, FORM, model), FORM)
    coded = to_bytes(keep(batch(FORM, 1), [9], Side(True, "sent")), FORM, model, True)
    with pytest.raises(ValueError, match="entropy-coded; expected the code model"):
        from_bytes(coded, FORM)
    with pytest.raises(ValueError, match="coded in 3 rounds; expected 5"):
        from_bytes(coded, FORM, FakeModel(10, rounds=5))
    with pytest.raises(ValueError, match=r"gives logits \(\d, 11\); expected \(\d, 10\)"):
        from_bytes(coded, FORM, FakeModel(11))


def test_models_that_name_wrong_positions_are_refused() -> None:
    tokens = replayed()[0]

    class Stuck(FakeModel):
        def next_positions(self, *args) -> np.ndarray:
            return np.arange(4)

        def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
            return super().rounds(kept_mask)[:1]

    with pytest.raises(ValueError, match=r"replay names the positions \[0, 1, 2, 3\]; expected 3 different ones"):
        to_bytes(tokens, FORM, Stuck(10))
    with pytest.raises(ValueError, match="code model's rounds have 3 positions; expected all 9 kept ones"):
        to_bytes(keep(batch(FORM, 1), [9], Side(True, "sent")), FORM, Stuck(10), True)
    outside = FakeModel(10)
    outside.rounds = lambda kept_mask: [np.array([16])]
    with pytest.raises(ValueError, match=r"code model names the positions \[16\]"):
        to_bytes(keep(batch(FORM, 1), [9], Side(True, "sent")), FORM, outside, True)


def test_tokens_that_do_not_fit_are_refused() -> None:
    tokens = keep(batch(FORM, 2), [3, 4], Side(True, "sent"))
    with pytest.raises(ValueError, match="tokens hold 2 global tokens and 16 patch positions; expected 3 and 16"):
        to_bytes(tokens, replace(FORM, global_tokens=3))
    with pytest.raises(ValueError, match="tokens hold entries from 0 to 10; expected 0 to 9"):
        wrong = tokens.patch_indices.where(~tokens.kept_mask, 10)
        to_bytes(replace(tokens, patch_indices=wrong), FORM)
    with pytest.raises(ValueError, match="tokens hold entries from -1 to -1"):
        to_bytes(replace(tokens, global_indices=torch.full((2, 2), -1)), FORM)
    with pytest.raises(ValueError, match="global_counts go from 0 to 3; expected 0 to 2"):
        to_bytes(replace(tokens, global_counts=torch.tensor([0, 3])), FORM)
    with pytest.raises(ValueError, match="images keep 3 to 4 patch tokens; expected a side with length=True"):
        to_bytes(replace(tokens, side=Side(False, "sent")), FORM)


def test_positions_that_nobody_could_derive_are_refused() -> None:
    tokens = keep(batch(FORM, 1), [3], Side(True, "derived"))
    with pytest.raises(ValueError, match="3 of 16 patch tokens are derived with score 'surprisal'"):
        to_bytes(tokens, FORM)
    with pytest.raises(ValueError, match="derived with score ''"):
        to_bytes(replace(tokens, ranking=None), FORM)
    with pytest.raises(ValueError, match="3 positions are kept that the order 'grid' does not begin with"):
        to_bytes(tokens, FORM, ranked_by=("grid", 1))


def test_a_format_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="global_tokens is -1; expected 0 to 65535"):
        Format(-1, 16, 10, MODEL)
    with pytest.raises(ValueError, match="patch_positions is 0; expected 1 to 65535"):
        Format(2, 0, 10, MODEL)
    with pytest.raises(ValueError, match="codebook_size is 4294967296"):
        Format(2, 16, 2**32, MODEL)
    with pytest.raises(ValueError, match="model_id has 3 bytes; expected 8"):
        Format(2, 16, 10, b"abc")


def stream(count: int = 9) -> bytes:
    return to_bytes(keep(batch(FORM, 1), [count], Side(True, "sent")), FORM)[0]


def sealed(body: bytes) -> bytes:
    """With a checksum that fits."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def with_field(place: int, value: int) -> bytes:
    body = bytearray(stream()[:-4])
    body[place] = value
    return sealed(bytes(body))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"stream begins with b''; expected b'TaTk'"),
        (b"PNG" + stream(), r"stream begins with b'PNGT'; expected b'TaTk'"),
        (b"TaTk", "stream's version is missing; expected 1"),
        (b"TaTk\x02" + stream()[5:], "stream's version is 2; expected 1"),
        (stream()[:9], "stream has 9 bytes; expected at least"),
        (stream()[:-1], "it is damaged or cut short"),
        (stream() + b"\0", "it is damaged or cut short"),
        (sealed(stream()[:-4] + b"\0"), "that no encoder writes"),
        (sealed(stream()[:-5]), "that no encoder writes"),
        (with_field(5, 8), "stream has flags 8"),
        (with_field(6, 3), "positions 3"),
        (with_field(FIXED.size - 1, 255), "255 bytes of score"),
        (with_field(FIXED.size, 0xFF), "score is .*; expected one of distortion, error, surprisal, entropy"),
        (with_field(FIXED.size - 7, 1), "count is 1; expected 0, the payload says it"),
        (with_field(5, 0), "that no encoder writes"),
        (with_field(FIXED.size - 5, 17), "rounds is 17; expected 1 to 16"),
        (with_field(FIXED.size - 3, 1), "coding_rounds is 1; expected 0"),
        (with_field(5, 3), "coding_rounds is 0; expected 1 to 65535"),
        (with_field(6, 2), "positions are replayed with score 'surprisal'; expected entropy"),
        (with_field(7, 0), "stream is of the model 0065696768747321; expected 7765696768747321"),
        (with_field(15, 3), "stream has global_tokens 3; expected 2"),
        (with_field(17, 20), "stream has patch_positions 20; expected 16"),
        (with_field(19, 11), "stream has codebook_size 11; expected 10"),
    ],
)
def test_what_is_no_stream_of_this_model_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        from_bytes([data], FORM)
    assert "\n" not in str(caught.value)


def test_headers_that_contradict_themselves_are_refused() -> None:
    header = unseal(stream())[0]
    with pytest.raises(ValueError, match="rounds is 1; expected 0 without a score"):
        replace(header, score="")
    with pytest.raises(ValueError, match="count is 17; expected 0 to 16"):
        replace(header, side=Side(False, "sent"), count=17)


def test_streams_of_different_cuts_are_not_one_batch() -> None:
    first = stream()
    tokens = batch(FORM, 1)
    others = {
        "count 3; expected 0": to_bytes(keep(tokens, [3], Side(False, "sent")), FORM),
        "score 'grid'; expected 'surprisal'": to_bytes(
            keep(batch(FORM, 1, score="grid"), [3], Side(True, "derived")), FORM
        ),
        "coded True; expected False": to_bytes(keep(tokens, [3], Side(True, "sent")), FORM, FakeModel(10), True),
        "length=False; expected True": to_bytes(keep(tokens, [0], Side(False, "sent")), FORM),
        "positions derived; expected sent": to_bytes(keep(tokens, [0], Side(True, "derived")), FORM),
    }
    for sentence, streams in others.items():
        with pytest.raises(ValueError, match=f"a stream has {sentence}"):
            from_bytes([first, *streams], FORM, FakeModel(10))


@pytest.mark.parametrize("fits", [False, True])
def test_mutations_raise_nothing_but_one_kind_of_error(fits: bool) -> None:
    """`fits`: the checksum is made to fit again, so that the mutation reaches the decoder."""
    tokens, model = replayed()
    coded = keep(batch(FORM, 1), [9], Side(True, "sent"))
    sources = [stream(), *to_bytes(tokens, FORM, model), *to_bytes(coded, FORM, model, True)]
    sources += to_bytes(keep(batch(FORM, 1, score="random"), [9], Side(False, "derived")), FORM)
    rng = noise(int(fits))
    refused = 0
    for number in range(1500):
        body = bytearray(sources[number % len(sources)][: -4 if fits else None])
        for _ in range(int(rng.integers(1, 4))):
            kind, place = rng.integers(0, 4), int(rng.integers(0, len(body)))
            if kind == 0:
                body[place] ^= 1 << int(rng.integers(0, 8))
            elif kind == 1:
                del body[place:]
            elif kind == 2:
                body += rng.bytes(int(rng.integers(1, 9)))
            else:
                body[place] = int(rng.integers(0, 256))
            if not body:
                break
        data = bytes(body)
        if fits:
            data = sealed(data)
        try:
            from_bytes([data], FORM, model)
        except ValueError:
            refused += 1
    assert refused > 1400 if not fits else refused > 500
