"""What travels between workers: a few collectives, and means that merge; each is the obvious thing for one worker."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

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


def gather(value: T) -> list[T]:
    """Every worker's value, in order of rank, on every worker."""
    if not active():
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def merged(part: T) -> T:
    """What all workers have measured together; `part` has `merge`, `to_arrays` and `from_arrays`."""
    measured: Any = part
    first, *others = (type(measured).from_arrays(arrays) for arrays in gather(measured.to_arrays()))
    for other in others:
        first.merge(other)
    return first


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Named sums of all parts of all workers; a name may be missing in some."""
    sums: dict[str, float] = {}
    for worker in gather(list(parts)):
        for part in worker:
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def prepared(module: nn.Module, compiled: bool) -> nn.Module:
    """Ready to train: compiled where that is asked for, and under DDP where there are other workers.

    What is sharded adds up its gradients itself. The quantizer keeps its buffers equal itself: broadcasting them would
    cost every step.
    """
    if compiled:
        module = torch.compile(module)  # type: ignore[assignment]
    if world_size() == 1 or hasattr(module, "unshard"):  # of FSDP2, whose import costs a second that few need
        return module
    with warnings.catch_warnings():  # the new name of the option is not known to every torch in our range
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


def synchronised(model: nn.Module, last: bool) -> Any:
    """Around a micro-batch: gradients travel between workers once per step, with the last one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def any_true(value: bool, device: torch.device) -> bool:
    """Whether any worker says so: all leave a loop at the same step."""
    return bool(total(torch.tensor(int(value), device=device)).item())


@dataclass(frozen=True)
class Mean:
    """A mean that merges, over the micro-batches of a step and then over workers: a sum and how many it is of."""

    sum: Tensor  # scalar, without gradients
    count: float

    @classmethod
    def of(cls, mean: Tensor, count: float = 1) -> Self:
        """The mean of `count` values; in float64, of which a single part comes back as it was."""
        return cls(mean.detach().double() * count, count)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


Terms = dict[str, Mean]  # of a step, by name


def added(terms: Terms, more: Terms) -> Terms:
    """Of the micro-batches so far, and of one more."""
    return terms | {name: terms[name] + mean if name in terms else mean for name, mean in more.items()}


def means(terms: Mapping[str, Mean]) -> dict[str, float]:
    """Over all workers, which all have to ask for the same names."""
    if not terms:
        return {}
    sums = torch.stack([mean.sum.double() for mean in terms.values()])
    counts = torch.tensor([mean.count for mean in terms.values()], dtype=torch.float64, device=sums.device)
    sums, counts = total(torch.stack([sums, counts]))
    return dict(zip(terms, (sums / counts).float().tolist(), strict=True))
