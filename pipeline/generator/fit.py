"""Checks that a generator fits a token stream, a tokenizer and the samples to draw. Imports no torch at the top.

Symbols: M global tokens, N patch positions, K codebook entries.
"""

from typing import TYPE_CHECKING, Any

from pipeline.core.checkpoints import check_architecture, find, is_hub_id, read_generator, tokenizer_sha256
from pipeline.core.config import Config, FilterConfig, GenerateConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.inputs import check_input
from pipeline.tokens.token_manifest import TokenManifest
from tatok_model.config import GeneratorConfig

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.generation.generator import Generator


def global_tokens_of(manifest: TokenManifest, filter: FilterConfig) -> int:  # noqa: A002 - the section's name
    """How many global tokens a sequence has at this cut: streams without patch tokens are cut by `count`."""
    stream = manifest.stream
    return int(filter.threshold) if not stream.score and filter.rule == "count" else stream.global_tokens


def check_global_cut(manifest: TokenManifest, filter: FilterConfig) -> None:  # noqa: A002
    """Refuse a number of global tokens that a stream without patch tokens does not have."""
    keep, most = global_tokens_of(manifest, filter), manifest.stream.global_tokens
    if not manifest.stream.score and not 1 <= keep <= most:
        raise BadInput(
            f"filter.threshold is {filter.threshold:g}; expected 1 to {most}, the global tokens of an image: "
            "the stream has no others"
        )


def generator_config(config: Config, manifest: TokenManifest, shortest: int, longest: int) -> GeneratorConfig:
    """The generator of a stream at the configured cut.

    Args:
        config: size, dropout, whether positions are generated or derived, and the cut.
        manifest: of the stream.
        shortest: patch tokens of the shortest sequence.
        longest: of the longest one, held-out ones included.

    Raises:
        BadInput: no token is kept, or positions are to be derived where some patch tokens are dropped.
    """
    section, most = config.generator, manifest.stream.patch_positions
    if longest + global_tokens_of(manifest, config.filter) == 0:
        raise BadInput(
            f"filter.threshold is {config.filter.threshold:g}, which keeps no token of any picture; "
            "expected one that does"
        )
    patches = bool(manifest.stream.score)
    positions = section.positions
    if positions == "auto":
        positions = "derived" if patches and shortest == most else "generated"
    if patches and positions == "derived" and shortest < most:
        raise BadInput(
            f"generator.positions is 'derived' where sequences have {shortest} to {longest} patch tokens; "
            f"expected generated or auto, or a cut that keeps all {most}"
        )
    return GeneratorConfig(
        size=section.size,
        dropout=section.dropout,
        class_dropout=section.class_dropout,
        positions=positions,
        max_patch_tokens=longest,
        cut=config.filter.cut(patches),
        **_given(config, manifest),
    )


def check_start(config: Config, manifest: TokenManifest, found: GeneratorConfig) -> None:
    """Refuse a `generator.checkpoint` to start from that was made for another kind of sequences."""
    path = config.generator.checkpoint
    wanted = {"size": config.generator.size, **_given(config, manifest)}
    for name, value in wanted.items():
        if getattr(found, name) != value:
            source = "generator.size" if name == "size" else f"tokens.path {config.tokens.path!r}"
            raise BadInput(
                f"generator.checkpoint {path!r} has {name} {getattr(found, name)!r}; expected {value!r}, as {source}"
            )


def check_length(config: Config, found: GeneratorConfig, wanted: GeneratorConfig) -> None:
    """Refuse a `generator.checkpoint` made for shorter sequences, or for other positions."""
    path = config.generator.checkpoint
    if found.positions != wanted.positions:
        raise BadInput(
            f"generator.checkpoint {path!r} has positions {found.positions}; expected {wanted.positions} at this cut"
        )
    if found.max_patch_tokens < wanted.max_patch_tokens:
        raise BadInput(
            f"generator.checkpoint {path!r} was made for {found.max_patch_tokens} patch tokens; "
            f"expected at least {wanted.max_patch_tokens}, the longest sequence at this cut"
        )


def _given(config: Config, manifest: TokenManifest) -> dict[str, Any]:
    """The fields of `GeneratorConfig` that the stream decides."""
    stream = manifest.stream
    return {
        "classes": len(manifest.classes),
        "global_tokens": global_tokens_of(manifest, config.filter),
        "patch_tokens": bool(stream.score),
        "grid_size": stream.image_size // stream.patch_size,
        "codebook_size": stream.codebook_size,
        "tokenizer_sha256": stream.tokenizer_sha256,
    }


