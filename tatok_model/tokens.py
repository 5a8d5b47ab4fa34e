"""A batch of variable-length token sequences as a value: `Tokens`.

A sequence is M global tokens and T of N patch tokens. While the order in which the patch tokens matter is known
(`Ranking`), the batch can be cut again and again: one ranking serves every threshold, and kept sets nest. `Side` says
what a decoder has to be told besides codes.

Shapes: B images, M global tokens, N patch positions, K codebook entries, T kept patch tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tatok_model.filtering import kept_counts, kept_mask_of, residual_counts
from tatok_model.filtering_rules import CHECK_BITS, SCORES, QualityLine, check_cut, fixes_length

POSITIONS = ("derived", "sent", "replayed")


@dataclass(frozen=True)
class Side:
    """What a decoder needs besides codes, and what it costs.

    Attributes:
        length: T varies between images and is sent: log2(N + 1) bits.
        positions: "derived": the decoder knows them (all, none, grid, seeded random): 0 bits; "sent": log2 C(N, T)
            bits; "replayed": the decoder ranks as the encoder did, guarded by a hash: 32 bits.
    """

    length: bool = False
    positions: str = "derived"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; expected one of {', '.join(POSITIONS)}")

    def bits(self, counts: Tensor, patch_positions: int) -> Tensor:
        """(B,) float64 of (B,) kept patch tokens out of N."""
        bits = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
        if self.length:
            bits = bits + math.log2(patch_positions + 1)
        if self.positions == "sent":
            bits = bits + log2_binomial(patch_positions, counts)
        elif self.positions == "replayed":
            bits = bits + CHECK_BITS
        return bits


@dataclass(frozen=True)
class Ranking:
    """The order in which an image's patch tokens matter.

    Attributes:
        order: (B, N) int64 patch positions, the most informative first.
        score_units: (B, N) int64, the score of each step of `order`, in whole score units.
        score: a key of `filtering_rules.SCORES`: what was scored.
        rounds: R, in how many rounds; streams and thresholds carry it, because another R is another order.
        line: predicts a picture's error from its dropped scores, for the rule `quality`; None: not calibrated.
    """

    order: Tensor
    score_units: Tensor
    score: str
    rounds: int
    line: QualityLine | None = None

    def __post_init__(self) -> None:
        if self.order.ndim != 2 or self.order.shape != self.score_units.shape:
            raise ValueError(
                f"order is {tuple(self.order.shape)} and score_units {tuple(self.score_units.shape)}; "
                "expected (B, N) both"
            )
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; expected one of {', '.join(SCORES)}")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; expected at least 1")
        if self.line is not None and (self.line.score, self.line.rounds) != (self.score, self.rounds):
            raise ValueError(
                f"line is of {self.line.score} in {self.line.rounds} rounds; "
                f"expected {self.score} in {self.rounds}, as the ranking"
            )

    @property
    def resolution(self) -> int:
        """Score units in the score's unit."""
        return SCORES[self.score].resolution

    def counts(self, rule: str, threshold: float) -> Tensor:
        """(B,) int64, T of each image where a rule cuts; arguments and errors as `Tokens.cut`."""
        check_cut(self.score, rule, threshold, self.order.shape[1])
        if rule == "quality":
            if self.line is None:
                raise ValueError(
                    f"rule is 'quality' and this tokenizer has no line from {self.score} in {self.rounds} rounds to "
                    "dB; expected one that jobs/calibrate.py has fitted"
                )
            total = self.score_units.sum(dim=1, keepdim=True).double() / self.resolution
            return residual_counts(self.score_units, self.line.residual_at(threshold, total) * self.resolution)
        return kept_counts(self.score_units, rule, threshold, self.resolution)

    def limits(self, rule: str) -> Tensor:
        """(B, 2) float64: at which thresholds of a rule each image keeps every patch token, and from which on none."""
        scores = self.score_units.double() / self.resolution
        if rule == "marginal":
            return torch.stack([scores.amin(1), scores[:, 0]], 1)
        total = scores.sum(1)
        unsaid = torch.stack([scores[:, -1], total], 1)  # once the last token, and every token, is dropped
        if rule == "residual":
            return unsaid
        if rule == "quality" and self.line is not None:
            said = self.line.kept_slope * (total[:, None] - unsaid)
            return (-10 * torch.log10(self.line.intercept + self.line.slope * unsaid + said)).clamp(max=self.line.most)
        return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(total), 2)  # shares of the score

    def each(self, change: Callable[[Tensor], Tensor]) -> "Ranking":
        """The same ranking with every tensor changed alike."""
        return replace(self, order=change(self.order), score_units=change(self.score_units))

    def __getitem__(self, images: Any) -> "Ranking":
        return self.each(lambda values: values[images])

    def to(self, device: torch.device | str) -> "Ranking":
        """The same ranking on another device."""
        return self.each(lambda values: values.to(device))


