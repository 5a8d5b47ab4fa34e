"""The two ways in which a job ends early on purpose; `files.OutOfRoom` is a failure that says why."""

import difflib


class BadInput(Exception):
    """The user's input cannot work: one sentence that names the value and the expected form. Exit code 2."""


class Stopped(Exception):
    """The job was asked to stop, saved its state and can be resumed. Exit code 3."""


def did_you_mean(name: str, valid: list[str]) -> str:
    """A question after the nearest of the valid names; empty where none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
