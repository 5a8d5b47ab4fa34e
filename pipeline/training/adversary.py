"""The adversarial term: a discriminator, its own optimiser step, and what the tokenizer gains by deceiving it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.training import distributed
from tatok_model.discriminator import Discriminator
from tatok_model.losses import hinge_discriminator_loss, hinge_generator_loss

BETAS = (0.5, 0.9)  # as VQGAN trains its discriminator


class Adversary:
    """A discriminator in training.

    Args:
        config: weights and learning rate in `losses`.
        device: where it lives.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config.losses
        self.network = Discriminator().to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), self.config.discriminator_lr, BETAS)
        self._wrapped: nn.Module = self.network

    def wrap(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Make it ready for several workers."""
        self._wrapped = wrap(self.network)

    def active(self, step: int) -> bool:
        """Whether the term counts at this step."""
        return step >= self.config.gan_start_step

    def deception(self, pictures: Tensor, autocast: Callable[[], Any]) -> Tensor:
        """The tokenizer's weighted adversarial loss: a scalar with gradients to `pictures`, (B, 3, H, W) in [0, 1]."""
        self.network.requires_grad_(False)
        with autocast():
            scores = self.network(pictures)
        self.network.requires_grad_(True)
        return self.config.gan * hinge_generator_loss(scores.float())

    def step(self, originals: Tensor, pictures: Tensor, autocast: Callable[[], Any]) -> dict[str, Tensor]:
        """One step of the discriminator on (B, 3, H, W) images in [0, 1]; its loss terms."""
        with autocast():
            scores = self._wrapped(torch.cat([originals, pictures.clamp(0, 1)]))
        real, fake = scores.float().chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        means = distributed.total(torch.stack([real.detach().mean(), fake.detach().mean()])) / distributed.world_size()
        penalty = self.config.lecam * self.network.lecam(real, fake, *means)
        (loss + penalty).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss, "lecam": penalty}
