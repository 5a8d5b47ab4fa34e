"""The compact feature network; behind `rfd_compact_cifar10` it stands in where Inception weights are not given.

A small residual network that `jobs/train_extractor.py` trains. Weights for CIFAR-10's classes and pictures of 32 pixels
ship with the package.

Shapes: B images, F = 192 features.
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from torch import Tensor, nn

from tatok_model.metrics.extractors.cifar_resnets import stage
from tatok_model.metrics.extractors.extractor import CIFAR10, TrainableExtractor, convolution, metadata, stem

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


# A residual network that `jobs/train_extractor.py` trains: a second opinion beside the compact one.

WIDTHS = (48, 96, 192)
UNITS = 2  # of each stage
RESNET_STEM_SIZE = 16  # pixels a side of the first stage


class SmallResNet(TrainableExtractor):
    """Stages at 16, 8 and 4 pixels, then the mean over positions."""

    architecture = "resnet"
    feature_dim = WIDTHS[-1]

    def __init__(self, classes: int, image_size: int) -> None:
        stages = [stage(inputs, outputs, UNITS) for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)]
        super().__init__(nn.Sequential(*stem(WIDTHS[0], image_size, RESNET_STEM_SIZE), *stages), classes, image_size)


# Which feature networks can be trained, and a file of one back as a network.

ARCHITECTURES: dict[str, Callable[[int, int], TrainableExtractor]] = {  # of classes and image size, random weights
    network.architecture: network for network in (CompactExtractor, SmallResNet)
}


def load_trained(path: str | Path) -> TrainableExtractor:
    """The network of a file that `jobs/train_extractor.py` wrote, named after its architecture and picture size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, of an unknown architecture, or without the weights that it claims.
    """
    try:
        about = metadata(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file: {str(error).splitlines()[0]}") from None
    architecture = about.get("architecture", CompactExtractor.architecture)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{str(path)!r} holds a feature network of architecture {architecture!r}; "
            f"expected {' or '.join(ARCHITECTURES)}"
        )
    try:
        sizes = int(about.get("classes", 10)), int(about.get("image_size", 32))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say how many classes and pixels it is for: {error}") from None
    return ARCHITECTURES[architecture](*sizes).load_file(path)
