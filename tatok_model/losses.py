"""What training minimises: reconstruction terms, LPIPS among them, and a PatchGAN with its losses.

LPIPS is the learned perceptual distance, from weight files that the user gives. Both images go through a classifier's
convolutions; at five depths the unit-normalised channels are subtracted, squared, weighted by a trained head and
averaged over the picture. The classifier (torchvision's VGG16 or AlexNet) and the heads (`lpips_v0.1_vgg.pth`,
`lpips_v0.1_alex.pth`) are two files; nothing is downloaded.

Shapes: B images, C channels, H and W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tatok_model.config import LossConfig
from tatok_model.vit import CHANNELS


@dataclass(frozen=True)
class Backbone:
    """A torchvision `features` stack and the layers whose output is compared."""

    name: str
    layers: tuple[nn.Module, ...]
    taps: tuple[int, ...]  # layer numbers, ReLUs that end a resolution
    channels: tuple[int, ...]  # at the taps
    smallest: int  # pixels a side below which a pool has nothing left


def _vgg16() -> Backbone:
    layers: list[nn.Module] = []
    inputs = 3
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    return Backbone("VGG16", tuple(layers), (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), smallest=16)


def _alexnet() -> Backbone:
    layers = (
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    return Backbone("AlexNet", layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), smallest=31)


BACKBONES: dict[tuple[int, ...], Callable[[], Backbone]] = {
    (64, 3, 3, 3): _vgg16,
    (64, 3, 11, 11): _alexnet,
}  # by the shape of the first convolution, features.0.weight


class LPIPS(nn.Module):
    """Perceptual distance with frozen weights; gradients reach the images only."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = nn.Sequential(*backbone.layers[: backbone.taps[-1] + 1])
        self.heads = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in backbone.channels)
        # ImageNet's mean and deviation, expressed for images in [-1, 1] as in the original.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_files(cls, backbone: str | Path, heads: str | Path) -> Self:
        """Build from a classifier's state dict and the trained heads.

        Args:
            backbone: torchvision's VGG16 or AlexNet (`features.N.weight`, `features.N.bias`), .pth or
                .safetensors; `classifier.*` is ignored.
            heads: LPIPS v0.1 heads for that backbone (`lin0.model.1.weight` ...), .pth or .safetensors.

        Raises:
            FileNotFoundError: if a file does not exist.
            ValueError: if a file is no weight file, lacks a tensor, or has one of another shape.
        """
        weights = _load(Path(backbone))
        first = weights.get("features.0.weight")
        if first is None:
            raise ValueError(f"{backbone} lacks features.0.weight: expected torchvision's VGG16 or AlexNet")
        if tuple(first.shape) not in BACKBONES:
            raise ValueError(f"{backbone} is neither VGG16 nor AlexNet: features.0.weight is {tuple(first.shape)}")
        model = cls(BACKBONES[tuple(first.shape)]())
        _copy(model.features.state_dict(), weights, "features.{}", backbone)
        _copy(model.heads.state_dict(), _load(Path(heads)), "lin{}.model.1.weight", heads)
        return model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair, 0 for equal images: (B, 3, H, W) floats in [0, 1] twice -> (B,).

        Raises:
            ValueError: shapes differ, are not (B, 3, H, W), or below 16 (VGG16) or 31 pixels (AlexNet) a side.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"expected two batches of one (B, 3, H, W) shape, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if min(x.shape[2:]) < self.backbone.smallest:
            raise ValueError(
                f"LPIPS with {self.backbone.name} needs at least {self.backbone.smallest} pixels a side, "
                f"got {tuple(x.shape[2:])}"
            )
        both = (torch.cat([x, y]) * 2 - 1 - self.shift) / self.scale  # (2B, 3, H, W)
        distance = both.new_zeros(len(x))
        head = iter(self.heads)
        for number, layer in enumerate(self.features):
            both = layer(both)
            if number in self.backbone.taps:
                unit_x, unit_y = _unit(both).chunk(2)
                distance = distance + ((unit_x - unit_y).square() * next(head)).sum(1).mean((1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Channels scaled to length 1; the constant inside the root keeps the gradient finite where all are zero.

    The original adds 1e-10 outside the root, whose gradient is NaN there; torchmetrics has 1e-8 inside, as here.
    """
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file read as a pickle fails in any way, KeyError included
        raise ValueError(f"{path} is not a readable .pth or .safetensors weight file") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__}, expected a state dict")
    return weights


def _copy(targets: dict[str, Tensor], weights: dict[str, Tensor], pattern: str, path: str | Path) -> None:
    """Copy `weights[pattern.format(name)]` into each named target; ValueError for one missing or of another shape."""
    keys = {name: pattern.format(name) for name in targets}
    missing = [key for key in keys.values() if key not in weights]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, target in targets.items():
        source = weights[keys[name]]
        if source.shape != target.shape:
            raise ValueError(f"{path}: {keys[name]} is {tuple(source.shape)}, expected {tuple(target.shape)}")
        target.copy_(source)


class ReconstructionLoss(nn.Module):
    """Weighted L1, L2 and, when its weights are given, perceptual distance between images.

    Args:
        config: the weights of the terms.
        perceptual: maps two (B, 3, H, W) batches in [0, 1] to a (B,) distance, e.g. `LPIPS`; ValueError where it is
            None and its weight is not 0.
    """

    def __init__(self, config: LossConfig, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if config.perceptual and perceptual is None:
            raise ValueError(f"perceptual weight is {config.perceptual}; expected a perceptual distance to weigh")
        self.config = config
        self.perceptual = perceptual

    def forward(self, originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms by name, of (B, 3, H, W) images in [0, 1]; their sum is the loss."""
        terms = {}
        if self.config.l1:
            terms["l1"] = self.config.l1 * (reconstructions - originals).abs().mean()
        if self.config.l2:
            terms["l2"] = self.config.l2 * (reconstructions - originals).square().mean()
        if self.config.perceptual and self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual * self.perceptual(originals, reconstructions).mean()
        return terms


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: scores of originals below 1 and of reconstructions above -1 cost. arXiv 1705.02894."""
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The adversarial term of the tokenizer: minus the mean score of its pictures."""
    return -fake.mean()


class LeCam(nn.Module):
    """LeCam regularisation: pulls scores of real pictures towards the running mean of fake ones' and vice versa.

    Source: arXiv 2104.03310, equation 5.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means towards a step's scalar means, those over all its pictures, of all workers."""
        self.real_mean.lerp_(real.detach(), 1 - self.decay)
        self.fake_mean.lerp_(fake.detach(), 1 - self.decay)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Scalar penalty for scores of originals and of reconstructions, any shape."""
        towards_fake = torch.relu(real - self.fake_mean).square().mean()
        return towards_fake + torch.relu(self.real_mean - fake).square().mean()


class Discriminator(nn.Module):
    """PatchGAN, as in pix2pix (arXiv 1611.07004): three strided convolutions and a score of how real each patch looks.

    Group norm instead of batch norm: a picture's score does not depend on the others in its batch.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.lecam = LeCam()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *_halving(width, 2 * width),
            *_halving(2 * width, 4 * width),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1, H / 8, W / 8) scores, high for real."""
        return self.layers(images * 2 - 1)


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
    return [convolution, nn.GroupNorm(16, outputs), nn.LeakyReLU(0.2)]
