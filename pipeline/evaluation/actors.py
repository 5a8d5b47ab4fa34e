"""Ray Data around the evaluator: every range of the plan goes to one of a few actors that hold the models.

An actor that dies takes nothing with it: what a range measured is one row, and Ray Data gives the range to another.
"""

import logging
from collections.abc import Iterator
from typing import Any

from pipeline.cluster import as_they_finish, connect
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.cuts import Cuts
from pipeline.evaluation.evaluator import Evaluator, Instruments
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.plan import Plan


class RangeActor:
    """Lives in a process of its own: models are loaded and warmed up once, then ranges come in.

    Args:
        shared: reference to (codec, instruments), which the driver has loaded.
        shards: folder of the shards, which every node has to see.
        plan, originals, device, cuts: as `Evaluator`.
    """

    def __init__(
        self, shared: Any, shards: str, plan: Plan, originals: bool, device: str, cuts: Cuts | None = None
    ) -> None:
        import ray

        codec, instruments = ray.get(shared)
        self._pictures = ShardDataset(shards, "heldout")
        self._evaluator = Evaluator(codec, instruments, plan, originals, device, cuts)
        self._evaluator.warm_up()

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """Measure one range; the row that comes back holds its sums as bytes."""
        found = self._evaluator.measure(self._pictures, row["start"], row["stop"])
        return {"number": row["number"], "measurements": found.to_bytes()}


def measure_on_actors(
    codec: Any,
    instruments: Instruments,
    shards: str,
    plan: Plan,
    originals: bool,
    device: str,
    workers: int,
    cuts: Cuts | None = None,
) -> Iterator[tuple[int, Measurements]]:
    """Every range of the plan with its number, as actors finish them."""
    ray = connect()
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would warn that its progress bars are off
    shared = ray.put((codec, instruments))
    ranges = [{"number": i, "start": start, "stop": stop} for i, (start, stop) in enumerate(plan.ranges())]
    rows = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map(  # one block is one range
        RangeActor,
        fn_constructor_args=(shared, shards, plan, originals, device, cuts),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(ranges))),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
    )
    for row in as_they_finish(rows):
        yield row["number"], Measurements.from_bytes(row["measurements"])
