"""The driver's side of a sweep: gives Tune its trials, keeps their child runs, notes how they end, passes on a stop.

Tune's `grid_search` over a list of trials with a `Callback` would be less of our own, but a stop request could then
only end all trials at once (`Stopper.stop_all`): it can withhold no trial while others save their state and end.
"""

import math
import time
from contextlib import suppress
from typing import Any

from ray.tune.search import Searcher

from pipeline.core.console import say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.job import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from pipeline.core.run import Run, read_metrics, read_summary
from pipeline.sweeps.report import distance_in, loss_of, objective, points_of
from pipeline.sweeps.trials import FAILED, FINISHED, INTERRUPTED, RUNNING, STOPPED, Ledger, SweepPlan, Trial
from pipeline.sweeps.tune import METRIC, STEP, GrowingMetrics, OptunaProposals, outcome_of, run_tune, work
from pipeline.tracking import Tracker
from pipeline.training.recorder import STOP_FILE

EXIT_CODES = {FINISHED: EXIT_DONE, FAILED: EXIT_FAILED, STOPPED: EXIT_STOPPED}
POLL_SECONDS = 1.0  # between reads of the metrics of trials


class ChildRun:
    """A trial as people see it, while it is open: a run folder, and a child run of `parent` in MLflow, with `tags`."""

    def __init__(self, plan: SweepPlan, trial: Trial, sweep: Run, parent: str | None, tags: dict[str, str]) -> None:
        self.plan, self.trial, self.began = plan, trial, time.monotonic()
        config = plan.config_of(trial).with_values("run", output=str(plan.folder), name=trial.name)
        self.run = Run.open("trial", config, trial.name, resume=True)
        self.run.rewind_metrics(2**62)  # a kill may have torn the last line
        self.run.inputs = dict(sweep.inputs)
        self._last: dict[str, int] = {}  # step by name of the metric
        for line in read_metrics(self.run.folder):
            self._last |= {name: max(line.step, self._last.get(name, -1)) for name in line.metrics}
        self._source = GrowingMetrics(plan.training_folder(trial))
        everything = {**tags, "trial": str(trial.number), "sweep": sweep.folder.name}
        if parent:
            everything["mlflow.parentRunId"] = parent
        self._tracker = Tracker.start(self.run, everything)

    def look(self) -> None:
        """Copy what the training has logged since the last look."""
        with suppress(OSError):  # of a training that is just writing
            for line in self._source.new():
                self._log(line.metrics, line.step)
            self._tracker.commit()

    def measured(self) -> float | None:
        """The objective of a finished trial. Its points are logged, the mean number of tokens being their step.

        Raises:
            BadInput: what the trial left cannot be read.
        """
        points, distance = points_of(self.plan, self.trial), distance_in(self.plan, self.trial)
        several = len(self.plan.cuts) > 1
        for rule in self.plan.cuts:
            results = read_summary(self.plan.evaluation_folder(self.trial, rule))["results"]
            prefix = f"{rule}/" if several else ""
            plain = {k: v for k, v in results.items() if v is not None and not k.startswith(("curve", "all_"))}
            self._log({f"{prefix}{key}": value for key, value in plain.items()}, 0)
            for point in sorted((p for p in points if p.rule == rule), key=lambda p: p.tokens):
                self._log(point.metrics(f"curve_{rule}" if several else "curve", distance), round(point.tokens))
        self.run.results = {"points": float(len(points))}
        value = objective(points, self.plan.config)
        if value is not None:
            self.run.results["objective"] = value
            self._log({"objective": value}, 0)
        return value

    def close(self, status: str, reason: str = "") -> None:
        """The end: `status` is finished, failed or stopped; the reason is kept beside it."""
        self.look()
        self._tracker.tag("outcome", status)
        if reason:
            self._tracker.tag("reason", reason)
        self._tracker.close(status)
        self.run.write_summary(status, reason or None, EXIT_CODES[status])
        self.run.close()

    def leave(self) -> None:
        """The sweep ends early: the trial goes on in the same child when the sweep is resumed."""
        self.close(STOPPED, "the sweep was stopped; it goes on with --resume")

    def _log(self, metrics: dict[str, float], step: int) -> None:
        """Log what is newer than what is there: a training that goes on repeats its last steps."""
        fresh = {name: value for name, value in metrics.items() if step > self._last.get(name, -1)}
        if fresh:
            self._last |= dict.fromkeys(fresh, step)
            self.run.log(fresh, step)


