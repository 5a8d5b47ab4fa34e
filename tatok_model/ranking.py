"""The order in which an image's patch tokens matter, by any score: the entropy model's, or a control's.

Plain functions of tokens and of `logits`, which asks the entropy model; `TaTok.rank` is their public face.

Shapes: B images, N patch positions, K codebook entries, n positions asked for.
"""

from typing import Protocol

import torch
from torch import Tensor

from tatok_model import orders
from tatok_model.config import BY_MODEL, KeptSetConfig
from tatok_model.filtering import conditional_entropy, rank_in_rounds, surprisal, to_units
from tatok_model.filtering_rules import SCORES, check_rounds
from tatok_model.kept_sets import Wanted
from tatok_model.tokens import Ranking, Tokens


class Logits(Protocol):
    """The entropy model as `TaTok` calls it."""

    def __call__(self, tokens: Tokens, given_mask: Tensor, at: Tensor) -> Tensor:
        """(n, K) at the True places of `at`, (B, N), from the codes at those of `given_mask`, (B, N)."""
        ...


def rank(
    tokens: Tokens, score: str, rounds: int, logits: Logits, patch_size: int, images: Tensor | None = None
) -> Ranking:
    """Order all patch tokens of each image; arguments and errors as `TaTok.rank`."""
    batch, positions = tokens.patch_indices.shape
    check_rounds(rounds, positions)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    if score in ("surprisal", "entropy"):

        def units(placed: Tensor) -> Tensor:
            found = logits(tokens, placed, ~placed)
            bits = (
                surprisal(found, tokens.patch_indices[~placed]) if score == "surprisal" else conditional_entropy(found)
            )
            return torch.zeros_like(tokens.patch_indices).masked_scatter(~placed, to_units(bits))

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
    tokens: Tokens, images: Tensor, wanted: Wanted, mix: KeptSetConfig, logits: Logits, patch_size: int
) -> Tensor:
    """(B, N) int64: the place of every position in its image's ranking, 0 where no prefix of a ranking was drawn.

    One round; each sample is ranked by surprisal or by entropy, as `wanted` says, so that both can be used later.

    Args:
        tokens: every patch token known.
        images: (B, 3, H, W) floats in [0, 1].
        wanted: what was drawn for each sample.
        mix: names the order.
        logits: the entropy model.
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
        at = torch.ones_like(part.kept_mask)
        found = logits(part, ~at, at).unflatten(0, at.shape)  # (b, N, K)
        by_entropy = wanted.by_entropy[needed][:, None]
        bits = torch.where(by_entropy, conditional_entropy(found), surprisal(found, part.patch_indices))
        order = to_units(bits).argsort(dim=1, descending=True, stable=True)
    places[needed] = order.argsort(dim=1)
    return places
