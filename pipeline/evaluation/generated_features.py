"""Features and logits of every picture of a split, kept as files: ranges to workers, as tokens are made.

Generated pictures are compared one by one (precision and recall, neighbours, classes), so sums do not do. Those of
real pictures are kept beside the reference statistics, `{run.output}/reference/features-{key}`, and serve later runs.

Shapes: B pictures, F features, C classes.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.data.manifest import Shard
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.extractors import Extractor
from pipeline.paths import write_atomically
from pipeline.run import Run
from pipeline.tokenizing.follow import make_all
from pipeline.tokenizing.parts import Seconds, Stopwatch
from pipeline.tokenizing.plan import Range

RANGE_ROWS = 1024  # pictures per file, in whole batches


@dataclass(frozen=True)
class FeatureSet:
    """Of B pictures.

    Attributes:
        places: (B,) where they stand in their split.
        labels: (B,) classes, -1 for none.
        features: by extractor, (B, F) float32.
        logits: by extractor, (B, C) float32.
    """

    places: np.ndarray
    labels: np.ndarray
    features: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class FeatureWork:
    """What the tasks of one set have in common."""

    folder: Path  # of the set, on a file system that all workers share
    key: str  # of all that decides features
    shards: str  # folder of the shards, which every node has to see
    batch_size: int
    files: ClassVar[str] = "features"  # the folder of what is made

    def worker(self, models: Any, device: str) -> "FeatureWorker":
        """Models are the networks by name."""
        return FeatureWorker(models, self, device)


class FeatureWorker:
    """Makes files of features.

    Args:
        networks: by name; they are moved to `device`.
        work: of the set.
        device: where everything computes.
    """

    def __init__(self, networks: dict[str, Any], work: FeatureWork, device: str) -> None:
        self._work, self._device = work, torch.device(device)
        self._networks = {name: network.to(self._device).eval() for name, network in networks.items()}
        self._pictures: dict[str, ShardDataset] = {}

    def make(self, task: Range) -> tuple[Shard, Seconds]:
        """Features of the pictures of one range; see `actors.Worker`."""
        watch = Stopwatch(self._device)
        with watch.timed("total"):
            batches = list(self._batches(task))
            file = io.BytesIO()
            whole: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            np.savez(file, **whole)
            path = self._work.folder / self._work.files / f"{task.name}.npz"
            write_atomically(path, file.getvalue())
        checksum = hashlib.sha256(file.getvalue()).hexdigest()
        return Shard(f"{self._work.files}/{path.name}", task.stop - task.start, checksum), watch.seconds

    @torch.inference_mode()
    def _batches(self, task: Range) -> Iterator[dict[str, np.ndarray]]:
        if task.split not in self._pictures:
            self._pictures[task.split] = ShardDataset(self._work.shards, task.split)
        source, rows = self._pictures[task.split], task.rows()
        for first in range(0, len(rows), self._work.batch_size):
            batch = source.images(rows[first : first + self._work.batch_size].tolist())
            images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self._device)
            found: dict[str, np.ndarray] = {}
            for name, network in self._networks.items():
                features, logits = network(images)
                found |= {f"features@{name}": features.cpu().numpy(), f"logits@{name}": logits.cpu().numpy()}
            yield found


def measure_features(
    run: Run,
    label: str,
    source: ShardDataset,
    count: int,
    place: str,
    extractors: Sequence[Extractor],
    folder: Path | None = None,
) -> FeatureSet:
    """Features of `count` pictures, spread evenly over a split; what was computed before is read.

    Args:
        run: whose `evaluate` section says how many workers there are and where they compute.
        label: of the progress bar.
        source: the split.
        count: pictures, at most all.
        place: folder of its shards.
        extractors: the networks.
        folder: where the files are kept; None: beside the reference statistics.

    Raises:
        Stopped: the run was asked to stop; finished files are kept.
    """
    batch_size = run.config.evaluate.batch_size
    meta = {
        "data": source.manifest.fingerprint,
        "split": source.split,
        "images": count,
        "batch_size": batch_size,
        "extractors": {extractor.name: extractor.weights_sha256 for extractor in extractors},
    }
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    work = FeatureWork(
        folder or Path(run.config.run.output) / "reference" / f"features-{key[:16]}", key, place, batch_size
    )
    size = -(-RANGE_ROWS // batch_size) * batch_size
    ranges = [
        Range(number, source.split, number, start, min(start + size, count), count, len(source))
        for number, start in enumerate(range(0, count, size))
    ]
    networks = {extractor.name: extractor.network for extractor in extractors}
    parts, _ = make_all(run, label, networks, work, ranges, "evaluate")
    arrays: dict[str, list[np.ndarray]] = {}
    for part in parts:
        with np.load(work.folder / part.file.file, allow_pickle=False) as file:
            for name in file.files:
                arrays.setdefault(name, []).append(file[name])
    whole = {name: torch.from_numpy(np.concatenate(values)) for name, values in arrays.items()}
    places = np.concatenate([task.rows() for task in ranges])
    of_kind = [{name: whole[f"{kind}@{name}"] for name in networks} for kind in ("features", "logits")]
    return FeatureSet(places, source.labels(places.tolist()), *of_kind)
