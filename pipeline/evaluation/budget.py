"""Whether baselines can be made at a tokenizer's bits, known before anything is measured where cuts fix the length.

Imports no torch.

Shapes: M global tokens, N patch positions, T kept patch tokens, K_b codewords.
"""

import math

from pipeline.config import Config
from pipeline.errors import BadInput
from tatok_model.filtering_rules import CHECK_BITS, SCORES, fixes_length, keeps_all

PATCHES, IMAGES = 400_000, 10_000  # at most, for the fit of k-means


def check_baselines(config: Config, training_images: int) -> None:
    """Refuse baselines that cannot be made; bits that vary between images are known only once they are measured.

    Args:
        config: which baselines, and the cut of the operating point.
        training_images: in the shards.

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
    if not SCORES[section.score].needs_image or kept in (0, positions):
        return bits
    return bits + (CHECK_BITS if section.replay else math.log2(math.comb(positions, kept)))


def check_kmeans(bits: float, images: int, positions: int) -> None:
    """Refuse codewords that cannot be fitted to the patches that there are.

    Args:
        bits: what an image may cost.
        images: training pictures.
        positions: N.

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
