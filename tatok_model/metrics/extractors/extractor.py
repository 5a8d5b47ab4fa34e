"""Base classes of feature networks for a Frechet distance: of any, and of those that this project trains.

Weights of the latter are in safetensors files whose metadata name the network. Distances over such a network compare
tokenizers within this project only, never with published numbers.

Shapes: B images, F features, C classes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import log2
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class FeatureExtractor(nn.Module):
    """Base class of all; a subclass sets `name`, sizes and class names, and implements `forward`.

    `name` goes into the metric's name (`rfd_<name>`) and into the key of cached reference statistics.
    """

    name: str
    feature_dim: ClassVar[int]
    classes: int
    class_names: tuple[str, ...] = ()  # of the logits, in order, lower case; empty: not known

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) features for the Frechet distance and (B, C) logits for the Inception score, float32 both.

        `images` are (B, 3, H, W) uint8 RGB, of any H and W that the network accepts; raises as `check_images`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(images)")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Full float32 inside: no autocast, and no TF32 where cuDNN would take it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
        yield


def check_images(images: Tensor) -> None:
    """ValueError for anything but (B, 3, H, W) uint8: a float batch would silently be scaled twice."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")


def resized(pixels: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) floats -> (B, 3, side, side), bilinear, antialiased, aspect ratio not kept, without rounding."""
    if pixels.shape[2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's pixels in [0, 1]; near those of others


class TrainableExtractor(FeatureExtractor):
    """The layers of a subclass, global average pooling, and a linear classifier.

    Args:
        layers: (B, 3, image_size, image_size) -> (B, F, h, w).
        classes: C.
        image_size: side in pixels, to which pictures are resized before the layers.
    """

    architecture: ClassVar[str]  # as in the key `extractor.architecture`
    mean: Tensor  # (3, 1, 1), of uint8 pixels
    std: Tensor  # likewise

    def __init__(self, layers: nn.Module, classes: int, image_size: int) -> None:
        super().__init__()
        self.name = f"{self.architecture}_{image_size}px"
        self.classes, self.image_size = classes, image_size
        self.layers = layers
        self.head = nn.Linear(self.feature_dim, classes)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.weights_sha256 = ""  # of the weight file, once loaded

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits; see `FeatureExtractor`. Images of another size are `resized`.

        Training runs it under autocast; features that are to be compared are computed outside of it, in float32.
        """
        check_images(images)
        pixels = resized(images.float().contiguous(memory_format=torch.channels_last), self.image_size)
        maps = self.layers((pixels - self.mean) / self.std)  # (B, F, h, w)
        features = maps.float().mean(dim=(2, 3))  # (B, F)
        return features, self.head(features).float()

    def load_file(self, path: str | Path) -> Self:
        """Load a file that `save` wrote, and put the network into evaluation mode without gradients.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not in safetensors format or holds another network's tensors.
        """
        data = Path(path).read_bytes()
        try:
            self.load_state_dict(load(data))
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{str(path)!r} does not hold the weights of a {type(self).__name__}: {reason}") from None
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        return self.eval().requires_grad_(False)

    def save(self, path: str | Path, origin: dict[str, str]) -> None:
        """Write the weights in safetensors format: kernels in float16, which halves the file, the rest as it is.

        `origin` goes into the metadata, beside which network it is.
        """
        tensors = {
            name: (value.half() if value.ndim > 1 else value).contiguous() for name, value in self.state_dict().items()
        }
        sizes = {"classes": str(self.classes), "image_size": str(self.image_size)}
        about = {**origin, "architecture": self.architecture, **sizes}
        Path(path).write_bytes(save(tensors, about))


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; SafetensorError where it is none."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def stem(outputs: int, image_size: int, wanted: int) -> list[nn.Sequential]:
    """First convolutions, to feature maps of about `wanted` pixels a side: each halves it, or one keeps it."""
    halvings = max(0, round(log2(image_size / wanted)))
    first = convolution(3, outputs, stride=2 if halvings else 1)
    return [first, *(convolution(outputs, outputs, stride=2) for _ in range(halvings - 1))]


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
