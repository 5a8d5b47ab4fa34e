"""What a token stream says of one image, between header and checksum.

What the payload says, in this order, by the exact arithmetic coder of `rangecoder.py`:

    1. T, of N + 1, if `side.length`; else the header says it.
    2. How many global tokens follow, of M + 1, if `Tokens.global_counts` is known.
    3. The global codes, of K each.
    4. The rank of the kept set, of C(N, T), if positions are sent. Derived ones follow from T and the global codes.
    5. A hash of kept set and codes: 32 bits if positions are replayed; else 16 bits if codes are entropy-coded. Both
       need a model to compute the same on both sides, and this notices when it did not.
    6. The kept patch codes, of K each, or by the frequencies of a code model.

Patch codes come in rounds, within a round in raster order: one round if the kept set is known and codes have a fixed
length, the code model's rounds if they are entropy-coded, the ranking's if positions are replayed. In a replay the
reader asks for the next positions, reads their codes, and asks again; only *which* positions a round has matters, so
that two nearly equal entropies that change places within a round do no harm.

Shapes: M global tokens, N patch positions, K codebook entries, T kept patch tokens, n of one round.
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
from tatok_model.codec.positions import kept_of, rank_of
from tatok_model.codec.range_coder import Coder, bounds_of, quantise
from tatok_model.filtering_rules import CHECK_BITS, SCORES
from tatok_model.ranking import grid_order, random_order, round_bounds
from tatok_model.tokens import Ranking

# In which round each kept patch code is entropy-coded: codes of a round are predicted from those of earlier rounds.


def grid_schedule(kept_mask: Tensor, rounds: int) -> Tensor:
    """(B, N) int64: rounds that are spread evenly over the grid, each of T / rounds kept positions.

    Args:
        kept_mask: (B, N) bool; what stands at dropped positions means nothing.
        rounds: at least 1; an image with fewer kept tokens has as many rounds as tokens.
    """
    order = grid_order(kept_mask.shape[1]).to(kept_mask.device)
    kept = kept_mask[:, order].long()
    numbers = (kept.cumsum(1) - 1) * rounds // kept.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(numbers).scatter(1, order.expand_as(numbers), numbers)


def ranking_schedule(ranking: Ranking) -> Tensor:
    """(B, N) int64: the round of the ranking in which each position was placed; what a replaying decoder does."""
    bounds = round_bounds(ranking.order.shape[1], ranking.rounds)
    numbers = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(pairwise(bounds))])
    rounds = numbers.to(ranking.order.device).expand_as(ranking.order)
    return torch.zeros_like(ranking.order).scatter(1, ranking.order, rounds)


CODED_CHECK_BITS = 16  # what the 64 bits of slack leave beside the checksum and whole bytes


class CodeModel(Protocol):
    """q for entropy-coded streams: must give the same numbers to writer and reader.

    Attributes:
        coding_rounds: a number from 1 to 65535 that names the schedule of `rounds`; a reader with another is refused.
    """

    coding_rounds: int

    def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
        """(N,) bool -> the kept positions, each in one round: int64 vectors."""

    def logits(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """(M,) and (N,) int64 codes, (N,) bool where the latter are known (0 elsewhere), (n,) -> (n, K) floats."""


class Replay(Protocol):
    """The ranking, repeated by the reader: must name the same positions to writer and reader."""

    def next_positions(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, placed: np.ndarray, count: int
    ) -> np.ndarray:
        """(M,) and (N,) int64 codes, (N,) bool where the latter are known (0 elsewhere) -> (count,) open positions.

        The `count` best of the positions that are not placed.
        """


class Models(NamedTuple):
    """What streams may need besides themselves."""

    code: CodeModel | None
    replay: Replay | None


class Image(NamedTuple):
    """What a stream says of one image."""

    global_indices: np.ndarray  # (M,) int64, 0 at those that are not part of the sequence
    global_count: int
    patch_indices: np.ndarray  # (N,) int64, 0 where dropped
    kept_mask: np.ndarray  # (N,) bool
    check: int  # the hash as written


def pass_image(coder: Coder, image: Image, header: Header, models: Models) -> Image:
    """Write an image, or read one: the same lines, so that they cannot disagree. A reader's `image` is blank."""
    m, n, k = header.form.global_tokens, header.form.patch_positions, header.form.codebook_size
    count = coder.number(n + 1, int(image.kept_mask.sum())) if header.side.length else header.count
    globals_said = coder.number(m + 1, image.global_count) if header.counted_globals else m
    global_indices = np.zeros(m, dtype=np.int64)
    for place in range(globals_said):
        global_indices[place] = coder.number(k, int(image.global_indices[place]))
    kept_mask = None
    if header.side.positions == "sent":
        kept_mask = kept_of(coder.number(math.comb(n, count), rank_of(image.kept_mask)), n, count)
    elif header.side.positions == "derived":
        kept_mask = _derived(header, count, global_indices)
    bits = check_bits(header)
    check = coder.number(2**bits, hash_of(image.patch_indices, image.kept_mask, bits))

    so_far = Image(global_indices, globals_said, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool), check)
    codes, known = so_far.patch_indices, so_far.kept_mask
    for positions in _rounds(kept_mask, count, header, models, so_far):
        if header.coded and models.code is not None:
            logits = models.code.logits(global_indices.copy(), codes.copy(), known.copy(), positions)
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
    kept_mask: np.ndarray | None, count: int, header: Header, models: Models, so_far: Image
) -> Iterator[np.ndarray]:
    """The positions of each round, (n,) int64 in raster order; looks at `so_far` as it is when the round is asked for.

    A `kept_mask` of None is to be found by replay.
    """
    known = so_far.kept_mask
    if header.coded and models.code is None:
        raise ValueError("patch codes are entropy-coded; expected the code model that wrote them")
    if kept_mask is None:
        if models.replay is None:
            raise ValueError("positions are replayed; expected a replay of the ranking")
        bounds = [min(bound, count) for bound in round_bounds(header.form.patch_positions, header.rounds)]
        for start, stop in pairwise(bounds):
            if start < stop:
                said = so_far.global_indices.copy(), so_far.patch_indices.copy(), known.copy()
                yield _checked(models.replay.next_positions(*said, stop - start), ~known, stop - start, "replay")
    elif header.coded and models.code is not None:
        if header.coding_rounds != models.code.coding_rounds:
            raise ValueError(
                f"patch codes are coded in {header.coding_rounds} rounds; "
                f"expected {models.code.coding_rounds} as the code model has"
            )
        for positions in models.code.rounds(kept_mask.copy()):
            if len(positions):
                yield _checked(positions, kept_mask & ~known, len(positions), "code model")
        if not np.array_equal(known, kept_mask):
            raise ValueError(f"code model's rounds have {int(known.sum())} positions; expected all {count} kept ones")
    else:
        yield kept_mask.nonzero()[0]


