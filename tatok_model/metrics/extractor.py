"""What every feature network behind a Frechet distance looks like from outside.

A name, its sizes, and uint8 pictures in: resizing and scaling belong to the network, so that no caller can get them
wrong. `inception.py`, `compact.py`, `small_resnet.py` and `resnet.py` are those in this package.

Shapes: B images, F features, C classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class FeatureExtractor(nn.Module):
    """Base of the feature networks; a subclass names itself and implements `forward`.

    `name` goes into the metric's name (`rfd_<name>`) and into the key of cached reference statistics.
    """

    name: str
    feature_dim: ClassVar[int]
    classes: int
    class_names: tuple[str, ...] = ()  # of the logits, in order, lower case; empty: not known

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features for the Frechet distance and logits for the Inception score.

        Args:
            images: (B, 3, H, W) uint8 RGB, any H and W that the network accepts.

        Returns:
            features (B, F) float32 and logits (B, C) float32.

        Raises:
            ValueError: if `images` has another type or shape (see `check_images`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(images)")


def check_images(images: Tensor) -> None:
    """Refuse anything but (B, 3, H, W) uint8: a float batch would be scaled twice without a word.

    Raises:
        ValueError: naming the shape and type that came.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
