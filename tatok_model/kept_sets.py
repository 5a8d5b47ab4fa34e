"""Which patch tokens a training step keeps: drawn for each sample, so that every length and every cut is trained.

One draw serves the decoder and the entropy model: what the decoder keeps is what the entropy model is given. Only where
everything is kept is there nothing to predict; those samples train the entropy model on a set of their own, most of
them without global tokens. docs/decisions/0003 says why.

Shapes: B images, N patch positions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tatok_model.config import KeptSetConfig
from tatok_model.tokens import Tokens

LANES = 4  # uniform numbers per sample before the N of the positions


class KeptSets(NamedTuple):
    """What each sample keeps."""

    kept_mask: Tensor  # (B, N) bool, what the decoder sees
    given_mask: Tensor  # (B, N) bool, what the entropy model is given: never everything
    without_globals: Tensor  # (B,) bool, whose global tokens the entropy model does not see


class Wanted(NamedTuple):
    """What kind of set each sample was drawn, and how long."""

    everything: Tensor  # (B,) bool
    nothing: Tensor  # (B,) bool
    blocks: Tensor  # (B,) bool
    filtered: Tensor  # (B,) bool: a prefix of the filter's ranking
    own_set: Tensor  # (B,) bool: everything is kept, and the entropy model's set is a prefix of the ranking
    sizes: Tensor  # (B,) int64, 0 to N - 1
    without_globals: Tensor  # (B,) bool
    by_entropy: Tensor  # (B,) bool: ranked by entropy, else by surprisal
    noise: Tensor  # (B, N) in [0, 1)


@torch.no_grad()
def hide(
    tokens: Tokens, uniforms: Tensor, config: KeptSetConfig, filtering: bool, places: Callable[[Wanted], Tensor] | None
) -> tuple[Tokens, KeptSets | None]:
    """What a training step keeps of all tokens of its images; the sets are None where there are no patch tokens.

    Args:
        tokens: all of them.
        uniforms: (B, LANES + N) in [0, 1), keyed by seed, step and sample.
        config: shares of the kinds.
        filtering: False while the entropy model warms up: prefixes are random sets then.
        places: gives `kept_sets` its `ranked`; None: there are no patch tokens.
    """
    sets = None
    if places is not None:
        wanted = draw(uniforms, config, filtering)
        sets = kept_sets(wanted, places(wanted))
        tokens = replace(tokens, kept_mask=sets.kept_mask)
    if config.global_tail:
        tokens = replace(tokens, global_counts=_global_counts(uniforms, tokens.global_indices.shape[1], config))
    return tokens, sets


def _global_counts(uniforms: Tensor, most: int, config: KeptSetConfig) -> Tensor:
    """(B,) int64: leading global tokens that stay, at least 1, for the share of samples that lose a tail."""
    kind, size = uniforms[:, 0], uniforms[:, 1]
    return torch.where(kind < config.global_tail, 1 + (size * most).long().clamp(max=most - 1), most)


def draw(uniforms: Tensor, config: KeptSetConfig, filtering: bool) -> Wanted:
    """Kinds and sizes from uniform numbers.

    Args:
        uniforms: (B, LANES + N) in [0, 1), keyed by seed, step and sample.
        config: shares of the kinds.
        filtering: False while the entropy model warms up: prefixes are random sets then.
    """
    kind, size, coin, order = uniforms[:, :LANES].unbind(1)
    noise = uniforms[:, LANES:]
    bounds = torch.tensor(config.shares(), device=kind.device).cumsum(0)
    number = (kind[:, None] >= bounds[:-1]).sum(1)  # 0 all, 1 none, 2 random, 3 blocks, 4 filtered
    everything, nothing, blocks = number == 0, number == 1, number == 3
    by_entropy = (order * 4).long() % 2 == 1
    if config.order in ("surprisal", "entropy"):
        by_entropy = torch.full_like(by_entropy, config.order == "entropy")
    hidden = everything & (coin < config.hidden_share())
    return Wanted(
        everything=everything,
        nothing=nothing,
        blocks=blocks,
        filtered=(number == 4) & filtering,
        own_set=everything & ~hidden & (order < 0.5) & filtering,
        sizes=(size * noise.shape[1]).long(),
        without_globals=hidden,
        by_entropy=by_entropy,
        noise=noise,
    )


def kept_sets(wanted: Wanted, ranked: Tensor) -> KeptSets:
    """The sets themselves.

    Args:
        wanted: what was drawn.
        ranked: (B, N) int64, place of every position in the filter's ranking; counts where a prefix of it was drawn.
    """
    random = wanted.noise.argsort(dim=1).argsort(dim=1)
    block = _block_places(wanted.noise)
    by_filter = (wanted.filtered | wanted.own_set)[:, None]
    places = torch.where(by_filter, ranked, torch.where(wanted.blocks[:, None], block, random))
    given = (places < wanted.sizes[:, None]) & ~wanted.nothing[:, None]
    return KeptSets(given | wanted.everything[:, None], given, wanted.without_globals)


def _block_places(noise: Tensor) -> Tensor:
    """(B, N) int64: positions by their distance from a random centre, so that a prefix is a block."""
    positions = noise.shape[1]
    side = round(positions**0.5)
    centre = noise[:, :2] * side if positions > 1 else noise.new_zeros(len(noise), 2)
    steps = torch.arange(positions, device=noise.device)
    rows, columns = steps // side, steps % side
    distance = torch.maximum((rows - centre[:, :1] + 0.5).abs(), (columns - centre[:, 1:] + 0.5).abs())
    return distance.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
