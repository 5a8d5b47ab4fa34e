"""Features and logits of every picture of a split, kept as files: ranges to workers, as tokens are made.

Generated pictures are compared one by one (precision and recall, neighbours, classes), so sums do not do. Those of
real pictures are kept for later runs, in `{run.output}/reference/features-{extractor}-{key}`.

Shapes: B pictures, F features, C classes.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.core.files import write_atomically
from pipeline.core.run import Run
from pipeline.data.shards import Shard, ShardDataset
from pipeline.evaluation.reference import Extractor
from pipeline.tokens.parts import Seconds, Stopwatch, make_all
from pipeline.tokens.ranges import Range

RANGE_ROWS = 1024  # pictures per file, in whole batches


@dataclass(frozen=True)
class FeatureSet:
    """What one network says of B pictures.

    Attributes:
        places: (B,) where they stand in their split.
        labels: (B,) classes, -1 for none.
        features: (B, F) float32.
        logits: (B, C) float32.
    """

    places: np.ndarray
    labels: np.ndarray
    features: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class FeatureWork:
    """What the tasks of one set have in common."""

    folder: Path  # of the set, on a file system that all workers share
    key: str  # of all that decides features
    shards: str  # folder of the shards, which every node has to see
    batch_size: int
    mirrored: bool = False  # the pictures, left and right exchanged
    files: ClassVar[str] = "features"  # the folder of what is made

    def worker(self, models: Any, device: str) -> "FeatureWorker":
        """The model is the network."""
        return FeatureWorker(models, self, device)


class FeatureWorker:
    """Makes files of features.

    Args:
        network: `FeatureExtractor`; it is moved to `device`.
        work: of the set.
        device: where everything computes.
    """

    def __init__(self, network: Any, work: FeatureWork, device: str) -> None:
        self._work, self._device = work, torch.device(device)
        self._network = network.to(self._device).eval()
        self._pictures: dict[str, ShardDataset] = {}

    def make(self, task: Range) -> tuple[Shard, Seconds]:
        """Features of the pictures of one range; see `actors.Worker`."""
        watch = Stopwatch(self._device)
        with watch.timed("total"):
            features, logits = (np.concatenate(found) for found in zip(*self._batches(task), strict=True))
            file = io.BytesIO()
            np.savez(file, features=features, logits=logits)
            path = self._work.folder / self._work.files / f"{task.name}.npz"
            write_atomically(path, file.getvalue())
        checksum = hashlib.sha256(file.getvalue()).hexdigest()
        return Shard(f"{self._work.files}/{path.name}", task.stop - task.start, checksum), watch.seconds

    @torch.inference_mode()
    def _batches(self, task: Range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if task.split not in self._pictures:
            self._pictures[task.split] = ShardDataset(self._work.shards, task.split)
        source, rows = self._pictures[task.split], task.rows()
        for first in range(0, len(rows), self._work.batch_size):
            batch = source.images(rows[first : first + self._work.batch_size].tolist())
            batch = batch[:, :, ::-1] if self._work.mirrored else batch
            images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self._device)
            features, logits = self._network(images)
            yield features.cpu().numpy(), logits.cpu().numpy()


def measure_features(
    run: Run,
    label: str,
    source: ShardDataset,
    count: int,
    place: str,
    extractor: Extractor,
    folder: Path | None = None,
    mirrored: bool = False,
) -> FeatureSet:
    """Features of `count` pictures, spread evenly over a split; what was computed before is read.

    Args:
        run: whose `evaluate` section says how many workers there are and where they compute.
        label: of the progress bar.
        source: the split.
        count: pictures, at most all.
        place: folder of its shards.
        extractor: the network.
        folder: where the files are kept; None: beside the reference statistics.
        mirrored: exchange left and right before anything is computed.

    Raises:
        Stopped: the run was asked to stop; finished files are kept.
    """
    batch_size = run.config.evaluate.batch_size
    size = -(-RANGE_ROWS // batch_size) * batch_size
    meta = {
        "data": source.manifest.fingerprint,
        "split": source.split,
        "images": count,
        "batch_size": batch_size,
        "images_per_file": size,
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "mirrored": mirrored,
    }
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    shared = Path(run.config.run.output) / "reference" / f"features-{extractor.name}-{key[:16]}"
    work = FeatureWork(folder or shared, key, place, batch_size, mirrored)
    ranges = [
        Range(number, source.split, number, start, min(start + size, count), count, len(source))
        for number, start in enumerate(range(0, count, size))
    ]
    parts, _ = make_all(run, label, extractor.network, work, ranges, "evaluate")
    features, logits = [], []
    for part in parts:
        with np.load(work.folder / part.file.file, allow_pickle=False) as file:
            features.append(torch.from_numpy(file["features"]))
            logits.append(torch.from_numpy(file["logits"]))
    places = np.concatenate([task.rows() for task in ranges])
    return FeatureSet(places, source.labels(places.tolist()), torch.cat(features), torch.cat(logits))
