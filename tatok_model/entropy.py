"""The entropy model q(c_i | g, c_S): what the kept codes say of a patch code that is not kept.

A small bidirectional transformer over the code vectors of the tokenizer, without gradients to them: global codes, and
at every patch position the code if it is given, else a learned mask. One pass gives q at all positions at once for any
given set S. A code never reaches its own prediction, because an open position holds the mask.

Shapes: B images, M global tokens, N patch positions, K codebook entries, d code width, W width, n positions asked for.
"""

import torch
from torch import Tensor, nn

from tatok_model.vit import Transformer, init_linear, positions

HEAD_WIDTH = 32


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
        patches = self.from_patch_codes(patch_codes.detach())  # (B, N, W)
        x = torch.where(given_mask[..., None], patches, self.open_position.to(patches.dtype))
        if self.global_tokens:
            known = self.from_global_codes(global_codes.detach())  # (B, M, W)
            if without_globals is not None:
                known = torch.where(without_globals[:, None, None], self.no_globals.to(known.dtype), known)
            x = torch.cat([known, x], dim=1)  # (B, M + N, W)
        hidden = self.transformer(x + self.positions)[:, self.global_tokens :]  # (B, N, W)
        return self.to_logits(hidden[at])
