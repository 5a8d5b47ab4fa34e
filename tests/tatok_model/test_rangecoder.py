import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tatok_model.codec.range_coder import FREQUENCY_BITS, MOST_ENTRIES, RangeDecoder, RangeEncoder, bounds_of, quantise


def softmax(logits: np.ndarray) -> np.ndarray:
    q = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return q / q.sum(axis=1, keepdims=True)


def code(logits: np.ndarray, codes: list[int]) -> bytes:
    """Encode, check that it can be read back, and return the bytes."""
    tables = bounds_of(quantise(logits))
    encoder = RangeEncoder()
    for bounds, value in zip(tables, codes, strict=True):
        assert encoder.symbol(bounds, value) == value
    data = encoder.finish()
    decoder = RangeDecoder(data)
    assert [decoder.symbol(bounds) for bounds in tables] == codes
    decoder.finish()
    return data


@given(st.lists(st.integers(1, 2**70).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1)))))
def test_numbers_come_back_and_cost_the_logarithm_of_their_totals(numbers: list[tuple[int, int]]) -> None:
    encoder = RangeEncoder()
    for total, value in numbers:
        encoder.number(total, value)
    data = encoder.finish()
    assert len(data) == math.ceil((math.prod(total for total, _ in numbers) - 1).bit_length() / 8)
    decoder = RangeDecoder(data)
    assert [decoder.number(total) for total, _ in numbers] == [value for _, value in numbers]
    decoder.finish()


@given(st.data())
def test_symbols_with_any_frequencies_come_back(data: st.DataObject) -> None:
    seed, n, k = data.draw(st.integers(0, 999)), data.draw(st.integers(0, 20)), data.draw(st.integers(1, 20))
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * data.draw(st.sampled_from([0, 1, 30, 1000]))
    code(logits, rng.integers(0, k, n).tolist())


@pytest.mark.parametrize(("k", "spread"), [(1024, 0), (1000, 3), (1024, 12), (16384, 3), (16384, 40)])
def test_codes_cost_within_2_percent_of_the_ideal(k: int, spread: float) -> None:
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(64, k)).astype(np.float32) * spread
    q = softmax(logits)
    codes = [int(rng.choice(k, p=row)) for row in q]
    ideal = -np.log2(q[np.arange(64), codes]).sum()
    spent = 8 * len(code(logits, codes))
    assert spent < 1.02 * ideal + 8
    assert spent < ideal + 32


def test_codes_that_q_calls_impossible_still_come_back() -> None:
    logits = np.zeros((3, 8))
    logits[:, 0] = 1000
    assert 8 * len(code(logits, [7, 0, 3])) <= 2 * FREQUENCY_BITS + 8


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, 2, 7, 1000, 16384, MOST_ENTRIES]), st.sampled_from([0.0, 3.0, 500.0]))
def test_frequencies_fill_the_total_and_no_code_gets_none(seed: int, k: int, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, k)) * spread
    frequencies = quantise(logits)
    assert frequencies.dtype == np.int64
    assert frequencies.sum(axis=1).tolist() == [2**FREQUENCY_BITS] * 2
    assert frequencies.min() >= 1
    total = 2**FREQUENCY_BITS
    assert (frequencies >= softmax(logits) * (total - k) - 1e-3).all()  # so that no code costs over K / total more


def test_frequencies_do_not_depend_on_the_other_rows_or_on_a_constant() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    assert np.array_equal(quantise(logits)[3:4], quantise(logits[3:4]))
    assert np.array_equal(quantise(np.zeros((1, 3)) + 5), quantise(np.zeros((1, 3))))


def test_logits_that_make_no_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits are \(3,\); expected \(n, K\)"):
        quantise(np.zeros(3))
    with pytest.raises(ValueError, match=f"K from 1 to {MOST_ENTRIES}"):
        quantise(np.zeros((1, MOST_ENTRIES + 1)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(np.array([[0.0, np.nan]]))


@pytest.mark.parametrize(("low", "frequency", "total"), [(0, 0, 4), (3, 2, 4), (-1, 1, 4), (4, 1, 4)])
def test_a_share_outside_the_total_is_refused(low: int, frequency: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"share is {low} to {low + frequency} of {total}"):
        RangeEncoder().put(low, frequency, total)


@pytest.mark.parametrize(
    "change", [lambda data: data + b"\0", lambda data: data[:-1], lambda data: b"\xff" * len(data)]
)
def test_bytes_that_no_encoder_writes_are_refused(change) -> None:
    encoder = RangeEncoder()
    for value in (999, 500, 7):
        encoder.number(1000, value)
    decoder = RangeDecoder(change(encoder.finish()))
    for _ in range(3):
        assert 0 <= decoder.number(1000) < 1000
    with pytest.raises(ValueError, match="that no encoder writes; expected 4 bytes"):
        decoder.finish()


def test_nothing_takes_no_bytes() -> None:
    assert RangeEncoder().finish() == b""
    RangeDecoder(b"").finish()
