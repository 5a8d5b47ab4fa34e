"""Connecting to Ray, whether what is asked for fits, and where networks compute.

A job runs on the cluster that `RAY_ADDRESS` names, else on one it starts on this machine. Ray asks a cluster that is
gone for minutes and then ends the process, so it is only let loose on one that has answered.
"""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.console import duration, say
from pipeline.core.errors import BadInput
from pipeline.core.files import interruptible, within

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    import torch


ANSWER_SECONDS = 10.0  # that a cluster may take to take a call, and as many again to say that it is Ray
SOCKET_BYTES = 107  # of a path: what Linux takes
EXPECTED = "expected host:6379 of a running cluster, auto for one on this machine, or no RAY_ADDRESS to start one here"
NOISE = (  # what workers of Ray print, some every second, that tells a user of a job nothing
    "Failed to query Ray Train Controller actor state",  # as long as there is no dashboard
    "Reporting training result",
    "Setting up process group",
    "has constructor arguments in the object store",
)


def names_cluster() -> bool:
    """Whether the environment says which cluster to work on; an empty address is none, `local` one to be started."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def connect(dashboard: bool = False) -> Any:
    """Connect to Ray once and return the module; a second call does nothing.

    Ray takes SIGTERM for itself; a job's orderly stop needs it, so it is given back. Until then Ctrl-C interrupts.

    Args:
        dashboard: start one, a gigabyte of memory, where no cluster is named: a cluster has its own.

    Raises:
        BadInput: no cluster answers where `RAY_ADDRESS` says, or none can be started on this machine.
    """
    # Ray announces a changed default of this variable at every start; saying what we rely on keeps it quiet.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(NOISE))
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray

    if ray.is_initialized():
        return ray
    check_cluster()
    named, began = names_cluster(), time.monotonic()
    say(f"connecting to Ray at {os.environ['RAY_ADDRESS']}" if named else "starting Ray: up to half a minute")
    if not named:  # of its own, which asks nobody for a token
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Not Ray's own choice of an address: it would wait without end for the last cluster of this machine that was not
    # stopped in good order.
    address, its_dashboard = (None, None) if named else ("local", dashboard)
    options = {"log_to_driver": True, "logging_level": logging.WARNING}
    try:
        with interruptible():
            ray.init(address, include_dashboard=its_dashboard, **options)
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        raise BadInput(_refusal(_in_a_line(error))) from None
    if (took := time.monotonic() - began) > 5:
        say(f"Ray is there after {duration(took)}")
    return ray


def _refusal(reason: str) -> str:
    if names_cluster():
        return (
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}, where no Ray cluster can be joined ({reason}); {EXPECTED}"
        )
    variable, folder = _sockets()
    return (
        f"Ray cannot start on this machine, in {folder!r} ({reason}); expected {variable} to name a folder on "
        "this machine with a short path and room that may be written to, such as /tmp"
    )


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_cluster() -> None:
    """Refuse a `RAY_ADDRESS` where no cluster answers; without one, a folder that Ray cannot start in.

    Raises:
        BadInput: naming the variable and the reason, after seconds.
    """
    if not names_cluster():
        _check_sockets()
        return
    address = _address()
    _check_token()
    there = "" if address == os.environ["RAY_ADDRESS"] else f"{address} of the last `ray start` here: "
    try:
        within(2 * ANSWER_SECONDS, lambda: _call(address))
    except PermissionError as error:
        raise BadInput(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}, where the Ray cluster does not let this process in "
            f"({there}{error}); expected RAY_AUTH_MODE=token and the token of the machine where it was started, in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(_refusal(there + _in_a_line(error))) from None


def _check_token() -> None:
    """Refuse token authentication without a token: Ray's own client says so only deep in a log."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file():
        raise BadInput(
            f"RAY_AUTH_MODE is 'token' and there is no token in {str(file)!r}; expected the cluster's: copy it from "
            "the head node, or set RAY_AUTH_TOKEN"
        )


