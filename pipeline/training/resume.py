"""Where a training run starts from, and whether it may go on: new, from other weights, or from its own checkpoint."""

from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoints
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.errors import BadInput
from pipeline.pretrained import load_tokenizer
from pipeline.progress import say
from pipeline.training.state import TrainState

FREE = {  # keys of `train` that may change between attempts: they do not decide what a step does
    "num_workers", "device", "compile", "max_steps", "max_minutes", "log_every", "validate_every", "validation_images",
    "grid_images", "checkpoint_every", "keep_checkpoints", "max_failures", "cpus_per_worker", "fused",
}  # fmt: skip


def starting_state(config: Config, folder: Path, device: torch.device) -> TrainState:
    """From the run's newest checkpoint in `folder`, else from `tokenizer.checkpoint`, else new.

    Raises:
        BadInput: the run was begun with other values, or `tokenizer.checkpoint` cannot be used.
    """
    state = TrainState(config, device)
    checkpoint = checkpoints.latest(folder)
    if checkpoint is not None:
        check_unchanged(checkpoint.record["decides"], deciding(config))
        state.load(checkpoint)
        say(f"going on from step {state.step}")
    elif config.tokenizer.checkpoint:
        state.start_from(load_tokenizer(config)[0])
    return state


def deciding(config: Config) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    values = config.to_dict()
    decides = {f"tokenizer.{key}": value for key, value in values["tokenizer"].items()}
    decides |= {f"losses.{key}": value for key, value in values["losses"].items()}
    decides |= {f"kept_sets.{key}": value for key, value in values["kept_sets"].items()}
    decides |= {f"train.{key}": value for key, value in values["train"].items() if key not in FREE}
    decides["data.shards"] = read_manifest(config.data.shards).fingerprint
    return decides


def check_unchanged(begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with other values than a run was begun with.

    Raises:
        BadInput: naming the first key that differs.
    """
    for key, value in wanted.items():
        if begun.get(key) != value:
            raise BadInput(f"{key} is {value!r}; expected {begun.get(key)!r}, as this run was begun, or a new run.name")
