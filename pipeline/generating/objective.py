"""One optimiser step of a generator: bits of all tokens of the global batch, divided by their number."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.generating.batches import TokenBatch
from pipeline.training import distributed
from pipeline.training.state import TrainState
from tatok_model.generator import Generator

KINDS = ("globals", "positions", "codes")  # of bits


class GeneratorObjective:
    """Performs steps on the state of a generator.

    Args:
        state: what is trained.
        device: where the model lives.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        wrap: makes a module ready for several workers (DDP) or faster (compile).
    """

    def __init__(
        self, state: TrainState[Generator], device: torch.device, bf16: bool, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        self.state, self.device, self.bf16 = state, device, bf16
        self.model: nn.Module = wrap(state.model)
        self._images = self._tokens = self._computed = 0

    def step(self, batch: TokenBatch) -> dict[str, Tensor]:
        """One optimiser step on this worker's part of a global batch.

        Gradients add up over the parts: how a batch is cut does not change them.

        Returns:
            `loss` in bits per token, `bits_globals`, `bits_positions` and `bits_codes` per image, gradient norms.
        """
        state, parts = self.state, batch.parts
        state.begin_step()
        state.model.train()
        found = torch.zeros(len(KINDS), device=self.device)
        for number, part in enumerate(parts):
            sequences, labels = part.sequences.to(self.device), part.labels.to(self.device, non_blocking=True)
            with distributed.synchronised(self.model, last=number == len(parts) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    bits = self.model(sequences, labels)
                # Times the number of workers, because gradients are averaged over them.
                (bits.total().sum() * distributed.world_size() / batch.tokens).backward()
            found += torch.stack([kind.detach().sum() for kind in (bits.globals_, bits.positions, bits.codes)]).float()
            self._count(part.sequences.lengths())
        norms = state.descend()
        state.end_step()
        images = sum(len(part.labels) for part in parts)
        terms = {"loss": found.sum() * distributed.world_size() / batch.tokens}
        return terms | {f"bits_{kind}": value / images for kind, value in zip(KINDS, found, strict=True)} | norms

    def metrics(self) -> dict[str, float]:
        """The share of computed tokens that is padding, and tokens per image, since the last call."""
        counts = torch.tensor([self._images, self._tokens, self._computed], device=self.device)
        images, tokens, computed = distributed.total(counts).tolist()
        self._images = self._tokens = self._computed = 0
        return {"train/padding_share": 1 - tokens / computed, "train/tokens_per_image": tokens / images}

    def _count(self, lengths: Tensor) -> None:
        self._images += len(lengths)
        self._tokens += int(lengths.sum())
        self._computed += len(lengths) * int(lengths.max())
