"""The tokenizer of `evaluate.blind_checkpoint`: the evaluated one with an entropy model that sees no global tokens.

Its sizes are compared before anything is made, its weights before anything is measured.
"""

import math
from typing import TYPE_CHECKING

from pipeline.core.checkpoints import SHAPING, find, read_architecture
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.run import Run
from tatok_model.filtering_rules import CHECK_BITS, SCORES, fixes_length, keeps_all

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.tokenizer import TaTok

# Whether baselines can be made at a tokenizer's bits, known before anything is measured where cuts fix the length.

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


KEY = "evaluate.blind_checkpoint"
MODEL = "entropy_model."  # beginning of an entropy model's weights' names


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
    found = read_architecture(path, KEY)
    if found.entropy_globals:
        raise BadInput(f"{KEY} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in SHAPING:
        wanted = getattr(tokenizer, name)
        if name != "entropy_globals" and getattr(found, name) != wanted:
            raise BadInput(f"{KEY} has {name} {getattr(found, name)}; expected {wanted}, as tokenizer.checkpoint")


def load_blind(run: Run, tokenizer: "TaTok") -> "TaTok | None":
    """The second model, noted among the run's inputs; None where none is named.

    Raises:
        BadInput: there is none, or as `check_blind`.
    """
    from tatok_model.tokenizer import TaTok

    path = run.config.evaluate.blind_checkpoint
    if not path:
        return None
    folder = find(path, KEY)
    blind = TaTok.from_pretrained(folder)
    check_blind(tokenizer, blind)
    run.inputs["blind"] = {"path": path, "sha256": sha256_file(folder / "model.safetensors")}
    return blind


def check_blind(tokenizer: "TaTok", blind: "TaTok") -> None:
    """Refuse a second model that does not belong to the tokenizer.

    Raises:
        BadInput: it sees the global tokens, its entropy model has another size, or other weights than that model's
            differ.
    """
    import torch

    if blind.entropy_model is None or blind.config.entropy_globals:
        raise BadInput(f"{KEY} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in ("entropy_layers", "entropy_width"):
        wanted, given = getattr(tokenizer.config, name), getattr(blind.config, name)
        if given != wanted:
            raise BadInput(f"{KEY} has {name} {given}; expected {wanted}, as tokenizer.checkpoint")
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(MODEL)}
        for model in (tokenizer, blind)
    )
    same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if not same:
        raise BadInput(f"{KEY} is another tokenizer; expected tokenizer.checkpoint, frozen")
