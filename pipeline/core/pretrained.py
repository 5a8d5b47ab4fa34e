"""Networks that come from files or from the hub, loaded so that bad input is told in one sentence."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.checkpoints import check_same_architecture, find, is_hub_id
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.losses import LPIPS
    from tatok_model.tokenizer import TaTok


def load_tokenizer(config: Config) -> "tuple[TaTok, str]":
    """The tokenizer of `tokenizer.checkpoint` and the sha256 of its weights.

    Raises:
        BadInput: it cannot be had from the hub, is damaged, or has another architecture than configured.
    """
    from safetensors import SafetensorError

    from tatok_model.config import read_config
    from tatok_model.tokenizer import TaTok

    folder = _tokenizer_folder(config)
    try:
        check_same_architecture(config.tokenizer.checkpoint, read_config(folder), config)
        return TaTok.from_pretrained(folder), sha256_file(folder / "model.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"tokenizer.checkpoint {config.tokenizer.checkpoint!r} cannot be loaded ({reason}); "
            "expected config.json and model.safetensors as training wrote them"
        ) from None


def check_quality(config: Config, tokenizer: "TaTok") -> None:
    """Refuse the rule `quality` where this tokenizer cannot predict it, or does not reach it.

    Raises:
        BadInput: not calibrated for the score and rounds, or more dB than all tokens give, at any of the cuts.
    """
    from tatok_model.filtering_rules import line_of

    section = config.filter
    if section.rule != "quality" or not config.tokenizer.patch_tokens:
        return
    line = line_of(tokenizer.quality_lines, section.score, section.rounds)
    if line is None:
        raise BadInput(
            f"filter.rule is 'quality' and tokenizer.checkpoint {config.tokenizer.checkpoint!r} has no line from "
            f"{section.score} in {section.rounds} rounds to dB; expected one that jobs/calibrate.py has fitted"
        )
    for key, number in [("filter.threshold", section.threshold)] + [
        ("evaluate.thresholds", found) for found in config.evaluate.thresholds
    ]:
        try:
            line.check(number)
        except ValueError as error:
            raise BadInput(f"{key}: {error}") from None


def tokenizer_sha256(config: Config) -> str:
    """Of the weights of `tokenizer.checkpoint`; raises as `load_tokenizer` where they cannot be had."""
    return sha256_file(_tokenizer_folder(config) / "model.safetensors")


def _tokenizer_folder(config: Config) -> Path:
    path = config.tokenizer.checkpoint
    return _from_hub(path) if is_hub_id(path) else find(path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "quality.json"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"tokenizer.checkpoint {name!r} cannot be had from the hub ({reason}); "
            "expected a checkpoint folder or a hub id"
        ) from None


def load_lpips(section: str, backbone: str, heads: str, image_size: int) -> "LPIPS":
    """LPIPS with the weights of two files.

    Args:
        section: the keys' beginning, for messages: `evaluate.lpips` or `losses.perceptual`.
        backbone: path of VGG16 or AlexNet weights.
        heads: path of the linear heads.
        image_size: pixels a side of the pictures it will compare.

    Raises:
        BadInput: the files are not such weights, or pictures are too small for the backbone.
    """
    from tatok_model.losses import LPIPS

    try:
        lpips = LPIPS.from_files(backbone, heads)
    except (OSError, ValueError) as error:
        raise BadInput(f"{section}_backbone and {section}_heads: {error}") from None
    smallest = lpips.backbone.smallest
    if image_size < smallest:
        raise BadInput(
            f"data.image_size is {image_size}; expected at least {smallest} pixels for LPIPS with "
            f"{lpips.backbone.name}, or no {section}_backbone"
        )
    return lpips
