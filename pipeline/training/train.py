"""The stage behind `jobs/train.py`: shards in, a tokenizer checkpoint out."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.checkpoints import check_architecture, find, is_hub_id, latest, replaced
from pipeline.core.cluster import check_cpus, pick_device
from pipeline.core.config import Config, TrainConfig
from pipeline.core.console import say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import OutOfRoom, memory_sentence, sha256_file
from pipeline.core.inputs import with_shards
from pipeline.core.run import Run
from pipeline.data.checks import check_files, check_pictures
from pipeline.data.shards import read_manifest
from pipeline.tracking import Tracker, check_tracking

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from torch import nn

# The driver's way through a training: workers, their outcome, the exported checkpoint.


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
    from pipeline.training.recorder import followed

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
        from pipeline.training.workers import run_workers

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


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: no source and no shards, shards of another image size, a checkpoint of another architecture, weights
            that do not exist, more workers than CPUs, a tracking address of unknown form.
    """
    check_cpus("train.num_workers", config.train.num_workers, config.train.cpus_per_worker)
    check_tracking(config)
    check_architecture(config)
    check_files(config, "losses.perceptual_backbone", "losses.perceptual_heads")
    check_pictures(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-train"


def run(run: Run) -> None:
    """Train, and leave the averaged model in `checkpoint/`."""
    run.config = with_shards(run.config)
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    if run.config.tokenizer.checkpoint:
        run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": _sha256(run.config)}
    if manifest.splits["train"].rows == 0 or manifest.splits["heldout"].rows == 0:
        rows = {name: split.rows for name, split in manifest.splits.items()}
        raise BadInput(f"shards {run.config.data.shards!r} hold {rows} pictures; expected some in both splits")
    if hides_nothing(run.config):
        say("kept_sets.all is 0: kept_sets.hide_globals has no effect, the entropy model always sees the global tokens")
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint}) as tracker:
        train_and_export(run, tracker, "train", "pipeline.training.tokenizer_training", "validation/reconstructions")
        say(f"tokenizer in {run.outputs['checkpoint']}")


def hides_nothing(config: Config) -> bool:
    """Whether global tokens are to be hidden from the entropy model in a share of samples of which there are none."""
    tokenizer, kept_sets = config.tokenizer, config.kept_sets
    sees = tokenizer.has_entropy_model and tokenizer.global_tokens and tokenizer.entropy_globals
    return bool(sees and kept_sets.hide_globals and not kept_sets.all)


def _sha256(config: Config) -> str:
    """Of the weights that training starts from; '' for those of the hub, which are not here yet."""
    path = config.tokenizer.checkpoint
    return "" if is_hub_id(path) else sha256_file(find(path) / "model.safetensors")
