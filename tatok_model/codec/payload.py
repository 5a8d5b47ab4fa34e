"""The payload of a token stream: one image, coded by `range_coder.py` as numbers out of so many equally likely ones.

    1. T, out of N + 1, if `side.length`; else the header holds it.
    2. How many global tokens follow, out of M + 1, if `Tokens.global_counts` is known.
    3. The global codes, out of K each.
    4. The rank of the kept set, out of C(N, T), if positions are sent. Derived ones follow from T and the global codes.
    5. A hash of kept set and codes: 32 bits if positions are replayed; else 16 bits if codes are entropy-coded. Both
       need a model that computes the same for writer and reader, and the hash detects where it did not.
    6. The kept patch codes, out of K each, or by the probabilities of a model.

Patch codes come in rounds, within a round in raster order: one round if the kept set is known and codes have a fixed
length, the model's rounds if they are entropy-coded, the ranking's if positions are replayed. In a replay the reader
repeats the ranking: it computes the positions of a round, reads their codes, and goes on. Only the *set* of positions
of a round matters, so that two nearly equal entropies may swap places within it.

Shapes: B images, M global tokens, N patch positions, K codebook entries, T kept patch tokens, n of one round.
"""

import math
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tatok_model.codec.header import Header
from tatok_model.codec.range_coder import Coder, bounds_of, quantise
from tatok_model.filtering_rules import CHECK_BITS, SCORES
from tatok_model.ranking import KNOWN_ORDERS, grid_order, round_bounds
from tatok_model.tokens import Ranking

CODED_CHECK_BITS = 16  # what the 64 bits of slack leave beside the checksum and whole bytes


class CodeModel(Protocol):
    """The entropy model q and the ranking by it; it must give writer and reader the same numbers.

    Codes are (M,) and (N,) int64, the latter 0 where the (N,) bool `known` is False.

    Attributes:
        coding_rounds: a number from 1 to 65535 that names the schedule of `rounds`; a reader with another is refused.
    """

    coding_rounds: int

    def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
        """Of entropy-coded streams: (N,) bool -> the kept positions, each in one round: int64 vectors."""

    def logits(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Of entropy-coded streams: scores of the codes at (n,) positions, (n, K) floats."""

    def next_positions(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, count: int
    ) -> np.ndarray:
        """Of replayed positions: the (count,) positions of the next round, in any order."""


class Image(NamedTuple):
    """One image's tokens; indices of lost or dropped tokens are 0."""

    global_indices: np.ndarray  # (M,) int64
    global_count: int  # how many leading global tokens are in the stream
    patch_indices: np.ndarray  # (N,) int64
    kept_mask: np.ndarray  # (N,) bool
    check: int = 0  # hash that the stream holds


def code_image(coder: Coder, image: Image, header: Header, model: CodeModel | None) -> Image:
    """Encode an image, or decode one into a copy of a blank `image`: one code path, so that both always agree.

    Raises:
        ValueError: the model that the header asks for is missing, has other rounds, or names impossible positions.
    """
    m, n, k = header.form.global_tokens, header.form.patch_positions, header.form.codebook_size
    count = coder.number(n + 1, int(image.kept_mask.sum())) if header.side.length else header.count
    global_count = coder.number(m + 1, image.global_count) if header.counted_globals else m
    global_indices = np.zeros(m, dtype=np.int64)
    for place in range(global_count):
        global_indices[place] = coder.number(k, int(image.global_indices[place]))
    kept_mask = None
    if header.side.positions == "sent":
        kept_mask = kept_of(coder.number(math.comb(n, count), rank_of(image.kept_mask)), n, count)
    elif header.side.positions == "derived":
        kept_mask = _derived(header, count, global_indices)
    bits = check_bits(header)
    check = coder.number(2**bits, hash_of(image.patch_indices, image.kept_mask, bits))

    so_far = Image(global_indices, global_count, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool), check)
    codes, known = so_far.patch_indices, so_far.kept_mask
    for positions in _rounds(kept_mask, count, header, model, so_far):
        if header.coded and model is not None:
            logits = model.logits(global_indices.copy(), codes.copy(), known.copy(), positions)
            if logits.shape != (len(positions), k):
                raise ValueError(f"code model gives logits {logits.shape}; expected {(len(positions), k)}")
            for position, bounds in zip(positions.tolist(), bounds_of(quantise(logits)), strict=True):
                codes[position] = coder.symbol(bounds, int(image.patch_indices[position]))
        else:
            for position in positions.tolist():
                codes[position] = coder.number(k, int(image.patch_indices[position]))
        known[positions] = True
    return so_far


