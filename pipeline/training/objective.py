"""One optimiser step: forward, losses, backward, update."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.schedule import learning_rate
from pipeline.training.state import TrainState, derive_seed
from tatok_model.losses import ReconstructionLoss
from tatok_model.tokens import Tokens

Wrap = Callable[[nn.Module], nn.Module]


class Objective:
    """Performs steps on a `TrainState`.

    Args:
        state: what is trained.
        losses: reconstruction terms.
        device: where the models live.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        wrap: makes a module ready for several workers (DDP) or faster (compile); called once per module.
    """

    def __init__(
        self, state: TrainState, losses: ReconstructionLoss, device: torch.device, bf16: bool, wrap: Wrap
    ) -> None:
        self.state, self.losses, self.device, self.bf16 = state, losses, device, bf16
        self.config = state.config
        self.model: nn.Module = wrap(state.model)
        if state.adversary is not None:
            state.adversary.wrap(wrap)

    def step(self, images: Tensor, uniforms: Tensor) -> tuple[dict[str, Tensor], Tokens]:
        """One optimiser step on this worker's part of a global batch.

        Args:
            images: (B, 3, H, W) uint8, on any device.
            uniforms: (B, draws) in [0, 1), for the kept sets.

        Returns:
            The terms of the last micro-batch by name, as scalars without gradients, and the tokens of its images.
        """
        train, state = self.config.train, self.state
        rate = learning_rate(state.step, train)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        # The codebook draws its first and its replaced entries from torch's generator: key it by the step, so that a
        # resumed run draws what an uninterrupted one would have drawn.
        torch.manual_seed(derive_seed(train.seed, "step", state.step))
        state.model.train(not state.frozen)  # a codebook in training moves
        parts = images.to(self.device, non_blocking=True).chunk(train.accumulation)
        draws = uniforms.to(self.device, non_blocking=True).chunk(train.accumulation)
        for number, part in enumerate(zip(parts, draws, strict=True)):
            with self._synchronised(self.model, last=number == len(parts) - 1):
                terms, tokens, pixels, pictures = self._backward(*part, len(parts))
        if train.clip_norm:
            # Apart: cross-entropy in bits would otherwise decide how far the tokenizer may move.
            for name, parameters in state.parameter_groups().items():
                terms[f"gradient_norm{name}"] = nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.adversary is not None and state.adversary.active(state.step):
            terms |= state.adversary.step(pixels, pictures, self._autocast)
        state.step += 1
        state.update_average()
        return {name: value.detach() for name, value in terms.items()}, tokens

    def _backward(
        self, images: Tensor, uniforms: Tensor, parts: int
    ) -> tuple[dict[str, Tensor], Tokens, Tensor, Tensor]:
        pixels = images.float() / 255  # (B, 3, H, W) in [0, 1]
        frozen, step = self.state.frozen, self.state.step
        mix = self.config.kept_sets
        with self._autocast():
            output = self.model(
                pixels, None, uniforms, mix, filtering_now=step >= mix.warmup_steps, reconstruct=not frozen
            )
        pictures = output.images.float()
        terms = {} if frozen else self.losses(pixels, pictures)
        if not frozen:
            terms["commitment"] = output.commitment_loss
        adversary = self.state.adversary
        if adversary is not None and adversary.active(step):
            terms["adversarial"] = adversary.deception(pictures, self._autocast)
        total = torch.stack([pixels.new_zeros(()), *terms.values()]).sum()
        terms["loss"] = total
        if len(output.code_bits):
            # The entropy model has parameters of its own: its loss moves nothing else and is not part of "loss". Every
            # prediction counts alike, however many a micro-batch or a worker has.
            entropy = output.code_bits.sum() / output.tokens.patch_indices.numel()
            terms["code_bits"] = output.code_bits.mean()
            terms["loss"] = entropy if frozen else total
            total = total + entropy
        (total / parts).backward()
        return terms, output.tokens, pixels, pictures.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @staticmethod
    def _synchronised(model: nn.Module, last: bool) -> Any:
        """Gradients travel between workers once per step, with the last micro-batch."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
