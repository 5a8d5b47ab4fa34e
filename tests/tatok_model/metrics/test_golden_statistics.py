"""The statistics on a real network and real images: CIFAR-10 through a published ResNet-20 (both in ../shared)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tatok_model.metrics.extractors.small_networks import CifarResNet
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.scores import InceptionScore


def cifar(path: Path, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, 32, 32) uint8 and labels (B,)."""
    import pyarrow.parquet as pq
    from PIL import Image

    for rows in pq.ParquetFile(path).iter_batches(batch, columns=["image", "label"]):
        decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in rows["image"].to_pylist()]
        labels = torch.tensor(rows["label"].to_pylist())
        yield torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2), labels


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.no_grad()
def test_cifar10_through_resnet20_gives_the_golden_values(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "statistics.json").read_text())["cifar10_resnet20"]
    network = CifarResNet.from_file(shared / "weights" / "resnet20-12fca82f.th")
    train, test, score, correct = FeatureStatistics(64), FeatureStatistics(64), InceptionScore(10), 0
    for images, _ in cifar(shared / "data" / "cifar10_jpeg_train.parquet"):
        train.update(network(images)[0])
    for images, labels in cifar(shared / "data" / "cifar10_jpeg_test.parquet"):
        features, logits = network(images)
        test.update(features)
        score.update(logits)
        correct += int((logits.argmax(1) == labels).sum())
    distance = frechet_distance(test.mean(), test.covariance(), train.mean(), train.covariance())
    assert (train.n, test.n) == (50_000, 10_000)
    assert distance == pytest.approx(golden["frechet_test10k_vs_train50k"], rel=1e-4)
    assert score.result() == pytest.approx(golden["inception_score_test10k"], rel=1e-4)
    assert correct / test.n == pytest.approx(golden["test_top1"], abs=2e-4)  # two images on an edge, in float32