def _checked(positions: np.ndarray, allowed: np.ndarray, count: int, who: str) -> np.ndarray:
    """(count,) int64, sorted: distinct positions of the (N,) bool `allowed`."""
    found = np.sort(np.asarray(positions).astype(np.int64))
    inside = len(found) == 0 or (found[0] >= 0 and found[-1] < len(allowed))
    if len(found) != count or len(np.unique(found)) != count or not inside or not allowed[found].all():
        raise ValueError(f"{who} names the positions {found.tolist()}; expected {count} different ones that are open")
    return found


def _derived(header: Header, count: int, global_indices: np.ndarray) -> np.ndarray:
    """(N,) bool, the kept set that follows from T and an order that everybody knows."""
    n = header.form.patch_positions
    if count in (0, n):
        return np.full(n, bool(count))
    if header.score not in SCORES or SCORES[header.score].needs_image:
        raise ValueError(
            f"positions of {count} of {n} patch tokens are derived with score {header.score!r}; "
            "expected an order that a reader knows, or positions sent"
        )
    keyed_by = torch.from_numpy(global_indices)[None]
    order = grid_order(n) if header.score == "grid" else random_order(keyed_by, n)[0]
    kept_mask = np.zeros(n, dtype=bool)
    kept_mask[order[:count].numpy()] = True
    return kept_mask


def check_bits(header: Header) -> int:
    """Length of the hash that a stream carries, 0 to 32 bits."""
    if header.side.positions == "replayed":
        return CHECK_BITS
    return CODED_CHECK_BITS if header.coded else 0


def hash_of(patch_indices: np.ndarray, kept_mask: np.ndarray, bits: int) -> int:
    """The lowest bits of the CRC-32 of kept positions and their codes, each four bytes, in raster order."""
    places = kept_mask.nonzero()[0]
    said = places.astype("<u4").tobytes() + patch_indices[places].astype("<u4").tobytes()
    return zlib.crc32(said) % 2**bits
