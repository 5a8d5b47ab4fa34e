"""Improved precision and recall, and nearest neighbours: which pictures lie where others lie in feature space.

Every set of features spans a manifold: balls around its members, each as large as the distance to the member's k-th
nearest neighbour within the set. Precision is the share of generated pictures inside the real manifold, recall the
share of real pictures inside the generated one. Distances are exact, in float64, a chunk of rows at a time.

Shapes: B and C members of two sets, F features, k neighbours.

Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
"""

import torch
from torch import Tensor

CHUNK = 1024  # rows of distances in memory at once


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, chunk: int = CHUNK) -> tuple[float, float]:
    """Precision and recall of generated pictures, both from 0 to 1.

    Args:
        real: (B, F) features.
        generated: (C, F) features. Sets of equal size compare best: balls shrink as a set grows.
        k: neighbours, itself not counted.
        chunk: rows of distances in memory at once; the results are the same.

    Raises:
        ValueError: features that are not 2-D, of unequal width or not finite, or fewer than k + 1 in a set.
    """
    _check(real, generated)
    for name, features in (("real", real), ("generated", generated)):
        if not 0 < k < len(features):
            raise ValueError(f"{name} has {len(features)} features with k {k}; expected at least k + 1, and k above 0")
    return _share_inside(generated, real, k, chunk), _share_inside(real, generated, k, chunk)


def radii(features: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """(B,) float64, distance of each of (B, F) features to its k-th nearest neighbour in the set, itself left out."""
    reach = []
    for first in range(0, len(features), chunk):
        rows = features[first : first + chunk]
        distances = _distances(rows, features)
        own = torch.arange(len(rows), device=features.device)
        distances[own, first + own] = torch.inf
        reach.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(reach)


def nearest(features: Tensor, among: Tensor, k: int = 1, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The k nearest members of another set: (B, F) and (C, F) -> (B, k) float64 distances, ascending, and indices.

    Raises:
        ValueError: features that are not 2-D, of unequal width or not finite, or fewer than k to choose among.
    """
    _check(features, among)
    if not 0 < k <= len(among):
        raise ValueError(f"k is {k} among {len(among)} features; expected 1 to {len(among)}")
    chunks = [
        _distances(features[first : first + chunk], among).topk(k, dim=1, largest=False)
        for first in range(0, len(features), chunk)
    ]
    return torch.cat([part.values for part in chunks]), torch.cat([part.indices for part in chunks])


def _share_inside(features: Tensor, manifold: Tensor, k: int, chunk: int) -> float:
    """Share of features within the ball of at least one member of the manifold."""
    reach, inside = radii(manifold, k, chunk), 0
    for first in range(0, len(features), chunk):
        inside += int((_distances(features[first : first + chunk], manifold) <= reach).any(1).sum())
    return inside / len(features)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C) float64 Euclidean distances of (B, F) and (C, F)."""
    centre = columns.double().mean(0)  # nearer to the origin, less is lost in the difference of squares
    a, b = rows.double() - centre, columns.double() - centre
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp(min=0).sqrt()


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features are {tuple(first.shape)} and {tuple(second.shape)}; expected (B, F) and (C, F)")
    if not (bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())):
        raise ValueError("features hold NaN or infinity; expected finite ones")
