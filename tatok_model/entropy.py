"""The entropy model q(c_i | g, c_S): what the kept codes say of a patch code that is not kept.

A small bidirectional transformer over the code vectors of the tokenizer, without gradients to them: global codes, and
at every patch position the code if it is given, else a learned mask. One pass gives q at all positions at once for any
given set S. A code never reaches its own prediction, because an open position holds the mask.

`EntropyModel.hidden` is the model; `hidden_without_gradients` gives the same up to rounding in fewer operations. The
head makes (n, K) logits of the n hidden states asked for. The `read_...` functions at the end make what filtering,
decoding and the loss want of q some rows at a time, so that the logits of a whole batch never exist at once.

Shapes: B images, M global tokens, N patch positions, K codebook entries, d code width, W width, n positions asked for.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.filtering import conditional_entropy, surprisal
from tatok_model.vit import Block, Transformer, init_linear, merge_heads, positions, rows_at_once

HEAD_WIDTH = 32

Read = Callable[[Tensor, nn.Linear], Any]  # of (n, W) hidden states, and the head that makes (n, K) logits of them


class EntropyModel(nn.Module):
    """Predicts patch codes from global codes and any set of given patch codes.

    Args:
        code_dim: d, width of a code vector.
        global_tokens: M; 0 makes a model of the patch codes alone.
        patch_positions: N.
        codebook_size: K of the patch codes.
        width: W, a multiple of 32.
        layers: transformer blocks.
    """

    def __init__(
        self, code_dim: int, global_tokens: int, patch_positions: int, codebook_size: int, width: int, layers: int
    ) -> None:
        super().__init__()
        self.global_tokens = global_tokens
        if global_tokens:  # parameters that no loss reaches would stop DDP
            self.from_global_codes = nn.Linear(code_dim, width)
            init_linear(self.from_global_codes)
            self.no_globals = nn.Parameter(torch.randn(width) * 0.02)
        self.from_patch_codes = nn.Linear(code_dim, width)
        self.positions = positions(global_tokens + patch_positions, width)
        self.open_position = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = Transformer(width, layers, width // HEAD_WIDTH)
        self.to_logits = nn.Linear(width, codebook_size)
        for layer in (self.from_patch_codes, self.to_logits):
            init_linear(layer)

    def forward(
        self,
        global_codes: Tensor,
        patch_codes: Tensor,
        given_mask: Tensor,
        at: Tensor,
        without_globals: Tensor | None = None,
    ) -> Tensor:
        """Unnormalised log q at the positions asked for.

        Args:
            global_codes: (B, M, d) code vectors.
            patch_codes: (B, N, d) code vectors; what stands at open positions is not looked at.
            given_mask: (B, N) bool, True where the patch code is given.
            at: (B, N) bool, True where the prediction is wanted: n positions in all.
            without_globals: (B,) bool, True for images whose global codes are hidden; None: none.

        Returns:
            (n, K) in the order of the images, then of the positions.
        """
        return self.to_logits(self.hidden(global_codes, patch_codes, given_mask, at, without_globals))

    def hidden(
        self,
        global_codes: Tensor,
        patch_codes: Tensor,
        given_mask: Tensor,
        at: Tensor,
        without_globals: Tensor | None = None,
    ) -> Tensor:
        """(n, W), what `to_logits` predicts from; arguments as `forward`."""
        x = self.embed(global_codes, patch_codes, given_mask, without_globals)
        return self.transformer(x)[:, self.global_tokens :][at]

    def embed(
        self, global_codes: Tensor, patch_codes: Tensor, given_mask: Tensor, without_globals: Tensor | None
    ) -> Tensor:
        """(B, M + N, W), what the transformer reads; arguments as `forward`."""
        patches = self.from_patch_codes(patch_codes.detach())  # (B, N, W)
        x = torch.where(given_mask[..., None], patches, self.open_position.to(patches.dtype))
        if self.global_tokens:
            x = torch.cat([self.embed_globals(global_codes, without_globals), x], dim=1)
        return x + self.positions

    def embed_globals(self, global_codes: Tensor, without_globals: Tensor | None = None) -> Tensor:
        """(B, M, W) of (B, M, d) code vectors, still without their positions."""
        known = self.from_global_codes(global_codes.detach())
        if without_globals is None:
            return known
        return torch.where(without_globals[:, None, None], self.no_globals.to(known.dtype), known)


@torch.no_grad()
def hidden_without_gradients(
    model: EntropyModel,
    global_codes: Tensor,
    patch_codes: Tensor,
    given_mask: Tensor,
    at: Tensor,
    without_globals: Tensor | None = None,
) -> Tensor:
    """`model.hidden` in fewer operations, equal up to rounding: (n, W).

    The last block runs for the positions asked for alone. Where no code is given and all are asked for, as in a
    ranking's first round, the first block looks at the open patches once for the whole batch.
    """
    if without_globals is None and bool(at.all()) and not bool(given_mask.any()):
        return _hidden_before_any(model, global_codes)
    *blocks, last = model.transformer.layers
    x = model.embed(global_codes, patch_codes, given_mask, without_globals)
    for block in blocks:
        x = block(x)
    mixed, patches = _mix_patches(last, x, model.global_tokens), x[:, model.global_tokens :]
    return model.transformer.norm(last.finish(patches[at], mixed[at]))


def _hidden_before_any(model: EntropyModel, global_codes: Tensor) -> Tensor:
    """(B * N, W) at all positions while no patch code is given, of (B, M, d) global code vectors.

    Open patches are then the same in every image. For the patches of an image they are one more key beside its global
    codes: with the logarithm of their summed weights as its score, and their mean as its value.
    """
    m = model.global_tokens
    first, *others = model.transformer.layers
    open_patches = (model.open_position + model.positions[m:])[None]  # (1, N, W)
    query, key, value = first.split(open_patches)  # (1, H, N, h) each
    scores = (query @ key.mT).float() * key.shape[-1] ** -0.5  # (1, H, N, N)
    mixed = scores.softmax(-1).to(value.dtype) @ value  # (1, H, N, h)
    if m:
        known = model.embed_globals(global_codes) + model.positions[:m]  # (B, M, W)
        own_query, own_key, own_value = first.split(known)  # (B, H, M, h) each
        own_scores = (query @ own_key.mT).float() * key.shape[-1] ** -0.5  # (B, H, N, M)
        total = scores.logsumexp(-1, keepdim=True).expand(len(known), -1, -1, -1)  # (B, H, N, 1)
        weights = torch.cat([own_scores, total], dim=-1).softmax(-1).to(value.dtype)  # (B, H, N, M + 1)
        mixed = weights[..., :-1] @ own_value + weights[..., -1:] * mixed
    x = first.finish(open_patches, merge_heads(mixed))  # (B, N, W); (1, N, W) where nothing tells images apart
    if others:
        if m:
            keys, values = (
                torch.cat([own, shared.expand(len(known), -1, -1, -1)], dim=2)
                for own, shared in ((own_key, key), (own_value, value))
            )
            own = merge_heads(F.scaled_dot_product_attention(own_query, keys, values))
            x = torch.cat([first.finish(known, own), x], dim=1)  # (B, M + N, W)
        for block in others[:-1]:
            x = block(x)
        x = others[-1].finish(x[:, m:], _mix_patches(others[-1], x, m))
    return model.transformer.norm(x).expand(len(global_codes), -1, -1).flatten(0, 1)


def _mix_patches(block: Block, x: Tensor, global_tokens: int) -> Tensor:
    """A block's attention, asked by the patches alone: (B, M + N, W) -> (B, N, W) mixed values."""
    query, key, value = block.split(x)
    return merge_heads(F.scaled_dot_product_attention(query[:, :, global_tokens:], key, value))


