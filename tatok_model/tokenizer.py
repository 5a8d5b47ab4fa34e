"""TaTok: an image becomes M global tokens and N patch tokens, and an image again.

    tokenizer = TaTok.from_pretrained("path/to/checkpoint")
    tokens = tokenizer.encode(images)                    # (B, 3, H, W) in [0, 1] or uint8; all tokens
    tokens = tokenizer.rank(tokens)                      # order patch tokens by importance, once for all cuts
    short = tokens.cut("residual", 60.0)                 # drop at most 60 bits of each image
    pictures = tokenizer.decode(short)                   # (B, 3, H, W) in [0, 1]

One transformer reads the patches together with M learnable global tokens; both kinds are quantized. An entropy model
q(c_i | g, c_S) predicts each patch code from the global tokens and the kept patch codes. A second transformer decodes
every patch from the same tokens; where one was dropped it gets a learned mask token and the code vector that q
expects there, never the dropped code, so any kept set can be decoded. `patch_only` is M = 0, `global_only` keeps no
patch token.

Shapes: B images, H = W image side, N patch positions, M global tokens, K codebook entries, D width, d code width, P
patch side, n positions asked for.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import repeat
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from tatok_model.config import BY_MODEL, SIZES, KeptSetConfig, TokenizerConfig, read_config
from tatok_model.entropy import (
    EntropyModel,
    Read,
    hidden_without_gradients,
    read_expected,
    read_surprisal,
    read_surprisal_and_expected,
)
from tatok_model.filtering_rules import QUALITY_FILE, QualityLine, lines_json, read_lines
from tatok_model.kept_sets import KeptSets, Wanted, hide
from tatok_model.pretrained import Pretrained
from tatok_model.quantizer import build_quantizer
from tatok_model.ranking import Models, rank, training_places
from tatok_model.tokens import Tokens
from tatok_model.vit import CHANNELS, Transformer, init_linear, patchify, positions, run_on_present, unpatchify

TOLERANCE = 1e-3  # floats may be this far outside [0, 1]: resizing and half precision round


class Reconstruction(NamedTuple):
    """What one training step needs of a forward pass."""

    images: Tensor  # (B, 3, H, W), about [0, 1], not clipped: a clipped value would carry no gradient
    tokens: Tokens
    commitment_loss: Tensor  # scalar
    code_bits: Tensor  # (n,) surprisal of the codes that the entropy model predicted; its mean is that model's loss


class Codes(NamedTuple):
    """Quantized tokens of a batch."""

    global_embeddings: Tensor  # (B, M, D), with gradients
    patch_embeddings: Tensor | None  # (B, N, D), with gradients; None: global_only
    global_indices: Tensor  # (B, M) int64
    patch_indices: Tensor  # (B, N) int64
    commitment_loss: Tensor  # scalar


class TaTok(Pretrained, library_name="tatok", tags=["image-tokenizer"]):
    """The tokenizer; the file's docstring says how it works.

    `encode`, `rank`, `decode` and all that is built on them change no weight, not even in training mode; `forward`
    is for training and then updates the codebooks.

    Source: arXiv 2605.16384; the mask token at empty decoder slots follows TiTok (arXiv 2406.07550).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quality_lines: tuple[QualityLine, ...] = ()  # fitted by calibration, saved beside the weights
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

        self.entropy_model: EntropyModel | None = None
        if self.patch_quantizer is not None and config.has_entropy_model:
            sizes = config.codebook_size, config.entropy_width, config.entropy_layers
            seen = m if config.entropy_globals else 0
            self.entropy_model = EntropyModel(self.patch_quantizer.code_dim, seen, n, *sizes)
            if config.expected_fill:
                self.from_expected = nn.Linear(self.patch_quantizer.code_dim, width, bias=False)
                self.fill_gate = nn.Parameter(torch.zeros(width))  # training starts without the expected codes
                init_linear(self.from_expected)

    def forward(
        self,
        images: Tensor,
        kept_mask: Tensor | None = None,
        uniforms: Tensor | None = None,
        mix: KeptSetConfig | None = None,
        filtering_now: bool = True,
        reconstruct: bool = True,
    ) -> Reconstruction:
        """Encode, quantize, drop, decode; with gradients. The choice of what is kept carries none.

        Args:
            images: (B, 3, H, W) floats in [0, 1].
            kept_mask: (B, N) bool, True means kept; None keeps every patch token the configuration has, or what
                `uniforms` say.
            uniforms: (B, 4 + N) in [0, 1): draws each sample's kept set as `mix` says.
            mix: shares of the kinds of kept sets; goes with `uniforms`.
            filtering_now: whether `mix` may use the entropy model's ranking yet.
            reconstruct: False leaves the decoder out, to train the entropy model alone; the images come back as given.
        """
        codes = self._quantize(*self._encode_features(images))
        tokens, sets = Tokens(codes.global_indices, codes.patch_indices, self._kept_mask(images, kept_mask)), None
        if uniforms is not None and mix is not None:
            filtering_now = filtering_now and (self.entropy_model is not None or mix.order not in BY_MODEL)
            places = partial(self._training_places, tokens, images, mix) if self.config.patch_tokens else None
            tokens, sets = hide(tokens, uniforms, mix, filtering_now, places)
        fill, code_bits = self._training_fill(tokens, sets)
        pictures = images
        if reconstruct:
            pictures = self._decode_embeddings(codes.global_embeddings, codes.patch_embeddings, tokens, fill)
        return Reconstruction(pictures, tokens, codes.commitment_loss, code_bits)

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
            global_indices = self._global_quantizer.nearest(global_features)
        patch_indices = self._no_indices(images, self.config.patch_positions)
        if self.patch_quantizer is not None:
            patch_indices = self.patch_quantizer.nearest(patch_features)
        return Tokens(global_indices, patch_indices, self._kept_mask(images, kept_mask))

    @torch.no_grad()
    def rank(self, tokens: Tokens, score: str = "distortion", rounds: int = 1, images: Tensor | None = None) -> Tokens:
        """The same tokens, all kept, with the order in which to cut them.

        Args:
            tokens: of `encode`, with every patch token known.
            score: a key of `filtering_rules.SCORES`. `distortion`, `surprisal` and `entropy` come from the entropy
                model, `error` from the decoder; the others are controls.
            rounds: R, 1 to N: how often the unplaced positions are scored again, given those placed; controls have 1.
            images: (B, 3, H, W), uint8 or floats in [0, 1]; `error` and `pixel_entropy` look at them.

        Raises:
            ValueError: tokens that do not fit or are cut already, an unknown score, rounds outside their range, or a
                score whose model or images are missing.
        """
        self._check_tokens(tokens)
        models = self._models()
        if not bool(tokens.kept_mask.all()):
            raise ValueError("tokens are cut already; expected every patch token to be known")
        images = None if images is None else self._as_float(images)
        if images is not None and len(images) != len(tokens):
            raise ValueError(f"images are {len(images)} and tokens of {len(tokens)} images; expected as many")
        return replace(tokens, ranking=rank(tokens, score, rounds, models, images))

    @torch.no_grad()
    def code_lengths(self, tokens: Tokens, schedule: Tensor, without_globals: Tensor | None = None) -> Tensor:
        """Ideal code length of the kept patch codes under q, in bits: (B,) float64.

        Args:
            tokens: what is kept.
            schedule: (B, N) int64, the round in which each position is coded; codes of one round are predicted from
                the global tokens and the kept codes of earlier rounds. Dropped positions do not count.
            without_globals: (B,) bool, True for images whose global tokens are hidden.
        """
        total = torch.zeros(len(tokens), dtype=torch.float64, device=schedule.device)
        rounds = int(schedule[tokens.kept_mask].max()) + 1 if bool(tokens.kept_mask.any()) else 0
        for number in range(rounds):
            at = tokens.kept_mask & (schedule == number)
            if bool(at.any()):
                given = tokens.kept_mask & (schedule < number)
                read = partial(read_surprisal, indices=tokens.patch_indices[at])
                bits = self._predict(tokens, given, at, read, without_globals)
                total.index_add_(0, at.nonzero()[:, 0], bits.double())
        return total

    @torch.no_grad()
    def patch_logits(
        self, tokens: Tokens, given_mask: Tensor, at: Tensor, without_globals: Tensor | None = None
    ) -> Tensor:
        """Unnormalised log q of patch codes at the positions asked for.

        Args:
            tokens: their codes at `given_mask` and their global tokens are looked at, nothing else.
            given_mask: (B, N) bool, True where the patch code is given.
            at: (B, N) bool, True where q is wanted.
            without_globals: (B,) bool, True for images whose global tokens are hidden.

        Returns:
            (n, K) float32, in the order of the images, then of the positions.

        Raises:
            ValueError: this tokenizer has no entropy model.
        """
        return self._predict(tokens, given_mask, at, None, without_globals).float()

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Images of tokens: (B, 3, H, W) floats in [0, 1].

        Raises:
            ValueError: tokens of another length or with entries beyond the codebook.
        """
        self._check_tokens(tokens)
        global_embeddings = self.mask_token.new_zeros(len(tokens), 0, len(self.mask_token))
        if self.config.global_tokens:
            global_embeddings = self._global_quantizer.embed(tokens.global_indices)
        patch_embeddings = None
        if self.patch_quantizer is not None:
            # The index of a dropped token means nothing: look up entry 0, the mask token replaces it.
            patch_embeddings = self.patch_quantizer.embed(tokens.patch_indices.where(tokens.kept_mask, 0))
        fill = None if bool(tokens.kept_mask.all()) else self._fill_of(tokens)
        return self._decode_embeddings(global_embeddings, patch_embeddings, tokens, fill).float().clamp(0, 1)

    def code_vectors(self) -> tuple[Tensor | None, Tensor | None]:
        """(K, d) code vectors of the global and of the patch tokens' codebook; None for a kind that there is not."""
        global_codes = self._global_quantizer.codes() if self.config.global_tokens else None
        return global_codes, None if self.patch_quantizer is None else self.patch_quantizer.codes()

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

    def _quantize(self, global_features: Tensor, patch_features: Tensor) -> Codes:
        """(B, M, D) and (B, N, D) embeddings -> their codebook entries."""
        losses = []
        global_embeddings, global_indices = global_features, self._no_indices(global_features, 0)
        if self.config.global_tokens:
            global_embeddings, global_indices, loss = self._global_quantizer(global_features)
            losses.append(loss)
        patch_embeddings, patch_indices = None, self._no_indices(patch_features, self.config.patch_positions)
        if self.patch_quantizer is not None:
            patch_embeddings, patch_indices, loss = self.patch_quantizer(patch_features)
            losses.append(loss)
        return Codes(global_embeddings, patch_embeddings, global_indices, patch_indices, torch.stack(losses).sum())

    def _decode_embeddings(
        self, global_embeddings: Tensor, patch_embeddings: Tensor | None, tokens: Tokens, fill: Tensor | None
    ) -> Tensor:
        """(B, M, D) and (B, N, D) embeddings -> (B, 3, H, W); the (B, N, D) `fill` is added at dropped positions."""
        kept, counts = tokens.kept_mask, tokens.global_counts
        present = kept  # (B, N), then (B, M + N)
        if counts is not None:
            places = torch.arange(global_embeddings.shape[1], device=counts.device)
            received = places < counts[:, None]  # (B, M)
            global_embeddings = global_embeddings.where(received[..., None], self.mask_token)
            present = torch.cat([received, kept], dim=1)
        elif self.config.global_tokens:
            present = F.pad(kept, (self.config.global_tokens, 0), value=True)
        slots: Tensor = repeat(self.mask_token, "d -> b n d", b=len(kept), n=kept.shape[1])  # (B, N, D)
        if fill is not None:
            slots = slots + fill
        if patch_embeddings is not None:
            slots = patch_embeddings.where(kept[..., None], slots)
        x = torch.cat([global_embeddings + self.global_positions, slots + self.decoder_positions], dim=1)
        trunk, rest = self.decoder.blocks[: self.config.trunk_layers], self.decoder.blocks[self.config.trunk_layers :]
        if len(trunk):
            x = run_on_present(trunk, x, present).where(present[..., None], x)
        for block in rest:
            x = block(x)
        x = self.decoder.norm(x)[:, self.config.global_tokens :]  # (B, N, D)
        return (unpatchify(self.to_pixels(x), self.config.patch_size) + 1) / 2  # (B, 3, H, W)

    def _predict(
        self,
        tokens: Tokens,
        given_mask: Tensor,
        at: Tensor,
        read: Read | None = None,
        without_globals: Tensor | None = None,
    ) -> Any:
        """(n, K) logits of the entropy model, or what `read` makes of them; see `patch_logits`."""
        if self.entropy_model is None or self.patch_quantizer is None:
            raise ValueError("this tokenizer has no entropy model; expected one with entropy_layers above 0")
        # Where no code is given the index means nothing and may be outside the codebook: look up entry 0 instead.
        patch_codes = self.patch_quantizer.codes()[tokens.patch_indices.where(given_mask, 0)]
        global_codes = patch_codes[:, :0]
        if self.config.global_tokens:
            global_codes = self._global_quantizer.codes()[tokens.global_indices]
        inputs = global_codes, patch_codes, given_mask, at, without_globals
        if read is None:  # the codec needs these logits bit for bit, so they take one path only
            return self.entropy_model(*inputs)
        if torch.is_grad_enabled():
            return read(self.entropy_model.hidden(*inputs), self.entropy_model.to_logits)
        return read(hidden_without_gradients(self.entropy_model, *inputs), self.entropy_model.to_logits)

    def _models(self) -> Models:
        """What a ranking may call; ValueError where there are no patch tokens to rank."""
        codes = self.code_vectors()[1]
        if codes is None:
            raise ValueError("this tokenizer has only global tokens; expected one with patch tokens to rank")
        return Models(self._predict, self.decode, codes, self.config.patch_size, self.quality_lines)

    def _read_bits_and_expected(self, indices: Tensor) -> Read:
        """Reads (n,) surprisal of the true codes and, where the decoder fills, the (n, d) expected code vectors."""
        codes = self.patch_quantizer.codes() if self.config.expected_fill and self.patch_quantizer else None
        return partial(read_surprisal_and_expected, indices=indices, codes=codes)

    def _fill(self, expected: Tensor, at: Tensor) -> Tensor | None:
        """(n, d) expected codes at (B, N) positions -> (B, N, D): gated, 0 elsewhere; None: this decoder has none."""
        if not self.config.expected_fill:
            return None
        values = self.fill_gate * self.from_expected(expected.to(self.dtype))  # (n, D)
        return values.new_zeros(*at.shape, values.shape[-1]).masked_scatter(at[..., None], values)

    def _fill_of(self, tokens: Tokens) -> Tensor | None:
        """What q expects where tokens are dropped, given those that are kept."""
        if self.entropy_model is None or self.patch_quantizer is None or not self.config.expected_fill:
            return None
        at = ~tokens.kept_mask
        with torch.no_grad():
            expected = self._predict(
                tokens, tokens.kept_mask, at, partial(read_expected, codes=self.patch_quantizer.codes())
            )
        return self._fill(expected, at)

    def _training_fill(self, tokens: Tokens, sets: KeptSets | None) -> tuple[Tensor | None, Tensor]:
        """What q expects where tokens are dropped, and (n,) bits of the codes that it predicted, with gradients.

        Where no sets were drawn q is not trained: the bits are empty, and q only fills the dropped positions.
        """
        if sets is None or self.entropy_model is None:
            fill = None if bool(tokens.kept_mask.all()) else self._fill_of(tokens)
            return fill, self.mask_token.new_zeros(0)
        at = ~sets.given_mask
        read = self._read_bits_and_expected(tokens.patch_indices[at])
        code_bits, expected = self._predict(tokens, sets.given_mask, at, read, sets.without_globals)
        return self._fill(expected, at), code_bits

    @torch.no_grad()
    def _training_places(self, tokens: Tokens, images: Tensor, mix: KeptSetConfig, wanted: Wanted) -> Tensor:
        """(B, N) int64: the place of every position in its image's ranking, where a prefix of one is wanted."""
        places = training_places(tokens, images, wanted, mix, self._models())
        # Older releases of torch keep the weights that autocast has cast here, without gradients, for the pass that
        # needs them (pytorch#112583).
        torch.clear_autocast_cache()
        return places

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
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}; expected a tensor (B, {CHANNELS}, {side}, {side}); "
                "encode_picture takes paths, arrays and pictures of any size"
            )
        if images.ndim != 4 or images.shape[1:] != (CHANNELS, side, side):
            raise ValueError(f"images are {tuple(images.shape)}; expected (B, {CHANNELS}, {side}, {side})")
        if images.dtype == torch.uint8:
            return (images.float() / 255).to(self.dtype)
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected uint8 or floats in [0, 1]")
        check_range(images, "images have")
        return images.to(self.dtype)

    def _check_tokens(self, tokens: Tokens) -> None:
        if not isinstance(tokens, Tokens):
            raise ValueError(f"tokens are a {type(tokens).__name__}; expected Tokens, as encode makes them")
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
        """Load a tokenizer in the box by its name, a checkpoint folder, or a hub's model named `owner/name`.

        Raises:
            FileNotFoundError: the text is not a hub id and no such folder exists, or a folder lacks a file.
            ValueError: the folder's config.json is not one of a tokenizer, or its quality.json not calibration's.
        """
        name = pretrained_model_name_or_path
        if not name or not isinstance(name, str | Path):
            raise ValueError(f"checkpoint is {name!r}; expected a folder, a hub id or a name: {', '.join(boxed())}")
        path = Path(name)
        in_the_box = Path(__file__).parent / "weights" / path
        if len(path.parts) == 1 and not path.exists() and in_the_box.is_dir():
            path = in_the_box
        if path.is_dir():
            read_config(path)
        elif len(path.parts) != 2 or str(path)[0] in "./~" or path.parent.exists():
            raise FileNotFoundError(
                f"checkpoint {str(path)!r} does not exist; expected a folder, a hub id owner/name "
                f"or a name in the box: {', '.join(boxed())}"
            )
        model = super().from_pretrained(path, **kwargs)
        model.quality_lines = read_lines(path / QUALITY_FILE if path.is_dir() else _quality_of_hub(str(path), kwargs))
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.quality_lines:
            (save_directory / QUALITY_FILE).write_text(lines_json(self.quality_lines))
        else:  # lines of other weights that lay there
            (save_directory / QUALITY_FILE).unlink(missing_ok=True)

    def card(self, millions: float) -> str:
        """See `Pretrained`."""
        config = self.config
        tokens = f"{config.global_tokens} global tokens"
        if config.patch_tokens:
            size = f"{config.patch_size}x{config.patch_size} pixels"
            tokens += f" and up to {config.patch_positions} patch tokens ({size} each)"
        reached = "".join(
            f" All tokens give {line.most:.1f} dB on its validation pictures." for line in self.quality_lines[:1]
        )
        return (
            f"# A tokenizer of {config.image_size}-pixel pictures\n\n{tokens} of {config.codebook_size:,} codes, "
            f"{millions:.1f} million parameters.{reached}\n\n```python\nfrom tatok_model import TaTok, decode_picture, "
            'encode_picture\n\ntokenizer = TaTok.from_pretrained("FOLDER")\n'
            'photo = encode_picture(tokenizer, "photo.jpg").keep(0.25)  # any picture; a quarter of its tokens\n'
            "picture = decode_picture(tokenizer, photo)  # (3, H, W) in [0, 1]\n```"
        )


def check_range(pixels: Tensor, what: str) -> None:
    """Refuse floats outside [0, 1] by more than rounding, and NaN; `what` begins the message, e.g. "images have".

    Raises:
        ValueError: naming the lowest and the highest value.
    """
    if pixels.numel():
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # so written, NaN is refused too
            raise ValueError(f"{what} values from {low:g} to {high:g}; expected uint8 or floats in [0, 1]")


def boxed() -> list[str]:
    """Names of the tokenizers that come with the package."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "weights").glob("*/config.json"))


def _quality_of_hub(name: str, options: dict[str, Any]) -> Path:
    """Where a hub model's quality.json lies on this machine; a path without a file where it has none."""
    known = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    try:
        return Path(hf_hub_download(name, QUALITY_FILE, **{key: options[key] for key in known if key in options}))
    except EntryNotFoundError:
        return Path(QUALITY_FILE) / "absent"
