"""The stage behind `jobs/train.py`: shards in, a tokenizer checkpoint out; and the driver's way through any training.

A training runs in this process or on Ray Train workers: one process per worker, DDP or FSDP2 between them, restarts
after failures.
"""

import json
import os
import shutil
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import check_architecture, check_begun, find, is_hub_id, latest, replaced
from pipeline.core.cluster import check_machine, check_room, connect, most_resources, names_cluster, pick_device
from pipeline.core.config import Config, TrainConfig
from pipeline.core.console import say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import OutOfRoom, memory_sentence, sha256_file, storage_sentence, write_json
from pipeline.core.inputs import with_input
from pipeline.core.manifest import values_of
from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.data.checks import check_files, check_pictures
from pipeline.data.shards import Damaged, read_manifest
from pipeline.tracking import Tracker, check_tracking

CLEANER = "PlacementGroupCleanerCallback"  # of Ray Train, private to it
GAVE_UP = "gave_up.json"  # in the run folder: why a worker saw no sense in starting again
ENDINGS = {"bad_input": BadInput, "not_finite": FloatingPointError, "out_of_room": OutOfRoom}  # that end all workers


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: no source and no shards, shards of another image size, a checkpoint of another architecture, weights
            that do not exist, more workers than CPUs, a tracking address of unknown form.
    """
    check_machine("train", config.train)
    check_tracking(config)
    check_architecture(config)
    check_files(config, "losses.perceptual_backbone", "losses.perceptual_heads")
    check_pictures(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-train"


SECTIONS = ("tokenizer", "losses", "kept_sets", "train")  # that decide weights


def decides(config: Config) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    return {**values_of(config, *SECTIONS), "data.shards": read_manifest(config.data.shards).fingerprint}


def made_of(config: Config) -> dict[str, Any]:
    """What decides the weights that a training on `data.shards` ends with."""
    start = {"weights": _sha256(config)} if config.tokenizer.checkpoint else {}
    return {**decides(config), "train.max_steps": config.train.max_steps, **start}


def run(run: Run) -> None:
    """Train, and leave the averaged model in `checkpoint/`."""
    check_begun(run, values_of(run.config, *SECTIONS))  # before pictures are preprocessed for nothing
    run.config = with_input(run.config, "data.shards")
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    if run.config.tokenizer.checkpoint:
        run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": _sha256(run.config)}
    if manifest.splits["train"].rows == 0 or manifest.splits["heldout"].rows == 0:
        rows = {name: split.rows for name, split in manifest.splits.items()}
        raise BadInput(f"shards {run.config.data.shards!r} hold {rows} pictures; expected some in both splits")
    if hides_nothing(run.config):
        say("kept_sets.all is 0: kept_sets.hide_globals has no effect, the entropy model always sees the global tokens")
    check_begun(run, decides(run.config))
    run.made_of = made_of(run.config)
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint}) as tracker:
        train_and_export(run, tracker, "train", "pipeline.training.tokenizer_training", "validation/reconstructions")


def hides_nothing(config: Config) -> bool:
    """Whether global tokens are to be hidden from the entropy model in a share of samples of which there are none."""
    tokenizer, kept_sets = config.tokenizer, config.kept_sets
    sees = tokenizer.has_entropy_model and tokenizer.global_tokens and tokenizer.entropy_globals
    return bool(sees and kept_sets.hide_globals and not kept_sets.all)


def _sha256(config: Config) -> str:
    """Of the weights that training starts from; '' for those of the hub, which are not here yet."""
    path = config.tokenizer.checkpoint
    return "" if is_hub_id(path) else sha256_file(find(path) / "model.safetensors")


def train_and_export(run: Run, tracker: Tracker, section: str, worker: str, pictures: str) -> None:
    """Train as a section says, in this process or on Ray Train workers, and leave the averaged model in `checkpoint/`.

    Args:
        run: gets results and outputs.
        tracker: gets checkpoints, pictures and the final model.
        section: of the configuration, a `TrainConfig`.
        worker: the module whose function `work(run, device, report)` a worker runs.
        pictures: the name under which pictures are tracked.

    Raises:
        Stopped: it ended early; a checkpoint was saved.
        BadInput, OutOfRoom, FloatingPointError: input is wrong, storage or memory is full, the loss is NaN or infinite.
    """
    from pipeline.training.recorder import followed

    with followed(run, tracker, pictures):
        outcome = _train(run, section, worker)
    run.results = outcome["results"]
    if outcome["stopped"]:
        raise Stopped(outcome["stopped"])
    run.outputs["checkpoint"] = str(export(run.folder))
    tracker.model(run.folder / "checkpoint")


def _train(run: Run, section: str, worker: str) -> dict[str, Any]:
    """Run the training; returns what `work` returned on rank 0."""
    train: TrainConfig = getattr(run.config, section)
    if train.num_workers:
        return run_workers(run, section, worker)
    device = pick_device(section, train.device)
    try:
        return import_module(worker).work(run, device)
    except RuntimeError as problem:
        if sentence := memory_sentence(problem, run.config, section):
            raise OutOfRoom(sentence) from problem
        raise


def export(folder: Path) -> Path:
    """Copy the newest checkpoint's model to `checkpoint/`: what other stages and people load."""
    newest = latest(folder / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"no whole checkpoint in {folder / 'checkpoints'}")
    final = folder / "checkpoint"
    with replaced(final) as aside:
        for name in ("config.json", "model.safetensors", "README.md"):
            if (newest.folder / name).exists():  # of a run from before, without a card
                shutil.copy2(newest.folder / name, aside / name)
    return final


