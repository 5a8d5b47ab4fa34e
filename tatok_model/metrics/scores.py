"""Scores without reference images: of pictures by a classifier, and of codes by their use and code lengths.

The Inception score rewards pictures that a classifier is sure of and that vary, `CodeUsage` counts how often codebook
entries are used; both hold sums that add up across processes. The functions at the end estimate the information between
global and patch codes, in bits, from code lengths under entropy models.

Shapes: B images, C classes, K codebook entries, N patch positions, O orders.
"""

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tatok_model.metrics.rate_distortion import bootstrap_mean_interval

CHAIN_ORDERS = 4  # O, coding orders over which code lengths by the chain rule are averaged


class InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)), over one or several splits.

    Per split it keeps n, sum p (C,) and sum p log p. ADM scores its bias-free logits in splits of 5,000, torch-fidelity
    in 10 splits after a shuffle with seed 2020: report the protocol with the number.

    Args:
        classes: C, the width of the logits.
        splits: how many groups are scored separately and then averaged.
    """

    def __init__(self, classes: int, splits: int = 1) -> None:
        if classes < 2 or splits < 1:
            raise ValueError(f"expected at least 2 classes and 1 split, got {classes} classes and {splits} splits")
        self.classes, self.splits = classes, splits
        self._counts = torch.zeros(splits, dtype=torch.int64)
        self._p = torch.zeros(splits, classes, dtype=torch.float64)
        self._p_log_p = torch.zeros(splits, dtype=torch.float64)

    def update(self, logits: Tensor, split: Tensor | None = None) -> None:
        """Add (B, C) logits of any floating type and device.

        Args:
            logits: of a batch.
            split: (B,) integers, the split of each image, set by its place in the whole set, so that it does not
                depend on which process measures it; None: all in split 0.

        Raises:
            ValueError: shapes do not fit, a logit is not finite, or a split number is outside 0 to splits - 1.
        """
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            raise ValueError(f"logits must be (B, {self.classes}), got {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise ValueError("logits hold NaN or infinity")
        rows = torch.zeros(len(logits), dtype=torch.int64) if split is None else split.detach().cpu().long()
        if rows.shape != logits.shape[:1] or (rows.numel() and not 0 <= rows.min() <= rows.max() < self.splits):
            raise ValueError(
                f"split must be {len(logits)} numbers from 0 to {self.splits - 1}, got {rows.tolist()[:8]}"
            )
        log_p = logits.detach().cpu().double().log_softmax(1)
        self._counts += rows.bincount(minlength=self.splits)
        self._p.index_add_(0, rows, log_p.exp())
        self._p_log_p.index_add_(0, rows, (log_p.exp() * log_p).sum(1))

    def merge(self, other: "InceptionScore") -> None:
        """Add the sums of another process; ValueError where classes or splits differ."""
        if (other.classes, other.splits) != (self.classes, self.splits):
            raise ValueError(
                f"cannot merge {other.classes} classes in {other.splits} splits "
                f"into {self.classes} classes in {self.splits} splits"
            )
        self._counts += other._counts
        self._p += other._p
        self._p_log_p += other._p_log_p

    def per_split(self) -> Tensor:
        """(splits,) float64, from 1 to C; ValueError where a split has no image."""
        if (self._counts == 0).any():
            raise ValueError(f"every split needs an image, got {self._counts.tolist()} images per split")
        marginal = self._p / self._counts[:, None]
        return (self._p_log_p / self._counts - torch.special.xlogy(marginal, marginal).sum(1)).exp()

    def result(self) -> float:
        """The mean over splits; raises as `per_split`."""
        return float(self.per_split().mean())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: counts (splits,), p (splits, C), p_log_p (splits,)."""
        state = {"counts": self._counts, "p": self._p, "p_log_p": self._p_log_p}
        return {name: value.numpy().copy() for name, value in state.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        splits, classes = arrays["p"].shape
        score = cls(classes, splits)
        score._counts = torch.tensor(arrays["counts"], dtype=torch.int64)
        score._p = torch.tensor(arrays["p"], dtype=torch.float64)
        score._p_log_p = torch.tensor(arrays["p_log_p"], dtype=torch.float64)
        return score


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """The score of (B, C) logits, divided in order into splits whose sizes differ by at most one.

    Raises:
        ValueError: as `InceptionScore`, and where there are more splits than images.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), got {tuple(logits.shape)}")
    score = InceptionScore(logits.shape[1], splits)
    score.update(logits, torch.arange(len(logits)) * splits // max(len(logits), 1))
    return score.result()


class CodeUsage:
    """How often each of K = `codebook_size` entries was chosen."""

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be positive, got {codebook_size}")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Add indices of any shape; ValueError where they are not integers from 0 to K - 1."""
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"code indices must be integers, got {indices.dtype}")
        flat = indices.detach().reshape(-1).cpu().long()
        if flat.numel() and not 0 <= flat.min() <= flat.max() < len(self.counts):
            raise ValueError(
                f"code indices must be 0 to {len(self.counts) - 1}, got {int(flat.min())} to {int(flat.max())}"
            )
        self.counts += flat.bincount(minlength=len(self.counts))

    def merge(self, other: "CodeUsage") -> None:
        """Add the counts of another process; ValueError where the codebook sizes differ."""
        if len(other.counts) != len(self.counts):
            raise ValueError(f"cannot merge a codebook of {len(other.counts)} into one of {len(self.counts)}")
        self.counts += other.counts

    @property
    def usage(self) -> float:
        """Share of entries chosen at least once, from 0 to 1."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """2 to the entropy of the choices in bits: from 1 (one entry) to K (uniform); 0 before the first index."""
        total = self.counts.sum()
        if total == 0:
            return 0.0
        share = self.counts.double() / total
        return float((-torch.special.xlogy(share, share).sum()).exp())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: counts (K,)."""
        return {"counts": self.counts.numpy().copy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        usage = cls(len(arrays["counts"]))
        usage.counts = torch.tensor(arrays["counts"], dtype=torch.int64)
        return usage


def chain_orders(positions: int, seed: int) -> np.ndarray:
    """(O, N) int64: random orders of the positions, the same for all images; row by row a permutation."""
    random = np.random.default_rng([seed, positions])
    return np.stack([random.permutation(positions) for _ in range(CHAIN_ORDERS)])


def partners(images: int, seed: int) -> np.ndarray:
    """(B,) int64: for each image another random one, whose global codes replace its own as the null hypothesis.

    One random cycle through all images, so that each is used once; images next to each other may be of one class.
    ValueError below two images.
    """
    if images < 2:
        raise ValueError(f"images is {images}; expected at least 2 to exchange global codes")
    cycle = np.random.default_rng([seed, images]).permutation(images)
    partner = np.empty_like(cycle)
    partner[cycle] = np.roll(cycle, 1)
    return partner


def redundancy(one_pass: np.ndarray, chain: np.ndarray) -> float:
    """Total correlation of the patch codes in bits an image, conditional on what both code lengths are.

    Args:
        one_pass: (B,) code lengths, every position predicted without the other patch codes.
        chain: (B, O) code lengths by the chain rule: every position given those before it, in each order.
    """
    return float(one_pass.mean() - chain.mean())


def mutual_information(blind: np.ndarray, seeing: np.ndarray, seed: int) -> tuple[float, float, float]:
    """I(c; g) in bits an image, and the ends of its 95% bootstrap interval over images.

    Args:
        blind: (B, O) chain-rule code lengths under a model that does not get g.
        seeing: (B, O) the same images and orders, under a model of equal compute that gets g.
        seed: of the bootstrap.

    Raises:
        ValueError: other images or orders.
    """
    if blind.shape != seeing.shape:
        raise ValueError(f"chains are {blind.shape} and {seeing.shape}; expected the same images and orders")
    gains = blind.mean(1) - seeing.mean(1)
    low, high = bootstrap_mean_interval(gains, seed)
    return float(gains.mean()), low, high


def unigram_bits(indices: np.ndarray, codebook_size: int) -> float:
    """Bits per image if (B, N) int64 codes are coded by the frequencies of the K entries over all of them."""
    shares = np.bincount(indices.ravel(), minlength=codebook_size) / indices.size
    used = shares[shares > 0]
    return float(-(used * np.log2(used)).sum() * indices.shape[1])


def limit(global_tokens: int, codebook_size: int) -> float:
    """M log2 K, the most bits that the global codes can hold."""
    return global_tokens * math.log2(codebook_size)
