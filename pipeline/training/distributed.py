"""The few collectives that training needs; without a process group each is the obvious thing for one worker."""

from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def active() -> bool:
    """Whether there is more than this process."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """This worker's number, 0 to world - 1."""
    return distributed.get_rank() if active() else 0


def world_size() -> int:
    """How many workers train together."""
    return distributed.get_world_size() if active() else 1


def gather(value: T) -> list[T]:
    """Every worker's value, in order of rank, on every worker."""
    if not active():
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def total(tensor: Tensor) -> Tensor:
    """The sum of every worker's tensor, on every worker."""
    if not active():
        return tensor
    summed = tensor.detach().clone()
    distributed.all_reduce(summed)
    return summed


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over the workers (FSDP2), which all have to ask; others as they are."""
    gathered = getattr(tensor, "full_tensor", None)  # of a DTensor, whose import costs a second that few need
    return tensor if gathered is None else gathered()


class Totals:
    """Named sums."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def merge(self, other: "Totals") -> None:
        """Add another part's sums."""
        for name, value in other.values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: one () per name."""
        return {name: np.array(value) for name, value in self.values.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Totals":
        """The inverse of `to_arrays`."""
        return cls(**{name: float(value) for name, value in arrays.items()})


def merged(part: T) -> T:
    """What all workers have measured together; `part` has `merge`, `to_arrays` and `from_arrays`."""
    measured: Any = part
    total: Any = None
    for arrays in gather(measured.to_arrays()):
        other = type(measured).from_arrays(arrays)
        if total is None:
            total = other
        else:
            total.merge(other)
    return total


def synchronised(model: nn.Module, last: bool) -> Any:
    """Around a backward pass: gradients travel between workers once per step, with the last micro-batch."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def any_true(value: bool, device: torch.device) -> bool:
    """Whether any worker says so: all leave a loop at the same step."""
    if not active():
        return value
    flag = torch.tensor(int(value), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def wait_for_all() -> None:
    """Return when every worker has come this far."""
    if active():
        distributed.barrier()
