"""Small feature networks: two that `jobs/train_extractor.py` trains, and two published CIFAR-10 classifiers.

`compact` and `resnet` are trained here; `load_trained` reads their files. `rfd_resnet20_cifar10` and
`rfd_resnet56_cifar10` come from the files of akamaster/pytorch_resnet_cifar10 (BSD licence), given by path; parameter
names are theirs. All are of moderate depth: what counts is that networks agree in their order of tokenizers.

Shapes: B images, F features, C classes.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from tatok_model.metrics.extractors.extractor import (
    CIFAR10,
    FeatureExtractor,
    TrainableExtractor,
    check_images,
    convolution,
    exact_float32,
    metadata,
    resized,
    stem,
)

SHIPPED = "compact_cifar10.safetensors"
SHIPPED_NAME = "compact_cifar10"
IMAGE_SIZE = 32  # pixels a side, of the published classifiers, and their normalisation: ImageNet's, in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (16, 32, 64)
PREFIX = "module."  # of stored names: the training ran under DataParallel


class CompactExtractor(TrainableExtractor):
    """Convolutions at 32, 16, 8 and 4 pixels, then the mean over positions: stands in where Inception is not given.

    Weights for CIFAR-10's classes and pictures of 32 pixels ship with the package, behind `rfd_compact_cifar10`.
    """

    architecture = "compact"
    feature_dim = 192

    def __init__(self, classes: int = 10, image_size: int = 32) -> None:
        layers = nn.Sequential(
            *stem(32, image_size, wanted=32),
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


class SmallResNet(TrainableExtractor):
    """Residual stages at 16, 8 and 4 pixels, then the mean over positions: a second opinion beside the compact one."""

    architecture = "resnet"
    feature_dim = 192

    def __init__(self, classes: int, image_size: int) -> None:
        stages = [stage(inputs, outputs, units=2) for inputs, outputs in ((48, 48), (48, 96), (96, self.feature_dim))]
        super().__init__(nn.Sequential(*stem(48, image_size, wanted=16), *stages), classes, image_size)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions beside a shortcut; where the width doubles, sides halve."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        pad = (y.shape[1] - x.shape[1]) // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad)))


def stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    """`units` residual units, the first of which may double the width and halve sides."""
    return nn.Sequential(ResidualUnit(inputs, outputs), *(ResidualUnit(outputs, outputs) for _ in range(units - 1)))


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


class CifarResNet(FeatureExtractor):
    """Three stages of residual units at 32, 16 and 8 pixels, then the mean over positions; subclasses say how deep."""

    feature_dim = 64
    classes = len(CIFAR10)
    class_names = CIFAR10
    units: ClassVar[int]  # of each stage; two convolutions each, so 6 x units + 2 layers
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = stage(WIDTHS[0], WIDTHS[0], self.units)
        self.layer2 = stage(WIDTHS[0], WIDTHS[1], self.units)
        self.layer3 = stage(WIDTHS[1], WIDTHS[2], self.units)
        self.linear = nn.Linear(self.feature_dim, self.classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.weights_sha256 = ""  # of the file that the weights came from
        self.eval().requires_grad_(False)

    @staticmethod
    def from_file(path: str | Path) -> "CifarResNet":
        """The network whose weights a file holds, of the depth found there, in evaluation mode and without gradients.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds anything but the published weights of a ResNet-20 or ResNet-56.
        """
        data = Path(path).read_bytes()
        tensors = _stored_tensors(data, str(path))
        network = _DEPTHS.get(_units(tensors))
        if network is None:
            depths = " or ".join(f"ResNet-{6 * units + 2}" for units in _DEPTHS)
            raise ValueError(f"{str(path)!r} has {_units(tensors)} units in layer1; expected a CIFAR {depths}")
        loaded = network()
        try:
            loaded.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{str(path)!r} does not hold the weights of {loaded.name}: {reason}") from None
        loaded.weights_sha256 = hashlib.sha256(data).hexdigest()
        return loaded

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `Inception2015.forward`; images of another size are `resized` to 32x32."""
        check_images(images)
        with exact_float32(images.device):
            pixels = resized(images.float(), IMAGE_SIZE)  # (B, 3, 32, 32)
            x = F.relu(self.bn1(self.conv1((pixels / 255 - self.mean) / self.std)))  # (B, 16, 32, 32)
            features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))  # (B, F)
            return features, self.linear(features)


class ResNet20(CifarResNet):
    """20 layers, 0.27 million parameters."""

    name = "resnet20_cifar10"
    units = 3


class ResNet56(CifarResNet):
    """56 layers, 0.85 million parameters."""

    name = "resnet56_cifar10"
    units = 9


_DEPTHS: dict[int, type[CifarResNet]] = {network.units: network for network in (ResNet20, ResNet56)}


def _stored_tensors(data: bytes, path: str) -> dict[str, Tensor]:
    try:
        stored: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path!r} is no file of PyTorch weights: {reason}") from None
    tensors = stored.get("state_dict") if isinstance(stored, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path!r} has no 'state_dict'; expected a file of akamaster/pytorch_resnet_cifar10")
    return {str(name).removeprefix(PREFIX): value for name, value in tensors.items()}


def _units(tensors: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("layer1.")})
