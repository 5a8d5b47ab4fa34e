"""Features and logits of every picture of a split, kept as files, one for each range of pictures.

Generated pictures are compared one by one (precision and recall, neighbours, classes), so sums do not do. Those of
real pictures are kept for later runs, in `{run.output}/reference/features-{extractor}-{key}`.

Shapes: B pictures, F features, C classes.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.core.ranges import Part, run_ranges, write_shard
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.reference import Extractor
from pipeline.tokens.token_manifest import RowRange
from tatok_model.vit import one_thread

RANGE_ROWS = 1024  # pictures per file, in whole batches


@dataclass(frozen=True)
class FeatureSet:
    """What one network says of B pictures."""

    places: np.ndarray  # (B,), where they stand in their split
    labels: np.ndarray  # (B,) classes, -1 for none
    features: torch.Tensor  # (B, F) float32
    logits: torch.Tensor  # (B, C) float32

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class FeatureWork:
    """How a range of pictures becomes a file of features; see `ranges.Work`."""

    folder: Path
    key: str
    shards: str  # folder of the shards, which every node has to see
    batch_size: int
    mirrored: bool = False  # the pictures, left and right exchanged
    folders: ClassVar[tuple[str, ...]] = ("features",)

    def worker(self, network: Any, device: str) -> Callable[[RowRange], Part]:
        """The model is a `FeatureExtractor`."""
        return FeatureWorker(network, self, device).make


class FeatureWorker:
    """Makes files of features with a `FeatureExtractor`."""

    def __init__(self, network: Any, work: FeatureWork, device: str) -> None:
        self._work, self._device = work, device
        self._network = network.to(device).eval()
        self._pictures: dict[str, ShardDataset] = {}

    @one_thread()
    def make(self, task: RowRange) -> Part:
        """Features of the pictures of one range."""
        features, logits = (np.concatenate(values) for values in zip(*self._batches(task), strict=True))
        data = io.BytesIO()
        np.savez(data, features=features, logits=logits)
        file = write_shard(self._work.folder, f"features/{task.name}.npz", data.getvalue(), task.rows)
        return Part(self._work.key, task.number, {"file": file})

    @torch.inference_mode()
    def _batches(self, task: RowRange) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if task.split not in self._pictures:
            self._pictures[task.split] = ShardDataset(self._work.shards, task.split)
        source, rows = self._pictures[task.split], task.places()
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
        RowRange(number, source.split, number, start, min(start + size, count), count, len(source))
        for number, start in enumerate(range(0, count, size))
    ]
    parts, _ = run_ranges(run, label, work, extractor.network, ranges, "evaluate")
    features, logits = [], []
    for part in parts:
        with np.load(work.folder / part.file.file, allow_pickle=False) as file:
            features.append(torch.from_numpy(file["features"]))
            logits.append(torch.from_numpy(file["logits"]))
    places = np.concatenate([task.places() for task in ranges])
    return FeatureSet(places, source.labels(places.tolist()), torch.cat(features), torch.cat(logits))
