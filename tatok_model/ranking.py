"""The order in which an image's patch tokens matter, by any score: the entropy model's, or a control's.

Plain functions of tokens and of `predict`, which asks the entropy model; `TaTok.rank` is their public face.

Shapes: B images, N patch positions, K codebook entries, n positions asked for.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tatok_model import orders
from tatok_model.config import BY_MODEL, KeptSetConfig
from tatok_model.entropy import Read
from tatok_model.filtering import rank_in_rounds, to_units
from tatok_model.filtering_rules import SCORES, check_rounds
from tatok_model.kept_sets import Wanted
from tatok_model.predictions import read_entropy, read_surprisal
from tatok_model.tokens import Ranking, Tokens


class Predict(Protocol):
    """The entropy model as `TaTok` calls it."""

    def __call__(self, tokens: Tokens, given_mask: Tensor, at: Tensor, read: Read) -> Any:
        """What `read` makes of q where (B, N) `at` is True, from the codes where (B, N) `given_mask` is."""
        ...


def rank(
    tokens: Tokens, score: str, rounds: int, predict: Predict, patch_size: int, images: Tensor | None = None
) -> Ranking:
    """Order all patch tokens of each image; arguments and errors as `TaTok.rank`."""
    batch, positions = tokens.patch_indices.shape
    check_rounds(rounds, positions)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    if score in ("surprisal", "entropy"):

        def units(placed: Tensor) -> Tensor:
            at = ~placed
            true_codes = partial(read_surprisal, indices=tokens.patch_indices[at])
            bits = predict(tokens, placed, at, true_codes if score == "surprisal" else read_entropy)
            return torch.zeros_like(tokens.patch_indices).masked_scatter(at, to_units(bits))

        return Ranking(*rank_in_rounds(units, batch, positions, rounds, tokens.patch_indices.device), score, rounds)
    if rounds != 1:
        raise ValueError(f"rounds is {rounds}; expected 1 for the score {score!r}, which nothing kept can change")
    return Ranking(*_fixed_order(tokens, score, patch_size, images), score, rounds)


def _fixed_order(tokens: Tokens, score: str, patch_size: int, images: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) positions and (B, N) score units of a score that asks no entropy model."""
    (batch, positions), device = tokens.patch_indices.shape, tokens.patch_indices.device
    if score == "pixel_entropy":
        if images is None:
            raise ValueError("score is 'pixel_entropy'; expected the images too")
        found = orders.pixel_entropy_units(images, patch_size)
        return rank_in_rounds(lambda placed: found, batch, positions, 1, device)
    if score == "random":
        order = orders.random_order(tokens.global_indices, positions)
    else:
        order = orders.grid_order(positions).to(device).expand(batch, -1)
    return order, torch.zeros_like(order)


def training_places(
    tokens: Tokens, images: Tensor, wanted: Wanted, mix: KeptSetConfig, predict: Predict, patch_size: int
) -> Tensor:
    """(B, N) int64: the place of every position in its image's ranking, 0 where no prefix of a ranking was drawn.

    One round; each sample is ranked by surprisal or by entropy, as `wanted` says, so that both can be used later.

    Args:
        tokens: every patch token known.
        images: (B, 3, H, W) floats in [0, 1].
        wanted: what was drawn for each sample.
        mix: names the order.
        predict: the entropy model.
        patch_size: pixels.
    """
    places = torch.zeros_like(tokens.patch_indices)
    needed = wanted.filtered | wanted.own_set
    if not bool(needed.any()):
        return places
    part = tokens[needed]
    if mix.order not in BY_MODEL:
        order = _fixed_order(part, mix.order, patch_size, images[needed])[0]
    else:
        bits = _bits_of_all(part, wanted.by_entropy[needed], predict)
        order = to_units(bits).argsort(dim=1, descending=True, stable=True)
    places[needed] = order.argsort(dim=1)
    return places


def _bits_of_all(tokens: Tokens, by_entropy: Tensor, predict: Predict) -> Tensor:
    """(B, N) float32 scores while nothing is given: entropy where (B,) bool `by_entropy` is True, else surprisal."""
    at = torch.ones_like(tokens.kept_mask)

    def read(hidden: Tensor, head: nn.Linear) -> Tensor:
        bits = read_surprisal(hidden, head, tokens.patch_indices.flatten()).view(at.shape)
        rows = by_entropy.nonzero()[:, 0]
        return bits.index_copy(
            0, rows, read_entropy(hidden.view(*at.shape, -1)[rows].flatten(0, 1), head).view(-1, at.shape[1])
        )

    bits: Tensor = predict(tokens, ~at, at, read)
    return bits
