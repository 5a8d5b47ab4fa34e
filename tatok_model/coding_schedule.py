"""In which round each kept patch code is entropy-coded: codes of a round are predicted from those of earlier rounds.

Pure functions of what a decoder knows before it reads a code: the kept positions, or the ranking it repeats.

Shapes: B images, N patch positions, T kept patch tokens.
"""

from itertools import pairwise

import torch
from torch import Tensor

from tatok_model.filtering import round_bounds
from tatok_model.orders import grid_order
from tatok_model.tokens import Ranking


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
