"""The learning rate as a function of the optimiser step."""

import math

from pipeline.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to `min_learning_rate` at `max_steps`.

    Args:
        step: counted from 0.
        config: `learning_rate`, `min_learning_rate`, `warmup_steps`, `max_steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
