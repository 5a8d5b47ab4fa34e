"""The step of a generator does not depend on how its batch is cut, and learns."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.config import FilterConfig, TrainConfig
from pipeline.generator.generator_training import GeneratorObjective
from pipeline.generator.token_data import TokenBatches, TokenDataset
from pipeline.training.distributed import Terms, means
from pipeline.training.loop import take_step
from pipeline.training.order import SampleOrder
from pipeline.training.state import TrainState
from tatok_model.config import GeneratorConfig
from tatok_model.generation.generator import Generator


@pytest.fixture(scope="module")
def dataset(stream_folder: Path) -> TokenDataset:
    return TokenDataset.load(str(stream_folder), "train", FilterConfig(threshold=0.6))


def objective(dataset: TokenDataset, **changes: Any) -> GeneratorObjective:
    torch.manual_seed(0)
    config = GeneratorConfig("nano", 0.0, classes=3, global_tokens=2, grid_size=4, codebook_size=16,
                             max_patch_tokens=dataset.longest)  # fmt: skip
    settings = TrainConfig(global_batch_size=16, clip_norm=0.0, **changes)
    state = TrainState(Generator(config), settings, Generator.from_pretrained)
    return GeneratorObjective(state, torch.device("cpu"), bf16=False)


def gradients(trained: GeneratorObjective) -> dict[str, torch.Tensor]:
    """Kept by a hook, because a step clears them."""
    kept: dict[str, torch.Tensor] = {}
    descend = trained.state.descend

    def keep() -> Terms:
        kept.update({n: p.grad.clone() for n, p in trained.state.model.named_parameters() if p.grad is not None})
        return descend()

    trained.state.descend = keep  # type: ignore[method-assign]
    return kept


def test_one_part_and_eight_give_the_same_gradient(dataset: TokenDataset) -> None:
    found = {}
    for groups in (1, 8):
        trained = objective(dataset)
        # The order of `groups=8` for both: what a batch holds depends on it, how it is cut must not matter.
        batches = TokenBatches(dataset, SampleOrder(len(dataset), 0, 16), 0, 1, 8, 0.1, ends=1)
        batches.groups = groups
        batch = batches.load(0)
        assert len(batch.parts) == groups
        kept = gradients(trained)
        terms = means(take_step(trained, batch))
        found[groups] = {**kept, "loss": torch.tensor(terms["loss"])}
    assert found[1].keys() == found[8].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[8][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_loss_is_the_bits_of_all_predictions_over_their_number(dataset: TokenDataset) -> None:
    trained = objective(dataset)
    batch = TokenBatches(dataset, SampleOrder(len(dataset), 0, 16), 0, 1, 4, 0.0, ends=1).load(0)
    with torch.no_grad():
        bits = [trained.state.model(part.sequences, part.labels) for part in batch.parts]
    total = sum(float(part.total().sum()) for part in bits)
    tokens = sum(int(part.sequences.lengths().sum()) + len(part.labels) for part in batch.parts)
    terms = means(take_step(trained, batch))
    assert terms["loss"] == pytest.approx(total / tokens, rel=1e-5)
    kinds = [terms[f"bits_{kind}"] for kind in ("globals", "positions", "codes")]
    assert sum(kinds) == pytest.approx(total / 16, rel=1e-5)


def test_padding_and_lengths_are_counted_since_the_last_log(dataset: TokenDataset) -> None:
    trained = objective(dataset)
    batches = TokenBatches(dataset, SampleOrder(len(dataset), 0, 16), 0, 1, 4, 0.0, ends=1)
    parts = [part for step in (0, 1) for part in batches.load(step).parts]
    for step in (0, 1):
        take_step(trained, batches.load(step))
    real = sum(int(part.sequences.lengths().sum()) for part in parts)
    computed = sum(len(part.labels) * int(part.sequences.lengths().max()) for part in parts)
    found = trained.metrics()
    assert found["train/padding_share"] == pytest.approx(1 - real / computed)
    assert found["train/tokens_per_image"] == pytest.approx(real / 32)
    take_step(trained, batches.load(2))
    assert trained.metrics()["train/tokens_per_image"] != found["train/tokens_per_image"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_sequences_are_learnt(dataset: TokenDataset, optimizer: str) -> None:
    trained = objective(dataset, optimizer=optimizer, learning_rate=3e-3, warmup_steps=5, max_steps=60)
    batches = TokenBatches(dataset, SampleOrder(16, 0, 16), 0, 1, 1, 0.0, ends=1)
    losses = [means(take_step(trained, batches.load(step)))["loss"] for step in range(40)]
    assert losses[-1] < 0.5 * losses[0]
