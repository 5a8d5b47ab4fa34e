"""The feature network of FID: Inception-v3 of December 2015 with 1008 classes, in plain PyTorch.

It is not torchvision's Inception: TensorFlow 1's bilinear resize, (x - 128) / 128 on uint8, average pools that do not
count their padding, a max pool in the last block, batch-norm epsilon 1e-3, 1008 logits. Parameter names are those of
the public file `pt_inception-2015-12-05-6726825d.pth`, which is given by path and never downloaded here.

Shapes: B images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tatok_model.metrics.extractors.extractor import FeatureExtractor, check_images

SHA256_PREFIX = "6726825d"
SIDE = 299


class Inception2015(FeatureExtractor):
    """2048 pooled features, and the logits without their bias that ADM's evaluator scores."""

    name = "inception2015"
    feature_dim = 2048
    classes = 1008

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.Mixed_5b = Block35(192, pool_channels=32)
        self.Mixed_5c = Block35(256, pool_channels=64)
        self.Mixed_5d = Block35(288, pool_channels=64)
        self.Mixed_6a = Reduction17()
        self.Mixed_6b = Block17(middle=128)
        self.Mixed_6c = Block17(middle=160)
        self.Mixed_6d = Block17(middle=160)
        self.Mixed_6e = Block17(middle=192)
        self.Mixed_7a = Reduction8()
        self.Mixed_7b = Block8(1280, pool=_average_pool)
        self.Mixed_7c = Block8(2048, pool=_same_max_pool)
        self.fc = nn.Linear(2048, self.classes)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Load the public weight file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if its SHA-256 does not begin with 6726825d.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights at {path}: expected pt_inception-2015-12-05-6726825d.pth")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(SHA256_PREFIX):
            raise ValueError(f"{path} is not the FID Inception: its SHA-256 begins {digest[:8]}, not {SHA256_PREFIX}")
        network = cls()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureExtractor.forward`; always full float32: under autocast, and where cuDNN would take TF32.

        Args:
            images: (B, 3, H, W) uint8 RGB of any size.
        """
        check_images(images)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, enabled=False):
            x = (tf1_bilinear(images.float(), SIDE) - 128) / 128  # (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
            features = x.mean((2, 3))
            return features, F.linear(features, self.fc.weight)


def tf1_bilinear(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's resize_bilinear: pixel i reads source i * H / side, no half-pixel offset, no antialiasing.

    Args:
        images: (B, C, H, W) float.
        side: pixels a side of the result.

    Returns:
        (B, C, side, side), the same type.
    """
    low, high, weight = _source_pixels(images.shape[2], side, images)
    rows = torch.lerp(images[:, :, low], images[:, :, high], weight[:, None])
    low, high, weight = _source_pixels(images.shape[3], side, images)
    return torch.lerp(rows[..., low], rows[..., high], weight)


def _source_pixels(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbours of every target pixel along one axis, and the weight of the second: each (side,)."""
    source = torch.arange(side, device=like.device, dtype=like.dtype) * (size / side)
    low = source.long().clamp(max=size - 1)
    return low, (low + 1).clamp(max=size - 1), source - low


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _same_max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, ...), smaller by the kernel and stride where not padded."""
        return F.relu(self.bn(self.conv(x)))


def _row(inputs: int, outputs: int, length: int) -> ConvUnit:
    """A 1 x length convolution that keeps the size."""
    return ConvUnit(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, length: int) -> ConvUnit:
    """A length x 1 convolution that keeps the size."""
    return ConvUnit(inputs, outputs, (length, 1), padding=(length // 2, 0))


class Block35(nn.Module):
    """Mixed_5b to 5d, on 35 x 35: 224 channels and those of the pool branch."""

    def __init__(self, inputs: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(inputs, 64, 1)
        self.branch5x5_1 = ConvUnit(inputs, 48, 1)
        self.branch5x5_2 = ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.branch_pool = ConvUnit(inputs, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 35, 35) to (B, 224 + pool_channels, 35, 35)."""
        b5x5 = self.branch5x5_2(self.branch5x5_1(x))
        b3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5x5, b3x3, self.branch_pool(_average_pool(x))], 1)


class Reduction17(nn.Module):
    """Mixed_6a: 288 channels on 35 x 35 to 768 on 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvUnit(288, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 288, 35, 35) to (B, 768, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Block17(nn.Module):
    """Mixed_6b to 6e, on 17 x 17: 768 channels in and out, 7 x 7 factorised into rows and columns."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(768, 192, 1)
        self.branch7x7_1 = ConvUnit(768, middle, 1)
        self.branch7x7_2 = _row(middle, middle, 7)
        self.branch7x7_3 = _column(middle, 192, 7)
        self.branch7x7dbl_1 = ConvUnit(768, middle, 1)
        self.branch7x7dbl_2 = _column(middle, middle, 7)
        self.branch7x7dbl_3 = _row(middle, middle, 7)
        self.branch7x7dbl_4 = _column(middle, middle, 7)
        self.branch7x7dbl_5 = _row(middle, 192, 7)
        self.branch_pool = ConvUnit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) to the same."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], 1)


class Reduction8(nn.Module):
    """Mixed_7a: 768 channels on 17 x 17 to 1280 on 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvUnit(768, 192, 1)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvUnit(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) to (B, 1280, 8, 8)."""
        b3x3 = self.branch3x3_2(self.branch3x3_1(x))
        b7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([b3x3, b7x7, F.max_pool2d(x, 3, stride=2)], 1)


class Block8(nn.Module):
    """Mixed_7b and 7c, on 8 x 8: 2048 channels out; the two differ in their pool."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvUnit(inputs, 320, 1)
        self.branch3x3_1 = ConvUnit(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = ConvUnit(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = ConvUnit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 8, 8) to (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(parts, 1)