@dataclass(frozen=True, repr=False)
class Tokens:
    """What an encoder says of B images and all that a decoder needs.

    Attributes:
        global_indices: (B, M) int64 codebook entries of the global tokens.
        patch_indices: (B, N) int64 codebook entries at the patch positions, in raster order.
        kept_mask: (B, N) bool, True where the patch token is part of the sequence; entries elsewhere mean nothing.
        ranking: the order to cut in; None when it is not known (any more).
        side: what is sent besides the codes.
        global_counts: (B,) int64, how many leading global tokens are part of the sequence; None: all M.
    """

    global_indices: Tensor
    patch_indices: Tensor
    kept_mask: Tensor
    ranking: Ranking | None = None
    side: Side = Side()
    global_counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.global_indices.ndim != 2 or self.patch_indices.ndim != 2:
            raise ValueError(
                f"global_indices is {tuple(self.global_indices.shape)} and patch_indices "
                f"{tuple(self.patch_indices.shape)}; expected (B, M) and (B, N)"
            )
        if self.kept_mask.shape != self.patch_indices.shape or self.kept_mask.dtype != torch.bool:
            raise ValueError(
                f"kept_mask is {self.kept_mask.dtype} {tuple(self.kept_mask.shape)}; "
                f"expected bool {tuple(self.patch_indices.shape)}"
            )
        if len(self.global_indices) != len(self.patch_indices):
            raise ValueError(
                f"global_indices has {len(self.global_indices)} images and patch_indices {len(self.patch_indices)}; "
                "expected as many"
            )
        if self.ranking is not None and self.ranking.order.shape != self.patch_indices.shape:
            raise ValueError(
                f"ranking is of {tuple(self.ranking.order.shape)}; expected {tuple(self.patch_indices.shape)}"
            )

    def __len__(self) -> int:
        return len(self.global_indices)

    def __repr__(self) -> str:
        patches = "no patch tokens"
        if self.patch_indices.shape[1]:
            mean = self.patch_counts.double().mean() if len(self) else 0
            patches = f"{mean:.1f} of {self.patch_indices.shape[1]} patch tokens on average"
        ranked = f", ranked by {self.ranking.score}" if self.ranking else ""
        return f"Tokens({len(self)} images, {self.global_indices.shape[1]} global and {patches}{ranked})"

    def __getitem__(self, images: Tensor | slice | list[int] | int) -> "Tokens":
        """The tokens of some of the images; of one, as a batch of one, where `images` is its number."""
        if isinstance(images, int):
            images = slice(range(len(self))[images], range(len(self))[images] + 1)  # IndexError as of a list
        return self.each(lambda values: values[images])

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens on another device."""
        return self.each(lambda values: values.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """The same tokens with every tensor changed alike."""
        return replace(
            self,
            global_indices=change(self.global_indices),
            patch_indices=change(self.patch_indices),
            kept_mask=change(self.kept_mask),
            ranking=None if self.ranking is None else self.ranking.each(change),
            global_counts=None if self.global_counts is None else change(self.global_counts),
        )

    @property
    def patch_counts(self) -> Tensor:
        """(B,) int64, T of each image."""
        return self.kept_mask.sum(dim=1)

    def kept_globals(self) -> Tensor:
        """(n,) int64 codebook entries of the global tokens that are part of a sequence, of all images together."""
        if self.global_counts is None:
            return self.global_indices.flatten()
        places = torch.arange(self.global_indices.shape[1], device=self.global_indices.device)
        return self.global_indices[places < self.global_counts[:, None]]

    def counts(self) -> Tensor:
        """(B,) int64, tokens of each image: M + T."""
        global_counts = self.global_indices.shape[1] if self.global_counts is None else self.global_counts
        return global_counts + self.patch_counts

    def bits(self, bits_per_token: float) -> Tensor:
        """(B,) float64, `bits_fixed` of each image: log2 K for every token, plus what `side` costs."""
        return self.counts().double() * bits_per_token + self.side.bits(self.patch_counts, self.patch_indices.shape[1])

    def cut(self, rule: str, threshold: float, replay: bool = False) -> "Tokens":
        """Keep of each image the first patch tokens of its ranking, as many as the rule says.

        Args:
            rule: relative, residual, marginal or count; `filtering.kept_counts` defines them. Or quality.
            threshold: tau, the score's unit, the score's unit, tokens or dB, as the rule wants it.
            replay: the decoder will repeat the ranking instead of being told the positions; `entropy` scores only.

        Raises:
            ValueError: the order is not known, the threshold is outside its range, the score cannot serve the rule
                or be replayed, or `quality` asks for more dB than there are or is not calibrated.
        """
        if self.ranking is None:
            raise ValueError("these tokens hold one cut and no ranking; expected tokens that TaTok.rank made")
        score, (_, positions) = self.ranking.score, self.patch_indices.shape
        counts = self.ranking.counts(rule, threshold)
        if replay and score != "entropy":
            raise ValueError(f"replay is set with score {score!r}; expected entropy, which a decoder can compute")
        how = _how_positions_travel(score, rule, threshold, replay, positions)
        side = Side(length=not fixes_length(rule, threshold), positions=how)
        return replace(self, kept_mask=kept_mask_of(self.ranking.order, counts), side=side)

    def cut_globals(self, count: int) -> "Tokens":
        """Keep the first `count` global tokens of each image, 0 to M: a cut of images without patch tokens."""
        if not 0 <= count <= self.global_indices.shape[1]:
            raise ValueError(f"count is {count}; expected 0 to {self.global_indices.shape[1]}, the global tokens")
        return replace(self, global_counts=torch.full_like(self.patch_counts, count))


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The images of several batches, cut and ranked alike, as one.

    Raises:
        ValueError: no batch, or batches of different kinds.
    """
    kinds = {(part.ranking is None, part.global_counts is None, part.side) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"{len(parts)} batches are of {len(kinds)} kinds; expected at least one, all of one cut")
    first, ranking = parts[0], parts[0].ranking
    if ranking is not None:
        rankings = [part.ranking for part in parts if part.ranking is not None]
        order, units = torch.cat([r.order for r in rankings]), torch.cat([r.score_units for r in rankings])
        ranking = replace(ranking, order=order, score_units=units)
    counts = [part.global_counts for part in parts if part.global_counts is not None]
    return replace(
        first,
        global_indices=torch.cat([part.global_indices for part in parts]),
        patch_indices=torch.cat([part.patch_indices for part in parts]),
        kept_mask=torch.cat([part.kept_mask for part in parts]),
        ranking=ranking,
        global_counts=torch.cat(counts) if counts else None,
    )


def log2_binomial(n: int, k: Tensor) -> Tensor:
    """log2 C(n, k), the bits that say which k of n: float64 of the shape of `k`."""
    k = k.double()
    total = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64, device=k.device))
    return ((total - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)) / math.log(2)).clamp(min=0)


def _how_positions_travel(score: str, rule: str, threshold: float, replay: bool, positions: int) -> str:
    """All or none at a fixed count needs no word; an order that looks at the picture has to be sent or replayed."""
    all_or_none = fixes_length(rule, threshold) and (rule != "count" or threshold in (0, positions))
    if SCORES[score].known_to_decoder or all_or_none:
        return "derived"
    return "replayed" if replay else "sent"
