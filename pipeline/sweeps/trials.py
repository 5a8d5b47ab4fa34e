"""The trials of a sweep, the configurations of their stages, and the ledger of their status. No torch, no Ray.

A sweep's folder holds, for the trial `trial-00-global_tokens-2`:

    trial-00-global_tokens-2/                    the trial: its metrics, summary.json, the child run in MLflow
    trial-00-global_tokens-2-train/              what `jobs/train.py` leaves
    trial-00-global_tokens-2-relative-evaluate/  what `jobs/evaluate.py` leaves, for each cut rule
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import is_hub_id, read_architecture
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import write_json
from pipeline.core.inputs import find_input
from pipeline.core.manifest import check_unchanged, values_of
from pipeline.core.presets import config_from_dict
from pipeline.sweeps.space import corner_points, points, read_cuts, read_space

CHECKPOINT = "tokenizer.checkpoint"
LONGEST = 80  # characters of a trial's name


@dataclass(frozen=True)
class Trial:
    """One model that is measured at every cut."""

    number: int  # from 0, in the order in which trials were planned
    values: dict[str, Any]  # of the space, by `section.key`; in a sweep of kind thresholds, the checkpoint

    @property
    def name(self) -> str:
        """Name of its run folder and of its child run in MLflow."""
        parts = [f"trial-{self.number:02d}"]
        for key, value in self.values.items():
            if key == CHECKPOINT:  # `cifar10-train` of `runs/cifar10-train/checkpoint`
                folder = Path(value)
                text = folder.parent.name if folder.name == "checkpoint" else folder.name
            else:
                text = f"{key.partition('.')[2]}-{f'{value:.4g}' if isinstance(value, float) else value}"
            parts += [re.sub(r"[^\w.=-]+", "_", text)] if text else []
        return "-".join(parts)[:LONGEST].rstrip("-_.")


@dataclass(frozen=True)
class SweepPlan:
    """Which trials there are, and the configuration of each of their stages."""

    config: Config  # of the sweep, with `data.shards` once they exist
    folder: Path  # of the sweep
    cuts: dict[str, tuple[float, ...]]  # rule to thresholds

    @classmethod
    def of(cls, config: Config, folder: Path) -> "SweepPlan":
        """Raises BadInput as `read_cuts`."""
        return cls(config, folder, read_cuts(config))

    @property
    def trains(self) -> bool:
        """Whether a trial begins with a training."""
        return self.config.sweep.kind == "architecture"

    @property
    def searches(self) -> bool:
        """Whether values depend on the results of earlier trials, so that trials cannot be listed."""
        return self.trains and self.config.sweep.search == "optuna"

    @property
    def total(self) -> int:
        """How many trials there will be."""
        return self.config.sweep.samples if self.searches else len(self.trials())

    @property
    def cuts_in_words(self) -> str:
        """`relative 0.5, 1; residual 40` for instance."""
        return "; ".join(f"{rule} {', '.join(f'{value:g}' for value in values)}" for rule, values in self.cuts.items())

    def trials(self) -> list[Trial]:
        """All trials; empty for a search, whose trials are not known in advance."""
        if self.searches:
            return []
        sweep = self.config.sweep
        if not self.trains:
            paths = sweep.checkpoints or (find_input(self.config, "tokenizer.checkpoint").tokenizer.checkpoint,)
            return [Trial(i, {CHECKPOINT: path}) for i, path in enumerate(paths)]
        return [Trial(i, values) for i, values in enumerate(points(read_space(sweep.space), sweep.samples, sweep.seed))]

    def samples(self) -> list[Trial]:
        """Trials to check before the sweep: all, or for a search those at the ends of the ranges."""
        if not self.searches:
            return self.trials()
        return [Trial(i, values) for i, values in enumerate(corner_points(read_space(self.config.sweep.space)))]

    def config_of(self, trial: Trial) -> Config:
        """The configuration of a trial, shown by its child run and written to best.yaml.

        Raises:
            BadInput: an unknown key, or an invalid value.
        """
        values = self.config.to_dict()
        for key, value in trial.values.items():
            section, name = key.split(".")
            if not isinstance(values.setdefault(section, {}), dict):
                raise BadInput(f"sweep.space has {key!r}; expected section.key, e.g. tokenizer.global_tokens")
            values[section] = {**values[section], name: value}
        path = trial.values.get(CHECKPOINT, "")
        if not self.trains and path and not is_hub_id(path):  # each checkpoint has its own architecture
            values["tokenizer"] |= dataclasses.asdict(read_architecture(path))
        values["evaluate"]["thresholds"] = []  # `evaluation_of` sets those of each rule
        return config_from_dict(values)

    def training_of(self, trial: Trial) -> Config:
        """The configuration of the trial's training, with the trial's name as preset, from which folders are named."""
        return self._inside(self.config_of(trial), trial.name)

    def evaluation_of(self, trial: Trial, rule: str, checkpoint: str) -> Config:
        """The configuration of the evaluation at every threshold of a rule; `checkpoint` is '' while there is none.

        Raises:
            BadInput: a threshold outside the rule's range.
        """
        values = self._inside(self.config_of(trial), f"{trial.name}-{rule}").to_dict()
        values["tokenizer"]["checkpoint"] = checkpoint
        values["evaluate"]["thresholds"] = list(self.cuts[rule])
        if rule != self.config.filter.rule:
            values["filter"] |= {"rule": rule, "threshold": self.cuts[rule][0]}
        try:
            return config_from_dict(values)
        except BadInput as error:
            raise BadInput(f"sweep.cuts of the rule {rule}: {error}") from None

    def task_of(self, trial: Trial) -> dict[str, Any]:
        """A trial as plain values for a worker; `training` is None where a checkpoint is given.

        Raises:
            BadInput: invalid values.
        """
        checkpoint = "" if self.trains else trial.values[CHECKPOINT]
        return {
            "folder": str(self.folder / trial.name),  # where a Tune worker writes the output of the stages
            "training": None if checkpoint else self.training_of(trial).to_dict(),
            "evaluations": [self.evaluation_of(trial, rule, checkpoint).to_dict() for rule in self.cuts],
        }

    def evaluation_folder(self, trial: Trial, rule: str) -> Path:
        """The evaluation's run folder."""
        return self.folder / f"{trial.name}-{rule}-evaluate"

    def training_folder(self, trial: Trial) -> Path:
        """The training's run folder."""
        return self.folder / f"{trial.name}-train"

    def _inside(self, config: Config, preset: str) -> Config:
        """A stage of a trial: in the sweep's folder, and not tracked, because the trial's child run is."""
        config = dataclasses.replace(config, preset=preset, sweep=type(config.sweep)())
        return config.with_values(
            "run", output=str(self.folder), name="", make=self.trains or config.run.make
        ).with_values("tracking", uri="")


