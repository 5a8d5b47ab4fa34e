"""The stage behind `jobs/sweep.py`: many trials in, a table, a plot and the best one out."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from pipeline.core.cluster import connect, most_resources, names_cluster
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.inputs import check_tokenizer, find_input, with_input
from pipeline.core.run import Run, read_summary
from pipeline.data.shards import Manifest, read_manifest
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.compare import curve_of
from pipeline.sweeps.trials import CHECKPOINT, Ledger, SweepPlan, Trial
from pipeline.tracking import Tracker, check_model_name, check_store, check_tracking
from pipeline.training import train as training

PARENT_SECONDS = 600.0  # wait for the MLflow run, which child runs refer to: a new database may take that long


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: a space over an unknown key or an empty range, a threshold outside its rule's range, a checkpoint
            that is none or has no entropy model, a control without a curve, a search that is not installed, a tracking
            server that does not answer or refuses, a name that no model is registered as, trials that do not fit into
            this machine, or as the checks of training and evaluation.
    """
    check_tracking(config)
    plan = SweepPlan.of(config, Path(config.run.output) / (config.run.name or default_name(config)))
    if plan.searches and find_spec("optuna") is None:
        raise BadInput(
            "sweep.search is 'optuna', which is not installed; expected random, or pip install 'tatok[optuna]'"
        )
    if not plan.trains and not config.sweep.checkpoints:
        check_tokenizer(config)
    samples = plan.samples()
    for trial in samples:
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
    if not names_cluster():
        find_room([plan.config_of(trial) for trial in samples], plan.total, os.cpu_count() or 1, 0)
    if config.tracking.uri:
        if config.sweep.register:
            check_model_name("sweep.register", config.sweep.register)
        check_store(config)


def _check_trial(plan: SweepPlan, trial: Trial) -> None:
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
    """Run the trials that have not ended, then compare all."""
    from pipeline.sweeps.driver import TrialSearcher
    from pipeline.sweeps.report import conclude

    plan = SweepPlan.of(run.config, run.folder)
    ledger = Ledger.open(plan)
    # All trials share the shards; where there are none, they are made inside the sweep's folder.
    inside = run.config.with_values("run", output=str(run.folder))
    place = run.config if find_input(run.config, "data.shards").data.shards else inside
    run.config = replace(run.config, data=with_input(place, "data.shards", run.folder).data)
    plan = replace(plan, config=run.config)
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    if run.config.sweep.objective == "bd_rate":
        check_control(run.config, manifest)
    configs = [plan.config_of(trial) for trial in plan.samples()]
    room = find_room(configs, plan.total, *_resources(run.config))
    say(room.sentence)
    tags = {"data_fingerprint": manifest.fingerprint, "threshold": plan.cuts_in_words}
    # `run.config` has one number of global tokens, but trials may have others.
    global_tokens = ", ".join(map(str, sorted({config.tokenizer.global_tokens for config in configs})))
    with Tracker.start(run, {**tags, "global_tokens": global_tokens}) as tracker:
        TrialSearcher(run, plan, ledger, tracker.run_id(PARENT_SECONDS), tags).work(room.at_once)
        conclude(run, plan, ledger, tracker)


def check_control(config: Config, manifest: Manifest) -> None:
    """Refuse a `sweep.control`, the evaluation that trials are compared with, of other pictures than theirs.

    Raises:
        BadInput: other shards, or another number of pictures.
    """
    path = config.sweep.control
    summary = read_summary(path)
    rows = manifest.splits["heldout"].rows
    wanted = {"shards": manifest.fingerprint, "images": min(config.evaluate.max_images or rows, rows)}
    measured = {
        "shards": summary["inputs"].get("shards", {}).get("sha256", "unknown"),
        "images": int(summary["results"].get("images", 0)),
    }
    for name, value in wanted.items():
        if measured[name] != value:
            raise BadInput(f"sweep.control {path!r} measured {name} {measured[name]}; expected {value}, as the trials")


def _resources(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of the cluster. Only with Ray's dashboard do workers of trials stopped by ASHA free theirs."""
    resources = most_resources(connect(dashboard=config.sweep.scheduler == "asha" and config.train.num_workers > 0))
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


# How many trials run at once: computed before launch, because Ray waits forever for resources that do not exist.


@dataclass(frozen=True)
class Room:
    """How many trials fit."""

    at_once: int
    sentence: str  # for people: what will run at once, and why


def find_room(configs: list[Config], total: int, cpus: float, gpus: float) -> Room:
    """How many of `total` trials run at once, by the configuration that needs most CPUs.

    A trial takes the CPUs of its larger stage: training `num_workers` x `cpus_per_worker` CPUs (one CPU, in the
    trial's own process, with no workers), evaluation a CPU for each of its workers. GPUs are divided likewise where
    trials may use them; trials that train in their own process all use the first GPU, so that one runs at a time.

    Raises:
        BadInput: not even one trial fits.
    """
    needs = {
        max(float(c.evaluate.num_workers), c.train.num_workers * c.train.cpus_per_worker or 1.0): c for c in configs
    }
    need = max(needs)
    train, evaluate = needs[need].train, needs[need].evaluate
    says = (
        f"training takes {train.num_workers or 1} x {train.cpus_per_worker if train.num_workers else 1:g} CPUs, "
        f"evaluation {evaluate.num_workers}"
    )
    if need > cpus:
        raise BadInput(
            f"a trial needs {need:g} CPUs ({says}) and there are {cpus:g}; expected a smaller train.num_workers, "
            "train.cpus_per_worker or evaluate.num_workers"
        )
    room = int(cpus / need + 1e-9)
    if gpus and any(config.train.device != "cpu" for config in configs):
        workers = max(config.train.num_workers for config in configs)
        room = min(room, max(int(gpus) // workers, 1)) if workers else 1
        says += f", {workers or 1} of {gpus:g} GPUs"
    at_once = min(room, total, configs[0].sweep.at_once or total)
    limit = f", as sweep.at_once says; there is room for {room}" if at_once == configs[0].sweep.at_once < room else ""
    return Room(at_once, f"{total} trials, {at_once} at once{limit}: a trial takes {need:g} of {cpus:g} CPUs ({says})")
