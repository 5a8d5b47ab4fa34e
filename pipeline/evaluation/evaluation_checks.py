"""What an evaluation refuses before anything is made, and what it can know of baselines by then; reads no pictures."""

import math
from pathlib import Path

from pipeline.core.checkpoints import SHAPING, read_architecture
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.data.checks import check_files, check_global_counts, check_pictures
from pipeline.data.shards import read_manifest
from pipeline.generator.generated_files import Generated, read_generated
from pipeline.tokens.token_manifest import check_stream, read_token_manifest
from tatok_model.filtering_rules import CHECK_BITS, SCORES, fixes_length, keeps_all

FILES = ("evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone", "evaluate.lpips_heads")
BLIND = "evaluate.blind_checkpoint"  # the evaluated tokenizer with an entropy model that sees no global tokens
PATCHES, IMAGES = 400_000, 10_000  # at most, for the fit of k-means


def check_networks(config: Config) -> None:
    """Refuse files of feature networks, of reference statistics or of LPIPS that are not there.

    Raises:
        BadInput: naming the first that is missing.
    """
    check_files(config, *FILES)
    if config.evaluate.extractor.endswith(".safetensors"):
        check_files(config, "evaluate.extractor")
    for path in config.evaluate.more_extractors:
        if not Path(path).is_file():
            raise BadInput(f"evaluate.more_extractors has {path!r}, which does not exist; expected a file")


def check_information(config: Config) -> None:
    """Refuse tokenizers that information cannot be measured with; reads no weights.

    Raises:
        BadInput: no entropy model or one that does not see the global tokens; no blind checkpoint where one is named,
            or one that sees them or has another architecture.
    """
    if not config.evaluate.information:
        return
    tokenizer, path = config.tokenizer, config.evaluate.blind_checkpoint
    if not tokenizer.has_entropy_model:
        raise BadInput("evaluate.information is true; expected a tokenizer with an entropy model")
    if tokenizer.global_tokens and not tokenizer.entropy_globals:
        raise BadInput("tokenizer.entropy_globals is false; expected true: evaluate.information asks for H(c | g)")
    if not path:
        return
    found = read_architecture(path, BLIND)
    if found.entropy_globals:
        raise BadInput(f"{BLIND} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in SHAPING:
        wanted = getattr(tokenizer, name)
        if name != "entropy_globals" and getattr(found, name) != wanted:
            raise BadInput(f"{BLIND} has {name} {getattr(found, name)}; expected {wanted}, as tokenizer.checkpoint")


def check_baselines(config: Config, training_images: int) -> None:
    """Refuse baselines that cannot be made; bits that vary between images are known only once they are measured.

    Raises:
        BadInput: no training picture, or as `check_kmeans`.
    """
    wanted = config.evaluate.baselines
    if wanted and not training_images:
        raise BadInput(
            f"evaluate.baselines has {', '.join(wanted)}, chosen or fitted on training pictures; "
            f"expected data.shards with some, {config.data.shards!r} has none"
        )
    bits = fixed_bits(config)
    if "kmeans" in wanted and bits is not None:
        check_kmeans(bits, training_images, config.tokenizer.patch_positions)


def fixed_bits(config: Config) -> float | None:
    """`bits_fixed` of every image at the operating point; None where it differs between images."""
    tokenizer, section = config.tokenizer, config.filter
    each, count = math.log2(tokenizer.codebook_size), section.rule == "count"
    if not tokenizer.patch_tokens:
        return (section.threshold if count else tokenizer.global_tokens) * each
    if not fixes_length(section.rule, section.threshold):
        return None
    positions = tokenizer.patch_positions
    kept = int(section.threshold) if count else positions if keeps_all(section.rule, section.threshold) else 0
    bits = (tokenizer.global_tokens + kept) * each
    if SCORES[section.score].known_to_decoder or kept in (0, positions):
        return bits
    return bits + (CHECK_BITS if section.replay else math.log2(math.comb(positions, kept)))


def check_kmeans(bits: float, images: int, positions: int) -> None:
    """Refuse codewords, for the bits that an image may cost, that cannot be fitted to the patches of training images.

    Raises:
        BadInput: fewer than two codewords, or more than patches.
    """
    count, (used, each) = codewords_for(bits, positions), sampled(images, positions)
    if not 2 <= count <= used * each:
        raise BadInput(
            f"evaluate.baselines has kmeans, which needs {count} codewords for {bits:.1f} bits an image; "
            f"expected 2 to {used * each}, the patches of data.source that it is fitted to"
        )


def codewords_for(bits: float, patches: int) -> int:
    """K_b, the most codewords with which `patches` patches cost at most `bits` bits."""
    return int(2 ** (bits / patches) * (1 + 1e-12))  # log2 K times 1 must give K again


def sampled(images: int, positions: int) -> tuple[int, int]:
    """Of how many training pictures patches are taken for the fit, and how many of each."""
    used = min(images, IMAGES)
    return used, min(-(-PATCHES // max(used, 1)), positions)


def check_generated(config: Config) -> None:
    """Refuse generated pictures that cannot be compared with those of the configuration.

    Raises:
        BadInput: a folder that `jobs/generate.py` did not write or did not finish, pictures of another size than the
            real ones or of other classes, tokens that another tokenizer made, a cut that they cannot have.
    """
    generated = read_generated(config.evaluate.generated)
    check_pictures(config)
    check_global_counts(config)
    size = generated.manifest.image_size
    if size != config.data.image_size:
        raise BadInput(
            f"evaluate.generated {config.evaluate.generated!r} has pictures of {size} pixels; "
            f"expected data.image_size, {config.data.image_size}"
        )
    _check_tokens(config, generated)
    if config.data.shards:
        check_classes(config, generated)


def _check_tokens(config: Config, generated: Generated) -> None:
    """Lengths are compared with those of the tokenizer whose tokens the generator writes."""
    if not config.tokens.path:
        return
    stream = read_token_manifest(config.tokens.path).stream
    check_stream(config, stream)
    if stream.tokenizer_sha256 != generated.tokenizer_sha256:
        raise BadInput(
            f"tokens.path {config.tokens.path!r} is of a tokenizer with sha256 {stream.tokenizer_sha256[:12]}...; "
            f"expected that of evaluate.generated {config.evaluate.generated!r}, {generated.tokenizer_sha256[:12]}..."
        )
    cut = config.filter.cut(bool(stream.score))
    if generated.cut not in ("", cut):
        raise BadInput(
            f"filter cuts tokens.path by {cut}; expected {generated.cut}, whose lengths the generator of "
            f"evaluate.generated {config.evaluate.generated!r} learned"
        )


def check_classes(config: Config, generated: Generated) -> None:
    """Refuse generated pictures of other classes than `data.shards` has."""
    ours, found = read_manifest(config.data.shards).classes, generated.manifest.classes
    if found and len(ours) != len(found):
        raise BadInput(
            f"evaluate.generated {config.evaluate.generated!r} has {len(found)} classes; "
            f"expected {len(ours)}, those of data.shards"
        )
