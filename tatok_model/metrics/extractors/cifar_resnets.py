"""Two published CIFAR-10 classifiers behind `rfd_resnet20_cifar10` and `rfd_resnet56_cifar10`.

Two networks whose order of tokenizers should agree. Weights are the files of akamaster/pytorch_resnet_cifar10 (BSD
licence), given by path; parameter names are theirs. Shortcuts have no parameters: where the width doubles they skip
pixels and pad channels with zeros.

Shapes: B images, F = 64 features, C = 10 classes.

Source: He et al. 2016, section 4.2.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.metrics.extractors.extractor import CIFAR10, FeatureExtractor, check_images

IMAGE_SIZE = 32  # pixels, square
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the weights were trained with: ImageNet's, in [0, 1]
WIDTHS = (16, 32, 64)
PREFIX = "module."  # of stored names: the training ran under DataParallel


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
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
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
        """See `FeatureExtractor.forward`; always full float32: under autocast, and where cuDNN would take TF32.

        Images of another size are resized to 32x32 (bilinear, antialiased, aspect ratio not kept) without rounding.
        """
        check_images(images)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, enabled=False):
            pixels = images.float()  # (B, 3, H, W)
            if pixels.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
                pixels = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
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