def check_fit(config: Config, generator: GeneratorConfig, sha256: str = "") -> None:
    """Refuse a generator whose tokens the tokenizer cannot decode, naming the first difference.

    Args:
        config: with both checkpoints; its tokenizer section is that of `tokenizer.checkpoint`.
        generator: of `generator.checkpoint`.
        sha256: of the tokenizer's weights; empty: computed here, except for a checkpoint on the hub.
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
    if generator.global_tokens > section.global_tokens:  # fewer are fine: the decoder can do without the last ones
        raise BadInput(
            f"generator.checkpoint {path!r} has {generator.global_tokens} global tokens; "
            f"expected at most the tokenizer's, {section.global_tokens}"
        )
    if not sha256 and not is_hub_id(section.checkpoint):
        sha256 = sha256_file(find(section.checkpoint) / "model.safetensors")
    if sha256 and generator.tokenizer_sha256 not in ("", sha256):
        raise BadInput(
            f"generator.checkpoint {path!r} writes tokens of a tokenizer with sha256 "
            f"{generator.tokenizer_sha256[:12]}...; expected that of tokenizer.checkpoint {section.checkpoint!r}, "
            f"{sha256[:12]}..."
        )


def check_generator(config: Config) -> Config:
    """Refuse a generator that cannot be used; where it has yet to be trained, run the check of that training.

    Returns:
        The configuration with the checkpoints that exist; `generator.checkpoint` is empty where it has to be trained.

    Raises:
        BadInput: no generator or one of another tokenizer; `tokenizer.checkpoint` is empty or of another architecture.
    """
    found = check_input(config, "generator.checkpoint")
    if not found.generator.checkpoint:
        return found
    _check_tokenizer(found)
    check_architecture(found)
    check_fit(found, read_generator(found.generator.checkpoint))
    return found


def load_generator(config: Config) -> "tuple[Generator, str]":
    """The generator of `generator.checkpoint`, in evaluation mode, and the sha256 of its weights.

    Raises:
        BadInput: no such folder, one that holds no generator or damaged weights, or a generator of another tokenizer
            than the one of `tokenizer.checkpoint`.
    """
    from safetensors import SafetensorError

    from tatok_model.generation.generator import Generator

    path = config.generator.checkpoint
    folder = find(path, "generator.checkpoint")
    found = read_generator(path)
    _check_tokenizer(config)
    check_fit(config, found, tokenizer_sha256(config))
    try:
        generator = Generator.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # absent, torn, or of another shape
        reason = " ".join(str(error).split())
        raise BadInput(f"generator.checkpoint {path!r} has damaged weights ({reason}); expected those saved") from None
    return generator.eval(), sha256_file(folder / "model.safetensors")


def _check_tokenizer(config: Config) -> None:
    if not config.tokenizer.checkpoint:
        raise BadInput(
            f"tokenizer.checkpoint is empty; expected the tokenizer whose tokens {config.generator.checkpoint!r} writes"
        )


def asked_labels(config: GenerateConfig, classes: int) -> tuple[int, ...]:
    """The classes of the samples, in turn; (-1,) without classes. A label beyond `classes` is refused."""
    for label in config.labels:
        if label >= classes:
            known = f"0 to {classes - 1}, the generator's classes" if classes else "none: the generator has no classes"
            raise BadInput(f"generate.labels has {label}; expected {known}")
    if config.unconditional or not classes:
        return (-1,)
    return config.labels or tuple(range(classes))


def check_guidance(config: GenerateConfig, labels: tuple[int, ...], class_dropout: float) -> None:
    """Refuse classifier-free guidance without classes, or by a generator that was trained without class dropout."""
    for name in ("guidance", "position_guidance"):
        scale = getattr(config, name)
        if scale == 1:  # no guidance
            continue
        if labels == (-1,):
            raise BadInput(f"generate.{name} is {scale:g} without classes; expected 1: there is nothing to guide to")
        if class_dropout == 0:
            raise BadInput(
                f"generate.{name} is {scale:g} with a generator trained at generator.class_dropout 0; expected 1: "
                "it cannot predict without a class"
            )
