"""What a benchmark found, for people and programs: rates with their spread, ratios with their goals, facts.

One `Findings` becomes `results` of summary.json, a line of metrics.jsonl, `report.md` and a table in the terminal.
"""

from dataclasses import dataclass, field

from pipeline.benchmarking.timing import Spread
from pipeline.evaluation.report import Row, columns, format_value, markdown, terminal_table
from pipeline.paths import write_atomically
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker


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
