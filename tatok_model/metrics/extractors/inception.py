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

from tatok_model.metrics.extractors.extractor import FeatureExtractor, check_images, exact_float32

SHA256_PREFIX = "6726825d"
SIDE = 299


class Inception2015(FeatureExtractor):
    """(B, 2048) pooled features, and (B, 1008) logits without bias, from which ADM's evaluator computes the score."""

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
        self.Mixed_5b = block35(192, pool_channels=32)
        self.Mixed_5c = block35(256, pool_channels=64)
        self.Mixed_5d = block35(288, pool_channels=64)
        self.Mixed_6a = reduction17()
        self.Mixed_6b = block17(middle=128)
        self.Mixed_6c = block17(middle=160)
        self.Mixed_6d = block17(middle=160)
        self.Mixed_6e = block17(middle=192)
        self.Mixed_7a = reduction8()
        self.Mixed_7b = block8(1280, pool=_average_pool)
        self.Mixed_7c = block8(2048, pool=_same_max_pool)
        self.fc = nn.Linear(2048, self.classes)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Load the public weight file; FileNotFoundError where it is missing, ValueError for any other file."""
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
        """See `FeatureExtractor.forward`; always full float32: under autocast, and where cuDNN would take TF32."""
        check_images(images)
        with exact_float32(images.device):
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
    """TensorFlow 1's resize_bilinear: (B, C, H, W) floats -> (B, C, side, side).

    Pixel i reads source i * H / side, no half-pixel offset, no antialiasing.
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


def _halving_max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. The kernel is (rows, columns)."""

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


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated along the channels.

    Args:
        pool: the pooling of the input, itself an output or the first step of a branch.
        units: name in the weight file -> (its input: `x`, `pool` or the name of another unit, the unit).
        outputs: names of the units that are concatenated, in order.
    """

    def __init__(
        self, pool: Callable[[Tensor], Tensor], units: dict[str, tuple[str, ConvUnit]], outputs: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.pool, self.outputs = pool, outputs
        self.inputs = {name: source for name, (source, _) in units.items()}
        for name, (_, unit) in units.items():
            self.add_module(name, unit)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, sum of the outputs' channels, H', W')."""
        maps = {"x": x, "pool": self.pool(x)}
        for name, source in self.inputs.items():
            maps[name] = self.get_submodule(name)(maps[source])
        return torch.cat([maps[name] for name in self.outputs], 1)


def _row(inputs: int, outputs: int, length: int) -> ConvUnit:
    """A 1 x length convolution that keeps the size."""
    return ConvUnit(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, length: int) -> ConvUnit:
    """A length x 1 convolution that keeps the size."""
    return ConvUnit(inputs, outputs, (length, 1), padding=(length // 2, 0))


def block35(inputs: int, pool_channels: int) -> Mixed:
    """Mixed_5b to 5d, on 35 x 35: 224 channels and those of the pool branch."""
    units = {
        "branch1x1": ("x", ConvUnit(inputs, 64, 1)),
        "branch5x5_1": ("x", ConvUnit(inputs, 48, 1)),
        "branch5x5_2": ("branch5x5_1", ConvUnit(48, 64, 5, padding=2)),
        "branch3x3dbl_1": ("x", ConvUnit(inputs, 64, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", ConvUnit(64, 96, 3, padding=1)),
        "branch3x3dbl_3": ("branch3x3dbl_2", ConvUnit(96, 96, 3, padding=1)),
        "branch_pool": ("pool", ConvUnit(inputs, pool_channels, 1)),
    }
    return Mixed(_average_pool, units, ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"))


def reduction17() -> Mixed:
    """Mixed_6a: 288 channels on 35 x 35 to 768 on 17 x 17."""
    units = {
        "branch3x3": ("x", ConvUnit(288, 384, 3, stride=2)),
        "branch3x3dbl_1": ("x", ConvUnit(288, 64, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", ConvUnit(64, 96, 3, padding=1)),
        "branch3x3dbl_3": ("branch3x3dbl_2", ConvUnit(96, 96, 3, stride=2)),
    }
    return Mixed(_halving_max_pool, units, ("branch3x3", "branch3x3dbl_3", "pool"))


def block17(middle: int) -> Mixed:
    """Mixed_6b to 6e, on 17 x 17: 768 channels in and out, 7 x 7 factorised into rows and columns."""
    units = {
        "branch1x1": ("x", ConvUnit(768, 192, 1)),
        "branch7x7_1": ("x", ConvUnit(768, middle, 1)),
        "branch7x7_2": ("branch7x7_1", _row(middle, middle, 7)),
        "branch7x7_3": ("branch7x7_2", _column(middle, 192, 7)),
        "branch7x7dbl_1": ("x", ConvUnit(768, middle, 1)),
        "branch7x7dbl_2": ("branch7x7dbl_1", _column(middle, middle, 7)),
        "branch7x7dbl_3": ("branch7x7dbl_2", _row(middle, middle, 7)),
        "branch7x7dbl_4": ("branch7x7dbl_3", _column(middle, middle, 7)),
        "branch7x7dbl_5": ("branch7x7dbl_4", _row(middle, 192, 7)),
        "branch_pool": ("pool", ConvUnit(768, 192, 1)),
    }
    return Mixed(_average_pool, units, ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"))


def reduction8() -> Mixed:
    """Mixed_7a: 768 channels on 17 x 17 to 1280 on 8 x 8."""
    units = {
        "branch3x3_1": ("x", ConvUnit(768, 192, 1)),
        "branch3x3_2": ("branch3x3_1", ConvUnit(192, 320, 3, stride=2)),
        "branch7x7x3_1": ("x", ConvUnit(768, 192, 1)),
        "branch7x7x3_2": ("branch7x7x3_1", _row(192, 192, 7)),
        "branch7x7x3_3": ("branch7x7x3_2", _column(192, 192, 7)),
        "branch7x7x3_4": ("branch7x7x3_3", ConvUnit(192, 192, 3, stride=2)),
    }
    return Mixed(_halving_max_pool, units, ("branch3x3_2", "branch7x7x3_4", "pool"))


def block8(inputs: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """Mixed_7b and 7c, on 8 x 8: 2048 channels out; the two differ in their pool."""
    units = {
        "branch1x1": ("x", ConvUnit(inputs, 320, 1)),
        "branch3x3_1": ("x", ConvUnit(inputs, 384, 1)),
        "branch3x3_2a": ("branch3x3_1", _row(384, 384, 3)),
        "branch3x3_2b": ("branch3x3_1", _column(384, 384, 3)),
        "branch3x3dbl_1": ("x", ConvUnit(inputs, 448, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", ConvUnit(448, 384, 3, padding=1)),
        "branch3x3dbl_3a": ("branch3x3dbl_2", _row(384, 384, 3)),
        "branch3x3dbl_3b": ("branch3x3dbl_2", _column(384, 384, 3)),
        "branch_pool": ("pool", ConvUnit(inputs, 192, 1)),
    }
    split = "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b"
    return Mixed(pool, units, ("branch1x1", *split, "branch_pool"))
