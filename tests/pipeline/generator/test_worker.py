"""Faults in training a generator: which sequences a bad step saw is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.core.config import Config
from pipeline.core.run import Run
from pipeline.generator.generator_training import GeneratorObjective
from pipeline.generator.token_data import TokenDataset, TokenPart
from pipeline.training.distributed import Mean, Terms
from pipeline.training.loop import NotFinite


@pytest.mark.parametrize("groups", [1, 8])
def test_a_step_whose_loss_is_no_number_keeps_the_ids_of_its_batch(
    configure: Callable[..., Config],
    train_generator: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
) -> None:
    seen: list[Tensor] = []
    real = GeneratorObjective.forward

    def forward(self: GeneratorObjective, part: tuple[TokenPart, int]) -> tuple[Tensor, Terms]:
        loss, terms = real(self, part)
        if self.state.step != 2:
            return loss, terms
        seen.append(part[0].sequences.global_indices)
        return loss, terms | {"loss": Mean.of(loss * float("nan"))}

    monkeypatch.setattr(GeneratorObjective, "forward", forward)
    config = configure(f"generator.length_groups={groups}", "train_generator.log_every=6")
    with pytest.raises(NotFinite, match=r"the loss is nan at step 3; .* in not_finite/step-00000003\.json"):
        train_generator(config, "nan")
    kept = json.loads((Path(config.run.output) / "nan" / "not_finite" / "step-00000003.json").read_text())
    training = TokenDataset.load(config.tokens.path, "train", config.filter)
    rows = [training.ids.index(name) for name in kept["ids"]]
    assert kept["step"] == 3
    assert len(rows) == config.train_generator.global_batch_size
    assert torch.equal(torch.from_numpy(training.global_indices[rows]).long(), torch.cat(seen))
