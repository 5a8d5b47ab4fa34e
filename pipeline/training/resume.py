"""Whether a training run may go on from its own checkpoint, whatever it trains."""

from pathlib import Path
from typing import Any

from pipeline.core import checkpoints
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.manifest import check_unchanged
from pipeline.training.state import TrainState

FREE = {  # keys of a training's section that may change between attempts: they do not decide what a step does
    "num_workers", "device", "compile", "max_steps", "max_minutes", "log_every", "validate_every", "validation_images",
    "grid_images", "checkpoint_every", "keep_checkpoints", "max_failures", "cpus_per_worker", "fused",
    "min_workers", "not_finite", "parallel",
}  # fmt: skip


def go_on(state: TrainState[Any], folder: Path, decides: dict[str, Any]) -> bool:
    """Load the newest checkpoint in `folder`; False where there is none.

    Args:
        state: new, of the right shape.
        folder: the run's `checkpoints`.
        decides: what decides the weights of a step, by key.

    Raises:
        BadInput: the run was begun with other values.
    """
    checkpoint = checkpoints.latest(folder)
    if checkpoint is None:
        return False
    check_unchanged(checkpoint.record["decides"], decides)
    state.load(checkpoint)
    say(f"going on from step {state.step}")
    return True


def values_of(config: Config, *sections: str) -> dict[str, Any]:
    """The values of some sections by `section.key`, without those that may change between attempts."""
    values = config.to_dict()
    training = ("train", "train_generator")
    return {
        f"{section}.{key}": value
        for section in sections
        for key, value in values[section].items()
        if section not in training or key not in FREE
    }