class TrialSearcher(Searcher):
    """Tune's search algorithm: the trials of a sweep that are missing, those that were interrupted first."""

    def __init__(self, run: Run, plan: SweepPlan, ledger: Ledger, parent: str | None, tags: dict[str, str]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.run, self.plan, self.ledger = run, plan, ledger
        self._parent, self._tags = parent, tags
        self._again = [entry.trial for entry in ledger.of(RUNNING)]
        self._next = max((entry.trial.number + 1 for entry in ledger.entries), default=0)
        self._listed = plan.trials()
        self._proposals = OptunaProposals(plan, self._next) if plan.searches else None
        if self._proposals is not None:
            for entry in ledger.of(FINISHED):
                value = objective(points_of(plan, entry.trial), plan.config)
                self._proposals.learn(entry.trial, loss_of(value, plan.config))
        self._children: dict[str, ChildRun] = {}  # by Tune's name of the trial
        self._seconds: list[float] = []  # of trials that ended in this session
        self._interrupted = False  # a trial was, while it ran
        self._at_once, self._looked = 1, 0.0

    def work(self, at_once: int) -> None:
        """Run trials, so many side by side, until none is missing.

        Raises:
            Stopped: the sweep was asked to stop; what was running goes on with --resume.
            RuntimeError: trials were left behind, because Ray Tune failed.
        """
        missing = self.plan.total - self.ledger.ended
        self._at_once = at_once
        if self.ledger.ended:
            say(f"{self.ledger.ended} of {self.plan.total} trials have ended before and are not run again")
        try:
            if missing and self.plan.total == 1 and not self.plan.trains:
                self._work_here()
            elif missing:
                run_tune(self.run.config, self.run.folder, missing, min(at_once, missing), self, self.look)
        finally:
            for child in self._children.values():
                child.leave()
        if self.run.should_stop or self._interrupted:
            raise Stopped("the sweep was asked to stop; --resume runs the trials that are missing")
        if self.ledger.ended < self.plan.total:
            raise RuntimeError("Ray Tune ended before its trials; --resume runs those that are missing")

    def _work_here(self) -> None:
        """One trained tokenizer at many cuts: there is nothing for Tune to place."""
        task = self.suggest("here")
        if task == Searcher.FINISHED:
            return
        try:
            work(task)
            self.on_trial_complete("here", {"outcome": FINISHED, "reason": ""})
        except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - recorded as the trial's
            self.on_trial_complete("here", outcome_of(problem))

    def suggest(self, trial_id: str) -> Any:
        """The next trial's task, as plain values for a worker; Searcher.FINISHED when no more are to begin."""
        while not self.run.should_stop and (trial := self._next_trial()) is not None:
            self.ledger.begin(trial)
            try:
                task = self.plan.task_of(trial)
            except BadInput as error:  # drawn between the ends of ranges, which alone could be checked beforehand
                self.ledger.end(trial.number, FAILED, str(error))
                say(f"{trial.name}: {FAILED}: {error}")
                continue
            self._children[trial_id] = ChildRun(self.plan, trial, self.run, self._parent, self._tags)
            self._say(f"{trial.name} begins")
            return task
        return Searcher.FINISHED

    def _next_trial(self) -> Trial | None:
        if self._again:
            return self._again.pop(0)
        number = self._next
        if number >= self.plan.total:
            return None
        self._next += 1
        return Trial(number, self._proposals.propose(number)) if self._proposals else self._listed[number]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended; one that reported no outcome was stopped by the scheduler."""
        child, result = self._children[trial_id], result or {}
        outcome, reason = result.get("outcome", STOPPED), result.get("reason", "")
        if error:
            outcome, reason = FAILED, "its worker died; see Ray's log"
        elif "outcome" not in result:
            step, value = result.get(STEP, 0), result.get(METRIC, math.nan)
            reason = f"ASHA: after step {step} its validation PSNR, {value:.2f} dB, was behind"
        self._seconds.append(time.monotonic() - child.began)
        if outcome == FINISHED:
            try:
                value = child.measured()
                if self._proposals is not None:
                    self._proposals.learn(child.trial, loss_of(value, self.plan.config))
            except BadInput as problem:
                outcome, reason = FAILED, str(problem)
        if outcome == INTERRUPTED:
            self._interrupted = True
            child.leave()  # the ledger still says that it runs: a resumed sweep goes on with it
        else:
            child.close(outcome, reason)
            self.ledger.end(child.trial.number, outcome, reason)
        del self._children[trial_id]
        self._say(f"{child.trial.name}: {outcome}{f': {reason}' if reason else ''}")

    def look(self) -> None:
        """Now and then copy what trials have logged, and pass on a stop; Tune calls it in every step of its loop."""
        if time.monotonic() - self._looked < POLL_SECONDS:
            return
        self._looked = time.monotonic()
        for child in self._children.values():
            child.look()
            folder = self.plan.training_folder(child.trial)
            if self.run.should_stop and folder.is_dir():  # one that is being evaluated ends by itself
                (folder / STOP_FILE).touch()

    def _say(self, what: str) -> None:
        total, done, running = self.plan.total, self.ledger.ended, len(self._children)
        left = ""
        if self._seconds and done < total:
            mean = sum(self._seconds) / len(self._seconds)
            left = f", about {mean * (total - done) / self._at_once:.0f} s left"
        say(f"{what} ({done} of {total} trials done, {running} running{left})")

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        """Nothing to set."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves what it is given to be able to resume, which is what the ledger is for."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing, likewise."""
