"""A trial as people see it: a run folder and a child run in MLflow, both kept by the driver.

The worker that does a trial's work talks to nobody: it writes metrics.jsonl and summary.json of its stages. The driver
copies them here. So a SQLite store has one writer, and a worker that is killed leaves no child running.
"""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path

from pipeline.job import DONE, FAILED, STOPPED
from pipeline.run import Run
from pipeline.tracking import Tracker
from pipeline.tuning.objective import Point, distance_in, objective, points_of
from pipeline.tuning.plan import Plan, Trial

EXIT_CODES = {"finished": DONE, "failed": FAILED, "stopped": STOPPED}


class Child:
    """One trial's run, while it is open.

    Args:
        plan: of the sweep.
        trial: which one.
        sweep: the sweep's own run.
        parent: its MLflow run; None where nothing is tracked.
        tags: of the child besides those that every run has.
    """

    def __init__(self, plan: Plan, trial: Trial, sweep: Run, parent: str | None, tags: dict[str, str]) -> None:
        self.plan, self.trial = plan, trial
        config = plan.config_of(trial)
        inside = dataclasses.replace(config.run, output=str(plan.folder), name=trial.name)
        self.run = Run.open("trial", dataclasses.replace(config, run=inside), trial.name, resume=True)
        self.run.rewind_metrics(2**62)  # a kill may have torn the last line
        self.run.inputs = dict(sweep.inputs)
        self._last = _last_steps(self.run.folder / "metrics.jsonl")
        self._source = _Lines(plan.training_folder(trial) / "metrics.jsonl")
        everything = {**tags, "trial": str(trial.number), "sweep": sweep.folder.name}
        if parent:
            everything["mlflow.parentRunId"] = parent
        self._tracker = Tracker.start(self.run, everything)

    def look(self) -> None:
        """Copy what the training has logged since the last look."""
        for entry in self._source.new():
            self._log(entry["metrics"], entry["step"])
        self._tracker.commit()

    def measured(self) -> list[Point]:
        """The points of a finished trial, which are logged, the mean number of tokens being their step."""
        points = points_of(self.plan, self.trial)
        name = distance_in(self.plan, self.trial)
        for rule in self.plan.cuts:
            results = json.loads((self.plan.evaluation_folder(self.trial, rule) / "summary.json").read_text())
            prefix = "" if len(self.plan.cuts) == 1 else f"{rule}/"
            of_cuts = ("curve", "all_")
            plain = {k: v for k, v in results["results"].items() if v is not None and not k.startswith(of_cuts)}
            self._log({f"{prefix}{key}": value for key, value in plain.items()}, 0)
            for point in sorted((p for p in points if p.rule == rule), key=lambda p: p.tokens):
                curve = "curve" if len(self.plan.cuts) == 1 else f"curve_{rule}"
                self._log(curve_metrics(point, curve, name), round(point.tokens))
        self.run.results = {"points": float(len(points))}
        value = objective(points, self.plan.config)
        if value is not None:
            self.run.results["objective"] = value
            self._log({"objective": value}, 0)
        return points

    def close(self, status: str, reason: str = "") -> None:
        """The end: `status` is finished, failed or stopped; the reason is kept beside it."""
        with suppress(OSError):  # a training that wrote nothing
            self.look()
        self._tracker.tag("outcome", status)
        if reason:
            self._tracker.tag("reason", reason)
        self._tracker.close(status)
        self.run.write_summary(status, reason or None, EXIT_CODES[status])
        self.run.close()

    def leave(self) -> None:
        """The sweep ends early: the trial goes on in the same child when the sweep is resumed."""
        self.close("stopped", "the sweep was stopped; it goes on with --resume")

    def _log(self, metrics: dict[str, float], step: int) -> None:
        """Log what is newer than what is there: a training that goes on repeats its last steps."""
        fresh = {name: value for name, value in metrics.items() if step > self._last.get(name, -1)}
        if fresh:
            self._last |= dict.fromkeys(fresh, step)
            self.run.log(fresh, step)


def curve_metrics(point: Point, prefix: str, distance: str) -> dict[str, float]:
    """A point by the names of its metrics: charts over steps are then curves over tokens.

    Args:
        point: of a trial.
        prefix: of the names: which curve it lies on.
        distance: name of the Frechet distance.
    """
    return {
        f"{prefix}/psnr": point.psnr,
        f"{prefix}/{distance}": point.distance,
        f"{prefix}/bits_fixed": point.bits_fixed,
        f"{prefix}/bits_coded": point.bits_coded,
        f"{prefix}/threshold": point.threshold,
        f"{prefix}/tokens_per_image": point.tokens,
    }


class _Lines:
    """Whole lines of a file that grows, or that is written anew by a training that goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, b""

    def new(self) -> list[dict]:
        """Lines since the last call; all of them where the file does not begin as it did."""
        data = self._path.read_bytes() if self._path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]
        fresh = data[len(self._read) :] if data.startswith(self._read) else data
        self._read = data
        return [_numbers(json.loads(line)) for line in fresh.splitlines()]


def _numbers(entry: dict) -> dict:
    nan = float("nan")
    return {**entry, "metrics": {name: nan if value is None else value for name, value in entry["metrics"].items()}}


def _last_steps(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in _Lines(path).new():
        found |= {name: max(entry["step"], found.get(name, -1)) for name in entry["metrics"]}
    return found
