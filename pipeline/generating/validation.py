"""Validation of a generator in training: bits of held-out sequences, and pictures that it makes.

Shapes: B sequences.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.config import GenerateConfig
from pipeline.evaluation.measurements import Totals
from pipeline.generating.fit import asked_labels
from pipeline.generating.grid import class_rows
from pipeline.generating.objective import KINDS
from pipeline.generating.token_data import TokenDataset
from pipeline.tokenizing.decoding import decoded_pictures
from pipeline.training import distributed
from pipeline.training.validation import spread
from tatok_model.generator import Generator
from tatok_model.sampling import sample
from tatok_model.tokenizer import TaTok

BATCH = 64  # sequences per forward pass


class GeneratorValidator:
    """Measures a generator on `count` held-out sequences, evenly spread over the split, shared out over the workers.

    Args:
        dataset: the held-out split.
        count: how many of its sequences to use.
        generate: how pictures are sampled.
        pictures: how many of them; 0: none.
        tokenizer: decodes them; None where this worker draws none.
        device: where models live.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        count: int,
        generate: GenerateConfig,
        pictures: int,
        tokenizer: TaTok | None,
        device: torch.device,
    ) -> None:
        self.dataset, self.generate, self.pictures, self.device = dataset, generate, pictures, device
        self.tokenizer = None if tokenizer is None else tokenizer.to(device).eval()
        indices = spread(len(dataset), count)
        self._indices = indices[np.argsort(dataset.counts[indices], kind="stable")]  # alike in a batch: less padding
        self._best, self._trained = float("inf"), float("inf")  # bits per token: held-out, and training's at that time

    @torch.inference_mode()
    def measure(self, model: Generator) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker."""
        totals = Totals()
        for sequences, labels in self._batches():
            bits = model(sequences, labels)
            kinds = (bits.globals_, bits.positions, bits.codes)
            sums = {name: float(kind.double().sum()) for name, kind in zip(KINDS, kinds, strict=True)}
            ends = len(labels) if bits.positions.shape[1] else 0
            tokens = float(sequences.lengths().sum())
            totals.merge(
                Totals(images=len(labels), tokens=tokens + ends, patches=float(sequences.counts.sum()), **sums)
            )
        values = distributed.merged(totals).values
        images = values["images"]
        found = {f"validation/bits_{name}": values[name] / images for name in KINDS}
        total = sum(values[name] for name in KINDS)
        found["validation/bits_per_image"] = total / images
        found["validation/bits_per_token"] = total / values["tokens"]
        if values["patches"]:
            found["validation/bits_per_code"] = values["codes"] / values["patches"]
        return found

    @torch.inference_mode()
    def examples(self, model: Generator) -> list[np.ndarray]:
        """Rows of sampled pictures, (B, H, W, 3) uint8 each: those with which `jobs/generate.py` would begin."""
        if not self.pictures or self.tokenizer is None:
            return []
        asked = asked_labels(self.generate, model.config.classes)
        numbers = np.arange(self.pictures)
        labels = np.array(asked)[numbers % len(asked)]
        asked_for, sample_numbers = (torch.from_numpy(array).to(self.device) for array in (labels, numbers))
        sequences = sample(model, asked_for, sample_numbers, self.generate.seed, self.generate)
        architecture = self.tokenizer.config
        tokens = sequences.to_tokens(architecture.patch_positions, architecture.global_tokens)
        return class_rows(decoded_pictures(self.tokenizer, tokens), labels)

    def warnings(self, model: Generator, found: dict[str, float]) -> list[str]:
        """Held-out bits that rise while training's fall: the generator learns its training set by heart."""
        here, trained = found["validation/bits_per_token"], found.get("train/loss", float("inf"))
        best, then = self._best, self._trained
        if here < best:
            self._best, self._trained = here, trained
        if here <= best or trained >= then:
            return []
        told = (
            f"held-out tokens cost {here:.3f} bits and cost {best:.3f} before, while those of training fell from "
            f"{then:.3f} to {trained:.3f}: the generator learns its training set by heart; expected more data, "
            "generator.dropout, or fewer steps"
        )
        return [told]

    def _batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        mine = self._indices[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), BATCH):
            rows = mine[start : start + BATCH]
            labels = torch.from_numpy(self.dataset.labels[rows])
            yield self.dataset.sequences(rows).to(self.device), labels.to(self.device)
