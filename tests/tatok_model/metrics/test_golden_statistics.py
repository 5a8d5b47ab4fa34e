"""The statistics on a real network and real images: CIFAR-10 through a published ResNet-20 (both in ../shared)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.scores import InceptionScore


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions; where the width doubles, the shortcut skips pixels and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        pad = (y.shape[1] - x.shape[1]) // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad)))


class ResNet20(nn.Module):
    """akamaster/pytorch_resnet_cifar10's network, with its parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(ResidualUnit(16, 16), ResidualUnit(16, 16), ResidualUnit(16, 16))
        self.layer2 = nn.Sequential(ResidualUnit(16, 32), ResidualUnit(32, 32), ResidualUnit(32, 32))
        self.layer3 = nn.Sequential(ResidualUnit(32, 64), ResidualUnit(64, 64), ResidualUnit(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = F.relu(self.bn1(self.conv1((images.float() / 255 - mean) / spread)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


def published_resnet20(path: Path) -> ResNet20:
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network = ResNet20()
    network.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    return network.eval()


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
    network = published_resnet20(shared / "weights" / "resnet20-12fca82f.th")
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
