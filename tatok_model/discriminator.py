"""PatchGAN: says of each patch of a picture whether it looks real.

Shapes: B images, H = W image side.
"""

from torch import Tensor, nn

from tatok_model.losses import LeCam
from tatok_model.vit import CHANNELS


class Discriminator(nn.Module):
    """Three strided convolutions and a score for each place, as in pix2pix (arXiv 1611.07004).

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