# The ledger: `trials.json` in the sweep's folder, written before every start and after every end of a trial.

FORMAT, VERSION = "tatok-trials", 1
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
INTERRUPTED = "interrupted"  # such a trial still counts as running: a resumed sweep continues it
SECTIONS = ("tokenizer", "losses", "kept_sets", "train", "filter")  # decide the results of a trial
DECIDES = (  # so do these keys of other sections
    "sweep.kind", "sweep.checkpoints", "sweep.space", "sweep.search", "sweep.samples", "sweep.seed", "sweep.objective",
    "sweep.budget_tokens", "sweep.rate", "sweep.control", "data.source", "data.heldout_source", "data.shards",
    "train.max_steps", "train.max_minutes", "evaluate.extractor", "evaluate.max_images",
)  # fmt: skip


@dataclass
class Entry:
    """A started trial and its status."""

    trial: Trial
    status: str = RUNNING
    reason: str = ""  # why it failed or was stopped


@dataclass
class Ledger:
    """All started trials."""

    path: Path
    begun: dict[str, Any]  # the settings that decide trials and results, as of the sweep's first start
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def open(cls, plan: SweepPlan) -> "Ledger":
        """The ledger in the plan's folder, or a new one.

        Raises:
            BadInput: the sweep was started with other settings, or the file is not a ledger.
        """
        path, begun = plan.folder / "trials.json", _begun(plan)
        if not path.exists():
            return cls(path, begun)
        try:
            read = json.loads(path.read_text())
            if (read["format"], read["version"]) != (FORMAT, VERSION):
                raise ValueError(read["format"])
            entries = [Entry(Trial(e["number"], e["values"]), e["status"], e["reason"]) for e in read["trials"]]
            first_settings = dict(read["begun"])
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{str(path)!r} is damaged; expected a file of format {FORMAT} version {VERSION}") from None
        check_unchanged(first_settings, begun)
        return cls(path, begun, entries)

    def begin(self, trial: Trial) -> None:
        """Record that a trial starts or continues."""
        if not any(entry.trial.number == trial.number for entry in self.entries):
            self.entries.append(Entry(trial))
        self._save()

    def end(self, number: int, status: str, reason: str = "") -> None:
        """Record how a trial ended."""
        entry = next(entry for entry in self.entries if entry.trial.number == number)
        entry.status, entry.reason = status, reason
        self._save()

    def of(self, *statuses: str) -> list[Entry]:
        """Trials with one of these statuses, in the order of their numbers."""
        return sorted((e for e in self.entries if e.status in statuses), key=lambda entry: entry.trial.number)

    @property
    def ended(self) -> int:
        """How many trials have ended."""
        return len(self.of(FINISHED, FAILED, STOPPED))

    def _save(self) -> None:
        trials = [{**dataclasses.asdict(e.trial), "status": e.status, "reason": e.reason} for e in self.entries]
        write_json(self.path, {"format": FORMAT, "version": VERSION, "begun": self.begun, "trials": trials})


def _begun(plan: SweepPlan) -> dict[str, Any]:
    values = plan.config.to_dict()
    named = {key: values[section][name] for key in DECIDES for section, name in [key.split(".")]}
    cuts = {rule: list(thresholds) for rule, thresholds in plan.cuts.items()}
    return {**named, "sweep.cuts": cuts, **values_of(plan.config, *SECTIONS)}
