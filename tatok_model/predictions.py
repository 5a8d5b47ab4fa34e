"""What is read off q's predictions without ever holding all of them: logits are made for some rows at a time.

The logits of every position asked for, (n, K), would be the largest tensor of a training step, and of another size at
every step, because n is what the kept sets leave open: allocators then keep far more memory than any step needs.
Gradients are exact; the backward pass makes the logits again.

Shapes: n positions asked for, W width, K codebook entries, d code width.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.filtering import conditional_entropy, surprisal

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
