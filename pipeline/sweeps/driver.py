"""The driver's side of a sweep: hands out trials, keeps their child runs, hears of their ends, passes on a stop."""

import dataclasses
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core.console import say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.job import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from pipeline.core.run import METRICS, LoggedLine, Run, parse_metrics, read_metrics, read_summary
from pipeline.sweeps.report import LESS_IS_BETTER, Point, distance_in, objective, points_of
from pipeline.sweeps.search import Queue
from pipeline.sweeps.trial_work import outcome_of, task_of, work
from pipeline.sweeps.trials import FAILED, FINISHED, STOPPED, Ledger, Plan, Trial
from pipeline.sweeps.tune import run_tune
from pipeline.tracking import Tracker

# A trial as people see it: a run folder and a child run in MLflow, both kept by the driver.

EXIT_CODES = {"finished": EXIT_DONE, "failed": EXIT_FAILED, "stopped": EXIT_STOPPED}


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
        self._last = _last_steps(self.run.folder)
        self._source = _Lines(plan.training_folder(trial) / METRICS)
        everything = {**tags, "trial": str(trial.number), "sweep": sweep.folder.name}
        if parent:
            everything["mlflow.parentRunId"] = parent
        self._tracker = Tracker.start(self.run, everything)

    def look(self) -> None:
        """Copy what the training has logged since the last look."""
        for entry in self._source.new():
            self._log(entry.metrics, entry.step)
        self._tracker.commit()

    def measured(self) -> list[Point]:
        """The points of a finished trial, which are logged, the mean number of tokens being their step."""
        points = points_of(self.plan, self.trial)
        name = distance_in(self.plan, self.trial)
        for rule in self.plan.cuts:
            results = read_summary(self.plan.evaluation_folder(self.trial, rule))["results"]
            prefix = "" if len(self.plan.cuts) == 1 else f"{rule}/"
            of_cuts = ("curve", "all_")
            plain = {k: v for k, v in results.items() if v is not None and not k.startswith(of_cuts)}
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

    def new(self) -> list[LoggedLine]:
        """Lines since the last call; all of them where the file does not begin as it did."""
        data = self._path.read_bytes() if self._path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]
        fresh = data[len(self._read) :] if data.startswith(self._read) else data
        self._read = data
        return parse_metrics(fresh)


