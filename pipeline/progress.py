"""Progress that reads well with and without a terminal: a bar, or a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._told: float = -1  # the count that was last printed

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
            if self._told != self._bar.n:
                self._show()
            self._bar.disable = True
        self._bar.close()

    def _show(self) -> None:
        """Print one line."""
        self._shown, self._told = time.monotonic(), self._bar.n
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
