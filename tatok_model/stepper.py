"""A batch of sequences in the middle of being written: asks the generator what comes next, takes what was chosen.

Under guidance every sequence has a second row without its class; both are combined before anybody sees a score.

Shapes: A sequences in the batch, R rows that are computed (A, or 2 A under guidance), L embeddings read, D width,
N patch positions, K codebook entries.
"""

import torch
from torch import Tensor

from tatok_model.generator import NO_CLASS, Generator
from tatok_model.generator_config import SamplingConfig


class Stepper:
    """The state of a batch.

    Args:
        generator: in evaluation mode.
        labels: (A,) int64.
        config: its guidance.
        use_cache: keep keys and values; else read everything again at every step.
    """

    def __init__(self, generator: Generator, labels: Tensor, config: SamplingConfig, use_cache: bool = True) -> None:
        self._generator, self._config = generator, config
        self._cache = generator.new_cache() if use_cache else None
        self._inputs: list[Tensor] = []  # (R, D) each: everything read, or the newest alone where there is a cache
        self._turns: list[Tensor] = []  # (R,) each
        self._steps = 0
        self._hidden: Tensor  # (R, L, D) of what was read; L = 1 where there is a cache
        rows = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if config.guided else labels
        self._read(generator.class_input(rows), torch.zeros_like(rows))

    @property
    def derived(self) -> bool:
        """Whether positions are known."""
        return self._generator.config.positions == "derived"

    @property
    def end(self) -> int:
        """What `place_logits` has last: no further position."""
        return self._generator.config.patch_positions

    def global_logits(self, number: int) -> Tensor:
        """(A, K) scores of global token `number`'s code."""
        generator = self._generator
        target = generator.global_targets.weight[number].expand(len(self._hidden), 1, -1)
        asked = self._ask(target, torch.zeros_like(self._turns[-1])[:, None])
        return self._guided(generator.to_global_codes(asked), self._config.guidance)

    def place_logits(self, last: Tensor) -> Tensor:
        """(A, N + 1) scores of the next position or the end, after (A,) positions; -1: none yet."""
        rows = last.repeat(2) if self._config.guided else last
        return self._guided(self._generator.place_logits(self._hidden[:, -1], rows), self._config.position_guidance)

    def code_logits(self, places: Tensor) -> Tensor:
        """(A, K) scores of the codes at (A,) positions."""
        rows = places.repeat(2) if self._config.guided else places
        asked = self._ask(self._generator.patch_targets(rows)[:, None], rows[:, None] + 1)
        return self._guided(self._generator.to_patch_codes(asked), self._config.guidance)

    def take_global(self, codes: Tensor, number: int) -> None:
        """Go on with (A,) codes of global token `number`."""
        rows = codes.repeat(2) if self._config.guided else codes
        self._read(self._generator.global_input(rows, torch.full_like(rows, number)), torch.zeros_like(rows))

    def take_patch(self, codes: Tensor, places: Tensor) -> None:
        """Go on with (A,) codes at (A,) positions."""
        if self._config.guided:
            codes, places = codes.repeat(2), places.repeat(2)
        self._read(self._generator.patch_input(codes, places), places + 1)

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the sequences: (A',) numbers of those that stay."""
        rows = torch.cat([stay, stay + len(self._hidden) // 2]) if self._config.guided else stay
        self._hidden = self._hidden[rows]
        self._inputs, self._turns = ([part[rows] for part in parts] for parts in (self._inputs, self._turns))
        if self._cache is not None:
            self._cache.keep(rows)

    def _read(self, newest: Tensor, turns: Tensor) -> None:
        """(R, D) and (R,): what the next token depends on most of all."""
        if self._steps >= self._generator.config.max_length:
            raise ValueError(f"a sequence has {self._steps} embeddings; expected at most that, as trained")
        if self._cache is not None:
            self._inputs, self._turns = [], []
        self._inputs.append(newest)
        self._turns.append(turns)
        self._steps += 1
        inputs, all_turns = torch.stack(self._inputs, 1), torch.stack(self._turns, 1)
        self._hidden = self._generator.read(inputs, all_turns, self._cache)

    def _ask(self, target: Tensor, target_turns: Tensor) -> Tensor:
        """(R, D) of a (R, 1, D) target."""
        turns = torch.stack(self._turns, 1)
        return self._generator.ask(self._hidden, turns, target, target_turns, self._cache)[:, 0]

    def _guided(self, logits: Tensor, scale: float) -> Tensor:
        """(R, C) -> (A, C): away from what is likely without the class, by the schedule's scale."""
        wide = logits if logits.dtype == torch.float64 else logits.float()  # autocast may have left bfloat16
        if not self._config.guided:
            return wide
        told, untold = wide.chunk(2)
        scale = self._config.scale_at(scale, self._steps / self._generator.config.max_length)
        if scale == 1:
            return told
        # Where both are -inf their difference is no number.
        return torch.where(told.isinf(), told, untold + scale * (told - untold))
