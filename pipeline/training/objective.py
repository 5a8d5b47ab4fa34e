"""One optimiser step of a tokenizer: forward, losses, backward, update."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training import distributed
from pipeline.training.batches import Batch
from pipeline.training.tokenizer_state import TokenizerState
from pipeline.training.usage import UsageMeter
from tatok_model.losses import ReconstructionLoss
from tatok_model.tokens import Tokens

Wrap = Callable[[nn.Module], nn.Module]


class Objective:
    """Performs steps on a `TokenizerState`.

    Args:
        state: what is trained.
        losses: reconstruction terms.
        device: where the models live.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        wrap: makes a module ready for several workers (DDP) or faster (compile); called once per module.
    """

    def __init__(
        self, state: TokenizerState, losses: ReconstructionLoss, device: torch.device, bf16: bool, wrap: Wrap
    ) -> None:
        self.state, self.losses, self.device, self.bf16 = state, losses, device, bf16
        self.config = state.config
        self.model: nn.Module = wrap(state.model)
        if state.adversary is not None:
            state.adversary.wrap(wrap)
        self._usage = UsageMeter(self.config.tokenizer)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on this worker's part of a global batch, on any device.

        Returns:
            The terms of the last micro-batch by name, as scalars without gradients.
        """
        train, state = self.config.train, self.state
        state.begin_step()
        state.model.train(not state.frozen)  # a codebook in training moves
        everything = train.global_batch_size / distributed.world_size()  # pictures of a mean worker
        parts = batch.images.to(self.device, non_blocking=True).chunk(train.accumulation)
        draws = batch.uniforms.to(self.device, non_blocking=True).chunk(train.accumulation)
        for number, part in enumerate(zip(parts, draws, strict=True)):
            with distributed.synchronised(self.model, last=number == len(parts) - 1):
                terms, tokens, pixels, pictures = self._backward(*part, len(part[0]) / everything)
        terms |= state.descend()
        if state.adversary is not None and state.adversary.active(state.step) and not state.skipped:
            terms |= state.adversary.step(pixels, pictures, self._autocast)
        state.end_step()
        self._usage.add(tokens)
        return {name: value.detach() for name, value in terms.items()}

    def metrics(self) -> dict[str, float]:
        """Use of the codebook and kept patch tokens since the last call."""
        found = self._usage.read()
        if self.state.model.entropy_model is not None and "codebook/perplexity_patch" in found:
            # What q saves against a code that knows only how often each entry is used.
            found["train/unigram_bits"] = math.log2(found["codebook/perplexity_patch"])
        return found

    def _backward(
        self, images: Tensor, uniforms: Tensor, share: float
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
        (total * share).backward()  # every picture counts alike, however workers and micro-batches divide them
        return terms, output.tokens, pixels, pictures.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
