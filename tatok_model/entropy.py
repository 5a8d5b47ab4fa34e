"""The entropy model q(c_i | g, c_S): what the kept codes say of a patch code that is not kept.

A small bidirectional transformer over the code vectors of the tokenizer, without gradients to them: global codes, and
at every patch position the code if it is given, else a learned mask. One pass gives q at all positions at once for any
given set S. A code never reaches its own prediction, because an open position holds the mask.

Shapes: B images, M global tokens, N patch positions, K codebook entries, d code width, W width, n positions asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tatok_model.vit import Block, Transformer, init_linear, positions

HEAD_WIDTH = 32
Read = Callable[[Tensor, nn.Linear], Any]  # of (n, W), and the layer that makes (n, K) logits of it


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
        read: Read | None = None,
    ) -> Any:
        """Unnormalised log q at the positions asked for, or what `read` makes of it.

        Args:
            global_codes: (B, M, d) code vectors.
            patch_codes: (B, N, d) code vectors; what stands at open positions is not looked at.
            given_mask: (B, N) bool, True where the patch code is given.
            at: (B, N) bool, True where the prediction is wanted: n positions in all.
            without_globals: (B,) bool, True for images whose global codes are hidden; None: none.
            read: one of `predictions`; without gradients only what it needs is computed then.

        Returns:
            (n, K) in the order of the images, then of the positions; or what `read` returns.
        """
        patches = self.from_patch_codes(patch_codes.detach())  # (B, N, W)
        x = torch.where(given_mask[..., None], patches, self.open_position.to(patches.dtype))
        if self.global_tokens:
            x = torch.cat([self._known(global_codes, without_globals), x], dim=1)  # (B, M + N, W)
        x = x + self.positions
        if read is None:  # streams are coded by these very numbers
            return self.to_logits(self.transformer(x)[:, self.global_tokens :][at])
        if torch.is_grad_enabled():
            return read(self.transformer(x)[:, self.global_tokens :][at], self.to_logits)
        for block in self._blocks[:-1]:
            x = block(x)
        return read(self._asked(x, at), self.to_logits)

    @torch.no_grad()
    def before_any(self, global_codes: Tensor, read: Read) -> Any:
        """What `read` makes of q at all positions while no patch code is given; `forward` in fewer operations.

        Open patches are then the same in every image, and the first block looks at them once for all. For the patches
        of an image they are one more key beside its global codes: with the logarithm of their summed weights as its
        score, and their mean as its value.

        Args:
            global_codes: (B, M, d) code vectors.
            read: of (B * N, W).
        """
        m, first, others = self.global_tokens, self._blocks[0], self._blocks[1:]
        open_patches = (self.open_position + self.positions[m:])[None]  # (1, N, W)
        query, key, value = _heads(first, open_patches)  # (1, H, N, h) each
        scores = (query @ key.mT).float() * key.shape[-1] ** -0.5  # (1, H, N, N)
        mixed = scores.softmax(-1).to(value.dtype) @ value  # (1, H, N, h)
        if m:
            known = self._known(global_codes, None) + self.positions[:m]  # (B, M, W)
            own_query, own_key, own_value = _heads(first, known)  # (B, H, M, h) each
            own_scores = (query @ own_key.mT).float() * key.shape[-1] ** -0.5  # (B, H, N, M)
            total = scores.logsumexp(-1, keepdim=True).expand(len(known), -1, -1, -1)  # (B, H, N, 1)
            weights = torch.cat([own_scores, total], dim=-1).softmax(-1).to(value.dtype)  # (B, H, N, M + 1)
            mixed = weights[..., :-1] @ own_value + weights[..., -1:] * mixed
        x = _finish(first, open_patches, _merge(mixed))  # (B, N, W); (1, N, W) where nothing tells images apart
        if others:
            if m:
                keys, values = (
                    torch.cat([own, shared.expand(len(known), -1, -1, -1)], dim=2)
                    for own, shared in ((own_key, key), (own_value, value))
                )
                own = _merge(F.scaled_dot_product_attention(own_query, keys, values))
                x = torch.cat([_finish(first, known, own), x], dim=1)  # (B, M + N, W)
            for block in others[:-1]:
                x = block(x)
            x = self._asked(x, None)
        else:
            x = self.transformer.norm(x)
        hidden = x.expand(len(global_codes), -1, -1).flatten(0, 1)  # (B * N, W)
        return read(hidden, self.to_logits)

    def _known(self, global_codes: Tensor, without_globals: Tensor | None) -> Tensor:
        """(B, M, W) of (B, M, d) code vectors."""
        known = self.from_global_codes(global_codes.detach())
        if without_globals is None:
            return known
        return torch.where(without_globals[:, None, None], self.no_globals.to(known.dtype), known)

    @property
    def _blocks(self) -> list[Block]:
        return list(self.transformer.blocks)  # type: ignore[arg-type]

    def _asked(self, x: Tensor, at: Tensor | None) -> Tensor:
        """What the last block and the norm make of the positions asked for: (B, M + N, W) -> (n, W), or (B, N, W)."""
        last = self._blocks[-1]
        query, key, value = _heads(last, x)
        mixed = _merge(F.scaled_dot_product_attention(query[:, :, self.global_tokens :], key, value))  # (B, N, W)
        x = x[:, self.global_tokens :]
        if at is not None:
            mixed, x = mixed[at], x[at]
        return self.transformer.norm(_finish(last, x, mixed))


def _heads(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block: (B, L, W) -> (B, H, L, h) each."""
    attention = block.attention
    query, key, value = rearrange(
        attention.to_qkv(block.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=attention.heads
    )
    return query, key, value


def _merge(mixed: Tensor) -> Tensor:
    return rearrange(mixed, "b h l d -> b l (h d)")


def _finish(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a block after its attention; `x` and `mixed` have a row for each position."""
    x = x + block.attention.to_out(mixed)
    return x + block.mlp(block.norm2(x))
