"""What a generator is made of and how it samples. Plain data: importing this does not import torch.

Symbols: N patch positions, M global tokens, K codebook entries, D width, T kept patch tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tatok_model.config import read_saved

SIZES = {  # name: (width D, layers, heads)
    "nano": (128, 4, 4),
    "tiny": (256, 6, 4),
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
SCHEDULES = ("constant", "linear", "power-cosine")


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of one generator and the kind of token sequence that it writes.

    A sequence is M global tokens, then, in raster order, the position and the code of each kept patch token, then the
    end. `patch_tokens=False` is for `global_only` tokens. Where every patch token is kept (`patch_only`), positions are
    known: `positions="derived"` leaves the position head out.
    """

    size: str = "tiny"  # a key of SIZES
    dropout: float = 0.1  # of attention and MLP outputs, in training
    classes: int = 0  # labels 0 to classes - 1; 0: no labels
    global_tokens: int = 8  # M
    patch_tokens: bool = True
    grid_size: int = 8  # patches along one side; N is its square
    codebook_size: int = 1000  # K
    positions: str = "generated"  # generated: by the position head | derived: all N, in raster order
    max_patch_tokens: int = 64  # T of the longest sequence that it can read or write
    tokenizer_sha256: str = ""  # of the tokenizer's weights; a generator writes the tokens of one tokenizer only
    cut: str = ""  # where the rankings were cut whose sequences it learned: score, rounds, rule, threshold
    class_dropout: float = 0.1  # share of training sequences without their label; 0: guidance has nothing to go by

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}; expected one of {', '.join(SIZES)}")
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and below 1")
        for name, least in (("classes", 0), ("global_tokens", 0), ("grid_size", 1), ("codebook_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if self.positions not in ("generated", "derived"):
            raise ValueError(f"positions is {self.positions!r}; expected generated or derived")
        if not self.patch_tokens and self.global_tokens == 0:
            raise ValueError("patch_tokens is false and global_tokens is 0; expected at least one kind of token")
        most = self.patch_positions if self.patch_tokens else 0
        if not 0 <= self.max_patch_tokens <= most:
            raise ValueError(f"max_patch_tokens is {self.max_patch_tokens}; expected 0 to {most}")
        if self.patch_tokens and self.positions == "derived" and self.max_patch_tokens != most:
            raise ValueError(f"max_patch_tokens is {self.max_patch_tokens} with derived positions; expected {most}")

    @property
    def patch_positions(self) -> int:
        """N."""
        return self.grid_size**2

    @property
    def max_length(self) -> int:
        """Embeddings that the transformer reads at most: the class and all tokens."""
        return 1 + self.global_tokens + self.max_patch_tokens


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn from what the generator predicts."""

    temperature: float = 1.0  # of codes; 0: always the likeliest
    position_temperature: float = 1.0  # of positions and the end; 0: always the likeliest
    top_k: int = 0  # of codes: only the k likeliest; 0: all
    top_p: float = 1.0  # of codes: only the likeliest that make up this share
    guidance: float = 1.0  # classifier-free guidance on codes: 1 is none
    position_guidance: float = 1.0  # the same on positions; lengths drift where it is not 1
    schedule: str = "constant"  # constant | linear | power-cosine: how guidance grows from 1 along the sequence
    schedule_power: float = 2.5  # of power-cosine

    def __post_init__(self) -> None:
        for name in ("temperature", "position_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("guidance", "position_guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more, 1 for none")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if not 0 < self.schedule_power < math.inf:
            raise ValueError(f"schedule_power is {self.schedule_power}; expected more than 0")

    @property
    def guided(self) -> bool:
        """Whether a second prediction, without the class, is needed."""
        return self.guidance != 1 or self.position_guidance != 1

    def scale_at(self, scale: float, progress: float) -> float:
        """The guidance scale at a share `progress`, 0 to 1, of the longest sequence; `scale` is the full one.

        power-cosine: 1 + (scale - 1) (1 - cos(pi progress^power)) / 2, weak at first, where the layout is decided
        (MDTv2, arXiv 2303.14389, has the schedule for diffusion steps).
        """
        if self.schedule == "constant":
            return scale
        if self.schedule == "linear":
            return 1 + (scale - 1) * progress
        return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**self.schedule_power)) / 2


def read_generator_config(folder: Path) -> GeneratorConfig:
    """The architecture that a checkpoint folder was saved with; its weights are not read.

    Raises:
        FileNotFoundError: the folder lacks config.json or model.safetensors.
        ValueError: config.json is not one of a generator.
    """
    return read_saved(folder, GeneratorConfig, "a generator", "Generator")
