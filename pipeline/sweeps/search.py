"""Which trial comes next: those that were interrupted, then new ones, from the plan's list or from Optuna."""

import threading
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.sweeps.space import Domain, read_space
from pipeline.sweeps.trials import FINISHED, RUNNING, Ledger, Plan, Trial

# How many trials run at once: arithmetic before launch, because Ray would wait without end for what does not fit.


@dataclass(frozen=True)
class Room:
    """What there is room for."""

    at_once: int
    sentence: str  # for people: what will run at once, and why


def find_room(configs: list[Config], total: int, cpus: float, gpus: float) -> Room:
    """How many of some trials run at once.

    A trial takes what the larger of its stages takes: training `num_workers` x `cpus_per_worker` CPUs (one CPU, in the
    trial's own process, with no workers), evaluation a CPU for each of its workers. GPUs are shared out likewise where
    trials may use them; trials that train in their own process all use the first GPU, so that one runs at a time.

    Args:
        configs: of the trials; the most demanding one counts.
        total: how many trials there will be.
        cpus: of the cluster.
        gpus: of the cluster.

    Raises:
        BadInput: not even one fits.
    """
    needs = {_cpus(config): config for config in configs}
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


def _cpus(config: Config) -> float:
    train = config.train
    training = train.num_workers * train.cpus_per_worker if train.num_workers else 1.0
    return max(training, float(config.evaluate.num_workers))


class Proposer(Protocol):
    """Makes up trials."""

    def propose(self, number: int) -> dict[str, Any] | None:
        """Values of the trial `number`; None when there are no more."""
        ...

    def learn(self, trial: Trial, loss: float | None) -> None:
        """A trial ended; `loss` is less the better it is, None when it has none."""
        ...


class Queue:
    """Hands out trials one after another. Any thread may call it.

    Args:
        plan: the sweep's.
        ledger: what was begun before.
        losses: of the trials that were finished before, by number.
    """

    def __init__(self, plan: Plan, ledger: Ledger, losses: dict[int, float | None]) -> None:
        self._proposer: Proposer = Optuna(plan) if plan.searches else Listed(plan)
        self._ledger, self._lock = ledger, threading.Lock()
        self._again = [entry.trial for entry in ledger.of(RUNNING)]
        self._next = max((entry.trial.number + 1 for entry in ledger.entries), default=0)
        self._closed = False
        for entry in ledger.of(FINISHED):
            self._proposer.learn(entry.trial, losses.get(entry.trial.number))

    def take(self) -> Trial | None:
        """The next trial, noted in the ledger; None when there is none left."""
        with self._lock:
            trial = self._again.pop(0) if self._again and not self._closed else self._new()
            if trial is not None:
                self._ledger.begin(trial)
            return trial

    def _new(self) -> Trial | None:
        values = None if self._closed else self._proposer.propose(self._next)
        if values is None:
            return None
        self._next += 1
        return Trial(self._next - 1, values)

    def learn(self, trial: Trial, loss: float | None) -> None:
        """A trial ended."""
        with self._lock:
            self._proposer.learn(trial, loss)

    def close(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._closed = True


class Listed:
    """The plan's own trials, which are known beforehand."""

    def __init__(self, plan: Plan) -> None:
        self._trials = plan.trials()

    def propose(self, number: int) -> dict[str, Any] | None:
        """As the plan lists them."""
        return self._trials[number].values if number < len(self._trials) else None

    def learn(self, trial: Trial, loss: float | None) -> None:
        """Changes nothing."""


class Optuna:
    """Trials that learn from those before, by Optuna's tree-structured Parzen estimator."""

    def __init__(self, plan: Plan) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep = plan.config.sweep
        self._optuna = optuna
        self._domains = read_space(sweep.space)
        self._distributions = {domain.key: self._distribution(domain) for domain in self._domains}
        sampler = optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=min(10, max(sweep.samples // 2, 2)))
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._samples, self._asked = sweep.samples, 0

    def _distribution(self, domain: Domain) -> Any:
        kinds, values = self._optuna.distributions, domain.values
        if domain.kind == "int":
            return kinds.IntDistribution(*values)
        if domain.kind in ("uniform", "log_uniform"):
            return kinds.FloatDistribution(*values, log=domain.kind == "log_uniform")
        return kinds.CategoricalDistribution(range(len(values)))  # lists are no values that Optuna takes

    def propose(self, number: int) -> dict[str, Any] | None:
        """Asks Optuna, which has to be told nothing else about a trial until it ends."""
        if number >= self._samples:
            return None
        while True:
            # The answer is added to the study when the trial ends: one that a kill interrupted is not there twice.
            asked = self._study.ask(self._distributions)
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            self._asked += 1
            if self._asked > number:  # the draws of trials before a resume are not repeated
                return {domain.key: self._value(domain, asked.params[domain.key]) for domain in self._domains}

    def learn(self, trial: Trial, loss: float | None) -> None:
        """Adds the trial to what Optuna knows."""
        if loss is None:
            return
        params = {domain.key: self._index(domain, trial.values[domain.key]) for domain in self._domains}
        made = self._optuna.trial.create_trial(params=params, distributions=self._distributions, value=loss)
        self._study.add_trial(made)

    @staticmethod
    def _value(domain: Domain, found: Any) -> Any:
        return domain.values[found] if domain.kind in ("grid", "choice") else found

    @staticmethod
    def _index(domain: Domain, value: Any) -> Any:
        return domain.values.index(value) if domain.kind in ("grid", "choice") else value


def check_search(plan: Plan) -> None:
    """Refuse a search that is not installed.

    Raises:
        BadInput: saying how to install it.
    """
    if plan.searches and find_spec("optuna") is None:
        raise BadInput(
            "sweep.search is 'optuna', which is not installed; expected random, or pip install 'tatok[optuna]'"
        )
