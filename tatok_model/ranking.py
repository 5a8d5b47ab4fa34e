"""The order in which an image's patch tokens matter: by a model's score, or by a control that needs no model.

`rank` is what `TaTok.rank` does. A score that depends on the tokens placed so far is computed again in every round:
`distortion`, `surprisal` and `entropy` come from the entropy model's q, `error` from the decoded picture.
Controls are ordered once: `pixel_entropy` by the picture, `random` by the global tokens, `grid` always alike.

Shapes: B images, N patch positions, K codebook entries, d code width, n positions asked for, P patch side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tatok_model.config import KeptSetConfig
from tatok_model.entropy import Read, read_distortion, read_entropy, read_surprisal
from tatok_model.filtering import to_units
from tatok_model.filtering_rules import SCORES, QualityLine, check_rounds, line_of
from tatok_model.kept_sets import Wanted
from tatok_model.tokens import Ranking, Tokens
from tatok_model.vit import patchify

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
LEVELS = 256
RANDOM_SEED = 0x7A70C  # part of the stream format: encoder and decoder must have the same


class Predict(Protocol):
    """The entropy model as `TaTok` calls it."""

    def __call__(self, tokens: Tokens, given_mask: Tensor, at: Tensor, read: Read) -> Any:
        """What `read` makes of q where (B, N) `at` is True, from the codes where (B, N) `given_mask` is."""
        ...


@dataclass(frozen=True)
class Models:
    """The parts of a tokenizer that a ranking may call."""

    predict: Predict  # the entropy model
    decode: Callable[[Tokens], Tensor]  # to (B, 3, H, W) pictures in [0, 1]
    codes: Tensor  # (K, d) code vectors of the patch tokens
    patch_size: int  # P
    lines: tuple[QualityLine, ...] = ()  # of rankings whose pictures' quality can be predicted


def rank(tokens: Tokens, score: str, rounds: int, models: Models, images: Tensor | None = None) -> Ranking:
    """Order all patch tokens of each image; arguments and errors as `TaTok.rank`, floats in [0, 1] as `images`."""
    (batch, positions), device = tokens.patch_indices.shape, tokens.patch_indices.device
    check_rounds(rounds, positions)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    if not SCORES[score].in_rounds:
        if rounds != 1:
            raise ValueError(f"rounds is {rounds}; expected 1 for the score {score!r}, which nothing kept can change")
        return Ranking(*_fixed_order(tokens, score, models.patch_size, images), score, rounds)

    def units(placed: Tensor) -> Tensor:
        return to_units(_values(tokens, score, placed, models, images), SCORES[score].resolution)

    order, score_units = rank_in_rounds(units, batch, positions, rounds, device)
    return Ranking(order, score_units, score, rounds, line_of(models.lines, score, rounds))


def _values(tokens: Tokens, score: str, placed: Tensor, models: Models, images: Tensor | None) -> Tensor:
    """(B, N) float32 of a score in rounds, in its unit; values where (B, N) `placed` is True do not matter."""
    if score == "error":
        if images is None:
            raise ValueError("score is 'error'; expected the images too, to see how wrong they get")
        return patch_errors(tokens, placed, images, models)
    values = models.predict(tokens, placed, ~placed, _read_score(score, tokens, ~placed, models))
    return values.new_zeros(placed.shape).masked_scatter(~placed, values)


def _read_score(score: str, tokens: Tokens, at: Tensor, models: Models) -> Read:
    """What a score computes from q where (B, N) `at` is True: (n,) float32 in the score's unit."""
    indices = tokens.patch_indices[at]
    reads: dict[str, Read] = {
        "distortion": partial(read_distortion, indices=indices, codes=models.codes),
        "surprisal": partial(read_surprisal, indices=indices),
        "entropy": read_entropy,
    }
    return reads[score]


def patch_errors(tokens: Tokens, kept_mask: Tensor, images: Tensor, models: Models) -> Tensor:
    """(B, N) float32: mean squared error of each patch as decoded from the tokens where (B, N) `kept_mask` is True."""
    pictures = models.decode(replace(tokens, kept_mask=kept_mask))
    return patchify((pictures.float() - images).square(), models.patch_size).mean(dim=-1)


def _fixed_order(tokens: Tokens, score: str, patch_size: int, images: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) positions and (B, N) score units of a score that asks no model."""
    batch, positions = tokens.patch_indices.shape
    if SCORES[score].known_to_decoder:
        order = KNOWN_ORDERS[score](tokens.global_indices, positions)
        return order, torch.zeros_like(order)
    units = FIXED_UNITS[score](tokens, images, patch_size)
    return rank_in_rounds(lambda placed: units, batch, positions, 1, tokens.patch_indices.device)


def rank_in_rounds(
    score: Callable[[Tensor], Tensor], batch: int, positions: int, rounds: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Order all positions by score, re-scoring the unplaced ones after every round.

    Args:
        score: (B, N) bool mask of the placed positions -> (B, N) int64 score units, ignored at placed positions.
        batch: B.
        positions: N.
        rounds: R, 1 to N; a round places the N / R best of the unplaced positions, best first. Ties go to the
            earlier position in raster order.
        device: where the scores are.

    Returns:
        (B, N) int64 positions, best first, and (B, N) int64 scores of the steps.

    Raises:
        ValueError: `rounds` is not from 1 to N.
    """
    check_rounds(rounds, positions)
    placed = torch.zeros(batch, positions, dtype=torch.bool, device=device)
    order, units, bounds = [], [], round_bounds(positions, rounds)
    for start, stop in pairwise(bounds):
        values, best = best_open(score(placed), placed, stop - start)
        order.append(best)
        units.append(values)
        placed = placed.scatter(1, best, True)
    return torch.cat(order, dim=1), torch.cat(units, dim=1)


