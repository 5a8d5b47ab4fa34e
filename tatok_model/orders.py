"""Orders of the patch positions that need no entropy model: the controls of dynamic token filtering.

Shapes: B images, M global tokens, N patch positions, H = W image side, P patch side.
"""

import math

import torch
from torch import Tensor

from tatok_model.filtering import to_units
from tatok_model.vit import patchify

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
LEVELS = 256
RANDOM_SEED = 0x7A70C  # every decoder has to have the same


def grid_order(positions: int) -> Tensor:
    """(N,) int64: positions so that every prefix is spread evenly over the square grid.

    The order of Bayer's threshold matrix: bits of row and column are interleaved and read backwards.
    """
    side = math.isqrt(positions)
    depth = max(side - 1, 1).bit_length()
    keys = []
    for position in range(positions):
        row, column = divmod(position, side)
        key = 0
        for bit in range(depth):  # the least significant bits decide most
            mixed = ((row ^ column) >> bit & 1) << 1 | (row >> bit & 1)
            key = key << 2 | mixed
        keys.append(key)
    return torch.tensor(keys).argsort(stable=True)


def random_order(global_indices: Tensor, positions: int) -> Tensor:
    """(B, N) int64: a shuffle of the positions for each image, keyed by its global tokens so that a decoder knows it.

    Args:
        global_indices: (B, M) int64; without global tokens all images share one order.
        positions: N.
    """
    key = torch.full((len(global_indices), 1), RANDOM_SEED, device=global_indices.device)
    for place in range(global_indices.shape[1]):
        key = _mix(key ^ global_indices[:, place : place + 1])
    lanes = torch.arange(positions, device=global_indices.device) * 0x9E3779B1
    return _mix(key ^ _mix(lanes)).argsort(dim=1, stable=True)


def pixel_entropy_units(images: Tensor, patch_size: int) -> Tensor:
    """(B, N) int64: entropy of the grey-level histogram of each patch, in 1/1024 bit, as DQ-VAE routes patches.

    Args:
        images: (B, 3, H, W), uint8 or floats in [0, 1].
        patch_size: P.
    """
    pixels = images.float() if images.dtype == torch.uint8 else images.float() * 255
    grey = sum(weight * pixels[:, channel : channel + 1] for channel, weight in enumerate(GREY))
    levels = patchify(torch.as_tensor(grey).round().clamp(0, LEVELS - 1).long(), patch_size)  # (B, N, P*P)
    counts = torch.zeros(*levels.shape[:2], LEVELS, device=levels.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels, dtype=counts.dtype))
    shares = counts / levels.shape[2]
    return to_units(-(shares * shares.clamp(min=1e-12).log2()).sum(dim=2))


def _mix(key: Tensor) -> Tensor:
    """A hash of 32-bit numbers kept in int64: the finaliser of murmur3, the same on every device."""
    mask = 0xFFFFFFFF
    key = key & mask
    key = (key ^ (key >> 16)) * 0x85EBCA6B & mask
    key = (key ^ (key >> 13)) * 0xC2B2AE35 & mask
    return key ^ (key >> 16)
