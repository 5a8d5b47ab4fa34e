"""Whether losses and gradients are numbers, without waiting for the device at every step."""

import math

import torch
from torch import Tensor

from pipeline.training import distributed

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
