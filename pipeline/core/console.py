"""What people read while a job runs and after: progress, lines, named numbers with notes as tables."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class Progress:
    """Counts towards a total and shows rate and time left on stderr; without a terminal, as lines.

    Args:
        label: what is done.
        total: how many there are.
        unit: of what.
        done: by an earlier attempt.
        every_seconds: without a terminal, at least so long between two lines.
        silent_seconds: without a terminal, at most so long, also where nothing advances.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        done: int = 0,
        every_seconds: float = 10.0,
        silent_seconds: float = 30.0,
    ) -> None:
        from tqdm import tqdm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit if self._terminal else f" {unit}",
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
        self._ended, self._silent = threading.Event(), silent_seconds
        if not self._terminal:  # tqdm does so by itself on one
            threading.Thread(target=self._break_silence, daemon=True, name="progress").start()

    def advance(self, count: int, **notes: str) -> None:
        """Add `count`; `notes` are shown beside the rate."""
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(count)
        if not self._terminal and time.monotonic() - self._shown >= self._every:
            self._show()

    def close(self) -> None:
        """Show the final state."""
        self._ended.set()
        if not self._terminal:
            if self._printed != self._bar.n:
                self._show()
            self._bar.disable = True
        self._bar.close()

    def _break_silence(self) -> None:
        while not self._ended.wait(max(self._shown + self._silent - time.monotonic(), 0.01)):
            if time.monotonic() - self._shown >= self._silent:
                self._show()

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


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"


_told: set[str] = set()


def say_once(text: str) -> None:
    """As `say`, but nothing where this process has said the same before."""
    if text not in _told:
        _told.add(text)
        say(text)


def short_path(path: str | Path) -> str:
    """A path as a command in this working directory may have it: relative where it lies inside."""
    here = Path.cwd()
    if os.environ.get("TATOK_ROOT") or not Path(path).is_relative_to(here) or "working_dir_files" in str(here):
        return str(path)
    return str(Path(path).relative_to(here))


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
