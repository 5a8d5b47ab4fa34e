"""What a benchmark found, for people and programs: rates with their spread, ratios with their goals, facts.

One `Findings` becomes `results` of summary.json, a line of metrics.jsonl, `report.md` and a table in the terminal.
"""

import multiprocessing
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.console import Row, columns, format_value, markdown, say, terminal_table
from pipeline.core.errors import Stopped
from pipeline.core.files import write_atomically
from pipeline.core.run import Run
from pipeline.tracking import Tracker

# The time on a device, and what it is called.


def now(device: Any) -> float:
    """Seconds, when everything asked of a `torch.device` is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_facts(device: Any) -> dict[str, str]:
    """Name and threads of a `torch.device`, for the report; `gpu` where it is one."""
    import torch

    if device.type != "cuda":
        return {"device": "CPU", "threads": str(torch.get_num_threads())}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "gpu": name}


# How much memory work takes: the peak of a fresh process that does nothing else.

MIB = 2**20


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work(*arguments)` gives back, and the peak of resident memory in MiB of the new process it ran in.

    Args:
        work: a function at the top of a module.
        arguments: that can be pickled.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result(), pool.submit(_peak).result()


def _peak() -> float:
    """Of this process, in MiB.

    Not `ru_maxrss` where it can be helped: on Linux a process inherits that of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


# Fair timings: contenders take turns, so that a machine that slows down slows all of them; medians are compared.

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


@dataclass(frozen=True)
class Goal:
    """What a ratio is to be, at least or at most."""

    limit: float
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value <= self.limit if self.at_most else value >= self.limit

    def told(self, value: float) -> str:
        """The goal and by how much it is missed, if it is."""
        wanted = f"goal: {'at most' if self.at_most else 'at least'} {self.limit:g}"
        return f"{wanted}, met" if self.is_met(value) else f"{wanted}, missed by {abs(value - self.limit):.2f}"


@dataclass(frozen=True)
class Ratio:
    """Ours over another's, taken side by side: `timing.ratio` makes the spread of paired measurements."""

    name: str  # in summary.json
    spread: Spread
    meaning: str  # what over what
    goal: Goal | None = None

    def row(self) -> Row:
        """As a line of the report."""
        spread = self.spread
        parts = [self.meaning, f"{spread.low:.3g} to {spread.high:.3g}"]
        return Row(self.name, spread.median, "; ".join(parts + ([self.goal.told(spread.median)] if self.goal else [])))


@dataclass
class Findings:
    """Everything that one benchmark has to say."""

    table: list[list[str]]  # a header, then a line for each contender
    ratios: list[Ratio] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)  # further results, by name
    facts: dict[str, str] = field(default_factory=dict)  # what the numbers depend on
    conclusion: str = ""  # a line below the tables

    def results(self) -> dict[str, float]:
        """For summary.json: the ratios with their lowest and highest, and the other numbers."""
        found = dict(self.numbers)
        for ratio in self.ratios:
            found |= spread_results(ratio.name, ratio.spread)
        return found


def spread_results(name: str, spread: Spread) -> dict[str, float]:
    """A median under `name` and its extremes beside it."""
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def rate_table(unit: str, rates: dict[str, Spread], ours: str) -> list[list[str]]:
    """A line for each contender: its rate, the extremes, and ours over its.

    Args:
        unit: of the rates, e.g. images/s.
        rates: by contender.
        ours: which of them is ours.
    """
    header = ["", unit, "lowest", "highest", f"{ours} / it"]
    lines = [
        [name, *map(format_value, (rate.median, rate.low, rate.high)), f"{rates[ours].median / rate.median:.2f}"]
        for name, rate in rates.items()
    ]
    return [header, *lines]


def publish(run: Run, tracker: Tracker, found: Findings) -> None:
    """Fill `run.results`, log them, write `report.md` and say the table.

    Args:
        run: of the benchmark.
        tracker: to which the report goes.
        found: what to tell.
    """
    run.results = found.results()
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(run.results, step=0)
    rows = [ratio.row() for ratio in found.ratios]
    title = f"{run.config.preset}: {run.config.benchmark.kind}"
    path = run.folder / "report.md"
    told = f"\n{found.conclusion}\n" if found.conclusion else ""
    write_atomically(path, (markdown(title, rows, [], found.facts, found.table) + told).encode())
    run.outputs["report"] = str(path)
    tracker.artifact(path)
    say(columns(found.table))
    if rows:
        say(terminal_table(title, rows, []))
    if found.conclusion:
        say(found.conclusion)


# Folders that a benchmark works in, which leave nothing behind.


@contextmanager
def scratch(run: Run) -> Iterator[Path]:
    """A new folder in the run's, not made yet, that goes when the benchmark ends, however it ends."""
    folder = run.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def emptied(folder: Path, *names: str) -> None:
    """Make the folder anew, with folders of these names and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)


def publish_measured(run: Run, measure: Callable[[Run, Path], Findings]) -> None:
    """Publish what `measure` finds in a scratch folder."""
    with scratch(run) as folder, Tracker.start(run) as tracker:
        publish(run, tracker, measure(run, folder))
