"""The order in which an image's patch tokens matter, by any score: the models', or a control's.

Plain functions of tokens and of the two models that can be asked: `predict` is the entropy model, `decode` the decoder.
`TaTok.rank` is their public face.

Shapes: B images, N patch positions, K codebook entries, d code width, n positions asked for, P patch side.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model import filtering
from tatok_model.config import BY_MODEL, KeptSetConfig
from tatok_model.entropy import Read
from tatok_model.filtering import conditional_entropy, rank_in_rounds, surprisal, to_units
from tatok_model.filtering_rules import SCORES, check_rounds
from tatok_model.kept_sets import Wanted
from tatok_model.quality import QualityLine, line_of
from tatok_model.tokens import Ranking, Tokens
from tatok_model.vit import patchify

# What is read off q's predictions without ever holding all of them: logits are made for some rows at a time.

CPU_LOGITS = 2**20  # at a time, 4 MiB: fewer rows make slower products, more are no faster
GPU_LOGITS = 2**25  # 128 MiB: a GPU wants much work at once


def read_surprisal(hidden: Tensor, head: nn.Linear, indices: Tensor) -> Tensor:
    """-log2 q of the true codes, in bits, with gradients: (n,) float32.

    Args:
        hidden: (n, W), what `head` predicts from.
        head: W to K.
        indices: (n,) int64 true codes.
    """
    if torch.is_grad_enabled():
        bits: Tensor = _Read.apply(hidden, head.weight, head.bias, indices, None)[0]
        return bits
    found = [surprisal(head(hidden[rows]), indices[rows]) for rows in _parts(len(hidden), head.weight)]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def read_surprisal_and_expected(
    hidden: Tensor, head: nn.Linear, indices: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `read_surprisal`, and (n, d) float32 expected code vectors under q, without gradients.

    Args:
        hidden: (n, W).
        head: W to K.
        indices: (n,) int64 true codes.
        codes: (K, d) code vectors; None: d is 0.
    """
    return _Read.apply(hidden, head.weight, head.bias, indices, codes)


@torch.no_grad()
def read_expected(hidden: Tensor, head: nn.Linear, codes: Tensor) -> Tensor:
    """(n, d) float32 expected code vectors under q, without gradients; arguments as above."""
    nowhere = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    expected: Tensor = _Read.apply(hidden, head.weight, head.bias, nowhere, codes)[1]
    return expected


@torch.no_grad()
def read_distortion(hidden: Tensor, head: nn.Linear, indices: Tensor, codes: Tensor) -> Tensor:
    """|c - E_q[c]|^2 of the true codes, without gradients: (n,) float32, in squared units of the code vectors.

    How far off the decoder's stand-in for a dropped token is, an estimate of the token's conditional variance.
    Arguments as above, (K, d) `codes` needed.
    """
    return (codes[indices].float() - read_expected(hidden, head, codes)).square().sum(-1)


