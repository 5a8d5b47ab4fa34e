"""The position codec: which T of N patch positions are kept, as one integer below C(N, T).

The combinatorial number system: kept positions p_1 < ... < p_T have the rank C(p_1, 1) + ... + C(p_T, T). Both ways
walk from the last position to the first with the one binomial they need; a multiplication and a division by small
numbers turn it into the next one. No table, so that N = 4096 costs milliseconds and no memory.

Shapes: N patch positions, T kept ones.

Source: D. E. Knuth, The Art of Computer Programming 4A, 7.2.1.3, theorem L.
"""

import math

import numpy as np


def rank_of(kept_mask: np.ndarray) -> int:
    """The number of a kept set among all sets of as many positions.

    Args:
        kept_mask: (N,) bool, True means kept.

    Returns:
        An integer from 0 to C(N, T) - 1.

    Raises:
        ValueError: `kept_mask` is not a bool vector.
    """
    if kept_mask.ndim != 1 or kept_mask.dtype != np.bool_:
        raise ValueError(f"kept_mask is {kept_mask.dtype} {kept_mask.shape}; expected bool (N,)")
    kept = kept_mask.tolist()
    left, rank = sum(kept), 0
    binomial = math.comb(len(kept) - 1, left) if kept else 0  # C(position, left) all along
    for position in range(len(kept) - 1, 0, -1):
        if kept[position]:
            rank += binomial
            binomial = binomial * left // position
            left -= 1
        else:
            binomial = binomial * (position - left) // position
    return rank  # position 0 adds C(0, 1) = 0


def kept_of(rank: int, positions: int, count: int) -> np.ndarray:
    """The kept set of a rank; undoes `rank_of`.

    Args:
        rank: 0 to C(N, T) - 1.
        positions: N.
        count: T.

    Returns:
        (N,) bool, True means kept.

    Raises:
        ValueError: T is not from 0 to N, or there are not so many sets.
    """
    if not 0 <= count <= positions:
        raise ValueError(f"count is {count}; expected 0 to {positions}, the number of patch positions")
    sets = math.comb(positions, count)
    if not 0 <= rank < sets:
        raise ValueError(f"rank is {rank}; expected 0 to {sets - 1} for {count} of {positions} positions")
    kept = [False] * positions
    left = count
    binomial = math.comb(positions - 1, left) if positions else 0
    for position in range(positions - 1, 0, -1):
        if left and rank >= binomial:
            kept[position] = True
            rank -= binomial
            binomial = binomial * left // position
            left -= 1
        else:
            binomial = binomial * (position - left) // position
    if left:
        kept[0] = True
    return np.array(kept, dtype=np.bool_)
