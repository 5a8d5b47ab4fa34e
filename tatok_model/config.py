"""What a tokenizer and a generator are made of, trained by and sampled with. Importing this does not import torch.

Every configuration refuses impossible values with a ValueError that names the key, its value and what is expected.

Symbols: N patch positions, M global tokens, K codebook entries, D width, T kept patch tokens.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tatok_model.filtering_rules import SCORES

C = TypeVar("C")  # a configuration

SIZES = {  # name: (width D, encoder layers, decoder layers, heads)
    "nano": (128, 4, 4, 2),
    "tiny": (192, 4, 4, 3),
    "small": (512, 8, 8, 8),
    "base": (768, 12, 12, 12),
    "large": (1024, 24, 24, 16),
}
GENERATOR_SIZES = {  # name: (width D, layers, heads)
    "nano": (128, 4, 4),
    "tiny": (256, 6, 4),
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
ORDERS = (*(name for name in SCORES if name != "random"), "filter")  # a random set is a kind of its own
BY_MODEL = (*(name for name, score in SCORES.items() if score.asks_entropy_model), "filter")
QUANTIZERS: dict[str, Callable[["TokenizerConfig"], int]] = {  # name: d, numbers in a code vector
    "vq": lambda config: config.codebook_dim,
    "fsq": lambda config: len(config.fsq_levels),
}
SCHEDULES = ("constant", "linear", "power-cosine")


def _expect(config: Any, names: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError for the first of the fields, named with blanks between them, for which `holds` is False."""
    for name in names.split():
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{name} is {value!r}; expected {expected}")


def _at_least_0(value: float) -> bool:
    return 0 <= value < math.inf  # NaN is refused too


def _share_below_1(value: float) -> bool:
    return 0 <= value < 1


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of one tokenizer. `global_tokens=0` is `patch_only`; `patch_tokens=False` is `global_only`."""

    image_size: int = 32  # pixels, square
    patch_size: int = 4  # pixels, square
    size: str = "tiny"  # a key of SIZES
    global_tokens: int = 8  # M, learnable tokens that carry what patches share
    patch_tokens: bool = True  # False: the patches are read but only global tokens are written
    quantizer: str = "vq"  # vq | fsq, a key of QUANTIZERS
    codebook_size: int = 1000  # K; for fsq the product of fsq_levels
    codebook_dim: int = 16  # width of a code vector (vq)
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)  # levels per dimension (fsq)
    shared_codebook: bool = False  # global and patch tokens use one codebook
    commitment_weight: float = 0.1  # weight of the commitment loss (vq)
    codebook_decay: float = 0.99  # EMA decay of the codebook (vq)
    dead_code_share: float = 0.2  # an entry used less than this share of the average is re-drawn from the batch (vq)
    entropy_layers: int = 2  # blocks of the entropy model q(c_i | g, c_S); 0: none, nothing can be filtered by it
    entropy_width: int = 96  # its width, a multiple of 32
    entropy_globals: bool = True  # False: q(c_i | c_S), blind to the global tokens, to measure what they tell
    expected_fill: bool = True  # the decoder gets the expected code under q where a patch token was dropped
    trunk_layers: int = 0  # leading decoder blocks that see global and kept patch tokens only; 0: all see the grid

    def __post_init__(self) -> None:
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))  # a list when it comes from a config.json
        _expect(self, "size", SIZES.__contains__, f"one of {', '.join(SIZES)}")
        if self.patch_size < 1 or self.image_size < 1:
            raise ValueError(
                f"image_size is {self.image_size} and patch_size {self.patch_size}; expected both to be at least 1"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; expected a multiple of patch_size, {self.patch_size}")
        most = SIZES[self.size][2] - 1
        least_grid = f"0 to {most}, one decoder block of size {self.size!r} less, which sees the whole grid"
        _expect(self, "trunk_layers", range(most + 1).__contains__, least_grid)
        _expect(self, "global_tokens", _at_least_0, "0 or more")
        if not self.patch_tokens and self.global_tokens == 0:
            raise ValueError("patch_tokens is false and global_tokens is 0; expected at least one kind of token")
        if self.entropy_layers < 0 or self.entropy_width < 32 or self.entropy_width % 32:
            raise ValueError(
                f"entropy_layers is {self.entropy_layers} and entropy_width {self.entropy_width}; "
                "expected 0 or more, and a multiple of 32"
            )
        _expect(self, "quantizer", QUANTIZERS.__contains__, " or ".join(QUANTIZERS))
        if self.codebook_size < 2 or self.codebook_dim < 1:
            raise ValueError(
                f"codebook_size is {self.codebook_size} and codebook_dim {self.codebook_dim}; expected at least 2 and 1"
            )
        _expect(self, "commitment_weight", _at_least_0, "0 or more")
        _expect(self, "codebook_decay dead_code_share", _share_below_1, "at least 0 and below 1")
        if self.quantizer == "fsq" and math.prod(self.fsq_levels) != self.codebook_size:
            raise ValueError(
                f"fsq_levels {list(self.fsq_levels)} make {math.prod(self.fsq_levels)} codes; "
                f"expected codebook_size, {self.codebook_size}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patch_positions(self) -> int:
        """N, the number of patch positions."""
        return self.grid_size**2

    @property
    def has_entropy_model(self) -> bool:
        """Whether there is a q: patch codes exist and the configuration wants one."""
        return self.patch_tokens and self.entropy_layers > 0

    @property
    def max_tokens(self) -> int:
        """Tokens of an image of which everything is kept."""
        return self.global_tokens + (self.patch_positions if self.patch_tokens else 0)

    @property
    def code_dim(self) -> int:
        """d, numbers in a code vector."""
        return QUANTIZERS[self.quantizer](self)

    @property
    def bits_per_token(self) -> float:
        """log2 K."""
        return math.log2(self.codebook_size)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the training terms. A weight of 0 switches a term off and costs nothing."""

    l1: float = 0.0  # mean absolute error, pixels in [0, 1]
    l2: float = 1.0  # mean squared error, pixels in [0, 1]
    perceptual: float = 0.0  # LPIPS (VGG16); needs perceptual_backbone and perceptual_heads
    perceptual_backbone: str = ""  # path of VGG16 weights (.pth or .safetensors)
    perceptual_heads: str = ""  # path of the LPIPS linear heads
    gan: float = 0.0  # hinge GAN
    gan_start_step: int = 0  # first step with the adversarial term
    lecam: float = 0.001  # LeCam regularisation of the discriminator
    discriminator_lr: float = 1e-4  # learning rate of the discriminator

    def __post_init__(self) -> None:
        _expect(self, "l1 l2 perceptual gan lecam discriminator_lr gan_start_step", _at_least_0, "0 or more")
        if self.l1 == self.l2 == self.perceptual == 0:
            raise ValueError("l1, l2 and perceptual are all 0; expected at least one reconstruction term")
        if self.perceptual and not (self.perceptual_backbone and self.perceptual_heads):
            raise ValueError("perceptual is on; expected perceptual_backbone and perceptual_heads to name weight files")