def run_workers(run: Run, section: str, worker: str) -> dict[str, Any]:
    """Train with `num_workers` Ray Train workers; returns what `work` returned on the first one.

    A worker that dies takes the others down; Ray starts all again, at most `max_failures` times, and they go on
    from the newest checkpoint in the run folder, which every node has to see. Where a node is gone for good they go on
    with fewer, at least `min_workers`. Arguments and errors are those of `train_and_export`.
    """
    ray = connect()
    (run.folder / GAVE_UP).unlink(missing_ok=True)
    train = getattr(run.config, section)
    resources = most_resources(ray)
    check_resources(resources, run.config, section)
    # Ray gives workers streams of its own. Train takes those for a library's, and would print every line twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        """Without the actor that frees what a dead controller held, on a Ray that ends with this job anyway.

        It asks the dashboard every second, and says every second that there is none.
        """

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [one for one in callbacks if names_cluster() or type(one).__name__ != CLEANER]

    task = {"section": section, "worker": worker}
    trainer = Trainer(
        _work,
        train_loop_config={"config": run.config.to_dict(), "folder": str(run.folder), "stage": run.stage, **task},
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.num_workers) if train.min_workers else train.num_workers,
            use_gpu=_use_gpu(train, resources),
            resources_per_worker={"CPU": train.cpus_per_worker},
        ),
        run_config=RunConfig(
            # Ray resumes an equal name by itself; checkpoints are ours, so every start gets a name of its own.
            name=f"{run.folder.name}-{int(time.time())}",
            storage_path=str(run.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    try:
        outcome: dict[str, Any] = _fit(trainer).return_value
    except Exception:
        outcome = _gave_up(run.folder)
        if not outcome:
            raise
    for kind, error in ENDINGS.items():
        if kind in outcome:
            raise error(outcome[kind])
    return outcome


def _fit(trainer: Any) -> Any:
    """Ray Train takes SIGINT for itself where `fit` is called on the main thread; a job's orderly stop needs it."""
    result: Future[Any] = Future()

    def fit() -> None:
        try:
            result.set_result(trainer.fit())
        except BaseException as problem:  # noqa: BLE001 - raised on the main thread instead
            result.set_exception(problem)

    threading.Thread(target=fit, daemon=True, name="ray-train").start()
    return result.result()


def check_resources(resources: dict[str, float], config: Config, section: str = "train") -> None:
    """Refuse more CPUs or GPUs than the cluster has, for which Ray would wait without end."""
    train = getattr(config, section)
    key = "min_workers" if train.min_workers else "num_workers"
    check_room(resources, f"{section}.{key}", getattr(train, key), train.device == "cuda", train.cpus_per_worker)


def _use_gpu(config: TrainConfig, resources: dict[str, float]) -> bool:
    """Whether workers get a GPU each: as configured, by default where the cluster has one for each."""
    if config.device == "auto":
        return resources.get("GPU", 0) >= (config.min_workers or config.num_workers)
    return config.device == "cuda"


def _work(values: dict[str, Any]) -> dict[str, Any]:
    """Runs in each worker."""
    import ray.train
    import ray.train.torch

    config = config_from_dict(values["config"])
    run = Run(values["stage"], config, Path(values["folder"]), command=["ray-train-worker"])
    if outcome := _gave_up(run.folder):
        return outcome
    try:
        return import_module(values["worker"]).work(run, ray.train.torch.get_device(), ray.train.report)
    except Exception as error:
        outcome = _ending(error, config, values["section"])
        if isinstance(error, BadInput | FloatingPointError) and not isinstance(error, Damaged):
            return outcome  # as all workers do alike
        # This may come to one worker alone, while the others wait for it: they end only when it dies. Ray then starts
        # all again, in vain, so they look for what it said.
        if outcome:
            with suppress(OSError):
                write_json(run.folder / GAVE_UP, outcome)
        raise


def _ending(error: Exception, config: Config, section: str) -> dict[str, str]:
    """What the driver raises, by its kind in `ENDINGS`; {} where starting again may help."""
    if isinstance(error, BadInput):
        return {"bad_input": str(error)}
    if isinstance(error, FloatingPointError):
        return {"not_finite": str(error)}
    full = memory_sentence(error, config, section) or storage_sentence(error)
    return {"out_of_room": full} if full else {}


def _gave_up(folder: Path) -> dict[str, str]:
    """Why a worker saw no sense in starting again; {} where none did."""
    path = folder / GAVE_UP
    return dict(json.loads(path.read_text())) if path.exists() else {}
