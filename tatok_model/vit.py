"""The transformer that encoder and decoder share: pre-norm blocks over a sequence of embeddings.

Shapes: B images, L sequence length, D width, N patch positions, C colour channels (3), P patch side in pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHANNELS = 3
CPU_PARTS = 4  # of a batch, by length
CPU_PRODUCT = 2**20  # numbers, 4 MiB: smaller products are slower, larger ones no faster
GPU_PRODUCT = 2**25  # 128 MiB: a GPU wants much work at once


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}; expected a multiple of heads, {heads}")
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); (B, L) bool `key_mask` is True where a key may be looked at, None: everywhere."""
        return self.to_out(self.mix(x, key_mask))

    def mix(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Mixed values of all heads before the last projection, shapes as `forward`."""
        return merge_heads(attend(*self.split(x), None if key_mask is None else key_mask[:, None, None, :]))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head: (B, L, D) -> (B, H, L, h) three times."""
        q, k, v = rearrange(self.to_qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return q, k, v


def merge_heads(mixed: Tensor) -> Tensor:
    """(B, H, L, h) -> (B, L, D), what `Attention.to_out` wants."""
    return rearrange(mixed, "b h l d -> b l (h d)")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, h) three times, and (B, 1, 1, L) bool, True where a key may be looked at -> (B, H, L, h)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # twice as fast as the fused kernel, with its gradients
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1, q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)


class Block(nn.Module):
    """Attention and a four times wider MLP, each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `key_mask` as `Attention`'s."""
        return self.finish(x, self.attention.mix(self.norm1(x), key_mask))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, L, h) each: the first half of `forward`, for an attention of one's own."""
        return self.attention.split(self.norm1(x))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The second half of `forward`, place by place: (..., D) that came in and (..., D) mixed values -> (..., D)."""
        x = x + self.attention.to_out(mixed)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Residual branches start small, by 1 / sqrt(2 x layers) as in GPT-2, so that depth does not change the scale.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(init_linear)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.to_out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @property
    def layers(self) -> list[Block]:
        """The blocks in their order."""
        return list(self.blocks)  # type: ignore[arg-type]


def run_on_present(blocks: Iterable[nn.Module], x: Tensor, present: Tensor) -> Tensor:
    """Run blocks on the tokens that are there, as if the others did not exist.

    Tokens are gathered to the front and padded to the longest sequence. On a CPU, sequences of like length are run
    together, so that little is padded; a GPU wants one pass.

    Args:
        blocks: of type `Block`.
        x: (B, L, D).
        present: (B, L) bool, True where there is a token.

    Returns:
        (B, L, D); what stands at places without a token means nothing.
    """
    if not len(x):
        return x
    counts = present.sum(dim=1)  # (B,)
    places = present.int().argsort(dim=1, descending=True, stable=True)  # (B, L), those of the tokens first
    shortest, longest = (int(count) for count in counts.aminmax())
    parts = CPU_PARTS if x.device.type == "cpu" and shortest != longest else 1
    for rows in counts.argsort(stable=True).chunk(parts):
        length = max(int(counts[rows].max()), 1)  # a parameter that no gradient reaches would stop DDP
        at = places[rows, :length, None].expand(-1, -1, x.shape[-1])  # (b, l, D)
        tokens = x[rows].gather(1, at)
        # A sequence of none looks at its first pad, because attention to nothing is NaN.
        mask = torch.arange(length, device=x.device) < counts[rows, None].clamp(min=1)  # (b, l)
        key_mask = None if bool(mask.all()) else mask
        for block in blocks:
            tokens = block(tokens, key_mask)
        x = x.index_copy(0, rows, x[rows].scatter(1, at, tokens.to(x.dtype)))
    return x


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows of a product (rows, columns) to make at a time where only a little is wanted of each."""
    return max(1, (CPU_PRODUCT if device.type == "cpu" else GPU_PRODUCT) // columns)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of floats depend on how they are shared out: torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def init_linear(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, zero biases: the ViT convention."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def positions(length: int, width: int) -> nn.Parameter:
    """(length, D) learned embeddings, one for each place of a sequence."""
    return nn.Parameter(torch.randn(length, width) * 0.02)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches in raster order: (B, C, H, W) -> (B, N, P*P*C)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put a square grid of patches back together: (B, N, P*P*C) -> (B, C, H, W)."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch_size, q=patch_size)
