"""Whether a generator, a tokenizer and what is asked of them fit together. Imports no torch."""

from pathlib import Path

from pipeline.checkpoints import find, is_hub_id
from pipeline.config import Config, GenerateConfig
from pipeline.errors import BadInput
from pipeline.paths import sha256_file
from tatok_model.generator_config import GeneratorConfig, read_generator_config


def read_generator(path: str) -> GeneratorConfig:
    """The architecture of `generator.checkpoint`, a checkpoint or the run folder of a training; reads no weights.

    Raises:
        BadInput: neither.
    """
    folder = Path(path) / "checkpoint"
    try:
        return read_generator_config(folder if (folder / "config.json").is_file() else Path(path))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"generator.checkpoint: {error}") from None


def check_fit(config: Config, generator: GeneratorConfig, tokenizer_sha256: str = "") -> None:
    """Refuse a generator that writes other tokens than the tokenizer reads.

    Args:
        config: with both checkpoints, the tokenizer's of the architecture that is configured.
        generator: of `generator.checkpoint`.
        tokenizer_sha256: of the tokenizer's weights; empty: looked up, except for one of the hub.

    Raises:
        BadInput: naming the first thing that differs.
    """
    path, section = config.generator.checkpoint, config.tokenizer
    pairs = [("patch_tokens", section.patch_tokens), ("codebook_size", section.codebook_size)]
    if section.patch_tokens:
        pairs += [("global_tokens", section.global_tokens), ("patch_positions", section.patch_positions)]
    for name, wanted in pairs:
        if getattr(generator, name) != wanted:
            raise BadInput(
                f"generator.checkpoint {path!r} has {name} {getattr(generator, name)}; "
                f"expected the tokenizer's, {wanted}"
            )
    if generator.global_tokens > section.global_tokens:  # fewer: it writes sequences that lost their tail
        raise BadInput(
            f"generator.checkpoint {path!r} has {generator.global_tokens} global tokens; "
            f"expected at most the tokenizer's, {section.global_tokens}"
        )
    if not tokenizer_sha256 and not is_hub_id(section.checkpoint):
        tokenizer_sha256 = sha256_file(find(section.checkpoint) / "model.safetensors")
    if tokenizer_sha256 and generator.tokenizer_sha256 not in ("", tokenizer_sha256):
        raise BadInput(
            f"generator.checkpoint {path!r} writes tokens of a tokenizer with sha256 "
            f"{generator.tokenizer_sha256[:12]}...; expected that of tokenizer.checkpoint {section.checkpoint!r}, "
            f"{tokenizer_sha256[:12]}..."
        )


def asked_labels(config: GenerateConfig, classes: int) -> tuple[int, ...]:
    """The classes that samples are asked to be of, in turn; -1 alone for none.

    Args:
        config: what is asked for.
        classes: that the generator knows.

    Raises:
        BadInput: a class that does not exist.
    """
    for label in config.labels:
        if label >= classes:
            known = f"0 to {classes - 1}, the generator's classes" if classes else "none: the generator has no classes"
            raise BadInput(f"generate.labels has {label}; expected {known}")
    if config.unconditional or not classes:
        return (-1,)
    return config.labels or tuple(range(classes))


def check_guidance(config: GenerateConfig, labels: tuple[int, ...], class_dropout: float) -> None:
    """Refuse guidance towards no class, or by a generator that always knew the class.

    Args:
        config: the scales.
        labels: that are asked for, as `asked_labels` gives them.
        class_dropout: of the generator's training.

    Raises:
        BadInput: naming the scale.
    """
    for name in ("guidance", "position_guidance"):
        if (scale := getattr(config, name)) == 1:
            continue
        if labels == (-1,):
            raise BadInput(f"generate.{name} is {scale:g} without classes; expected 1: there is nothing to guide to")
        if class_dropout == 0:
            raise BadInput(
                f"generate.{name} is {scale:g} with a generator trained at generator.class_dropout 0; expected 1: "
                "it never wrote without being told the class"
            )
