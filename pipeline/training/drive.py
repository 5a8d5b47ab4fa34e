"""The driver's way through a training: workers, their outcome, the exported checkpoint.

Imports neither torch nor ray before it trains.
"""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints import latest, replaced
from pipeline.config import TrainConfig
from pipeline.devices import pick_device
from pipeline.errors import Stopped
from pipeline.room import OutOfRoom, memory_sentence
from pipeline.run import Run
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from torch import nn


def train_and_export(run: Run, tracker: Tracker, section: str, worker: str, pictures: str) -> None:
    """Train as a section says, in this process or on Ray Train workers, and leave the averaged model in `checkpoint/`.

    Args:
        run: gets results and outputs.
        tracker: is told of checkpoints, pictures and the final model.
        section: of the configuration, a `TrainConfig`.
        worker: the module whose function `work(run, device, wrap, report)` a worker runs.
        pictures: the name under which pictures are tracked.

    Raises:
        Stopped: it ended early; a checkpoint was saved.
        OutOfRoom: storage or memory is full.
        FloatingPointError: the loss is no number.
    """
    from pipeline.training.follow import followed

    with followed(run, tracker, pictures):
        outcome = _run_workers(run, section, worker)
    run.results = outcome["results"]
    if outcome["stopped"]:
        raise Stopped(outcome["stopped"])
    run.outputs["checkpoint"] = str(export(run.folder))
    tracker.model(run.folder / "checkpoint")


def _run_workers(run: Run, section: str, worker: str) -> dict[str, Any]:
    """What `work` returned, on the first worker."""
    train: TrainConfig = getattr(run.config, section)
    if train.num_workers:
        from pipeline.training.ray_workers import run_workers

        return run_workers(run, section, worker)
    device = pick_device(section, train.device)
    try:
        return import_module(worker).work(run, device, compiled(train))
    except RuntimeError as problem:
        if sentence := memory_sentence(problem, run.config, section):
            raise OutOfRoom(sentence) from problem
        raise


def compiled(train: TrainConfig) -> "Callable[[nn.Module], nn.Module]":
    """What prepares a module in a process of its own: `torch.compile` where the training asks for it."""
    import torch

    return torch.compile if train.compile else lambda module: module  # type: ignore[return-value]


def export(folder: Path) -> Path:
    """Copy the newest checkpoint's model to `checkpoint/`: what other stages and people load."""
    newest = latest(folder / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"no whole checkpoint in {folder / 'checkpoints'}")
    final = folder / "checkpoint"
    with replaced(final) as aside:
        for name in ("config.json", "model.safetensors"):
            shutil.copy2(newest.folder / name, aside / name)
    return final
