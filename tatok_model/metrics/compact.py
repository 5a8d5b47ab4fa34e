"""The compact feature network behind `rfd_compact_cifar10`: what stands in where Inception weights are not given.

A small residual network for 32-pixel pictures that `jobs/train_extractor.py` trains on CIFAR-10 classes; its weights
ship with the package. Distances over it compare tokenizers within this project and with nothing published.

Shapes: B images, F = 192 features, C = 10 classes.
"""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from tatok_model.metrics.extractor import FeatureExtractor, check_images

IMAGE_SIZE = 32  # pixels, square
SHIPPED = "compact_cifar10.safetensors"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels in [0, 1]


class CompactExtractor(FeatureExtractor):
    """Convolutions at 32, 16, 8 and 4 pixels, then the mean over positions."""

    name = "compact_cifar10"
    feature_dim = 192
    classes = 10
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3, 32),
            convolution(32, 48, stride=2),
            Residual(48),
            convolution(48, 96, stride=2),
            Residual(96),
            convolution(96, self.feature_dim, stride=2),
        )
        self.head = nn.Linear(self.feature_dim, self.classes)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.weights_sha256 = ""  # of the file that the weights came from

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits; see `FeatureExtractor`.

        Images of another size are resized to 32x32 (bilinear, antialiased, aspect ratio not kept) without rounding.
        Training runs it under autocast; features that are to be compared are computed outside of it, in float32.
        """
        check_images(images)
        pixels = images.float().contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
        if pixels.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        maps = self.layers((pixels - self.mean) / self.std)  # (B, F, 4, 4)
        features = maps.float().mean(dim=(2, 3))  # (B, F)
        return features, self.head(features).float()

    @classmethod
    def shipped(cls) -> Self:
        """The network with the weights in this package, in evaluation mode."""
        with resources.as_file(resources.files("tatok_model") / "weights" / SHIPPED) as path:
            return cls.from_file(path)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The network with the weights of a file that `save` wrote, in evaluation mode and without gradients.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not in safetensors format or holds another network's tensors.
        """
        data = Path(path).read_bytes()
        network = cls()
        try:
            network.load_state_dict(load(data))
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{str(path)!r} does not hold the weights of a {cls.__name__}: {reason}") from None
        network.weights_sha256 = hashlib.sha256(data).hexdigest()
        return network.eval().requires_grad_(False)

    def save(self, path: str | Path, metadata: dict[str, str]) -> None:
        """Write the weights in safetensors format: kernels in float16, which halves the file, the rest as it is."""
        tensors = {
            name: (value.half() if value.ndim > 1 else value).contiguous() for name, value in self.state_dict().items()
        }
        Path(path).write_bytes(save(tensors, metadata))


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, at constant width and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        return x + self.layers(x)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
