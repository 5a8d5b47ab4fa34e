"""The generator: an autoregressive transformer over [class, global tokens, kept patch tokens].

    generator = Generator.from_pretrained("path/to/checkpoint")
    bits = generator(Sequences.from_tokens(tokens), labels)          # what each token costs, in bits
    sequences = sample(generator, labels, numbers, seed=0, config=SamplingConfig())    # sampling.py

One step per token. The position head predicts from the last hidden state which patch position comes next, or that the
sequence ends. With the position known, one more attention layer attends from an embedding of that position (the target)
to all hidden states, and the code head predicts the code there. Global tokens have no position: their target is an
embedding of the token's number. Patch tokens come in raster order, so that only later positions can follow.

Shapes: B sequences, M global tokens, T patch tokens of the longest one, L = 1 + M + T embeddings, D width, N patch
positions, K codebook entries.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.config import GENERATOR_SIZES, GeneratorConfig, read_generator_config
from tatok_model.generation.layers import EPS, Cache, CausalBlock, Rotation, init_weights
from tatok_model.generation.sequences import Sequences
from tatok_model.pretrained import Pretrained

NO_CLASS = -1  # label of pictures without a class, and of rows whose class is dropped


@dataclass(frozen=True)
class Bits:
    """What B sequences cost under the generator: -log2 of each probability, 0 at padding.

    Attributes:
        globals_: (B, M) float32.
        positions: (B, T + 1) float32, the end of a sequence last. (B, 0) where positions are derived.
        codes: (B, T) float32.
    """

    globals_: Tensor
    positions: Tensor
    codes: Tensor

    def total(self) -> Tensor:
        """(B,) float32."""
        return self.globals_.sum(1) + self.positions.sum(1) + self.codes.sum(1)


class Generator(Pretrained, library_name="tatok", tags=["image-generation"]):
    """An autoregressive transformer over token sequences; the file's docstring says how it works.

    Source: LlamaGen (arXiv 2406.06525) for the plain autoregressive recipe; position and code heads are ours.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, layers, heads = GENERATOR_SIZES[config.size]
        m, n, k = config.global_tokens, config.patch_positions, config.codebook_size
        self.class_embedding = nn.Embedding(config.classes + 1, width)  # the last: no class
        self.rotation = Rotation(config.grid_size, width // heads)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, config.dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.code_block = CausalBlock(width, heads, config.dropout)
        self.code_norm = nn.RMSNorm(width, eps=EPS)
        if m:
            self.global_codes = nn.Embedding(k, width)
            self.global_numbers = nn.Embedding(m, width)
            self.global_targets = nn.Embedding(m, width)  # "which code has global token i?"
            self.to_global_codes = nn.Linear(width, k)
        if config.patch_tokens:
            self.patch_codes = nn.Embedding(k, width)
            self.patch_places = nn.Embedding(n, width)
            self.patch_targets = nn.Embedding(n, width)  # "which code is at position p?"
            self.to_patch_codes = nn.Linear(width, k)
            if config.positions == "generated":
                self.to_places = nn.Linear(width, n + 1)  # the last: the end
        init_weights(self, layers + 1)

    def forward(self, sequences: Sequences, labels: Tensor) -> Bits:
        """What each token of the sequences costs, given those before it.

        Args:
            sequences: B of them, padded.
            labels: (B,) int64 classes, -1 for no class.

        Raises:
            ValueError: on the CPU, labels, codes, positions or lengths that this generator was not made for. On a GPU
                nothing is checked, because the host would wait for the values at every step: call `check` before.
        """
        if labels.device.type == "cpu":
            self.check(sequences, labels)
        m, counts = self.config.global_tokens, sequences.counts
        inputs, rotary = self._inputs(sequences, labels)  # (B, L, D), (B, L)
        hidden = self.read(inputs, rotary)  # (B, L, D)
        targets, target_rotary = self._targets(sequences)  # (B, M + T, D), (B, M + T)
        last = m + sequences.codes.shape[1]
        attended = self.attend(hidden[:, :last], rotary[:, :last], targets, target_rotary)  # (B, M + T, D)
        globals_ = hidden.new_zeros(len(sequences), 0, dtype=torch.float32)
        positions = codes = globals_
        if m:
            globals_ = _bits(self.to_global_codes(attended[:, :m]), sequences.global_indices)
        if self.config.patch_tokens:
            real = sequences.real
            codes = _bits(self.to_patch_codes(attended[:, m:]), sequences.codes) * real
            if self.config.positions == "generated":
                positions = self._position_bits(hidden[:, m:], sequences.places, counts)
        return Bits(globals_, positions, codes)

    @torch.no_grad()
    def start_from_codes(self, global_codes: Tensor | None, patch_codes: Tensor | None) -> None:
        """Initialise from the tokenizer's (K, d) codebooks: codes with similar vectors get similar weights.

        The embedding and the output weights of a code start as a random projection of its vector, at the usual scale
        of initial weights, and are trained like all others. A short training gains much by it: docs/experiments.md.
        None for a kind of token that the sequences do not have.
        """
        if global_codes is not None and self.config.global_tokens:
            _project(global_codes, self.global_codes.weight, self.to_global_codes.weight)
        if patch_codes is not None and self.config.patch_tokens:
            _project(patch_codes, self.patch_codes.weight, self.to_patch_codes.weight)

    # Used by `forward` for all steps at once, and by sampling.py one step at a time.

    def read(self, inputs: Tensor, rotary: Tensor, cache: Cache | None = None) -> Tensor:
        """Normalised hidden states under causal attention: (B, L, D) -> (B, L, D).

        Args:
            inputs: embeddings; with a cache the newest one alone, L = 1.
            rotary: (B, L) int64 rotary positions: 0 for class and global tokens, else patch position + 1.
            cache: keys and values of earlier inputs; those of the new one are added.
        """
        rotation = self.rotation.of(rotary)
        x = inputs
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, None if cache is None else (cache, layer, cache.length))
        if cache is not None:
            cache.length += 1
        return self.norm(x)

    def attend(
        self, hidden: Tensor, rotary: Tensor, targets: Tensor, target_rotary: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Attend from targets to hidden states, to predict the code at each target.

        Args:
            hidden: (B, L, D) from `read`; with a cache the newest one alone.
            rotary: (B, L) rotary positions of `hidden`.
            targets: (B, L, D) embeddings of global token numbers or patch positions, or (B, 1, D) for the newest alone.
            target_rotary: (B, L) or (B, 1) rotary positions of `targets`.
            cache: as `read` left it.

        Returns:
            (B, L, D) or (B, 1, D), the input of `to_global_codes` and `to_patch_codes`.
        """
        x = hidden[:, -targets.shape[1] :] + targets if targets.shape[1] else targets
        memory = None if cache is None else (cache, len(self.blocks), cache.length - 1)
        attended = self.code_block(x, self.rotation.of(target_rotary), memory, hidden, self.rotation.of(rotary))
        return self.code_norm(attended)

    def class_input(self, labels: Tensor) -> Tensor:
        """(B, D) embeddings of (B,) labels."""
        return self.class_embedding(labels.where(labels != NO_CLASS, self.config.classes))

    def global_input(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """(..., D) embeddings of global tokens, by codebook entry and number 0 to M - 1."""
        return self.global_codes(codes) + self.global_numbers(numbers)

    def patch_input(self, codes: Tensor, places: Tensor) -> Tensor:
        """(..., D) embeddings of patch tokens, by codebook entry and position."""
        return self.patch_codes(codes) + self.patch_places(places)

    def place_logits(self, hidden: Tensor, last: Tensor) -> Tensor:
        """Logits of the next position, or the end.

        Args:
            hidden: (..., D).
            last: (...) int64, the latest position, -1 for none.

        Returns:
            (..., N + 1) float; -inf at positions up to `last`; the end is entry N.
        """
        logits = self.to_places(hidden).float() if hidden.dtype != torch.float64 else self.to_places(hidden)
        passed = torch.arange(logits.shape[-1] - 1, device=hidden.device) <= last[..., None]  # (..., N)
        return logits.masked_fill(F.pad(passed, (0, 1)), -math.inf)

    def new_cache(self) -> Cache:
        """An empty one, for one batch of sequences."""
        return Cache(len(self.blocks) + 1, self.config.max_length)

    def _inputs(self, sequences: Sequences, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) of class, global and patch tokens, and their (B, L) rotary positions."""
        parts = [self.class_input(labels)[:, None]]
        rotary = [labels.new_zeros(len(labels), 1 + self.config.global_tokens)]
        if self.config.global_tokens:
            parts.append(self.global_input(sequences.global_indices, self._numbers(labels)))
        if self.config.patch_tokens:
            parts.append(self.patch_input(sequences.codes, sequences.places))
            rotary.append(sequences.places + 1)
        return torch.cat(parts, 1), torch.cat(rotary, 1)

    def _targets(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Targets (B, M + T, D), the place of the next token at each step, and their (B, M + T) rotary positions."""
        batch, m = len(sequences), self.config.global_tokens
        parts, rotary = [], [sequences.counts.new_zeros(batch, m)]
        if m:
            parts.append(self.global_targets(self._numbers(sequences.counts)).expand(batch, -1, -1))
        if self.config.patch_tokens:
            parts.append(self.patch_targets(sequences.places))
            rotary.append(sequences.places + 1)
        return torch.cat(parts, 1), torch.cat(rotary, 1)

    def _numbers(self, like: Tensor) -> Tensor:
        return torch.arange(self.config.global_tokens, device=like.device)

    def _position_bits(self, hidden: Tensor, places: Tensor, counts: Tensor) -> Tensor:
        """(B, T + 1) bits of every position, then of the end."""
        steps = torch.arange(places.shape[1] + 1, device=places.device)
        last = F.pad(places, (1, 0), value=-1)  # (B, T + 1)
        # After an image's end is padding: the end is a target there that `place_logits` does not mask.
        target = F.pad(places, (0, 1)).where(steps < counts[:, None], self.config.patch_positions)
        return _bits(self.place_logits(hidden, last), target) * (steps <= counts[:, None])

    def check(self, sequences: Sequences, labels: Tensor) -> None:
        """Raises ValueError for labels, codes, positions or lengths that this generator was not made for."""
        config = self.config
        m, t = sequences.global_indices.shape[1], sequences.codes.shape[1]
        if m != config.global_tokens:
            raise ValueError(f"sequences have {m} global tokens; expected {config.global_tokens}")
        if t > config.max_patch_tokens:
            raise ValueError(f"a sequence has {t} patch tokens; expected at most {config.max_patch_tokens}, as trained")
        if (
            config.positions == "derived"
            and config.patch_tokens
            and bool((sequences.counts != t).any() or t < config.patch_positions)
        ):
            raise ValueError(
                f"sequences have {sorted(set(sequences.counts.tolist()))} patch tokens with derived positions; "
                f"expected all {config.patch_positions}"
            )
        check_labels(labels, config.classes)
        for name, values in (("global_indices", sequences.global_indices), ("codes", sequences.codes)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < config.codebook_size:
                raise ValueError(
                    f"{name} hold {int(values.min())} to {int(values.max())}; expected 0 to {config.codebook_size - 1}"
                )
        places, real = sequences.places, sequences.real
        ascending = (places[:, 1:] > places[:, :-1]) | ~real[:, 1:]
        within = (places >= 0) & (places < config.patch_positions)
        if not bool(ascending.all() and within.all()):
            raise ValueError(f"places do not ascend within 0 to {config.patch_positions - 1}; expected raster order")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a checkpoint folder.

        Raises:
            FileNotFoundError: no such folder, or it lacks a file.
            ValueError: the folder's config.json is not one of a generator.
        """
        read_generator_config(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def card(self, millions: float) -> str:
        """See `Pretrained`."""
        config = self.config
        classes = f"{config.classes} classes" if config.classes else "no classes"
        return (
            f"# A generator of tokens\n\nIt draws {config.global_tokens} global and up to {config.max_patch_tokens} of "
            f"{config.patch_positions} patch tokens of {config.codebook_size:,} codes, knows {classes} and has "
            f"{millions:.1f} million parameters.\n\n```python\nfrom tatok_model import Generator, TaTok, sample\n\n"
            'generator = Generator.from_pretrained("FOLDER")\n'
            "sequences = sample(generator, [-1] * 16)  # sixteen pictures of no class\n"
            f"tokens = sequences.to_tokens({config.patch_positions}, {config.global_tokens})\n"
            'pictures = TaTok.from_pretrained("ITS TOKENIZER").decode(tokens)  # (16, 3, H, W) in [0, 1]\n```'
        )


def _project(codes: Tensor, *weights: Tensor) -> None:
    """Fill (K, D) weights with random projections of (K, d) code vectors, standard deviation 0.02."""
    if codes.shape[0] != weights[0].shape[0]:
        raise ValueError(f"codes are {codes.shape[0]}; expected {weights[0].shape[0]}, the codebook size")
    spread = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-6) / codes.shape[1] ** 0.5
    for weight in weights:
        weight.copy_(spread.to(weight) @ torch.randn(codes.shape[1], weight.shape[1]).to(weight) * 0.02)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises ValueError for a class that does not exist; -1 is no class."""
    if labels.numel() and not NO_CLASS <= int(labels.min()) <= int(labels.max()) < classes:
        told = f"0 to {classes - 1}, or -1 for no class" if classes else "-1: this generator knows no classes"
        raise ValueError(f"labels hold {int(labels.min())} to {int(labels.max())}; expected {told}")


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, S) cross-entropies in bits of (B, S, C) logits and (B, S) targets, in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.unflatten(0, targets.shape) / math.log(2)
