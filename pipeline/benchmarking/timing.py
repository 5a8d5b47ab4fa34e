"""Fair timings: contenders take turns, so that a machine that slows down slows all of them; medians are compared."""

import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import Stopped
from pipeline.run import Run

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Of several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def go_on(run: Run) -> None:
    """Called before each timing.

    Raises:
        Stopped: the run was asked to stop.
    """
    if run.should_stop:
        raise Stopped("the benchmark was asked to stop; --resume measures anew")


def take_turns(contenders: Mapping[K, Callable[[], float]], repeats: int) -> dict[K, list[float]]:
    """What each contender measures of itself, once before to warm up and then `repeats` times.

    Every round calls all of them, in an order that is turned round from one round to the next.
    """
    for measure in contenders.values():
        measure()
    found: dict[K, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(repeats):
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(contenders[name]())
    return found


def steady_rate(finished: list[tuple[float, int]], workers: int) -> float:
    """Pictures per second from when each of the workers has finished a range: starting them is not in it.

    Args:
        finished: when a range was done, in seconds, and its pictures; in order, more of them than workers.
        workers: that share the ranges.
    """
    begun = workers - 1  # the range whose end starts the clock
    return sum(pictures for _, pictures in finished[begun + 1 :]) / (finished[-1][0] - finished[begun][0])


def ratio(ours: list[float], others: list[float]) -> Spread:
    """Ours over another's, round by round: what slowed a whole round down is in both.

    Args:
        ours: rates, one a round.
        others: of the other contender in the same rounds.
    """
    return Spread.of([one / other for one, other in zip(ours, others, strict=True)])
