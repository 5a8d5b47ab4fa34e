"""The training loop: a plain function over an objective, batches and hooks.

It knows neither Ray nor MLflow, nor what is trained.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import Stopped
from pipeline.training import distributed
from pipeline.training.state import TrainState

STOP_EVERY = 10  # steps between questions whether another worker wants to stop
Batch = TypeVar("Batch")
Read_co = TypeVar("Read_co", covariant=True)
Taken_contra = TypeVar("Taken_contra", contravariant=True)


class Batches(Protocol[Read_co]):
    """One worker's parts of the global batches."""

    @property
    def world(self) -> int:
        """How many workers share a global batch."""
        ...

    def between(self, start: int, stop: int) -> Iterator[Read_co]:
        """Of the steps from `start` to before `stop`."""
        ...


class Objective(Protocol[Taken_contra]):
    """What is trained, and how a step of it is taken."""

    @property
    def state(self) -> TrainState[Any]:
        """What its steps change."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def step(self, batch: Taken_contra) -> dict[str, Tensor]:
        """One optimiser step on this worker's part of a global batch.

        Returns:
            Terms by name, scalars without gradients, `loss` among them: their mean over the workers is logged.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """By their logged names, of the steps since the last call, over all workers; every worker has to ask."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks the outside."""

    log: Callable[[dict[str, float], int], None]  # metrics and the step they belong to; called on every worker
    validate: Callable[[TrainState[Any]], None]
    save: Callable[[TrainState[Any]], None]  # write a checkpoint
    advance: Callable[[int, float], None]  # images seen since the last call, current loss
    stop_reason: Callable[[], str]  # '' to go on


def train(objective: Objective[Batch], batches: Batches[Batch], config: TrainConfig, hooks: Hooks) -> None:
    """Train until `config.max_steps`, from wherever the state is.

    Raises:
        Stopped: somebody asked for it or `max_minutes` are over; a checkpoint was saved.
        FloatingPointError: the loss is not finite.
    """
    state = objective.state
    meter = Meter(config)
    deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else float("inf")
    if state.step >= config.max_steps:  # ended before, but not yet exported
        hooks.validate(state)
    for batch in batches.between(state.step, config.max_steps):
        terms = objective.step(batch)
        meter.add()
        done = state.step == config.max_steps
        if state.step % config.log_every == 0 or done:
            metrics = meter.read(terms, state.optimizer.param_groups[0]["lr"]) | objective.metrics()
            hooks.log(metrics, state.step)
            hooks.advance(meter.images, metrics["train/loss"])
            meter.reset()
        reason = "" if done else _stop_reason(hooks, state.step, batches.world, deadline, objective.device)
        if _due(state.step, config.checkpoint_every) or done or reason:
            check_finite(float(distributed.total(terms["loss"])))
            hooks.save(state)
            meter.restart_clock()
        if _due(state.step, config.validate_every) or done:
            hooks.validate(state)
            meter.restart_clock()
        if reason:
            raise Stopped(f"{reason} after step {state.step}; go on with --resume")


class Meter:
    """Loss terms and rates since the last log."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Start a new stretch."""
        self.images, self._seconds = 0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into validation or a checkpoint."""
        self._counted = time.perf_counter()

    def add(self) -> None:
        """Count one step."""
        now = time.perf_counter()
        self._seconds += now - self._counted
        self._counted = now
        self.images += self._config.global_batch_size

    def read(self, terms: dict[str, Tensor], rate: float) -> dict[str, float]:
        """Metrics of this stretch by their logged names, over all workers; every worker has to ask.

        Args:
            terms: of the last step, scalars.
            rate: learning rate.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        values = distributed.total(torch.stack([value.float() for value in terms.values()])) / distributed.world_size()
        metrics = {f"train/{name}": float(value) for name, value in zip(terms, values, strict=True)}
        check_finite(metrics["train/loss"])
        metrics["train/learning_rate"] = rate
        metrics["train/images_per_second"] = self.images / max(self._seconds, 1e-9)
        return metrics


def check_finite(loss: float) -> None:
    """A loss that is no number would spoil the weights and then every checkpoint.

    Raises:
        FloatingPointError: it is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; expected a number: try a lower learning rate")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stop_reason(hooks: Hooks, step: int, world: int, deadline: float, device: torch.device) -> str:
    """Why to stop now, the same on every worker; '' to go on."""
    reason = hooks.stop_reason() or ("max_minutes are over" if time.monotonic() >= deadline else "")
    if world == 1:
        return reason
    if step % STOP_EVERY:
        return ""
    return (reason or "stopped") if distributed.any_true(bool(reason), device) else ""
