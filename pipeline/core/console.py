"""What people read while a job runs and after: progress, lines, named numbers with notes as tables."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """Counts towards a total and shows rate and time left on stderr."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0, every_seconds: float = 10.0) -> None:
        from tqdm import tqdm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            unit_scale=False,
            file=sys.stderr,
            dynamic_ncols=self._terminal,
            delay=0 if self._terminal else 1e-9,  # without a terminal: do not draw before there is something to say
            mininterval=0.2 if self._terminal else float("inf"),
            bar_format=None if self._terminal else LINE,
        )
        self._every = every_seconds
        self._shown = time.monotonic()
        self._printed: float = -1  # the count of the last line

    def advance(self, count: int, **notes: str) -> None:
        """Add `count`; `notes` are shown beside the rate."""
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(count)
        if not self._terminal and time.monotonic() - self._shown >= self._every:
            self._show()

    def close(self) -> None:
        """Show the final state."""
        if not self._terminal:
            if self._printed != self._bar.n:
                self._show()
            self._bar.disable = True
        self._bar.close()

    def _show(self) -> None:
        """Print one line."""
        self._shown, self._printed = time.monotonic(), self._bar.n
        print(str(self._bar), file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """`Progress` that is closed at the end, also after an error."""
    shown = Progress(label, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


def say(text: str) -> None:
    """One line for the reader of the terminal or the log."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str  # as in summary.json
    value: float
    note: str


def terminal_table(title: str, rows: list[Row], warnings: list[str]) -> str:
    """Aligned columns, then one line per warning."""
    names, values = [row.name for row in rows], [format_value(row.value) for row in rows]
    first, second = max(map(len, names)), max(map(len, values))
    lines = [title, "-" * len(title)]
    lines += [
        f"{name:<{first}}  {value:>{second}}  {row.note}".rstrip()
        for name, value, row in zip(names, values, rows, strict=True)
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings)])


def columns(table: list[list[str]]) -> str:
    """A header and lines as aligned columns, the first to the left and numbers to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([f"{line[0]:<{widths[0]}}", *(f"{text:>{w}}" for text, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    )


def markdown(
    title: str, rows: list[Row], warnings: list[str], facts: dict[str, str], curve: list[list[str]] | None = None
) -> str:
    """The same as a page: table, warnings, the table of the curve, and the facts that the numbers depend on."""
    lines = [f"# {title}", "", "| metric | value | note |", "|---|---:|---|"]
    lines += [f"| {row.name} | {format_value(row.value)} | {row.note} |" for row in rows]
    lines += [""] + [f"- **warning:** {text}" for text in warnings]
    if curve:
        header, *points = (f"| {' | '.join(line)} |" for line in curve)
        lines += ["", header, "|---|" + "---:|" * (len(curve[0]) - 1), *points]
    lines += ["", "| fact | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def format_value(value: float) -> str:
    """Four significant digits, whole numbers whole."""
    if value == round(value) and abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
