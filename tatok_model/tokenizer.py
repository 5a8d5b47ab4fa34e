"""TaTok: an image becomes M global tokens and N patch tokens, and an image again.

    tokenizer = TaTok.from_pretrained("path/to/checkpoint")
    tokens = tokenizer.encode(images)      # (B, 3, H, W) in [0, 1] or uint8
    pictures = tokenizer.decode(tokens)    # (B, 3, H, W) in [0, 1]

One transformer reads the patches together with M learnable global tokens; both kinds are quantized; a second one
writes every patch from the global tokens and the patch tokens that were kept. Where a patch token is missing the
decoder sees a learned mask token, so any kept set can be decoded. `patch_only` is M = 0, `global_only` keeps no patch
token.

Shapes: B images, H = W image side, N patch positions, M global tokens, K codebook entries, D width, P patch side.
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from einops import repeat
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from tatok_model.config import SIZES, TokenizerConfig, read_config
from tatok_model.quantizer import build_quantizer
from tatok_model.tokens import Tokens
from tatok_model.vit import CHANNELS, Transformer, init_linear, patchify, positions, unpatchify


class Reconstruction(NamedTuple):
    """What one training step needs of a forward pass."""

    images: Tensor  # (B, 3, H, W), about [0, 1], not clipped: a clipped value would carry no gradient
    tokens: Tokens
    commitment_loss: Tensor  # scalar


class TaTok(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="tatok",
    tags=["image-tokenizer"],
):
    """The tokenizer.

    Source: arXiv 2605.16384; the mask token at empty decoder slots follows TiTok (arXiv 2406.07550).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, encoder_layers, decoder_layers, heads = SIZES[config.size]
        pixels = config.patch_size**2 * CHANNELS
        m, n = config.global_tokens, config.patch_positions

        self.patch_embedding = nn.Linear(pixels, width)
        self.global_tokens = positions(m, width)
        self.encoder_positions = positions(n, width)
        self.encoder = Transformer(width, encoder_layers, heads)

        self.patch_quantizer = build_quantizer(width, config) if config.patch_tokens else None
        shared = config.shared_codebook and self.patch_quantizer is not None
        self.global_quantizer = build_quantizer(width, config) if m and not shared else None

        self.global_positions = positions(m, width)
        self.decoder_positions = positions(n, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.decoder = Transformer(width, decoder_layers, heads)
        self.to_pixels = nn.Linear(width, pixels)
        init_linear(self.patch_embedding)
        init_linear(self.to_pixels)

    def forward(self, images: Tensor, kept_mask: Tensor | None = None) -> Reconstruction:
        """Encode, quantize, drop what `kept_mask` drops, decode; with gradients.

        Args:
            images: (B, 3, H, W) floats in [0, 1].
            kept_mask: (B, N) bool, True means kept; None keeps every patch token the configuration has.
        """
        global_features, patch_features = self._encode_features(images)
        losses = []
        global_embeddings, global_indices = global_features, self._no_indices(images, 0)
        if self.config.global_tokens:
            global_embeddings, global_indices, loss = self._global_quantizer(global_features)
            losses.append(loss)
        patch_embeddings, patch_indices = None, self._no_indices(images, self.config.patch_positions)
        if self.patch_quantizer is not None:
            patch_embeddings, patch_indices, loss = self.patch_quantizer(patch_features)
            losses.append(loss)
        tokens = Tokens(global_indices, patch_indices, self._kept_mask(images, kept_mask))
        pictures = self._decode_embeddings(global_embeddings, patch_embeddings, tokens.kept_mask)
        return Reconstruction(pictures, tokens, torch.stack(losses).sum())

    @torch.no_grad()
    def encode(self, images: Tensor, kept_mask: Tensor | None = None) -> Tokens:
        """Tokens of images.

        Args:
            images: (B, 3, H, W), uint8 or floats in [0, 1].
            kept_mask: (B, N) bool, True means kept; None keeps every patch token the configuration has.

        Raises:
            ValueError: images of another shape or type than the tokenizer was made for.
        """
        images = self._as_float(images)
        global_features, patch_features = self._encode_features(images)
        global_indices = self._no_indices(images, 0)
        if self.config.global_tokens:
            global_indices = self._global_quantizer(global_features)[1]
        patch_indices = self._no_indices(images, self.config.patch_positions)
        if self.patch_quantizer is not None:
            patch_indices = self.patch_quantizer(patch_features)[1]
        return Tokens(global_indices, patch_indices, self._kept_mask(images, kept_mask))

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Images of tokens: (B, 3, H, W) floats in [0, 1].

        Raises:
            ValueError: tokens of another length or with entries beyond the codebook.
        """
        self._check_tokens(tokens)
        batch = len(tokens)
        width = self.mask_token.shape[0]
        global_embeddings = self.mask_token.new_zeros(batch, 0, width)
        if self.config.global_tokens:
            global_embeddings = self._global_quantizer.embed(tokens.global_indices)
        patch_embeddings = None
        if self.patch_quantizer is not None:
            # What was dropped may hold anything: look up entry 0 there, the mask token replaces it.
            patch_embeddings = self.patch_quantizer.embed(tokens.patch_indices.where(tokens.kept_mask, 0))
        return self._decode_embeddings(global_embeddings, patch_embeddings, tokens.kept_mask).float().clamp(0, 1)

    def reconstruct(self, images: Tensor, kept_mask: Tensor | None = None) -> Tensor:
        """`decode(encode(images))`: (B, 3, H, W) floats in [0, 1]."""
        return self.decode(self.encode(images, kept_mask))

    def _encode_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] -> (B, M, D) and (B, N, D) embeddings before quantization."""
        patches = patchify(images * 2 - 1, self.config.patch_size)  # (B, N, P*P*3) in [-1, 1]
        x = self.patch_embedding(patches) + self.encoder_positions  # (B, N, D)
        global_tokens = repeat(self.global_tokens, "m d -> b m d", b=len(images))  # (B, M, D)
        x = self.encoder(torch.cat([global_tokens, x], dim=1))  # (B, M + N, D)
        return x[:, : self.config.global_tokens], x[:, self.config.global_tokens :]

    def _decode_embeddings(self, global_embeddings: Tensor, patch_embeddings: Tensor | None, kept: Tensor) -> Tensor:
        """(B, M, D), (B, N, D) or None, (B, N) bool -> (B, 3, H, W)."""
        slots: Tensor = repeat(self.mask_token, "d -> b n d", b=len(kept), n=kept.shape[1])  # (B, N, D)
        if patch_embeddings is not None:
            slots = patch_embeddings.where(kept[..., None], slots)
        x = torch.cat([global_embeddings + self.global_positions, slots + self.decoder_positions], dim=1)
        x = self.decoder(x)[:, self.config.global_tokens :]  # (B, N, D)
        return (unpatchify(self.to_pixels(x), self.config.patch_size) + 1) / 2  # (B, 3, H, W)

    @property
    def _global_quantizer(self) -> Any:
        return self.patch_quantizer if self.global_quantizer is None else self.global_quantizer

    def _no_indices(self, images: Tensor, length: int) -> Tensor:
        return torch.zeros(len(images), length, dtype=torch.int64, device=images.device)

    def _kept_mask(self, images: Tensor, kept_mask: Tensor | None) -> Tensor:
        shape = (len(images), self.config.patch_positions)
        if not self.config.patch_tokens:
            if kept_mask is not None and kept_mask.any():
                raise ValueError("kept_mask keeps patch tokens; expected none: this tokenizer has only global tokens")
            return torch.zeros(shape, dtype=torch.bool, device=images.device)
        if kept_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=images.device)
        if kept_mask.shape != shape or kept_mask.dtype != torch.bool:
            raise ValueError(f"kept_mask is {kept_mask.dtype} {tuple(kept_mask.shape)}; expected bool {shape}")
        return kept_mask

    def _as_float(self, images: Tensor) -> Tensor:
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (CHANNELS, side, side):
            raise ValueError(f"images are {tuple(images.shape)}; expected (B, {CHANNELS}, {side}, {side})")
        if images.dtype == torch.uint8:
            return images.float() / 255
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected uint8 or floats in [0, 1]")
        return images

    def _check_tokens(self, tokens: Tokens) -> None:
        lengths = tokens.global_indices.shape[1], tokens.patch_indices.shape[1]
        expected = self.config.global_tokens, self.config.patch_positions
        if lengths != expected:
            raise ValueError(
                f"tokens hold {lengths[0]} global tokens and {lengths[1]} patch positions; "
                f"expected {expected[0]} and {expected[1]}"
            )
        if not self.config.patch_tokens and tokens.kept_mask.any():
            raise ValueError("tokens keep patch tokens; expected none: this tokenizer has only global tokens")
        kept = tokens.patch_indices[tokens.kept_mask]
        for indices in (tokens.global_indices, kept):
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.config.codebook_size:
                raise ValueError(
                    f"tokens hold entries from {int(indices.min())} to {int(indices.max())}; "
                    f"expected 0 to {self.config.codebook_size - 1}"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a checkpoint folder, or a model of the Hugging Face hub named `owner/name`.

        Raises:
            FileNotFoundError: the text is not a hub id and no such folder exists, or a folder lacks a file.
            ValueError: the folder's config.json is not one of a tokenizer.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            read_config(path)
        elif len(path.parts) != 2 or str(path)[0] in "./~" or path.parent.exists():
            raise FileNotFoundError(
                f"checkpoint {str(path)!r} does not exist; expected a folder or a hub id owner/name"
            )
        return super().from_pretrained(str(path), **kwargs)
