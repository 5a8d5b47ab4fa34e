"""Views of training pictures that become rows of their own: mirror images and shifted copies.

A generator learns from tokens, which cannot be mirrored or shifted any more; so it is done before they are made.

Shapes: B pictures of H x W pixels.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.config import TokensConfig
from pipeline.training.order import keyed_uniforms

SHIFT = 8  # copies are shifted by up to 1/SHIFT of the side
DRAWS = 3  # random numbers of a copy: down, right, mirrored


@dataclass(frozen=True)
class View:
    """One way to look at a picture."""

    name: str  # at the end of the row's id; empty: the picture itself
    mirrored: bool = False  # left for right
    copy: int = 0  # 1, 2, ...: shifted and mirrored at random, by this number; 0: neither


def views_of(split: str, config: TokensConfig) -> list[View]:
    """The views of each picture of a split, in the order of their rows; held-out pictures have one."""
    found = [View("")]
    if split == "train":
        found += [View("@flip", mirrored=True)] * config.flip
        found += [View(f"@crop{number}", copy=number) for number in range(1, config.crops + 1)]
    return found


def look(pictures: np.ndarray, view: View, seed: int, numbers: np.ndarray) -> np.ndarray:
    """The pictures as a view has them.

    Copies are shifted by whole pixels, every distance alike, over borders that reflect, and half of them are mirrored.

    Args:
        pictures: (B, H, W, 3) uint8.
        view: of all of them.
        seed: keys the draws of copies, with the number of the picture and of the copy.
        numbers: (B,) places in the split.

    Returns:
        (B, H, W, 3) uint8.
    """
    if not view.copy:
        return pictures[:, :, ::-1] if view.mirrored else pictures
    high, wide = pictures.shape[1:3]
    far = high // SHIFT
    draws = keyed_uniforms(seed, np.full(len(numbers), view.copy), numbers, DRAWS)
    down, right = (np.floor(draws[:, axis] * (2 * far + 1)).astype(int) for axis in (0, 1))  # 0 to 2 far
    padded = np.pad(pictures, ((0, 0), (far, far), (far, far), (0, 0)), mode="reflect")
    rows = (down[:, None] + np.arange(high))[:, :, None]  # (B, H, 1)
    columns = (right[:, None] + np.arange(wide))[:, None, :]  # (B, 1, W)
    shifted = padded[np.arange(len(pictures))[:, None, None], rows, columns]
    mirrored = draws[:, 2] < 0.5
    shifted[mirrored] = shifted[mirrored, :, ::-1]
    return shifted
