"""Everything that measuring needs besides what is measured: the tokenizer and its baselines stand on one bench."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.core.checkpoints import load_lpips
from pipeline.core.cluster import as_they_finish, connect, pick_workers_device
from pipeline.core.config import Config
from pipeline.core.console import progress
from pipeline.core.errors import Stopped
from pipeline.core.run import Run
from pipeline.data.shards import Manifest, ShardDataset
from pipeline.evaluation.evaluator import Evaluator, Instruments, merged
from pipeline.evaluation.measurements import Cuts, Measurements, Plan, make_plan
from pipeline.evaluation.reference import Extractor, load_extractor, load_more


@dataclass(frozen=True)
class Bench:
    """Pictures, networks, workers."""

    run: Run
    manifest: Manifest
    pictures: ShardDataset  # the held-out split
    plan: Plan
    extractor: Extractor  # behind the main Frechet distance and the Inception score
    more: list[Extractor]  # behind further Frechet distances
    instruments: Instruments
    device: str

    @classmethod
    def set_up(cls, run: Run) -> "Bench":
        """As `run.config` says; `data.shards` names existing shards.

        Raises:
            BadInput: too few held-out pictures, unusable weights, more workers than the cluster has room for.
        """
        config: Config = run.config
        pictures = ShardDataset(config.data.shards, "heldout")
        extractor = load_extractor(config.evaluate)
        plan = make_plan(len(pictures), extractor.network.feature_dim, config.evaluate)
        files = config.evaluate.lpips_backbone, config.evaluate.lpips_heads
        lpips = load_lpips("evaluate.lpips", *files, config.data.image_size) if all(files) else None
        more = load_more(config.evaluate)
        instruments = Instruments(extractor.network, lpips, tuple(other.network for other in more))
        device = pick_workers_device("evaluate", config.evaluate.device, config.evaluate.num_workers)
        return cls(run, pictures.manifest, pictures, plan, extractor, more, instruments, device)

    @property
    def cuts(self) -> Cuts:
        """As configured."""
        return Cuts(self.run.config.filter, self.run.config.evaluate.thresholds)

    def measure(self, label: str, codec: Any, originals: bool) -> Measurements:
        """Measure a codec on every picture of the plan.

        Args:
            label: of the progress bar.
            codec: `TaTok` or a baseline.
            originals: whether features of the originals are wanted too.

        Raises:
            Stopped: the run was asked to stop.
        """
        workers = self.run.config.evaluate.num_workers
        shards = self.run.config.data.shards
        common = self.plan, originals, self.device, workers, self.cuts
        parts = measure_on_actors(codec, self.instruments, shards, *common)
        return merged(self._followed(label, parts), self.plan.count)

    def _followed(self, label: str, parts: Iterator[tuple[int, Measurements]]) -> Iterator[tuple[int, Measurements]]:
        with progress(label, self.plan.count, "images") as shown:
            for number, part in parts:
                shown.advance(part.images)
                if self.run.should_stop:
                    raise Stopped("evaluation was asked to stop; --resume measures anew")
                yield number, part


# Ray Data around the evaluator: every range of the plan goes to one of a few actors that hold the models.


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