@torch.no_grad()
def read_entropy(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Entropy of q in bits, without gradients: (n,) float32."""
    found = [conditional_entropy(head(hidden[rows])) for rows in _parts(len(hidden), head.weight)]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


class _Read(torch.autograd.Function):
    """Surprisal, with gradients, and expected codes, without."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, indices: Tensor, codes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        n = len(hidden)
        log_sums = hidden.new_empty(n, 1, dtype=torch.float32)
        chosen = torch.empty_like(log_sums)
        expected = hidden.new_empty(n, 0 if codes is None else codes.shape[1], dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            cast = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
            for rows in _parts(n, weight):
                logits = F.linear(cast[0][rows], *cast[1:]).float()
                torch.gather(logits, 1, indices[rows, None], out=chosen[rows])
                highest = logits.amax(1, keepdim=True)
                shares = logits.sub_(highest).exp_()  # in place: the cache holds one such tensor
                sums = shares.sum(1, keepdim=True)
                torch.add(highest, sums.log(), out=log_sums[rows])
                if codes is not None:
                    torch.div(shares @ codes, sums, out=expected[rows])
        ctx.save_for_backward(hidden, weight, bias, indices, log_sums)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(expected)
        return (log_sums - chosen)[:, 0] / math.log(2), expected

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, indices, log_sums = ctx.saved_tensors
        scale = gradients[0][:, None].float() / math.log(2)
        to_hidden = torch.empty_like(hidden)
        to_weight, to_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = hidden.to(ctx.dtype), weight.to(ctx.dtype), bias.to(ctx.dtype)
            for rows in _parts(len(hidden), weight):
                logits = F.linear(cast[0][rows], *cast[1:]).float()
                back = logits.sub_(log_sums[rows]).exp_().mul_(scale[rows])  # of q, less the true code's
                back.scatter_add_(1, indices[rows, None], -scale[rows])
                to_bias += back.sum(0)
                back = back.to(ctx.dtype)
                to_hidden[rows] = back @ cast[1]
                to_weight += back.T @ cast[0][rows]
        return to_hidden, to_weight, to_bias, None, None


def _parts(n: int, weight: Tensor) -> Iterator[slice]:
    """Rows of (n, W) that are looked at together; `weight` is the head's, (K, W)."""
    rows = max(1, (CPU_LOGITS if weight.device.type == "cpu" else GPU_LOGITS) // len(weight))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


class Predict(Protocol):
    """The entropy model as `TaTok` calls it."""

    def __call__(self, tokens: Tokens, given_mask: Tensor, at: Tensor, read: Read) -> Any:
        """What `read` makes of q where (B, N) `at` is True, from the codes where (B, N) `given_mask` is."""
        ...


@dataclass(frozen=True)
class Models:
    """What a ranking may ask.

    Attributes:
        predict: the entropy model.
        decode: tokens to (B, 3, H, W) pictures in [0, 1].
        codes: (K, d) code vectors of the patch tokens.
        patch_size: P.
        lines: of rankings whose pictures' quality can be predicted.
    """

    predict: Predict
    decode: Callable[[Tokens], Tensor]
    codes: Tensor
    patch_size: int
    lines: tuple[QualityLine, ...] = ()


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
    if score == "error" and images is None:
        raise ValueError("score is 'error'; expected the images too, to see how wrong they get")

    def units(placed: Tensor) -> Tensor:
        if score == "error" and images is not None:
            return to_units(patch_errors(tokens, placed, images, models), SCORES[score].resolution)
        at = ~placed
        values = models.predict(tokens, placed, at, _read_score(score, tokens, at, models))
        return torch.zeros_like(tokens.patch_indices).masked_scatter(at, to_units(values, SCORES[score].resolution))

    order, score_units = rank_in_rounds(units, batch, positions, rounds, device)
    return Ranking(order, score_units, score, rounds, line_of(models.lines, score, rounds))


def _read_score(score: str, tokens: Tokens, at: Tensor, models: Models) -> Read:
    """What a score reads off q where (B, N) `at` is True: (n,) float32 in the score's unit."""
    indices = tokens.patch_indices[at]
    if score == "distortion":
        return partial(read_distortion, indices=indices, codes=models.codes)
    return partial(read_surprisal, indices=indices) if score == "surprisal" else read_entropy


def patch_errors(tokens: Tokens, kept_mask: Tensor, images: Tensor, models: Models) -> Tensor:
    """(B, N) float32: mean squared error of each patch as decoded from the tokens where (B, N) `kept_mask` is True.

    Args:
        tokens: every patch token known.
        kept_mask: (B, N) bool.
        images: (B, 3, H, W) floats in [0, 1].
        models: whose decoder is asked.
    """
    pictures = models.decode(replace(tokens, kept_mask=kept_mask))
    return patchify((pictures.float() - images).square(), models.patch_size).mean(dim=-1)


def _fixed_order(tokens: Tokens, score: str, patch_size: int, images: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) positions and (B, N) score units of a score that asks no entropy model."""
    (batch, positions), device = tokens.patch_indices.shape, tokens.patch_indices.device
    if score == "pixel_entropy":
        if images is None:
            raise ValueError("score is 'pixel_entropy'; expected the images too")
        found = filtering.pixel_entropy_units(images, patch_size)
        return rank_in_rounds(lambda placed: found, batch, positions, 1, device)
    if score == "random":
        order = filtering.random_order(tokens.global_indices, positions)
    else:
        order = filtering.grid_order(positions).to(device).expand(batch, -1)
    return order, torch.zeros_like(order)


def training_places(tokens: Tokens, images: Tensor, wanted: Wanted, mix: KeptSetConfig, models: Models) -> Tensor:
    """(B, N) int64: the place of every position in its image's ranking, 0 where no prefix of a ranking was drawn.

    One round; with the order `filter`, each sample is ranked by surprisal or by entropy, as `wanted` says, so that both
    can be used later.

    Args:
        tokens: every patch token known.
        images: (B, 3, H, W) floats in [0, 1].
        wanted: what was drawn for each sample.
        mix: names the order.
        models: that a ranking asks.
    """
    places = torch.zeros_like(tokens.patch_indices)
    needed = wanted.filtered | wanted.own_set
    if not bool(needed.any()):
        return places
    part = tokens[needed]
    at, values = torch.ones_like(part.kept_mask), None
    if mix.order == "error":
        values = patch_errors(part, ~at, images[needed], models)
    elif mix.order in BY_MODEL:
        either = mix.order == "filter"
        read = _read_either(part, wanted.by_entropy[needed]) if either else _read_score(mix.order, part, at, models)
        values = models.predict(part, ~at, at, read).view(at.shape)
    if values is None:
        order = _fixed_order(part, mix.order, models.patch_size, images[needed])[0]
    else:
        units = to_units(values, SCORES["surprisal" if mix.order == "filter" else mix.order].resolution)
        order = units.argsort(dim=1, descending=True, stable=True)
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