@dataclass(frozen=True)
class KeptSetConfig:
    """Which patch tokens a training step keeps: shares of the samples, which add up to 1."""

    all: float = 0.15  # everything
    none: float = 0.05  # global tokens only
    random: float = 0.40  # a random set of uniform size
    blocks: float = 0.15  # a square block of uniform size
    filtered: float = 0.25  # a prefix of uniform length of `order`
    order: str = "distortion"  # distortion | error | surprisal | entropy | filter (by surprisal or entropy at random) |
    # grid | pixel_entropy
    warmup_steps: int = 500  # steps in which `filtered` sets are random, while the entropy model learns
    hide_globals: float = 0.10  # share of samples whose entropy model sees no global tokens; taken from `all`, so
    # that none are where `all` is 0
    global_tail: float = 0.0  # share of samples that lose a tail of uniform length of their global tokens

    def __post_init__(self) -> None:
        names = "all none random blocks filtered hide_globals global_tail"
        _expect(self, names, lambda value: 0 <= value <= 1, "a share from 0 to 1")
        if abs(sum(self.shares()) - 1) > 1e-6:
            raise ValueError(
                f"all, none, random, blocks and filtered are {list(self.shares())}; expected shares that add up to 1"
            )
        if 0 < self.all < self.hide_globals:
            raise ValueError(
                f"hide_globals is {self.hide_globals}; expected at most {self.all}, the share all that it is taken from"
            )
        _expect(self, "order", ORDERS.__contains__, f"one of {', '.join(ORDERS)}")
        _expect(self, "warmup_steps", _at_least_0, "0 or more")

    def shares(self) -> tuple[float, ...]:
        """Of all, none, random, blocks, filtered."""
        return (self.all, self.none, self.random, self.blocks, self.filtered)

    def hidden_share(self) -> float:
        """Of the samples that keep everything, how many hide the global tokens from the entropy model."""
        return min(self.hide_globals / self.all, 1.0) if self.all else 0.0


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
        _expect(self, "size", GENERATOR_SIZES.__contains__, f"one of {', '.join(GENERATOR_SIZES)}")
        _expect(self, "dropout class_dropout", _share_below_1, "at least 0 and below 1")
        _expect(self, "classes global_tokens", _at_least_0, "0 or more")
        _expect(self, "grid_size", lambda value: value >= 1, "1 or more")
        _expect(self, "codebook_size", lambda value: value >= 2, "2 or more")
        _expect(self, "positions", ("generated", "derived").__contains__, "generated or derived")
        if not self.patch_tokens and self.global_tokens == 0:
            raise ValueError("patch_tokens is false and global_tokens is 0; expected at least one kind of token")
        most = self.patch_positions if self.patch_tokens else 0
        _expect(self, "max_patch_tokens", range(most + 1).__contains__, f"0 to {most}")
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
        _expect(self, "temperature position_temperature top_k", _at_least_0, "0 or more")
        _expect(self, "guidance position_guidance", _at_least_0, "0 or more, 1 for none")
        _expect(self, "top_p", lambda value: 0 < value <= 1, "more than 0 and at most 1")
        _expect(self, "schedule", SCHEDULES.__contains__, f"one of {', '.join(SCHEDULES)}")
        _expect(self, "schedule_power", lambda value: 0 < value < math.inf, "more than 0")

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


def read_config(folder: Path) -> TokenizerConfig:
    """The architecture that a checkpoint folder was saved with, as `read_saved`."""
    return read_saved(folder, TokenizerConfig, "a tokenizer", "TaTok")


def read_generator_config(folder: Path) -> GeneratorConfig:
    """The architecture that a checkpoint folder was saved with, as `read_saved`."""
    return read_saved(folder, GeneratorConfig, "a generator", "Generator")


def read_saved(folder: Path, architecture: type[C], kind: str, saver: str) -> C:
    """The configuration in a checkpoint folder; its weights are not read.

    Args:
        folder: of config.json and model.safetensors.
        architecture: the dataclass that config.json holds.
        kind: what has it, for messages.
        saver: the class that saves such folders, for messages.

    Raises:
        FileNotFoundError: the folder lacks one of the two.
        ValueError: config.json holds something else.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"checkpoint {str(folder)!r} has no {name}; expected a folder that {saver} saved")
    try:
        return architecture(**json.loads((folder / "config.json").read_text()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config.json in {str(folder)!r} is not {kind}'s: {error}") from None