def best_open(units: Tensor, placed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores at unplaced positions: (B, count) scores and positions; ties in raster order."""
    ordered = units.masked_fill(placed, -1).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :count], ordered.indices[:, :count]


def round_bounds(positions: int, rounds: int) -> list[int]:
    """Steps at which rounds begin, and N: as even as whole numbers allow."""
    return [number * positions // rounds for number in range(rounds + 1)]


def grid_order(positions: int) -> Tensor:
    """(N,) int64: positions so that every prefix is spread evenly over the square grid.

    The order of Bayer's threshold matrix: bits of row and column are interleaved and read backwards.
    """
    side = math.isqrt(positions)
    depth = max(side - 1, 1).bit_length()
    keys = []
    for position in range(positions):
        row, column = divmod(position, side)
        key = 0
        for bit in range(depth):  # the least significant bits decide most
            mixed = ((row ^ column) >> bit & 1) << 1 | (row >> bit & 1)
            key = key << 2 | mixed
        keys.append(key)
    return torch.tensor(keys).argsort(stable=True)


def random_order(global_indices: Tensor, positions: int) -> Tensor:
    """(B, N) int64: a shuffle of N positions per image, seeded by its (B, M) global tokens, which a decoder has."""
    key = torch.full((len(global_indices), 1), RANDOM_SEED, device=global_indices.device)
    for place in range(global_indices.shape[1]):
        key = _mix(key ^ global_indices[:, place : place + 1])
    lanes = torch.arange(positions, device=global_indices.device) * 0x9E3779B1
    return _mix(key ^ _mix(lanes)).argsort(dim=1, stable=True)


def pixel_entropy_units(images: Tensor, patch_size: int) -> Tensor:
    """(B, N) int64: entropy of the grey-level histogram of each patch, in 1/1024 bit, by which DQ-VAE routes patches.

    `images` are (B, 3, H, W), uint8 or floats in [0, 1].
    """
    pixels = images.float() if images.dtype == torch.uint8 else images.float() * 255
    red, green, blue = pixels.split(1, dim=1)  # (B, 1, H, W) each
    grey = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    levels = patchify(grey.round().clamp(0, LEVELS - 1).long(), patch_size)  # (B, N, P*P)
    histogram = torch.zeros(*levels.shape[:2], LEVELS, device=levels.device)  # (B, N, 256)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=histogram.dtype))
    shares = histogram / levels.shape[2]
    return to_units(-(shares * shares.clamp(min=1e-12).log2()).sum(dim=2))


def _pixel_entropy(tokens: Tokens, images: Tensor | None, patch_size: int) -> Tensor:
    if images is None:
        raise ValueError("score is 'pixel_entropy'; expected the images too")
    return pixel_entropy_units(images, patch_size)


# Scores that ask no model. A writer and every reader work a known order out alike, from (B, M) global tokens and N;
# others have (B, N) int64 score units, from the tokens, the images, which may be missing, and the patch side.
KNOWN_ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "random": random_order,
    "grid": lambda given, positions: grid_order(positions).to(given.device).expand(len(given), -1),
}
FIXED_UNITS: dict[str, Callable[[Tokens, Tensor | None, int], Tensor]] = {"pixel_entropy": _pixel_entropy}


def _mix(key: Tensor) -> Tensor:
    """A hash of 32-bit numbers kept in int64: the finaliser of murmur3, the same on every device."""
    mask = 0xFFFFFFFF
    key = key & mask
    key = (key ^ (key >> 16)) * 0x85EBCA6B & mask
    key = (key ^ (key >> 13)) * 0xC2B2AE35 & mask
    return key ^ (key >> 16)


def training_places(tokens: Tokens, images: Tensor, wanted: Wanted, mix: KeptSetConfig, models: Models) -> Tensor:
    """(B, N) int64: the place of every position in its image's ranking, 0 where no prefix of a ranking was drawn.

    One round; with the order `filter`, each sample is ranked by surprisal or by entropy, as `wanted` says, so that both
    can be used later.

    Args:
        tokens: every patch token known.
        images: (B, 3, H, W) floats in [0, 1].
        wanted: what was drawn for each sample.
        mix: names the order.
        models: that a ranking calls.
    """
    places = torch.zeros_like(tokens.patch_indices)
    needed = wanted.filtered | wanted.own_set
    if not bool(needed.any()):
        return places
    part, score = tokens[needed], "surprisal" if mix.order == "filter" else mix.order
    none = torch.zeros_like(part.kept_mask)
    if not SCORES[score].in_rounds:
        order = _fixed_order(part, score, models.patch_size, images[needed])[0]
    else:
        if mix.order == "filter":
            values = models.predict(part, none, ~none, _read_either(part, wanted.by_entropy[needed])).view(none.shape)
        else:
            values = _values(part, score, none, models, images[needed])
        order = to_units(values, SCORES[score].resolution).argsort(dim=1, descending=True, stable=True)
    places[needed] = order.argsort(dim=1)
    return places


def _read_either(tokens: Tokens, by_entropy: Tensor) -> Read:
    """Reads (B, N) bits while nothing is given: entropy where (B,) bool `by_entropy` is True, else surprisal."""

    def read(hidden: Tensor, head: nn.Linear) -> Tensor:
        shape = tokens.patch_indices.shape
        bits = read_surprisal(hidden, head, tokens.patch_indices.flatten()).view(shape)
        rows = by_entropy.nonzero()[:, 0]
        entropies = read_entropy(hidden.view(*shape, -1)[rows].flatten(0, 1), head)
        return bits.index_copy(0, rows, entropies.view(-1, shape[1]))

    return read
