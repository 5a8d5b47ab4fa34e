"""Which trials there are and how they stand: `trials.json` in the sweep's folder, written before others rely on it.

    {"format": "tatok-trials", "version": 1, "begun": {key: value},
     "trials": [{"number", "values", "status", "reason"}]}

Resuming reads this file, not Tune's state: it says the same after a kill at any moment, and which trials Tune has seen
does not matter.
"""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput
from pipeline.paths import write_json
from pipeline.tuning.plan import Plan, Trial

FORMAT, VERSION = "tatok-trials", 1
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
SECTIONS = ("tokenizer", "losses", "kept_sets", "train", "filter")  # decide what a trial is worth
DECIDES = (  # of other sections
    "sweep.kind", "sweep.checkpoints", "sweep.space", "sweep.search", "sweep.samples", "sweep.seed", "sweep.objective",
    "sweep.budget_tokens", "sweep.rate", "sweep.control", "data.source", "data.heldout_source", "data.shards",
    "train.max_steps", "train.max_minutes", "evaluate.extractor", "evaluate.max_images",
)  # fmt: skip


@dataclass
class Entry:
    """One trial that was begun."""

    trial: Trial
    status: str = RUNNING
    reason: str = ""  # why it failed or was stopped


@dataclass
class Ledger:
    """All trials that were begun. Any thread may call it."""

    path: Path
    begun: dict[str, Any]  # what decides which trials there are and what they are worth
    entries: list[Entry] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, plan: Plan) -> "Ledger":
        """The ledger in the plan's folder, or a new one.

        Raises:
            BadInput: the sweep was begun with other trials in mind, or the file is not a ledger.
        """
        from pipeline.training.resume import check_unchanged  # imports torch

        path, begun = plan.folder / "trials.json", _begun(plan)
        if not path.exists():
            return cls(path, begun)
        try:
            found = json.loads(path.read_text())
            if (found["format"], found["version"]) != (FORMAT, VERSION):
                raise ValueError(found["format"])
            entries = [Entry(Trial(e["number"], e["values"]), e["status"], e["reason"]) for e in found["trials"]]
            before = dict(found["begun"])
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{str(path)!r} is damaged; expected a file of format {FORMAT} version {VERSION}") from None
        check_unchanged(before, begun)
        return cls(path, begun, entries)

    def begin(self, trial: Trial) -> None:
        """Note that a trial begins or goes on."""
        with self._lock:
            if not any(entry.trial.number == trial.number for entry in self.entries):
                self.entries.append(Entry(trial))
            self._save()

    def end(self, number: int, status: str, reason: str = "") -> None:
        """Note how a trial ended."""
        with self._lock:
            entry = next(entry for entry in self.entries if entry.trial.number == number)
            entry.status, entry.reason = status, reason
            self._save()

    def of(self, *statuses: str) -> list[Entry]:
        """Trials that stand so, in the order of their numbers."""
        with self._lock:
            found = [entry for entry in self.entries if entry.status in statuses]
        return sorted(found, key=lambda entry: entry.trial.number)

    def _save(self) -> None:
        trials = [
            {"number": e.trial.number, "values": e.trial.values, "status": e.status, "reason": e.reason}
            for e in self.entries
        ]
        write_json(self.path, {"format": FORMAT, "version": VERSION, "begun": self.begun, "trials": trials})


def _begun(plan: Plan) -> dict[str, Any]:
    from pipeline.training.resume import values_of

    values = plan.config.to_dict()
    named = {key: values[key.partition(".")[0]][key.partition(".")[2]] for key in DECIDES}
    cuts = {rule: list(thresholds) for rule, thresholds in plan.cuts.items()}
    return {**named, "sweep.cuts": cuts, **values_of(plan.config, *SECTIONS)}
