"""The two ways in which a job ends early on purpose; `files.OutOfRoom` is a failure that says why."""


class BadInput(Exception):
    """The user's input cannot work: one sentence that names the value and the expected form. Exit code 2."""


class Stopped(Exception):
    """The job was asked to stop, saved its state and can be resumed. Exit code 3."""