def _address() -> str:
    """Where `RAY_ADDRESS` points, host:port; `auto` is looked up.

    Raises:
        BadInput: it is of another form, or no cluster was started on this machine.
    """
    named = os.environ["RAY_ADDRESS"]
    if named.startswith(("http://", "https://")):
        raise BadInput(f"RAY_ADDRESS is {named!r}, the address of a dashboard, which only `ray job` takes; {EXPECTED}")
    if named.startswith("ray://"):
        raise BadInput(f"RAY_ADDRESS is {named!r}, of Ray Client, through which these jobs cannot work; {EXPECTED}")
    if named != "auto":
        matched = re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):(\d+)", named, re.ASCII)
        if not matched or not 0 < int(matched[1]) < 2**16:
            raise BadInput(f"RAY_ADDRESS is {named!r}; {EXPECTED}")
        return named
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` does for `auto` alone
    try:
        return str(canonicalize_bootstrap_address("auto"))
    except (OSError, ValueError) as error:
        raise BadInput(_refusal(_in_a_line(error))) from None


def _call(address: str) -> None:
    """Ask what is at host:port whether it is Ray and lets this process in.

    Raises:
        PermissionError: it wants another token.
        OSError: nothing takes the call, or does not answer as Ray does.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
        pass
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    with closing(init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_SECONDS - 1)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise PermissionError(error.details()) from None
            if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                raise TimeoutError("what listens there does not answer as Ray does") from None


def _sockets() -> tuple[str, str]:
    """The variable that says where Ray's sockets lie on this machine, and the folder."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ or "TMPDIR" not in os.environ else "TMPDIR"
    return variable, os.path.abspath(os.environ.get(variable, "/tmp"))


def _check_sockets() -> None:
    """Raises BadInput where Ray would start for minutes, or fail in a library of C++."""
    variable, folder = _sockets()
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    over = len(os.fsencode(os.path.join(folder, "ray", session, "sockets", "plasma_store"))) - SOCKET_BYTES
    if over > 0:
        raise BadInput(
            f"{variable} is {folder!r}, too long by {over} for the sockets that Ray makes below it; expected "
            "RAY_TMPDIR to name a folder with a shorter path on this machine, such as /tmp"
        )
    there = os.path.join(folder, "ray")
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(
            f"{variable} is {folder!r}, where Ray cannot make a folder; expected RAY_TMPDIR to name one on this "
            "machine that can be written to, such as /tmp"
        )


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

    Also what `check_cluster` refuses, where these workers are Ray's: one alone may work in this process.

    Raises:
        BadInput: naming `key`, what it asks for and what there is; workers where Ray cannot work.
    """
    alone = workers == 1 and not key.startswith("train") and not (names_cluster() and key != "data.num_workers")
    if workers and not alone:
        check_cluster()
    if names_cluster():
        return
    available = os.cpu_count() or 1
    if workers * cpus_per_worker > available:
        raise BadInput(
            f"{key} is {workers}, which needs {workers * cpus_per_worker:g} CPUs; expected at most "
            f"{int(available / cpus_per_worker)} on this machine with {available} CPUs"
        )


def check_machine(section: str, settings: Any) -> None:
    """Refuse workers and a device that this machine does not have; a cluster is asked once connected.

    Args:
        section: of the configuration.
        settings: its values; `num_workers` 0 is this process, whatever cluster there is.

    Raises:
        BadInput: as `check_cpus` and `check_device`.
    """
    if not (settings.num_workers and names_cluster()):
        check_device(section, getattr(settings, "device", ""))
    check_cpus(f"{section}.num_workers", settings.num_workers, getattr(settings, "cpus_per_worker", 1.0))


def check_device(section: str, wanted: str) -> None:
    """Refuse a GPU that this process is to compute on and that is not there, before anything else is made.

    Raises:
        BadInput: as `pick_device`.
    """
    if wanted == "cuda":
        pick_device(section, wanted)


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
