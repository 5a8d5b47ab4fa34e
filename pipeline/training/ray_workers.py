"""Ray Train around the worker: one process per worker, DDP between them, restarts after failures."""

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.cluster import connect
from pipeline.config import Config, TrainConfig, config_from_dict
from pipeline.errors import BadInput
from pipeline.run import Run


def run_workers(run: Run, section: str, worker: str) -> dict[str, Any]:
    """Train with `num_workers` Ray Train workers; returns what `work` returned on the first one.

    Args:
        run: the run folder and the configuration.
        section: of the configuration, that describes the training.
        worker: the module whose function `work` a worker runs.

    A worker that dies takes the others down; Ray starts all again, at most `max_failures` times, and they go on
    from the newest checkpoint in the run folder, which every node has to see.
    """
    ray = connect()
    train = getattr(run.config, section)
    check_resources(ray.cluster_resources(), run.config, section)
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
            num_workers=train.num_workers,
            use_gpu=_use_gpu(train),
            resources_per_worker={"CPU": train.cpus_per_worker},
        ),
        run_config=RunConfig(
            # Ray resumes an equal name by itself; checkpoints are ours, so every start gets a name of its own.
            name=f"{run.folder.name}-{int(time.time())}",
            storage_path=str(run.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    outcome: dict[str, Any] = _fit(trainer).return_value
    if outcome.get("bad_input"):
        raise BadInput(outcome["bad_input"])
    if outcome.get("not_finite"):
        raise FloatingPointError(outcome["not_finite"])
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
    wanted = {"CPU": train.num_workers * train.cpus_per_worker}
    if train.device == "cuda":
        wanted["GPU"] = train.num_workers
    for kind, count in wanted.items():
        if count > resources.get(kind, 0):
            raise BadInput(
                f"{section}.num_workers is {train.num_workers}, which needs {count:g} {kind}s; "
                f"expected at most what the cluster has, {resources.get(kind, 0):g}"
            )


def _use_gpu(config: TrainConfig) -> bool:
    """Whether workers get a GPU each: as configured, by default where the cluster has one."""
    import ray

    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.num_workers
    return config.device == "cuda"


def _work(values: dict[str, Any]) -> dict[str, Any]:
    """Runs in each worker."""
    import ray.train
    import ray.train.torch

    from pipeline.training.worker import compiled

    config = config_from_dict(values["config"])
    run = Run(values["stage"], config, Path(values["folder"]), command=["ray-train-worker"])
    device = ray.train.torch.get_device()
    try:
        wrap = _for_workers(compiled(config, values["section"]))
        return import_module(values["worker"]).work(run, device, wrap, report=ray.train.report)
    # Both come to all workers alike, and starting again would not help: the driver raises them.
    except BadInput as error:
        return {"bad_input": str(error)}
    except FloatingPointError as error:
        return {"not_finite": str(error)}


def _for_workers(compile_module: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """DDP around the module. The quantizer keeps its buffers equal itself: broadcasting them would cost every step."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    def wrap(module: Any) -> Any:
        if distributed.get_world_size() == 1:
            return compile_module(module)
        with warnings.catch_warnings():  # the new name of the option is not known to every torch in our range
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(compile_module(module), broadcast_buffers=False)

    return wrap
