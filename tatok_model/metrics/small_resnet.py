"""A residual network that `jobs/train_extractor.py` trains: a second opinion beside the compact one.

Three stages as of the CIFAR networks in `resnet.py`, wider and behind a stem that halves pictures to 16 pixels a side:
pictures of 64 pixels are cheap enough for a CPU.

Shapes: B images, F = 192 features.
"""

from torch import nn

from tatok_model.metrics.resnet import stage
from tatok_model.metrics.trainable import TrainableExtractor, stem

WIDTHS = (48, 96, 192)
UNITS = 2  # of each stage
STEM_SIZE = 16  # pixels a side of the first stage


class SmallResNet(TrainableExtractor):
    """Stages at 16, 8 and 4 pixels, then the mean over positions."""

    architecture = "resnet"
    feature_dim = WIDTHS[-1]

    def __init__(self, classes: int, image_size: int) -> None:
        stages = [stage(inputs, outputs, UNITS) for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)]
        super().__init__(nn.Sequential(*stem(WIDTHS[0], image_size, STEM_SIZE), *stages), classes, image_size)
