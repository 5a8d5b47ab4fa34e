"""Connecting to Ray, whether what is asked for fits, and where networks compute.

A job runs on the cluster that `RAY_ADDRESS` names, else on one it starts on this machine.
"""

import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BadInput

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    import torch


def names_cluster() -> bool:
    """Whether the environment says which cluster to work on; an empty address is none."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(dashboard: bool = False) -> Any:
    """Connect to Ray once and return the module; a second call does nothing.

    Ray takes SIGTERM for itself; a job's orderly stop needs it, so it is given back.

    Args:
        dashboard: start one, a gigabyte of memory, where no cluster is named: a cluster has its own.
    """
    # Ray announces a changed default of this variable at every start; saying what we rely on keeps it quiet.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        named = names_cluster()
        # Not Ray's own choice of an address: it would wait without end for the last cluster of this machine that was
        # not stopped in good order.
        ray.init(None if named else "local", log_to_driver=True, include_dashboard=None if named else dashboard)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return ray


def most_resources(ray: Any) -> dict[str, float]:
    """What the cluster has, or what its autoscaler may grow it to: workers may ask for nodes that are not there yet."""
    from ray._private.state import state  # Ray Data and Tune ask it too; no public call answers

    found = dict(ray.cluster_resources())
    planned = state.get_max_resources_from_cluster_config() or {}
    return {kind: max(found.get(kind, 0.0), float(planned.get(kind, 0))) for kind in found | planned}


def as_they_finish(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of a Ray dataset, each when its block is finished; `iter_rows` holds a block until the next is there."""
    for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from block.to_pylist()


def check_room(resources: dict[str, float], key: str, workers: int, gpu: bool, cpus_per_worker: float = 1.0) -> None:
    """Refuse workers, each with some CPUs and perhaps a GPU, that a cluster has no room for: Ray would wait for ever.

    Raises:
        BadInput: naming `key`, what it asks for and what there is.
    """
    for kind, count in (("CPU", workers * cpus_per_worker), ("GPU", workers if gpu else 0)):
        there = resources.get(kind, 0)
        if count > there:
            raise BadInput(
                f"{key} is {workers}, which needs {count:g} {kind}s; expected at most what the cluster has, {there:g}"
            )


def check_cpus(key: str, workers: int, cpus_per_worker: float = 1.0) -> None:
    """Refuse more workers than this machine has CPUs for; a cluster's size is only known once connected.

    Raises:
        BadInput: naming `key`, what it asks for and what there is.
    """
    if names_cluster():
        return
    available = os.cpu_count() or 1
    if workers * cpus_per_worker > available:
        raise BadInput(
            f"{key} is {workers}, which needs {workers * cpus_per_worker:g} CPUs; expected at most "
            f"{int(available / cpus_per_worker)} on this machine with {available} CPUs"
        )


def pick_device(section: str, wanted: str) -> "torch.device":
    """The device of this process, as the `device` of a section wants it; `auto` is a GPU where there is one.

    Raises:
        BadInput: a GPU is wanted where there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BadInput(f"{section}.device is 'cuda'; expected cpu or auto on a machine without a CUDA GPU")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def pick_workers_device(section: str, wanted: str, number: int) -> str:
    """Where the `num_workers` of a section compute, as its `device` wants it; `auto`: on GPUs where all have one.

    Raises:
        BadInput: more workers than the cluster has CPUs, or than GPUs when those are asked for.
    """
    resources = most_resources(connect())
    check_room(resources, f"{section}.num_workers", number, gpu=wanted == "cuda")
    return "cuda" if wanted != "cpu" and resources.get("GPU", 0) >= number else "cpu"


def uses_bf16(precision: str, device: "torch.device") -> bool:
    """Whether to compute in bfloat16: as `precision` says; `auto` is on a GPU that can."""
    import torch

    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
