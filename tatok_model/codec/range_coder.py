"""An exact arithmetic coder: numbers with integer frequencies become bytes, and numbers again.

Every number narrows an interval of [0, 1) to its share, and the bytes are a point inside the last one. The interval is
kept in whole numbers without bound: nothing is rounded, no carry can be lost, and a total need not be a power of two.
A code of K = 1000 entries costs log2 1000 bits, a rank log2 C(N, T). The price is time quadratic in the length: about a
millisecond for a picture's hundreds of tokens, and wrong for megabytes.

`RangeEncoder` and `RangeDecoder` have the same methods, so that one function both writes and reads
(`payload.code_image`).

Shapes: n numbers, K codebook entries.

Source: J. Rissanen, Generalized Kraft inequality and arithmetic coding, IBM J. Res. Dev. 20 (1976).
"""

from typing import Protocol

import numpy as np

FREQUENCY_BITS = 24  # frequencies add up to 2**24: with K = 16384 no code costs over 0.0015 bits more than -log2 q
MOST_ENTRIES = 2**FREQUENCY_BITS // 256  # beyond, the 1 that every entry gets would be over 1/256 of the total


class Coder(Protocol):
    """What `RangeEncoder` and `RangeDecoder` have in common."""

    def number(self, total: int, value: int) -> int:
        """Code one of `total` equally likely numbers; a decoder ignores `value` and returns what was written."""

    def symbol(self, bounds: np.ndarray, value: int) -> int:
        """Code one of K numbers; (K + 1,) `bounds` are the running sums of their frequencies, from 0 to the total."""


class RangeEncoder:
    """Writes numbers. `put` in any order that a decoder can follow, then `finish`."""

    def __init__(self) -> None:
        self._low, self._width, self._total = 0, 1, 1  # the interval [low, low + width) / total

    def put(self, low: int, frequency: int, total: int) -> None:
        """Narrow the interval to [low, low + frequency) / total of it; ValueError for an empty share or one outside."""
        if frequency < 1 or not 0 <= low <= total - frequency:
            raise ValueError(f"share is {low} to {low + frequency} of {total}; expected a part of it that is not empty")
        self._low = self._low * total + low * self._width
        self._width *= frequency
        self._total *= total

    def number(self, total: int, value: int) -> int:
        """Write one of `total` equally likely numbers."""
        self.put(value, 1, total)
        return value

    def symbol(self, bounds: np.ndarray, value: int) -> int:
        """Write one of K numbers with frequencies; see `Coder`."""
        low, high = int(bounds[value]), int(bounds[value + 1])
        self.put(low, high - low, int(bounds[-1]))
        return value

    def finish(self) -> bytes:
        """The shortest bytes that name a point of the interval: less than 8 bits over the ideal code length."""
        length = max(0, self._total.bit_length() - self._width.bit_length() - 1) // 8
        while self._width << 8 * length < self._total:
            length += 1
        point = -((-self._low << 8 * length) // self._total)  # rounded up, so that it is not below the interval
        return point.to_bytes(length, "big")


class RangeDecoder:
    """Reads what `RangeEncoder` wrote, asked for the same numbers in the same order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._point, self._total = int.from_bytes(data, "big"), 1 << 8 * len(data)  # point / total inside the interval
        self._again = RangeEncoder()

    def where(self, total: int) -> int:
        """The share out of `total` that comes next: 0 to total - 1."""
        return self._point * total // self._total

    def take(self, low: int, frequency: int, total: int) -> None:
        """Consume the number with the share [low, low + frequency) of `total`, in which `where` lies."""
        self._point = self._point * total - low * self._total
        self._total *= frequency
        self._again.put(low, frequency, total)

    def number(self, total: int, value: int = 0) -> int:
        """Read one of `total` equally likely numbers; `value` is not looked at."""
        number = self.where(total)
        self.take(number, 1, total)
        return number

    def symbol(self, bounds: np.ndarray, value: int = 0) -> int:
        """Read one of K numbers with frequencies; see `Coder`."""
        total = int(bounds[-1])
        symbol = int(np.searchsorted(bounds, self.where(total), side="right")) - 1
        low, high = int(bounds[symbol]), int(bounds[symbol + 1])
        self.take(low, high - low, total)
        return symbol

    def finish(self) -> None:
        """Check that nothing is left: ValueError where an encoder would have written other bytes for what was read."""
        expected = self._again.finish()
        if self._data != expected:
            raise ValueError(
                f"payload is {len(self._data)} bytes that no encoder writes; "
                f"expected {len(expected)} bytes for the tokens it says"
            )


def quantise(logits: np.ndarray) -> np.ndarray:
    """Integer frequencies of codes under q = softmax(logits), each at least 1: (n, K) floats -> (n, K) int64.

    Rounded down in float64 after every entry got its 1; what is left of 2**FREQUENCY_BITS goes to the likeliest. A code
    costs at most log2(1 / (1 - K / 2**24)) bits more than -log2 q. The same logits give the same frequencies; other
    hardware may give logits that differ in the last bits, which whoever decodes has to check.

    Raises:
        ValueError: not 2-dimensional, too many entries, or not finite.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MOST_ENTRIES:
        raise ValueError(f"logits are {logits.shape}; expected (n, K) with K from 1 to {MOST_ENTRIES}")
    if not np.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinity; expected finite numbers")
    scaled = logits.astype(np.float64)
    q = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    total, entries = 2**FREQUENCY_BITS, logits.shape[1]
    frequencies = 1 + np.floor(q * (total - entries)).astype(np.int64)
    # The sum of q may pass 1 by rounding, and what is left may then be below 0; the likeliest has enough to give.
    frequencies[np.arange(len(q)), q.argmax(axis=1)] += total - frequencies.sum(axis=1)
    return frequencies


def bounds_of(frequencies: np.ndarray) -> np.ndarray:
    """(n, K) frequencies -> (n, K + 1) running sums from 0, as `Coder.symbol` wants them."""
    return np.pad(frequencies.cumsum(axis=1), ((0, 0), (1, 0)))
