"""The transformer of the generator: RMS norms, rotary positions in two dimensions, SwiGLU, attention with a cache.

`rotary` is the rotary position of each embedding: 0, no rotation, for class and global tokens, and p + 1, rotation by
row and column, for patch position p.

Shapes: B sequences, L embeddings of each, D width, H heads, E = D / H, N patch positions.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BASE = 100.0  # of the rotary frequencies: grids have tens of rows, not thousands
EPS = 1e-6


class Rotation(nn.Module):
    """Rotary positions: the first half of each head rotates by the row, the second by the column.

    Source: RoFormer (arXiv 2104.09864), its axial form in two dimensions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid_size: int, head_width: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(f"head_width is {head_width}; expected a multiple of 4: two axes of pairs")
        quarter = head_width // 4
        frequencies = BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        steps = torch.arange(1, grid_size + 1, dtype=torch.float64)[:, None] * frequencies  # (side, E/4)
        rows, columns = steps.repeat_interleave(grid_size, 0), steps.repeat(grid_size, 1)  # (N, E/4) both
        angles = torch.cat([torch.zeros(1, 2 * quarter), torch.cat([rows, columns], 1)])  # (1 + N, E/2)
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def of(self, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, 1, L, E/2) both, of (B, L) rotary positions."""
        return self.cos[rotary][:, None], self.sin[rotary][:, None]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, L, E) rotated by the angles of `Rotation.of`."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Cache:
    """Keys and values of all embeddings so far, for every layer, in memory allocated once for `capacity` of them."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers, self.capacity = layers, capacity
        self.length = 0  # embeddings stored in every layer
        self._stored: Tensor | None = None  # (layers, 2, B, H, capacity, E)

    def put(self, layer: int, at: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, E) keys and values at index `at`, and return those up to it, (B, H, at + 1, E) both."""
        if self._stored is None:
            batch, heads, _, width = keys.shape
            self._stored = keys.new_zeros(self.layers, 2, batch, heads, self.capacity, width)
        stored = self._stored[layer]
        stored[0, :, :, at], stored[1, :, :, at] = keys[:, :, 0], values[:, :, 0]
        return stored[0, :, :, : at + 1], stored[1, :, :, : at + 1]

    def keep(self, rows: Tensor) -> None:
        """Remove all sequences but `rows`, indices into the batch."""
        if self._stored is not None:
            self._stored = self._stored[:, :, rows]


class CausalAttention(nn.Module):
    """Causal attention of queries to keys, which may come from another sequence of the same length."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        x_rotation: tuple[Tensor, Tensor],
        source_rotation: tuple[Tensor, Tensor],
        memory: tuple[Cache, int, int] | None,
    ) -> Tensor:
        """The attention output for each query.

        Args:
            x: (B, L, D) for the queries; with L = 1 it attends to the whole source, else causally.
            source: (B, L', D) for keys and values; L' = 1 with a memory.
            x_rotation: from `Rotation.of`.
            source_rotation: likewise.
            memory: cache, layer, and the index at which the source's one embedding is stored; None: no cache.

        Returns:
            (B, L, D).
        """
        q = rotate(rearrange(self.to_q(x), "b l (h e) -> b h l e", h=self.heads), x_rotation)
        k, v = rearrange(self.to_kv(source), "b l (two h e) -> two b h l e", two=2, h=self.heads)
        k = rotate(k, source_rotation)
        if memory is not None:
            cache, layer, at = memory
            k, v = cache.put(layer, at, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.to_out(rearrange(mixed, "b h l e -> b l (h e)"))


class SwiGLU(nn.Module):
    """A gated MLP with about as many parameters as a plain one of hidden width 4 D (arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 32) * 32  # 8 / 3 D, rounded up to a multiple of 32
        self.to_gate = nn.Linear(width, hidden, bias=False)
        self.to_hidden = nn.Linear(width, hidden, bias=False)
        self.to_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.to_out(F.silu(self.to_gate(x)) * self.to_hidden(x))


class CausalBlock(nn.Module):
    """A pre-norm transformer block: attention and a SwiGLU, both residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=EPS)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        x_rotation: tuple[Tensor, Tensor],
        memory: tuple[Cache, int, int] | None = None,
        source: Tensor | None = None,
        source_rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D); without a source the sequence attends to itself. See `CausalAttention`."""
        normed = self.norm1(x)
        source = normed if source is None else source
        rotation = x_rotation if source_rotation is None else source_rotation
        x = x + self.dropout(self.attention(normed, source, x_rotation, rotation, memory))
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module, layers: int) -> None:
    """Normal weights of standard deviation 0.02, scaled down by depth at the end of residual branches (as GPT-2)."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if name.endswith("to_out.weight") else 0.02)
