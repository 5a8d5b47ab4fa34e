"""The training loop, over an objective, batches, a validator and a recorder; it knows neither Ray nor MLflow.

`take_step` is one optimiser step: begin, forward and backward of every micro-batch, descend, end.
"""

import ctypes
import functools
import math
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.config import TrainConfig
from pipeline.core.console import duration, say
from pipeline.training import distributed
from pipeline.training.distributed import Terms, added, means
from pipeline.training.order import read_ahead
from pipeline.training.recorder import Recorder
from pipeline.training.state import TrainState

MOST_SKIPPED = 10  # steps in a row: the weights are then past help
SECONDS_BETWEEN_TRIMS = 30.0  # a call takes 0.1 to 0.2 seconds
STOP_EVERY = 10  # steps between questions, on GPUs, whether another worker wants to stop: each has to wait for it
LARGE = 2e9  # parameters x images of a step that take a CPU a minute or so
SLOW = 5.0  # seconds of a step whose length is worth telling
Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)


class Objective(Protocol[Batch_contra]):
    """What is trained, and what it minimises."""

    state: Any  # a TrainState: what steps change
    device: torch.device
    model: nn.Module  # the state's, ready for several workers

    def parts(self, batch: Batch_contra) -> Sequence[Any]:
        """The micro-batches of this worker's part of a global batch; equally many on every worker."""

    def forward(self, part: Any) -> tuple[Tensor, Terms]:
        """The scalar loss of a micro-batch, which adds up over them, and terms by name, `loss` among them."""

    def metrics(self) -> dict[str, float]:
        """By their logged names, of the steps since the last call, over all workers; every worker has to ask."""


class Validator(Protocol):
    """Looks at the averaged model on held-out data."""

    def measure(self, model: Any) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker, which all have to ask."""

    def examples(self, model: Any) -> list[np.ndarray]:
        """Rows of pictures to look at, (B, H, W, 3) uint8 each; none where there is nothing to show."""

    def warnings(self, model: Any, metrics: dict[str, float]) -> list[str]:
        """What a reader of the log should look into, given the latest metrics by their logged names."""


def take_step(objective: Objective[Batch], batch: Batch, stopping: Callable[[], str] = str) -> Terms | None:
    """One optimiser step on this worker's part of a global batch; terms of all its micro-batches.

    Args:
        objective: whose state moves.
        batch: this worker's part.
        stopping: asked between micro-batches, where a step can be taken back: why to leave it out, or ''. Then nothing
            has moved and the answer is None.
    """
    state, terms = objective.state, Terms()
    state.begin_step()
    parts = objective.parts(batch)
    for number, part in enumerate(parts, start=1):
        if number > 1 and state.keeps_buffers and stopping():
            state.take_back()
            return None
        with distributed.synchronised(objective.model, last=number == len(parts)):
            loss, of_part = objective.forward(part)
            loss.backward()
        terms = added(terms, of_part)
    terms |= state.descend()
    state.end_step()
    return terms


def train(
    objective: Objective[Batch],
    load: Callable[[int], Batch],
    config: TrainConfig,
    validator: Validator,
    recorder: Recorder,
    report: Callable[[dict[str, float]], None],
) -> dict[str, Any]:
    """Train until `config.max_steps`, from wherever the state is; returns once the last checkpoint is safe.

    A term that is NaN or infinite is found when metrics are logged and before a checkpoint is written, and ends the
    run; with `not_finite: skip`, steps with such a gradient change nothing and are counted.

    Args:
        objective: what is trained.
        load: this worker's part of the global batch of a step, counted from 0; read ahead by a thread.
        config: of the training.
        validator: measures the averaged model.
        recorder: keeps metrics, pictures and checkpoints.
        report: given the latest validation metrics at every checkpoint, on every worker.

    Returns:
        `results` by name, and `stopped`: why it ended early, or ''; a checkpoint was saved then too.

    Raises:
        NotFinite: a term is NaN or infinite, or ten steps in a row were left out; no checkpoint has it.
    """
    state = objective.state
    meter, guard, trim = Meter(config), Guard(recorder), HeapTrim()
    deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else float("inf")

    def validate() -> None:
        average = state.averaged()
        recorder.validated(validator.measure(average), state.step)
        if recorder.first:
            recorder.show(validator.examples(average), validator.warnings(average, recorder.latest), state.step)
        meter.restart_clock()

    def save() -> None:
        guard.check()
        recorder.save(state)
        report({**recorder.validation, "step": state.step})  # all workers meet here
        meter.restart_clock()

    stopped = ""
    try:
        if state.step >= config.max_steps:  # ended before, but not yet exported
            validate()
        pace = Pace(objective, config, recorder.first)
        for batch in read_ahead(load, state.step, config.max_steps):
            terms = take_step(objective, batch, lambda: _stop_reason(recorder, state.step, math.inf, objective.device))
            if terms is None:
                save()
                stopped = f"stopped after step {state.step}; go on with --resume"
                break
            guard.add(state, terms)
            meter.add()
            recorder.stepped(state.step)
            pace.tell(state.step)
            done = state.step == config.max_steps
            if state.step % config.log_every == 0 or done:
                guard.check()
                metrics = meter.read(guard.terms, state.optimizer.param_groups[0]["lr"]) | objective.metrics()
                recorder.log(metrics | guard.count(), state.step)
                trim()
            reason = "" if done else _stop_reason(recorder, state.step, deadline, objective.device)
            if _due(state.step, config.checkpoint_every) or done or reason:
                save()
            if _due(state.step, config.validate_every) or done:
                validate()
            if reason:
                stopped = f"{reason} after step {state.step}; go on with --resume"
                break
    finally:
        recorder.close()
    return {"results": recorder.results(state), "stopped": stopped}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stop_reason(recorder: Recorder, step: int, deadline: float, device: torch.device) -> str:
    """Why to stop now, the same on every worker, which all have to ask; '' to go on."""
    reason = recorder.stop_reason() or ("max_minutes are over" if time.monotonic() >= deadline else "")
    if distributed.world_size() == 1:
        return reason
    if device.type == "cuda" and step % STOP_EVERY:
        return ""
    return (reason or "stopped") if distributed.any_true(bool(reason), device) else ""


class NotFinite(FloatingPointError):
    """A term of a step is NaN or infinite; the weights after it are spoiled.

    Args:
        step: counted from 1, as logs do.
        name: of the term.
        value: of the term.
        notes: what else to say.
    """

    def __init__(self, step: int, name: str, value: float, notes: str = "") -> None:
        super().__init__(f"{name} is {value} at step {step}; expected a number{notes}")


class Guard:
    """Looks after terms that are NaN or infinite; they stay on the device until `check`, which waits for it.

    Args:
        recorder: keeps the ids of what a bad step saw.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.terms: Terms = {}  # of the latest step that counted; {} before there is one
        self._recorder = recorder
        self._steps: list[tuple[int, Terms]] = []  # since the last check
        self._skipped = self._in_a_row = 0

    def add(self, state: TrainState[Any], terms: Terms) -> None:
        """Take in a step that was done, or left out.

        Raises:
            NotFinite: so many in a row were left out that the weights must be past help.
        """
        if not state.skipped:
            self.terms, self._in_a_row = terms, 0
            self._steps.append((state.step, terms))
            return
        self._skipped += 1
        self._in_a_row += 1
        place = self._recorder.keep_ids(state.step)
        if distributed.rank() == 0:
            say(f"step {state.step} is left out, its gradient is no number; the ids of its batch are in {place}")
        if self._in_a_row == MOST_SKIPPED:
            raise NotFinite(state.step, "the gradient", math.nan, f", and so were {MOST_SKIPPED} in a row")

    def check(self) -> None:
        """Look at all steps since the last time, of all workers; every worker has to ask.

        Raises:
            NotFinite: naming the first step that has such a term.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        sums = torch.stack([torch.stack([mean.sum.float() for mean in terms.values()]).sum() for _, terms in steps])
        bad = (~distributed.total(sums).isfinite()).tolist()
        if True not in bad:
            return
        step, terms = steps[bad.index(True)]
        values = {name: float(mean.sum / mean.count) for name, mean in terms.items()}
        spoiled = {name: value for name, value in values.items() if not math.isfinite(value)}
        name = "loss" if "loss" in spoiled or not spoiled else next(iter(spoiled))  # none: it is another worker's
        notes = f": try a lower learning rate; the ids of its batch are in {self._recorder.keep_ids(step)}"
        raise NotFinite(step, f"the {name}", spoiled.get(name, math.nan), notes)

    def count(self) -> dict[str, float]:
        """How many steps were left out in this attempt, where there are any, by its logged name."""
        return {"train/skipped_steps": float(self._skipped)} if self._skipped else {}


class Meter:
    """Loss terms and rates since the last log."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._images, self._seconds = 0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into validation or a checkpoint."""
        self._counted = time.perf_counter()

    def add(self) -> None:
        """Count one step."""
        now = time.perf_counter()
        self._seconds += now - self._counted
        self._counted = now
        self._images += self._config.global_batch_size

    def read(self, terms: Terms, learning_rate: float) -> dict[str, float]:
        """Metrics by their logged names, terms over all workers; every worker has to ask. A new stretch begins.

        Args:
            terms: of the last step; {} where there was none.
            learning_rate: of the last step.
        """
        rate = self._images / max(self._seconds, 1e-9)
        self._images, self._seconds = 0, 0.0
        metrics = {f"train/{name}": value for name, value in means(terms).items()}
        return metrics | {"train/learning_rate": learning_rate, "train/images_per_second": rate}