def _rounds(
    kept_mask: np.ndarray | None, count: int, header: Header, model: CodeModel | None, so_far: Image
) -> Iterator[np.ndarray]:
    """Yields the positions of each round, (n,) int64 in raster order.

    `code_image` fills `so_far` between rounds. A `kept_mask` of None is found by replaying the ranking.
    """
    known = so_far.kept_mask
    if header.coded and model is None:
        raise ValueError("patch codes are entropy-coded; expected the code model that wrote them")
    if kept_mask is None:
        if model is None:
            raise ValueError("positions are replayed; expected a replay of the ranking")
        bounds = [min(bound, count) for bound in round_bounds(header.form.patch_positions, header.rounds)]
        for start, stop in pairwise(bounds):
            if start < stop:
                given = so_far.global_indices.copy(), so_far.patch_indices.copy(), known.copy()
                yield _checked(model.next_positions(*given, stop - start), ~known, stop - start, "replay")
    elif header.coded and model is not None:
        if header.coding_rounds != model.coding_rounds:
            raise ValueError(
                f"patch codes are coded in {header.coding_rounds} rounds; "
                f"expected {model.coding_rounds} as the code model has"
            )
        for positions in model.rounds(kept_mask.copy()):
            if len(positions):
                yield _checked(positions, kept_mask & ~known, len(positions), "code model")
        if not np.array_equal(known, kept_mask):
            raise ValueError(f"code model's rounds have {int(known.sum())} positions; expected all {count} kept ones")
    else:
        yield kept_mask.nonzero()[0]


def _checked(positions: np.ndarray, allowed: np.ndarray, count: int, who: str) -> np.ndarray:
    """The (count,) int64 positions, sorted; ValueError unless they are distinct and True in the (N,) bool `allowed`."""
    named = np.sort(np.asarray(positions).astype(np.int64))
    inside = len(named) == 0 or (named[0] >= 0 and named[-1] < len(allowed))
    if len(named) != count or len(np.unique(named)) != count or not inside or not allowed[named].all():
        raise ValueError(f"{who} names the positions {named.tolist()}; expected {count} different ones that are open")
    return named


def _derived(header: Header, count: int, global_indices: np.ndarray) -> np.ndarray:
    """(N,) bool, the first T positions of an order that the reader can compute without the image."""
    n = header.form.patch_positions
    if count in (0, n):
        return np.full(n, bool(count))
    if header.score not in SCORES or not SCORES[header.score].known_to_decoder:
        raise ValueError(
            f"positions of {count} of {n} patch tokens are derived with score {header.score!r}; "
            "expected an order that a reader knows, or positions sent"
        )
    order = KNOWN_ORDERS[header.score](torch.from_numpy(global_indices)[None], n)[0]
    return np.isin(np.arange(n), order[:count].numpy())


def check_bits(header: Header) -> int:
    """Length of the hash in a stream, 0 to 32 bits."""
    if header.side.positions == "replayed":
        return CHECK_BITS
    return CODED_CHECK_BITS if header.coded else 0


def hash_of(patch_indices: np.ndarray, kept_mask: np.ndarray, bits: int) -> int:
    """The lowest bits of the CRC-32 of kept positions and their codes, each four bytes, in raster order."""
    places = kept_mask.nonzero()[0]
    data = places.astype("<u4").tobytes() + patch_indices[places].astype("<u4").tobytes()
    return zlib.crc32(data) % 2**bits


def grid_schedule(kept_mask: Tensor, rounds: int) -> Tensor:
    """(B, N) int64: in which round each kept code is coded: T / rounds of them in each, spread evenly over the grid.

    Args:
        kept_mask: (B, N) bool; the result means nothing at dropped positions.
        rounds: at least 1; an image with fewer kept tokens has as many rounds as tokens.
    """
    order = grid_order(kept_mask.shape[1]).to(kept_mask.device)  # (N,)
    kept = kept_mask[:, order].long()
    # In grid order, the t-th of T kept codes (t from 0) goes into round t * rounds // T.
    numbers = (kept.cumsum(1) - 1) * rounds // kept.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(numbers).scatter(1, order.expand_as(numbers), numbers)


def ranking_schedule(ranking: Ranking) -> Tensor:
    """(B, N) int64: the round of the ranking that placed each position, in which a replaying decoder reads its code."""
    bounds = round_bounds(ranking.order.shape[1], ranking.rounds)
    numbers = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(pairwise(bounds))])
    rounds = numbers.to(ranking.order.device).expand_as(ranking.order)
    return torch.zeros_like(ranking.order).scatter(1, ranking.order, rounds)


def rank_of(kept_mask: np.ndarray) -> int:
    """The number of a kept set among all sets of as many positions, from 0 to C(N, T) - 1.

    The combinatorial number system: kept positions p_1 < ... < p_T have the rank C(p_1, 1) + ... + C(p_T, T). This and
    `kept_of` go from the last position to the first and derive each binomial from the one before, by one
    multiplication and one division by small numbers. No table, so that N = 4096 costs milliseconds and no memory.

    Raises:
        ValueError: `kept_mask` is not (N,) bool.

    Source: D. E. Knuth, The Art of Computer Programming 4A, 7.2.1.3, theorem L.
    """
    if kept_mask.ndim != 1 or kept_mask.dtype != np.bool_:
        raise ValueError(f"kept_mask is {kept_mask.dtype} {kept_mask.shape}; expected bool (N,)")
    kept = kept_mask.tolist()
    left, rank = sum(kept), 0
    binomial = math.comb(len(kept) - 1, left) if kept else 0  # always C(position, left)
    for position in range(len(kept) - 1, 0, -1):
        if kept[position]:
            rank += binomial
            binomial = binomial * left // position
            left -= 1
        else:
            binomial = binomial * (position - left) // position
    return rank  # position 0 adds C(0, 1) = 0


def kept_of(rank: int, positions: int, count: int) -> np.ndarray:
    """(N,) bool, the set of T of N positions with this rank; inverse of `rank_of`.

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
