"""What one trial does, wherever it runs: train, then evaluate at every cut; finished stages are not repeated.

Nothing here talks to MLflow. What the stages leave in their run folders is all there is to say; the driver reads it.
"""

import fcntl
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.job import run_nested
from pipeline.core.presets import config_from_dict
from pipeline.core.run import read_metrics, read_summary

METRIC, STEP = "psnr", "step"  # what Tune is told while a trial trains
VALIDATED = "validation/psnr"  # as training logs it
STDERR = 2  # file descriptor
LOOK_SECONDS = 0.5  # between looks at the metrics of a training
LOCK_SECONDS = 60.0  # how long a run folder may still be held by a worker of a sweep that was killed


def task_of(folder: Path, training: Config | None, evaluations: list[Config]) -> dict[str, Any]:
    """A trial as plain values, to be sent to a worker.

    Args:
        folder: of the trial: a worker of Tune keeps there what the stages print.
        training: None where a checkpoint is given.
        evaluations: one for each cut rule.
    """
    return {
        "folder": str(folder),
        "training": training.to_dict() if training else None,
        "evaluations": [config.to_dict() for config in evaluations],
    }


def work(task: dict[str, Any]) -> None:
    """Do all that a trial has to do and was not done before.

    Raises:
        BadInput, Stopped: as the stages.
    """
    checkpoint = ""
    if task["training"]:
        config = config_from_dict(task["training"])
        _once("train", config)
        checkpoint = str(_folder("train", config) / "checkpoint")
    for values in task["evaluations"]:
        tokenizer = {**values["tokenizer"], "checkpoint": checkpoint or values["tokenizer"]["checkpoint"]}
        _once("evaluate", config_from_dict({**values, "tokenizer": tokenizer}))


def in_tune(task: dict[str, Any]) -> None:
    """The function that Tune runs: works in a thread of its own and reports what its training validates meanwhile."""
    from ray import tune

    outcome = {"outcome": "finished", "reason": ""}

    def do() -> None:
        with _output_to(Path(task["folder"]) / "output.txt"):
            try:
                work(task)
            except BaseException as problem:  # noqa: BLE001 - whatever it was, it is told and ends this trial only
                traceback.print_exc()
                outcome.update(outcome_of(problem))

    thread = threading.Thread(target=do, daemon=True, name="trial")
    thread.start()
    last = {STEP: 0, METRIC: float("-inf")}
    training = _folder("train", config_from_dict(task["training"])) if task["training"] else None
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        for step, value in _validated(training, last[STEP]):
            last = {STEP: step, METRIC: value}
            tune.report(last)
    tune.report({**last, **outcome})


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What is printed goes into a file: of several trials side by side, people could not tell whose it is.

    Ray's C++ part writes to the file descriptor itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(STDERR)
    with open(path, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(before, STDERR)
            os.close(before)


def outcome_of(problem: BaseException) -> dict[str, str]:
    """How a trial ended, for the ledger."""
    if isinstance(problem, Stopped | KeyboardInterrupt):
        return {"outcome": "interrupted", "reason": str(problem)}
    name = "" if isinstance(problem, BadInput) else f"{type(problem).__name__}: "
    return {"outcome": "failed", "reason": " ".join(f"{name}{problem}".split())}


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    try:
        return bool(read_summary(folder)["status"] == "finished")
    except (OSError, ValueError):
        return False


def _once(stage: str, config: Config) -> None:
    """Run a stage, or go on with it, unless it is finished."""
    folder = _folder(stage, config)
    if not is_finished(folder):
        _wait_for(folder)
        run_nested(stage, config)


def _folder(stage: str, config: Config) -> Path:
    return Path(config.run.output) / f"{config.preset}-{stage}"


def _wait_for(folder: Path) -> None:
    """A killed sweep's workers live on for some seconds and hold what they work in."""
    limit = time.monotonic() + LOCK_SECONDS
    while not _is_free(folder) and time.monotonic() < limit:
        time.sleep(0.2)


def _is_free(folder: Path) -> bool:
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _validated(folder: Path | None, after: float) -> list[tuple[int, float]]:
    """Steps beyond `after` that a training validated, with their value."""
    lines = read_metrics(folder, VALIDATED) if folder else []
    values = [(line.step, line.metrics[VALIDATED]) for line in lines if line.step > after]
    return [(step, value) for step, value in values if not math.isnan(value)]
