"""How many trials run at once: arithmetic before launch, because Ray would wait without end for what does not fit."""

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import BadInput


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