def _last_steps(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in read_metrics(folder):
        found |= {name: max(entry.step, found.get(name, -1)) for name in entry.metrics}
    return found


LOOK_SECONDS = 1.0  # between looks at what trials have logged


class Driver:
    """Runs the trials of a sweep that are missing.

    Args:
        run: of the sweep.
        plan: its trials.
        ledger: how they stand.
        parent: the sweep's MLflow run; None where nothing is tracked.
        tags: of the children.
    """

    def __init__(self, run: Run, plan: Plan, ledger: Ledger, parent: str | None, tags: dict[str, str]) -> None:
        self.run, self.plan, self.ledger = run, plan, ledger
        self._parent, self._tags = parent, tags
        losses = {entry.trial.number: self._loss(entry.trial) for entry in ledger.of(FINISHED)}
        self._queue = Queue(plan, ledger, losses)
        self._events: queue.Queue[tuple[Trial, str, str]] = queue.Queue()  # what Tune's thread has seen
        self._taken: dict[int, Trial] = {}
        self._children: dict[int, Child] = {}
        self._seconds: list[float] = []  # of trials that ended in this session
        self._began: dict[int, float] = {}
        self._interrupted = False  # a trial was, while it ran

    def work(self, at_once: int) -> None:
        """Run trials until none is missing.

        Args:
            at_once: how many side by side.

        Raises:
            Stopped: the sweep was asked to stop; what was running goes on with --resume.
            RuntimeError: trials were left behind, because Ray Tune failed.
        """
        ended = self.ledger.of(FINISHED, FAILED, STOPPED)
        missing = self.plan.total - len(ended)
        if ended:
            say(f"{len(ended)} of {self.plan.total} trials have ended before and are not run again")
        try:
            if missing and self.plan.total == 1 and not self.plan.trains:
                self._work_here()
            elif missing:
                config, folder = self.run.config, self.run.folder
                self._follow(run_tune(config, folder, missing, min(at_once, missing), self.take, self.ended), at_once)
        finally:
            for child in self._children.values():
                child.leave()
        if self.run.should_stop or self._interrupted:
            raise Stopped("the sweep was asked to stop; --resume runs the trials that are missing")
        if len(self.ledger.of(FINISHED, FAILED, STOPPED)) < self.plan.total:
            raise RuntimeError("Ray Tune ended before its trials; --resume runs those that are missing")

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """The next trial's number and task, for Tune's thread."""
        while (trial := self._queue.take()) is not None:
            try:
                task = self._task(trial)
            except BadInput as error:  # drawn between the ends of ranges, which alone could be checked beforehand
                self.ledger.end(trial.number, FAILED, str(error))
                say(f"{trial.name}: {FAILED}: {error}")
                continue
            self._taken[trial.number] = trial
            self._events.put((trial, "begun", ""))
            return trial.number, task
        return None

    def ended(self, number: int, outcome: str, reason: str) -> None:
        """How a trial ended, from Tune's thread, before it asks for the next one."""
        trial, loss = self._taken[number], None
        if outcome == FINISHED:
            try:
                loss = self._loss(trial)
            except BadInput as error:  # what it left cannot be read
                outcome, reason = FAILED, str(error)
        self._queue.learn(trial, loss)
        self._events.put((trial, outcome, reason))

    def _work_here(self) -> None:
        """One trained tokenizer at many cuts: there is nothing for Tune to place."""
        given = self.take()
        self._look(1)
        if given is None:
            return
        number, task = given
        try:
            work(task)
            self.ended(number, FINISHED, "")
        except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - recorded as the trial's
            self.ended(number, *outcome_of(problem).values())
        self._look(1)

    def _follow(self, thread: threading.Thread, at_once: int) -> None:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            self._look(at_once)
            if self.run.should_stop:
                self._queue.close()
                self._ask_to_stop()
        self._look(at_once)

    def _look(self, at_once: int) -> None:
        """Open children of trials that began, copy what trials logged, close those of trials that ended."""
        while not self._events.empty():
            trial, outcome, reason = self._events.get()
            if outcome == "begun":
                self._began[trial.number] = time.monotonic()
                self._children[trial.number] = Child(self.plan, trial, self.run, self._parent, self._tags)
                self._say(f"{trial.name} begins", at_once)
            else:
                self._close(trial, outcome, reason)
                self._say(f"{trial.name}: {outcome}{f': {reason}' if reason else ''}", at_once)
        for child in self._children.values():
            with suppress(OSError):
                child.look()

    def _close(self, trial: Trial, outcome: str, reason: str) -> None:
        child = self._children[trial.number]
        self._seconds.append(time.monotonic() - self._began[trial.number])
        if outcome == "interrupted":
            self._interrupted = True
            child.leave()  # the ledger still says that it runs: a resumed sweep goes on with it
        else:
            if outcome == FINISHED:
                child.measured()
            child.close(outcome, reason)
            self.ledger.end(trial.number, outcome, reason)
        del self._children[trial.number]

    def _say(self, what: str, at_once: int) -> None:
        done, running = len(self.ledger.of(FINISHED, FAILED, STOPPED)), len(self._children)
        left = ""
        if self._seconds and done < self.plan.total:
            mean = sum(self._seconds) / len(self._seconds)
            left = f", about {mean * (self.plan.total - done) / at_once:.0f} s left"
        say(f"{what} ({done} of {self.plan.total} trials done, {running} running{left})")

    def _ask_to_stop(self) -> None:
        """As the driver of a training does; a trial that is being evaluated ends by itself."""
        from pipeline.training.recorder import STOP_FILE

        for child in self._children.values():
            folder = self.plan.training_folder(child.trial)
            if folder.is_dir():
                (folder / STOP_FILE).touch()

    def _task(self, trial: Trial) -> dict[str, Any]:
        checkpoint = "" if self.plan.trains else trial.values["tokenizer.checkpoint"]
        training = None if checkpoint else self.plan.training_of(trial)
        evaluations = [self.plan.evaluation_of(trial, rule, checkpoint) for rule in self.plan.cuts]
        return task_of(self.plan.folder / trial.name, training, evaluations)

    def _loss(self, trial: Trial) -> float | None:
        """The objective, less being better."""
        value = objective(points_of(self.plan, trial), self.plan.config)
        return value if value is None or LESS_IS_BETTER[self.plan.config.sweep.objective] else -value
