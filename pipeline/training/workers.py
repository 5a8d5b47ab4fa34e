"""Ray Train around the worker: one process per worker, DDP or FSDP2 between them, restarts after failures."""

import json
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pipeline.core.cluster import check_room, connect, most_resources
from pipeline.core.config import Config, TrainConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import OutOfRoom, memory_sentence, storage_sentence, write_json
from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.data.shards import Damaged
from pipeline.training import distributed
from pipeline.training.state import load_optimizer, make_optimizer, optimizer_tensors
from pipeline.training.train import compiled
from tatok_model.tokenizer import TaTok

# FSDP2: a worker holds its part of weights, average, gradients and optimiser, and all of a block only while it is due.


def shard(
    model: TaTok, average: TaTok, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Cut two models in place, equal on every worker, and what the optimiser of the first remembers.

    Args:
        model: what is trained.
        average: of the same architecture.
        optimizer: of the whole model.
        config: of the training.
        device: where this worker computes.

    Returns:
        An optimiser of the parameters that `model` now has.

    Source: `torch.distributed.fsdp.fully_shard`, which is FSDP2 (arXiv 2304.11277 for the idea).
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in (model, average):
        for block in (*part.encoder.blocks, *part.decoder.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh)
    own = make_optimizer(model, config)
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    found = optimizer_tensors(optimizer)
    for name, tensor in found.items():
        if tensor.ndim:  # a moment, not the count of steps
            found[name] = distribute_tensor(tensor, mesh, parameters[int(name.split(".")[0])].placements)
    load_optimizer(own, found)
    return own


GAVE_UP = "gave_up.json"  # in the run folder: why a worker saw no sense in starting again
ENDINGS = {"bad_input": BadInput, "not_finite": FloatingPointError, "out_of_room": OutOfRoom}  # that end all workers


def run_workers(run: Run, section: str, worker: str) -> dict[str, Any]:
    """Train with `num_workers` Ray Train workers; returns what `work` returned on the first one.

    A worker that dies takes the others down; Ray starts all again, at most `max_failures` times, and they go on
    from the newest checkpoint in the run folder, which every node has to see. Where a node is gone for good they go on
    with fewer, at least `min_workers`.

    Args:
        run: the run folder and the configuration.
        section: of the configuration, that describes the training.
        worker: the module whose function `work` a worker runs.

    Raises:
        BadInput: as the workers found, or the cluster is too small.
        OutOfRoom: storage or memory is full.
        FloatingPointError: the loss is no number.
    """
    ray = connect()
    (run.folder / GAVE_UP).unlink(missing_ok=True)
    train = getattr(run.config, section)
    resources = most_resources(ray)
    check_resources(resources, run.config, section)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": run.config.to_dict(),
            "folder": str(run.folder),
            "stage": run.stage,
            "section": section,
            "worker": worker,
        },
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
    """Refuse what Ray would wait for without end.

    Raises:
        BadInput: more CPUs or GPUs are asked for than the cluster has.
    """
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
    device = ray.train.torch.get_device()
    try:
        wrap = _for_workers(compiled(getattr(config, values["section"])))
        return import_module(values["worker"]).work(run, device, wrap, report=ray.train.report)
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


def _for_workers(compile_module: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """DDP around the module, unless it is sharded and so adds up its gradients itself.

    The quantizer keeps its buffers equal itself: broadcasting them would cost every step.
    """
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    def wrap(module: Any) -> Any:
        if distributed.get_world_size() == 1:
            return compile_module(module)
        if isinstance(module, FSDPModule):
            return module
        with warnings.catch_warnings():  # the new name of the option is not known to every torch in our range
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(compile_module(module), broadcast_buffers=False)

    return wrap
