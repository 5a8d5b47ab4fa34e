"""The training loop: a plain function over an objective, batches and hooks.

It knows neither Ray nor MLflow, nor what is trained.
"""

import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.core.config import TrainConfig
from pipeline.core.console import say
from pipeline.core.errors import Stopped
from pipeline.training import distributed
from pipeline.training.state import TrainState

# Whether losses and gradients are numbers, without waiting for the device at every step.

MOST_SKIPPED = 10  # steps in a row: the weights are then past help


class NotFinite(FloatingPointError):
    """A term of a step is no number; the weights after it are spoiled.

    Args:
        step: counted from 1, as logs do.
        name: of the term.
        value: of the term.
        notes: what else to say.
    """

    def __init__(self, step: int, name: str, value: float, notes: str = "") -> None:
        super().__init__(f"{name} is {value} at step {step}; expected a number{notes}")
        self.step, self.name, self.value = step, name, value


class FiniteWatch:
    """Keeps the terms of steps on the device until somebody asks; then finds the first that is no number."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """Remember the scalars of a step."""
        self._steps.append((step, terms))

    def check(self) -> None:
        """Look at all steps since the last time, of all workers; every worker has to ask.

        Raises:
            NotFinite: naming the first step that has a term that is no number.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        sums = torch.stack([torch.stack([t.float() for t in terms.values()]).sum() for _, terms in steps])
        bad = (~distributed.total(sums).isfinite()).tolist()
        if True in bad:
            step, terms = steps[bad.index(True)]
            values = {name: float(value) for name, value in terms.items()}
            found = {name: value for name, value in values.items() if not math.isfinite(value)}
            name = "loss" if "loss" in found or not found else next(iter(found))  # none: it is another worker's
            raise NotFinite(step, f"the {name}", found.get(name, math.nan))


# Freed memory goes back to the system while a training runs.

SECONDS_BETWEEN = 30.0  # a call takes 0.1 to 0.2 seconds


class HeapTrim:
    """Gives back what is free, when asked and not too often."""

    def __init__(self, seconds_between: float = SECONDS_BETWEEN) -> None:
        self._between, self._due = seconds_between, time.monotonic() + seconds_between

    def __call__(self) -> bool:
        """Give back, unless the last time is too near; whether it did. Nothing happens where there is no glibc."""
        trim = _malloc_trim()
        if trim is None or time.monotonic() < self._due:
            return False
        trim(0)
        self._due = time.monotonic() + self._between
        return True


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another system, or another libc
        return None
    return found


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
    not_finite: Callable[[int], str]  # keep what that step saw, counted from 1; says where


def train(objective: Objective[Batch], batches: Batches[Batch], config: TrainConfig, hooks: Hooks) -> None:
    """Train until `config.max_steps`, from wherever the state is.

    A term that is no number is found when metrics are logged and before a checkpoint is written, and ends the run; with
    `not_finite: skip`, steps with such a gradient change nothing and are counted.

    Raises:
        Stopped: somebody asked for it or `max_minutes` are over; a checkpoint was saved.
        NotFinite: a term is no number, or ten steps in a row were left out; no checkpoint has it.
    """
    state = objective.state
    meter, guard, trim = Meter(config), Guard(hooks), HeapTrim()
    deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else float("inf")
    if state.step >= config.max_steps:  # ended before, but not yet exported
        hooks.validate(state)
    for batch in batches.between(state.step, config.max_steps):
        guard.add(state, objective.step(batch))
        meter.add()
        done = state.step == config.max_steps
        if state.step % config.log_every == 0 or done:
            guard.check()
            metrics = meter.read(guard.terms, state.optimizer.param_groups[0]["lr"]) | objective.metrics()
            hooks.log(metrics | guard.count(), state.step)
            hooks.advance(meter.images, metrics.get("train/loss", float("nan")))
            meter.reset()
            trim()
        reason = "" if done else _stop_reason(hooks, state.step, batches.world, deadline, objective.device)
        if _due(state.step, config.checkpoint_every) or done or reason:
            guard.check()
            hooks.save(state)
            meter.restart_clock()
        if _due(state.step, config.validate_every) or done:
            hooks.validate(state)
            meter.restart_clock()
        if reason:
            raise Stopped(f"{reason} after step {state.step}; go on with --resume")


class Guard:
    """Looks after terms that are no numbers.

    Args:
        hooks: keep what a bad step saw.
    """

    def __init__(self, hooks: Hooks) -> None:
        self.terms: dict[str, Tensor] = {}  # of the latest step that counted; {} before there is one
        self._hooks, self._watch = hooks, FiniteWatch()
        self._skipped = self._in_a_row = 0

    def add(self, state: TrainState[Any], terms: dict[str, Tensor]) -> None:
        """Take in a step that was done, or left out.

        Raises:
            NotFinite: so many in a row were left out that the weights must be past help.
        """
        if not state.skipped:
            self.terms, self._in_a_row = terms, 0
            self._watch.add(state.step, terms)
            return
        self._skipped += 1
        self._in_a_row += 1
        place = self._hooks.not_finite(state.step)
        if distributed.rank() == 0:
            say(f"step {state.step} is left out, its gradient is no number; the ids of its batch are in {place}")
        if self._in_a_row == MOST_SKIPPED:
            raise NotFinite(state.step, "the gradient", float("nan"), f", and so were {MOST_SKIPPED} in a row")

    def check(self) -> None:
        """Look at the steps since the last time; every worker has to ask.

        Raises:
            NotFinite: a term of one of them is no number.
        """
        try:
            self._watch.check()
        except NotFinite as problem:
            place = self._hooks.not_finite(problem.step)
            notes = f": try a lower learning rate; the ids of its batch are in {place}"
            raise NotFinite(problem.step, problem.name, problem.value, notes) from None

    def count(self) -> dict[str, float]:
        """How many steps were left out in this attempt, where there are any, by its logged name."""
        return {"train/skipped_steps": float(self._skipped)} if self._skipped else {}


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
            terms: of the last step, scalars; {} where there was none.
            rate: learning rate.
        """
        metrics = {}
        if terms:
            stacked = torch.stack([value.float() for value in terms.values()])
            values = distributed.total(stacked) / distributed.world_size()
            metrics = {f"train/{name}": float(value) for name, value in zip(terms, values, strict=True)}
        metrics["train/learning_rate"] = rate
        metrics["train/images_per_second"] = self.images / max(self._seconds, 1e-9)
        return metrics


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
