"""Frechet distance between two sets of features, from sums that add up across processes.

The state is (n, sum f, sum f f^T) in float64: 33.5 MB at 2048 features, whatever the number of images. One process
accumulates its share, states merge by addition, and mean and covariance are taken once at the end.

    d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

Below about 2048 images the covariance has not its full rank, and the distance is biased by about 1/n: say n with it.

Shapes: B images, F features.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features, F = `feature_dim` wide, batch by batch and merged across processes."""

    def __init__(self, feature_dim: int) -> None:
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be positive, got {feature_dim}")
        self.feature_dim = feature_dim
        self.n = 0
        self._sum = torch.zeros(feature_dim, dtype=torch.float64)
        self._outer = torch.zeros(feature_dim, feature_dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add (B, F) features of any floating type and device.

        Raises:
            ValueError: they are not 2-D, not F wide, or hold NaN or infinity.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be 2-D (B, F), got shape {tuple(features.shape)}")
        if features.shape[1] != self.feature_dim:
            raise ValueError(f"features must be {self.feature_dim} wide, got shape {tuple(features.shape)}")
        batch = features.detach().cpu().double()
        if not torch.isfinite(batch).all():
            raise ValueError(
                f"features hold NaN or infinity in {int((~batch.isfinite()).any(1).sum())} of {len(batch)} rows"
            )
        self.n += len(batch)
        self._sum += batch.sum(0)
        self._outer.addmm_(batch.T, batch)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another process has seen; ValueError where the widths differ."""
        if other.feature_dim != self.feature_dim:
            raise ValueError(f"cannot merge features {other.feature_dim} wide into features {self.feature_dim} wide")
        self.n += other.n
        self._sum += other._sum
        self._outer += other._outer

    def mean(self) -> Tensor:
        """(F,) float64; ValueError where no image was seen."""
        if self.n < 1:
            raise ValueError("a mean needs at least 1 image, got 0")
        return self._sum / self.n

    def covariance(self) -> Tensor:
        """(F, F) float64, divided by n - 1 as every published FID does; ValueError below two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        return (self._outer - torch.outer(self._sum, self.mean())) / (self.n - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as arrays, to pass between processes or to store: n (), sum (F,), outer (F, F)."""
        return {"n": np.array(self.n), "sum": self._sum.numpy().copy(), "outer": self._outer.numpy().copy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`; ValueError where `outer` is not (F, F) for the F of `sum`."""
        width = len(arrays["sum"])
        if arrays["outer"].shape != (width, width):
            raise ValueError(f"outer must be ({width}, {width}) as sum is {width} wide, got {arrays['outer'].shape}")
        statistics = cls(width)
        statistics.n = int(arrays["n"])
        statistics._sum = torch.tensor(arrays["sum"], dtype=torch.float64)
        statistics._outer = torch.tensor(arrays["outer"], dtype=torch.float64)
        return statistics


def frechet_distance(
    mu1: Tensor | np.ndarray, sigma1: Tensor | np.ndarray, mu2: Tensor | np.ndarray, sigma2: Tensor | np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians of (F,) means and (F, F) covariances: FID in the literature.

    The eigenvalues of S1 S2 are those of the symmetric sqrt(S1) S2 sqrt(S1), so the trace of its square root needs no
    `sqrtm`, which returns imaginary parts for the near-singular covariances of real features. Equal inputs may give
    about -1e-9 of the terms' size.

    Raises:
        ValueError: shapes do not fit together or a value is not finite.

    Source: Heusel et al. 2017 (arXiv 1706.08500).
    """
    m1, s1, m2, s2 = (torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (mu1, sigma1, mu2, sigma2))
    shapes = [tuple(value.shape) for value in (m1, s1, m2, s2)]
    width = m1.numel()
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"expected mu (F,) and sigma (F, F) of one width twice, got {shapes}")
    if not all(torch.isfinite(value).all() for value in (m1, s1, m2, s2)):
        raise ValueError("a mean or covariance holds NaN or infinity")
    eigenvalues, vectors = torch.linalg.eigh(s1)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)
