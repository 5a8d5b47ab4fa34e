"""The compact feature network; behind `rfd_compact_cifar10` it stands in where Inception weights are not given.

A small residual network that `jobs/train_extractor.py` trains. Weights for CIFAR-10's classes and pictures of 32 pixels
ship with the package.

Shapes: B images, F = 192 features.
"""

from importlib import resources
from typing import Self

from torch import Tensor, nn

from tatok_model.metrics.extractor import CIFAR10
from tatok_model.metrics.trainable import TrainableExtractor, convolution, stem

SHIPPED = "compact_cifar10.safetensors"
SHIPPED_NAME = "compact_cifar10"
STEM_SIZE = 32  # pixels a side of the first maps


class CompactExtractor(TrainableExtractor):
    """Convolutions at 32, 16, 8 and 4 pixels, then the mean over positions."""

    architecture = "compact"
    feature_dim = 192

    def __init__(self, classes: int = 10, image_size: int = 32) -> None:
        layers = nn.Sequential(
            *stem(32, image_size, STEM_SIZE),
            convolution(32, 48, stride=2),
            Residual(48),
            convolution(48, 96, stride=2),
            Residual(96),
            convolution(96, self.feature_dim, stride=2),
        )
        super().__init__(layers, classes, image_size)

    @classmethod
    def shipped(cls) -> Self:
        """The network with the weights in this package, in evaluation mode."""
        with resources.as_file(resources.files("tatok_model") / "weights" / SHIPPED) as path:
            network = cls().load_file(path)
        network.name, network.class_names = SHIPPED_NAME, CIFAR10
        return network


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, at constant width and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        return x + self.layers(x)
