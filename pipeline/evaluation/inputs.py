"""What is evaluated: the tokenizer that is named, found beside the run, or trained first."""

import dataclasses
import json
from pathlib import Path

from pipeline.core.checkpoints import check_architecture
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.job import run_nested
from pipeline.data.checks import check_pictures
from pipeline.data.shards import read_manifest
from pipeline.training import train as training


def trained_folder(config: Config) -> Path:
    """Where `jobs/train.py` leaves the run of the same preset and output."""
    return Path(config.run.output) / training.default_name(config)


def with_trained(config: Config) -> Config:
    """The configuration with `tokenizer.checkpoint`: as given, else what training made; nothing is trained here."""
    folder = trained_folder(config) / "checkpoint"
    if config.tokenizer.checkpoint or not (folder / "config.json").is_file():
        return config
    return _with_checkpoint(config, folder)


def check_inputs(config: Config) -> None:
    """Refuse a tokenizer or pictures that cannot be used; what would be trained first is checked as training does.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; a checkpoint of another architecture, pictures
            that cannot be used.
    """
    found = with_trained(config)
    if not found.tokenizer.checkpoint:
        training.check(config)
        return
    check_architecture(found)
    check_pictures(config)


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
    made = run_nested("train", "pipeline.training.train", config)
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
