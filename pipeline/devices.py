"""Where networks compute: in this process, or in workers that a cluster has to have room for."""

from typing import TYPE_CHECKING

from pipeline.cluster import check_room, connect, most_resources
from pipeline.errors import BadInput

if TYPE_CHECKING:  # torch is imported inside functions: a stage's `check` answers without it
    import torch


def pick_device(section: str, wanted: str) -> "torch.device":
    """The device of this process; `auto` is a GPU where there is one.

    Args:
        section: of the configuration, for messages.
        wanted: its `device`: auto, cpu or cuda.

    Raises:
        BadInput: a GPU is wanted where there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BadInput(f"{section}.device is 'cuda'; expected cpu or auto on a machine without a CUDA GPU")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def pick_workers_device(section: str, wanted: str, number: int) -> str:
    """Where workers of a cluster compute; `auto` is on GPUs where there is one for each.

    Args:
        section: of the configuration, for messages.
        wanted: its `device`: auto, cpu or cuda.
        number: its `num_workers`.

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
