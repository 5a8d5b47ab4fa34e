"""What is evaluated and with which networks: found or made, loaded in the driver, so that bad input is told at once."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoints import check_same_architecture, find, is_hub_id
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.errors import BadInput
from pipeline.job import run_nested
from pipeline.paths import sha256_file
from pipeline.progress import say
from pipeline.training import stage as training

if TYPE_CHECKING:  # torch is imported inside functions: a stage's `check` answers without it
    from tatok_model.lpips import LPIPS
    from tatok_model.tokenizer import TaTok


def trained_folder(config: Config) -> Path:
    """Where `jobs/train.py` leaves the run of the same preset and output."""
    return Path(config.run.output) / training.default_name(config)


def with_trained(config: Config) -> Config:
    """The configuration with `tokenizer.checkpoint`: as given, else what training made; nothing is trained here."""
    folder = trained_folder(config) / "checkpoint"
    if config.tokenizer.checkpoint or not (folder / "config.json").is_file():
        return config
    return _with_checkpoint(config, folder)


def with_tokenizer(config: Config) -> Config:
    """The configuration with `tokenizer.checkpoint`; trains with the same configuration when there is none yet.

    Args:
        config: `data.shards` names existing shards.

    Raises:
        BadInput: the tokenizer that training left was made from other shards, so that the pictures to measure may be
            among those it has seen.
    """
    if config.tokenizer.checkpoint:
        return config
    found = with_trained(config)
    if found.tokenizer.checkpoint:
        _check_shards_of(trained_folder(config), config)
        say(f"tokenizer.checkpoint is empty: taking {found.tokenizer.checkpoint}")
        return found
    say("tokenizer.checkpoint is empty: training first")
    made = run_nested("train", "pipeline.training.stage", config)
    return _with_checkpoint(config, made.folder / "checkpoint")


def _with_checkpoint(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, checkpoint=str(folder)))


def _check_shards_of(run_folder: Path, config: Config) -> None:
    inputs = json.loads((run_folder / "summary.json").read_text())["inputs"]
    ours = read_manifest(config.data.shards).fingerprint
    if inputs.get("shards", {}).get("sha256") != ours:
        raise BadInput(
            f"tokenizer.checkpoint is empty and the tokenizer in {str(run_folder)!r} was trained on other shards than "
            f"{config.data.shards!r}; expected tokenizer.checkpoint, or another run.output to train one in"
        )


def load_tokenizer(config: Config) -> "tuple[TaTok, str]":
    """The tokenizer of `tokenizer.checkpoint` and the sha256 of its weights.

    Raises:
        BadInput: it cannot be had from the hub, or has another architecture than configured.
    """
    from tatok_model.config import read_config
    from tatok_model.tokenizer import TaTok

    path = config.tokenizer.checkpoint
    folder = _from_hub(path) if is_hub_id(path) else find(path)
    check_same_architecture(path, read_config(folder), config.tokenizer.architecture())
    return TaTok.from_pretrained(folder), sha256_file(folder / "model.safetensors")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"tokenizer.checkpoint {name!r} cannot be had from the hub ({reason}); "
            "expected a checkpoint folder or a hub id"
        ) from None


def load_lpips(config: Config) -> "LPIPS | None":
    """LPIPS with the weights that the configuration names; None when it names none.

    Raises:
        BadInput: the files are not such weights, or pictures are too small for the backbone.
    """
    files = config.evaluate
    if not files.lpips_backbone:
        return None
    from tatok_model.lpips import LPIPS

    try:
        lpips = LPIPS.from_files(files.lpips_backbone, files.lpips_heads)
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"evaluate.lpips_backbone and evaluate.lpips_heads: {error}") from None
    smallest = lpips.backbone.smallest
    if config.data.image_size < smallest:
        raise BadInput(
            f"data.image_size is {config.data.image_size}; expected at least {smallest} pixels for LPIPS with "
            f"{lpips.backbone.name}, or no evaluate.lpips_backbone"
        )
    return lpips
