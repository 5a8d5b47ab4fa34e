"""Everything that measuring needs besides what is measured: the tokenizer and its baselines stand on one bench."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardDataset
from pipeline.devices import pick_workers_device
from pipeline.errors import Stopped
from pipeline.evaluation.actors import measure_on_actors
from pipeline.evaluation.cuts import Cuts
from pipeline.evaluation.evaluator import Instruments, merged
from pipeline.evaluation.extractors import Extractor, load_extractor, load_more
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.plan import Plan, make_plan
from pipeline.pretrained import load_lpips
from pipeline.progress import progress
from pipeline.run import Run


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
