"""PSNR and SSIM between originals and reconstructions, on images quantised to uint8.

Both are measured on what a picture file would hold: reconstructions are rounded first (`to_uint8`), originals are the
stored bytes. Per-image values are kept, so means and percentiles do not depend on how images were shared out.

Shapes: B images, C channels, H and W pixels.
"""

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

UINT8_RULE = "round"  # goes beside every number; 1d-tokenizer truncates instead, which moves rFID
SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8 by the one rule of this project: round half to even after scaling by 255, then clamp.

    Raises:
        ValueError: `images` is not floating or holds NaN or infinity, which a cast would turn into some colour.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating in [0, 1], got {images.dtype}")
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinity")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def squared_error(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Sum of squared differences of each image, exact: (B,) int64, in grey levels squared.

    Raises:
        ValueError: the two are not uint8 of one (B, C, H, W) shape.
    """
    _check_pair(originals, reconstructions)
    return (originals.int() - reconstructions.int()).square().sum((1, 2, 3), dtype=torch.int64)


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: (B,) float64, dB; arguments and errors as `squared_error`.

    Identical images would be infinite and spoil every mean. They count as if one value were off by one level, the best
    a different image can reach: 83.0 dB at 3 x 32 x 32.
    """
    values = originals[0].numel() if len(originals) else 1
    error = squared_error(originals, reconstructions).double()
    return 10 * torch.log10(255**2 * values / error.clamp(min=1))


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image, the mean of `ssim_map`: (B,) float64, at most 1."""
    return ssim_map(originals, reconstructions).mean((1, 2, 3))


def ssim_map(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity around each pixel, (B, C, H, W) float64, of two uint8 batches, H and W at least 11.

    Gaussian window 11, sigma 1.5, data range 1, K 0.01 and 0.03, population (not sample) variances.

    Border: pixels are mirrored about the outermost one and every pixel has a window, as in torchmetrics, so that the
    border counts as much as the middle: windows wholly inside would be centred on 47% of a 32-pixel image.
    scikit-image takes only those in its mean; there the two maps are equal. float64, because variances are differences
    of nearly equal numbers (float32 misses by 2e-5 on flat images).

    Raises:
        ValueError: as `squared_error`, and for images smaller than the window, for which SSIM is not defined.

    Source: Wang et al. 2004.
    """
    _check_pair(originals, reconstructions)
    height, width = originals.shape[2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {(height, width)}")
    x, y = originals.double() / 255, reconstructions.double() / 255
    rows, columns = _windows(height).to(x), _windows(width).to(x)
    mean_x, mean_y, xx, yy, xy = (rows @ maps @ columns.T for maps in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return light * structure


def _windows(size: int) -> Tensor:
    """The gaussian means along one axis as a (size, size) matrix: two products are far faster than convolutions."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = (-(offsets.double() ** 2) / (2 * SSIM_SIGMA**2)).exp()
    pixels = (torch.arange(size)[:, None] + offsets).abs()
    mirrored = (size - 1) - (size - 1 - pixels).abs()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored, (weights / weights.sum()).expand(size, -1))


def _check_pair(originals: Tensor, reconstructions: Tensor) -> None:
    pair = [(tuple(images.shape), images.dtype) for images in (originals, reconstructions)]
    if pair[0] != pair[1] or originals.dtype != torch.uint8 or originals.ndim != 4:
        raise ValueError(f"expected two uint8 batches of one (B, C, H, W) shape, got {pair[0]} and {pair[1]}")


OF_EACH_IMAGE = {"psnr": psnr, "ssim": ssim}  # name of a result: (B,) float64 of a batch, whose mean it is


class ImageQuality:
    """PSNR and SSIM over a whole set, mergeable without loss."""

    def __init__(self) -> None:
        self._of_images = {name: np.zeros(0) for name in OF_EACH_IMAGE}
        self._squared_error = 0  # grey levels squared, exact
        self._values = 0  # how many numbers were compared

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add a batch; arguments and errors as `ssim_map`."""
        found = {name: measure(originals, reconstructions) for name, measure in OF_EACH_IMAGE.items()}
        self._append({name: values.cpu().numpy() for name, values in found.items()})
        self._squared_error += int(squared_error(originals, reconstructions).sum())
        self._values += originals.numel()

    def merge(self, other: "ImageQuality") -> None:
        """Add what another process has seen."""
        self._append(other._of_images)
        self._squared_error += other._squared_error
        self._values += other._values

    def _append(self, later: dict[str, np.ndarray]) -> None:
        self._of_images = {name: np.append(values, later[name]) for name, values in self._of_images.items()}

    def results(self) -> dict[str, float]:
        """The same to the last bit in whatever order images came; ValueError where none was seen.

        psnr is the mean of per-image dB; psnr_pooled the dB of the mean squared error over all images (identical sets
        count as one value off by one level); psnr_p10 the dB that 90% of images exceed; ssim and any other the mean.
        """
        n = len(self._of_images["psnr"])
        if n == 0:
            raise ValueError("image quality needs at least 1 image, got 0")
        means = {name: math.fsum(values) / n for name, values in self._of_images.items()}
        return {
            "psnr": means.pop("psnr"),
            "psnr_pooled": 10 * math.log10(255**2 * self._values / max(self._squared_error, 1)),
            "psnr_p10": float(np.quantile(self._of_images["psnr"], 0.1)),
            **means,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: (n,) for each of `OF_EACH_IMAGE`, squared_error (), values ()."""
        return {
            **self._of_images,
            "squared_error": np.array(self._squared_error),
            "values": np.array(self._values),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        quality = cls()
        quality._of_images = {name: np.array(arrays[name]) for name in OF_EACH_IMAGE}
        quality._squared_error, quality._values = int(arrays["squared_error"]), int(arrays["values"])
        return quality
