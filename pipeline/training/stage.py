"""The stage behind `jobs/train.py`: shards in, a tokenizer checkpoint out."""

import dataclasses
import os
import shutil
from pathlib import Path

from pipeline.checkpoints import check_architecture, find, is_hub_id, latest
from pipeline.checks import check_files, check_pictures
from pipeline.cluster import check_cpus
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.errors import BadInput, Stopped
from pipeline.job import run_nested
from pipeline.paths import sha256_file
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker, check_tracking


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
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint}) as tracker:
        _train(run, tracker)


def with_shards(config: Config) -> Config:
    """The configuration with `data.shards`; makes them from `data.source` when it names none, and says so."""
    if config.data.shards:
        return config
    say("data.shards is empty: preprocessing data.source first")
    made = run_nested("preprocess", "pipeline.data.preprocess", config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=str(made.folder)))


def _sha256(config: Config) -> str:
    """Of the weights that training starts from; '' for those of the hub, which are not here yet."""
    path = config.tokenizer.checkpoint
    return "" if is_hub_id(path) else sha256_file(find(path) / "model.safetensors")


def _train(run: Run, tracker: Tracker) -> None:
    from pipeline.training.follow import followed

    with followed(run, tracker):
        outcome = _run_workers(run)
    run.results = outcome["results"]
    if outcome["stopped"]:
        raise Stopped(outcome["stopped"])
    run.outputs["checkpoint"] = str(export(run.folder))
    tracker.model(run.folder / "checkpoint")
    say(f"tokenizer in {run.folder / 'checkpoint'}")


def _run_workers(run: Run) -> dict:
    if run.config.train.num_workers:
        from pipeline.training.ray_workers import run_workers

        return run_workers(run)
    from pipeline.training.worker import compiled, pick_device, work

    return work(run, pick_device(run.config), compiled(run.config))


def export(folder: Path) -> Path:
    """Copy the newest checkpoint's model to `checkpoint/`: what other stages and people load."""
    newest = latest(folder / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"no whole checkpoint in {folder / 'checkpoints'}")
    aside, final = folder / f".checkpoint.{os.getpid()}", folder / "checkpoint"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(newest.folder / name, aside / name)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    return final
