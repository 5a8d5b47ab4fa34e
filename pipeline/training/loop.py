"""The training loop: a plain function over an objective, batches and hooks. It knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import Stopped
from pipeline.training import distributed
from pipeline.training.batches import Batches
from pipeline.training.objective import Objective
from pipeline.training.state import TrainState
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokens import Tokens

STOP_EVERY = 10  # steps between questions whether another worker wants to stop


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks the outside."""

    log: Callable[[dict[str, float], int], None]  # metrics and the step they belong to; called on every worker
    validate: Callable[[TrainState], None]
    save: Callable[[TrainState], None]  # write a checkpoint
    advance: Callable[[int, float], None]  # images seen since the last call, current loss
    stop_reason: Callable[[], str]  # '' to go on


def train(objective: Objective, batches: Batches, config: TrainConfig, hooks: Hooks) -> None:
    """Train until `config.max_steps`, from wherever the state is.

    Raises:
        Stopped: somebody asked for it or `max_minutes` are over; a checkpoint was saved.
        FloatingPointError: the loss is not finite.
    """
    state = objective.state
    meter = Meter(state, config)
    deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else float("inf")
    if state.step >= config.max_steps:  # ended before, but not yet exported
        hooks.validate(state)
    for batch in batches.between(state.step, config.max_steps):
        terms, tokens = objective.step(batch.images, batch.uniforms)
        meter.add(tokens)
        done = state.step == config.max_steps
        if state.step % config.log_every == 0 or done:
            metrics = meter.read(terms)
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
    """Rates and codebook use since the last log."""

    def __init__(self, state: TrainState, config: TrainConfig) -> None:
        self._config, self._optimizer = config, state.optimizer
        self._codes = state.model.config.codebook_size
        self._has_patch_codes = state.model.config.patch_tokens
        self.reset()

    def reset(self) -> None:
        """Start a new stretch."""
        self.images, self._seconds = 0, 0.0
        self._counts: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []  # kept patch tokens, images
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into validation or a checkpoint."""
        self._counted = time.perf_counter()

    def add(self, tokens: Tokens) -> None:
        """Count one step. Counts stay on the device, without a look at them: it would have to wait."""
        now = time.perf_counter()
        self._seconds += now - self._counted
        self._counted = now
        self.images += self._config.global_batch_size
        everything = [("global", tokens.global_indices)]
        if self._has_patch_codes:
            everything.append(("patch", tokens.patch_indices))
        for kind, indices in everything:  # kept or not: the codebook learns from all of them
            counts = self._counts.setdefault(kind, indices.new_zeros(self._codes))
            counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        kept = [tokens.kept_mask.sum(), tokens.kept_mask.new_full((), len(tokens), dtype=torch.int64)]
        self._kept = [old + new for old, new in zip(self._kept, kept, strict=True)] if self._kept else kept

    def read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of this stretch by their logged names, over all workers; every worker has to ask.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        values = distributed.total(torch.stack([value.float() for value in terms.values()])) / distributed.world_size()
        metrics = {f"train/{name}": float(value) for name, value in zip(terms, values, strict=True)}
        check_finite(metrics["train/loss"])
        metrics["train/learning_rate"] = self._optimizer.param_groups[0]["lr"]
        metrics["train/images_per_second"] = self.images / max(self._seconds, 1e-9)
        for kind, counts in self._counts.items():
            usage = CodeUsage.from_arrays({"counts": distributed.total(counts).cpu().numpy()})
            if usage.counts.sum():
                metrics[f"codebook/usage_{kind}"] = usage.usage
                metrics[f"codebook/perplexity_{kind}"] = usage.perplexity
        kept = [distributed.total(count) for count in self._kept]
        metrics["train/kept_patch_tokens"] = float(kept[0] / kept[1])
        if "code_bits" in terms and "codebook/perplexity_patch" in metrics:
            # What q saves against a code that knows only how often each entry is used.
            metrics["train/unigram_bits"] = math.log2(metrics["codebook/perplexity_patch"])
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
