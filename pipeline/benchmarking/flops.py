"""Floating point operations of a training step, and what share of a GPU's they are.

Counted are matrix products of encoder, decoder and entropy model, two operations for each multiplication; the backward
pass has twice those of the forward pass. Norms, activations and the optimiser are left out, as is usual: model FLOP
utilisation, arXiv 2204.02311, appendix B.

Shapes: L sequence length, D width, K codebook entries, N patch positions, M global tokens.
"""

from tatok_model.config import SIZES, TokenizerConfig
from tatok_model.vit import CHANNELS

FORWARD_AND_BACKWARD = 3  # forward passes' worth
DENSE_BF16 = {  # operations per second without sparsity, by what the name of a GPU contains; the vendor's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def training_flops(config: TokenizerConfig) -> float:
    """Operations of a training step for each image; q's own ranking pass is not counted."""
    return FORWARD_AND_BACKWARD * forward_flops(config)


def forward_flops(config: TokenizerConfig) -> float:
    """Operations of a forward pass for an image of which everything is read, kept and predicted."""
    width, encoder_layers, decoder_layers, _ = SIZES[config.size]
    m, n = config.global_tokens, config.patch_positions
    pixels = config.patch_size**2 * CHANNELS
    total = 2.0 * (2 * n * pixels * width)  # patches in, pixels out
    total += transformer_flops(m + n, width, encoder_layers + decoder_layers)
    total += 2.0 * config.max_tokens * config.codebook_size * _code_dim(config)  # nearest entries
    total += 2 * (2.0 * config.max_tokens * width * _code_dim(config))  # to code vectors and back
    if config.has_entropy_model:
        seen = n + (m if config.entropy_globals else 0)
        total += 2.0 * seen * _code_dim(config) * config.entropy_width
        total += transformer_flops(seen, config.entropy_width, config.entropy_layers)
        total += 2.0 * n * config.entropy_width * config.codebook_size
    return total


def transformer_flops(length: int, width: int, layers: int) -> float:
    """Of L embeddings through blocks: 12 D^2 weights for each embedding, and L^2 D twice for scores and mixing."""
    return 2.0 * layers * (12 * length * width**2 + 2 * length**2 * width)


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name; None: not in the table."""
    return next((peak for name, peak in DENSE_BF16.items() if name in gpu), None)


def _code_dim(config: TokenizerConfig) -> int:
    return config.codebook_dim if config.quantizer == "vq" else len(config.fsq_levels)
