"""What a sweep varies: `sweep.space` and `sweep.cuts` read, checked and turned into points. No torch, no Ray.

space: {tokenizer.global_tokens: [2, 4, 8], train.learning_rate: {log_uniform: [1e-4, 1e-2]}}
cuts: {residual: [40, 100, 160], relative: {range: [0.2, 1, 5]}}
"""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from pipeline.core.config import Config
from pipeline.core.errors import BadInput

DRAWN = ("choice", "uniform", "log_uniform", "int")
SHARED = (  # sections that no key may come from: the same for all trials, or not used by them
    "run", "data", "tracking", "sweep", "evaluate", "tokens", "generator", "train_generator", "generate", "benchmark",
    "extractor",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The values that a sweep tries for one key.

    Attributes:
        key: `section.key`.
        kind: `grid`, every value in turn, or one of DRAWN, a random distribution.
        values: all of them for grid and choice; (low, high), both included, for the others.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    @property
    def is_listed(self) -> bool:
        """Whether `values` holds all possible values."""
        return self.kind in ("grid", "choice")

    def draw(self, source: random.Random) -> Any:
        """One random value; not for a grid."""
        if self.kind == "choice":
            return source.choice(self.values)
        low, high = self.values
        if self.kind == "int":
            return source.randint(low, high)
        if self.kind == "uniform":
            return source.uniform(low, high)
        value = math.exp(source.uniform(math.log(low), math.log(high)))
        return min(max(value, low), high)  # exp may round to just outside


def read_space(space: dict[str, Any]) -> list[Domain]:
    """The domains of `sweep.space`, in its order.

    Raises:
        BadInput: a key of SHARED or of another form, an empty range, or something that is no range.
    """
    return [_domain(str(key), value) for key, value in space.items()]


def _domain(key: str, value: Any) -> Domain:
    section = key.partition(".")[0]
    if key.count(".") != 1 or not all(key.split(".")):
        raise BadInput(f"sweep.space has the key {key!r}; expected section.key, e.g. tokenizer.global_tokens")
    if section in SHARED:
        raise BadInput(f"sweep.space has {key!r}; expected no key of {section}, which all trials share")
    if isinstance(value, list | tuple):
        if not value:
            raise BadInput(f"sweep.space has {key}: []; expected at least one value")
        if any(item in value[:i] for i, item in enumerate(value)):
            raise BadInput(f"sweep.space has {key}: {list(value)}; expected different values")
        return Domain(key, "grid", tuple(value))
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in DRAWN:
        raise BadInput(f"sweep.space has {key}: {value!r}; expected a list, or one of {', '.join(DRAWN)} with a list")
    kind, given = next(iter(value.items()))
    if not isinstance(given, list | tuple) or not given:
        raise BadInput(f"sweep.space has {key}: {value!r}; expected {kind} with a list of at least one value")
    return Domain(key, kind, tuple(given) if kind == "choice" else _ends(key, kind, given))


def _ends(key: str, kind: str, ends: Any) -> tuple[Any, ...]:
    numbers = _numbers(ends)
    expected = ""
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        expected = "[low, high] with low below high"
    elif kind == "log_uniform" and numbers[0] <= 0:
        expected = "a low above 0"
    elif kind == "int" and not all(number.is_integer() for number in numbers):
        expected = "whole numbers"
    if expected:
        raise BadInput(f"sweep.space has {key}: {{{kind}: {list(ends)}}}; expected {expected}")
    return tuple(map(int, numbers)) if kind == "int" else numbers


def _numbers(values: Any) -> tuple[float, ...]:
    """Finite numbers of a list, also from text, as which YAML reads 1e-4; () for anything else."""
    if not isinstance(values, list | tuple):
        return ()
    try:
        numbers = tuple(math.nan if isinstance(value, bool) else float(value) for value in values)
    except (TypeError, ValueError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def points(domains: list[Domain], samples: int, seed: int) -> list[dict[str, Any]]:
    """Every grid point; `samples` times, with new draws, where other keys are random. Deterministic."""
    grid = [domain for domain in domains if domain.kind == "grid"]
    drawn = [domain for domain in domains if domain.kind != "grid"]
    source, made = random.Random(seed), []
    for _ in range(samples if drawn else 1):
        for values in itertools.product(*(domain.values for domain in grid)):
            chosen = dict(zip((domain.key for domain in grid), values, strict=True))
            chosen |= {domain.key: domain.draw(source) for domain in drawn}
            made.append({domain.key: chosen[domain.key] for domain in domains})
    return made


def corner_points(domains: list[Domain]) -> list[dict[str, Any]]:
    """Points that use every value of lists and both ends of ranges, each at least once."""
    most = max(len(domain.values) for domain in domains)
    return [{domain.key: domain.values[i % len(domain.values)] for domain in domains} for i in range(most)]


def read_cuts(config: Config) -> dict[str, tuple[float, ...]]:
    """Cut rules and their thresholds, in order: `sweep.cuts`, else `filter.rule` at `evaluate.thresholds`.

    Raises:
        BadInput: no threshold, or something that is no list or range of numbers. `SweepPlan.evaluation_of` checks
            whether a threshold is within the range of its rule.
    """
    cuts = config.sweep.cuts or {config.filter.rule: list(config.evaluate.thresholds)}
    if not any(cuts.values()) and not config.sweep.cuts:
        raise BadInput("sweep.cuts and evaluate.thresholds are empty; expected thresholds, e.g. {relative: [0.5, 1]}")
    return {str(rule): _thresholds(str(rule), value) for rule, value in cuts.items()}


def _thresholds(rule: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, dict) and set(value) == {"range"}:
        return _range(rule, value["range"])
    if not (numbers := _numbers(value)):
        raise BadInput(f"sweep.cuts has {rule}: {value!r}; expected a list of numbers or {{range: [low, high, count]}}")
    return numbers


def _range(rule: str, value: Any) -> tuple[float, ...]:
    match _numbers(value):
        case (low, high, count) if low < high and count >= 2 and count.is_integer():
            step = (high - low) / (count - 1)
            made = [high if i == count - 1 else round(low + i * step, 9) for i in range(int(count))]
            return tuple(float(round(number)) for number in made) if rule == "count" else tuple(made)
    raise BadInput(
        f"sweep.cuts has {rule}: {{range: {value!r}}}; expected [low, high, count] with low below high and count from 2"
    )
