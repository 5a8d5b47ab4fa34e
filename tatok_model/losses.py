"""What reconstruction training minimises, term by term.

Shapes: B images, H = W image side.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tatok_model.config import LossConfig


class ReconstructionLoss(nn.Module):
    """Weighted L1, L2 and, when its weights are given, perceptual distance between images.

    Args:
        config: the weights of the terms.
        perceptual: maps two (B, 3, H, W) batches in [0, 1] to a (B,) distance, e.g. `LPIPS`; needed when its weight is
            not 0.

    Raises:
        ValueError: the perceptual weight is not 0 and there is no perceptual distance.
    """

    def __init__(self, config: LossConfig, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if config.perceptual and perceptual is None:
            raise ValueError(f"perceptual weight is {config.perceptual}; expected a perceptual distance to weigh")
        self.config = config
        self.perceptual = perceptual

    def forward(self, originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms by name; their sum is the loss.

        Args:
            originals: (B, 3, H, W) in [0, 1].
            reconstructions: the same shape.
        """
        terms = {}
        if self.config.l1:
            terms["l1"] = self.config.l1 * (reconstructions - originals).abs().mean()
        if self.config.l2:
            terms["l2"] = self.config.l2 * (reconstructions - originals).square().mean()
        if self.config.perceptual and self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual * self.perceptual(originals, reconstructions).mean()
        return terms


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real scores below 1 and fake scores above -1 cost. arXiv 1705.02894.

    Args:
        real: scores of originals, any shape.
        fake: scores of reconstructions, any shape.
    """
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The adversarial term of the tokenizer: minus the mean score of its pictures."""
    return -fake.mean()


class LeCam(nn.Module):
    """Keeps the discriminator's scores near the running mean of the other kind: steadier with little data.

    Source: arXiv 2104.03310, equation 5.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
        """Scalar penalty for scores; updates the running means.

        Args:
            real: scores of originals, any shape.
            fake: scores of reconstructions, any shape.
            real_mean: scalar mean of `real` over all workers.
            fake_mean: scalar mean of `fake` over all workers.
        """
        self.real_mean.lerp_(real_mean.detach(), 1 - self.decay)
        self.fake_mean.lerp_(fake_mean.detach(), 1 - self.decay)
        towards_fake = torch.relu(real - self.fake_mean).square().mean()
        return towards_fake + torch.relu(self.real_mean - fake).square().mean()
