"""The stage behind `jobs/sweep.py`: many trials in, a table, a plot and the best one out."""

import dataclasses
import os
from pathlib import Path

from pipeline.core.cluster import connect, most_resources
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.inputs import with_shards
from pipeline.core.run import Run, read_summary
from pipeline.data.shards import Manifest, read_manifest
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.compare import curve_of
from pipeline.sweeps.search import check_search, find_room
from pipeline.sweeps.trials import CHECKPOINT, Plan, Trial, cuts_in_words
from pipeline.tracking import Tracker, check_answers, check_tracking
from pipeline.training import train as training

PARENT_SECONDS = 600.0  # how long a new database may take on a busy machine: children name their parent


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: a space over an unknown key or an empty range, a threshold outside its rule's range, a checkpoint
            that is none or has no entropy model, a control without a curve, a tracking server that does not answer,
            trials that do not fit into this machine, or as the checks of training and evaluation.
    """
    check_tracking(config)
    plan = Plan.of(config, Path(config.run.output) / (config.run.name or default_name(config)))
    check_search(plan)
    for trial in plan.samples():
        try:
            _check_trial(plan, trial)
        except BadInput as error:
            if len(config.sweep.checkpoints) < 2:
                raise
            raise BadInput(f"of sweep.checkpoints {trial.values[CHECKPOINT]!r}: {error}") from None
    if config.sweep.objective == "bd_rate":
        curve_of(Path(config.sweep.control))
    if config.sweep.scheduler == "asha":
        _check_asha(config)
    if not os.environ.get("RAY_ADDRESS"):
        configs = [plan.config_of(trial) for trial in plan.samples()]
        find_room(configs, plan.total, os.cpu_count() or 1, 0)
    check_answers(config)


def _check_trial(plan: Plan, trial: Trial) -> None:
    for rule in plan.cuts:
        evaluation.check(plan.evaluation_of(trial, rule, "" if plan.trains else trial.values[CHECKPOINT]))
    if plan.trains or not trial.values[CHECKPOINT]:
        training.check(plan.training_of(trial))


def _check_asha(config: Config) -> None:
    if config.sweep.kind != "architecture":
        raise BadInput("sweep.scheduler is 'asha'; expected none with the kind thresholds, which trains nothing")
    every = config.train.validate_every
    if not 0 < every <= (config.sweep.grace_steps or every) < config.train.max_steps:
        raise BadInput(
            f"sweep.scheduler is 'asha' with sweep.grace_steps {config.sweep.grace_steps} and train.validate_every "
            f"{every}; expected validations before train.max_steps, {config.train.max_steps}"
        )


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-sweep"


def run(run: Run) -> None:
    """Run the trials that are missing, then compare all."""
    from pipeline.sweeps.driver import Driver
    from pipeline.sweeps.outcome import conclude
    from pipeline.sweeps.trials import Ledger

    plan = Plan.of(run.config, run.folder)
    ledger = Ledger.open(plan)
    run.config = _with_shards(plan)
    plan = dataclasses.replace(plan, config=run.config)
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    if run.config.sweep.objective == "bd_rate":
        check_control(run.config, manifest)
    room = find_room([plan.config_of(trial) for trial in plan.samples()], plan.total, *_resources(plan))
    say(room.sentence)
    tags = {"data_fingerprint": manifest.fingerprint, "threshold": cuts_in_words(plan)}
    with Tracker.start(run, {**tags, "global_tokens": _global_tokens(plan)}) as tracker:
        Driver(run, plan, ledger, tracker.run_id(PARENT_SECONDS), tags).work(room.at_once)
        conclude(run, plan, ledger, tracker)


def _global_tokens(plan: Plan) -> str:
    """Those of the trials: the configuration of a sweep names one number, which its trials need not have."""
    return ", ".join(map(str, sorted({plan.config_of(trial).tokenizer.global_tokens for trial in plan.samples()})))


def check_control(config: Config, manifest: Manifest) -> None:
    """Refuse a control that was measured on other pictures than the trials will be.

    Raises:
        BadInput: other shards, or another number of pictures.
    """
    path = config.sweep.control
    summary = read_summary(path)
    rows = manifest.splits["heldout"].rows
    wanted = {"shards": manifest.fingerprint, "images": min(config.evaluate.max_images or rows, rows)}
    found = {
        "shards": summary["inputs"].get("shards", {}).get("sha256", "unknown"),
        "images": int(summary["results"].get("images", 0)),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise BadInput(f"sweep.control {path!r} measured {name} {found[name]}; expected {value}, as the trials")


def _with_shards(plan: Plan) -> Config:
    """With shards that all trials share, made inside the sweep's folder where there are none."""
    inside = dataclasses.replace(plan.config.run, output=str(plan.folder))
    made = with_shards(dataclasses.replace(plan.config, run=inside))
    return dataclasses.replace(plan.config, data=made.data)


def _resources(plan: Plan) -> tuple[float, float]:
    """CPUs and GPUs of the cluster. Without Ray's dashboard, workers of trials that ASHA stops keep what they hold."""
    needs_dashboard = plan.config.sweep.scheduler == "asha" and plan.config.train.num_workers > 0
    found = most_resources(connect(dashboard=needs_dashboard))
    return found.get("CPU", 0.0), found.get("GPU", 0.0)