def read_surprisal(hidden: Tensor, head: nn.Linear, indices: Tensor) -> Tensor:
    """-log2 q of the (n,) true codes, in bits, with gradients: (n,) float32. `head` makes q of (n, W) `hidden`."""
    if torch.is_grad_enabled():
        bits: Tensor = _Read.apply(hidden, head.weight, head.bias, indices, None)[0]
        return bits
    parts = [surprisal(head(hidden[rows]), indices[rows]) for rows in _parts(len(hidden), head.weight)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def read_surprisal_and_expected(
    hidden: Tensor, head: nn.Linear, indices: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `read_surprisal`, and (n, d) float32 expected code vectors under q, without gradients.

    `codes` are the (K, d) code vectors; None: d is 0.
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
    """
    return (codes[indices].float() - read_expected(hidden, head, codes)).square().sum(-1)


@torch.no_grad()
def read_entropy(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Entropy of q in bits, without gradients: (n,) float32."""
    parts = [conditional_entropy(head(hidden[rows])) for rows in _parts(len(hidden), head.weight)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _Read(torch.autograd.Function):
    """Surprisal, with gradients, and expected codes, without."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, indices: Tensor, codes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        n = len(hidden)
        codes = None if codes is None else codes.float()
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
    rows = rows_at_once(len(weight), weight.device)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