class Pace:
    """Says before a training what it trains, and what keeps the first step waiting; after it, how long the others take.

    Args:
        objective: what is trained.
        config: of the training.
        first: whether this worker speaks.
    """

    def __init__(self, objective: Objective[Any], config: TrainConfig, first: bool) -> None:
        self._config, self._device, state = config, objective.device, objective.state
        parameters = sum(p.numel() for p in state.model.parameters())
        moved = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        self._measured = state.step + (2 if config.compile else 1)  # the step that tells how long the others take
        self._first, self._began = first and state.step < config.max_steps, time.monotonic()
        if not self._first:
            return
        gib = 4 * (2 * parameters + 3 * moved) / 2**30  # weights and average; gradients and two moments
        steps = f"{config.max_steps - state.step} steps of {config.global_batch_size} images"
        memory = f"{gib:.2g} GiB of memory and what the pictures take"
        say(f"training {parameters / 1e6:.3g} million parameters on {self._device.type}: {steps}, {memory}")
        if config.compile:
            say("the model is compiled in the first step, which takes minutes")
        elif self._device.type == "cpu" and parameters * config.global_batch_size / distributed.world_size() > LARGE:
            say("the first step of so large a model may take minutes on a CPU")

    def tell(self, step: int) -> None:
        """After a step: how long the others will take, where that is worth telling."""
        now, began = time.monotonic(), self._began
        self._began = now
        if self._first and step == self._measured and now - began > SLOW:
            left = (now - began) * (self._config.max_steps - step)
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            say(f"a step takes {duration(now - began)} and {gib:.1f} GiB of memory: {duration(left)} for the rest")


class HeapTrim:
    """Gives freed memory back to the system while a training runs, when asked and not too often."""

    def __init__(self, seconds_between: float = SECONDS_BETWEEN_TRIMS) -> None:
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
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another system, or another libc
        return None
    return trim
