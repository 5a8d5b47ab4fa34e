"""Muon and AdamW: which parameters each moves, how far, and that a run goes on as it was begun."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.core.config import TrainConfig
from pipeline.core.errors import BadInput, Stopped
from pipeline.training.state import MuonAdamW, TrainState, make_optimizer
from pipeline.training.tokenizer_training import TokenizerState
from tatok_model.config import GeneratorConfig
from tatok_model.generation.generator import Generator
from tatok_model.vit import Block

CPU = torch.device("cpu")
MUON = TrainConfig(optimizer="muon", weight_decay=0.1)
GENERATOR = GeneratorConfig("nano", 0.0, classes=3, global_tokens=2, grid_size=4, codebook_size=16, max_patch_tokens=16)
IN_TOKENIZER = r"(encoder|decoder|entropy_model\.transformer)\.blocks\.\d+\.(attention\.to_(qkv|out)|mlp\.[02])\.weight"
IN_GENERATOR = r"(blocks\.\d+|code_block)\.(attention\.to_(q|kv|out)|mlp\.to_(gate|hidden|out))\.weight"


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Of the parameters in each group."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return [[known[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("tokenizer", "parts", "matrices"),
    [
        ({}, "all", 4 * (4 + 4 + 2)),  # nano has as many layers in encoder and decoder
        ({"quantizer": "fsq", "fsq_levels": (4, 4)}, "all", 4 * (4 + 4 + 2)),
        ({"patch_tokens": False}, "all", 4 * (4 + 4)),
        ({"checkpoint": "that stays"}, "entropy", 4 * 2),
    ],
)
def test_muon_moves_a_tokenizers_hidden_matrices_and_adamw_the_rest(configure, tokenizer, parts, matrices):
    sizes = {"size": "nano", "entropy_layers": 2}
    state = TokenizerState(configure(tokenizer=sizes | tokenizer, train={"optimizer": "muon", "parts": parts}), CPU)
    hidden, decayed, single = names_of(state.model, state.optimizer)
    trained = [name for name, p in state.model.named_parameters() if p.requires_grad]
    assert sorted(hidden + decayed + single) == sorted(trained)
    assert len(hidden) == matrices
    assert set(hidden) == {name for name in trained if re.fullmatch(IN_TOKENIZER, name)}
    ndims = {name: p.ndim for name, p in state.model.named_parameters()}
    assert all(ndims[name] >= 2 for name in decayed)
    assert all(ndims[name] == 1 for name in single)
    if parts == "all":
        embeddings = {"patch_embedding.weight", "encoder_positions", "decoder_positions", "to_pixels.weight"}
        assert embeddings <= set(decayed)


def test_muon_moves_a_generators_hidden_matrices_and_adamw_the_rest():
    model = Generator(GENERATOR)
    hidden, decayed, single = names_of(model, make_optimizer(model, MUON))
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(hidden + decayed + single) == sorted(everything)
    assert set(hidden) == {name for name in everything if re.fullmatch(IN_GENERATOR, name)}
    assert "code_block.mlp.to_gate.weight" in hidden
    heads = {f"{layer}.weight" for layer in ("to_global_codes", "to_patch_codes", "to_places")}
    tables = ("class_embedding", "global_codes", "global_numbers", "global_targets", "patch_codes", "patch_places")
    assert set(decayed) == heads | {f"{table}.weight" for table in (*tables, "patch_targets")}
    assert all("norm" in name or name.endswith(".bias") for name in single)


def test_adamw_is_the_default_and_moves_everything():
    model = Generator(GENERATOR)
    optimizer = make_optimizer(model, TrainConfig())
    assert type(optimizer) is torch.optim.AdamW
    everything = list(model.named_parameters())
    split = [[n for n, p in everything if p.ndim >= 2], [n for n, p in everything if p.ndim < 2]]
    assert names_of(model, optimizer) == split
    assert type(make_optimizer(nn.Linear(2, 2), MUON)) is torch.optim.AdamW  # it has no hidden matrices


def test_muons_step_is_nearly_orthogonal_and_as_long_as_one_of_adamw():
    model = Block(64, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    make_optimizer(model, MUON).step()
    rate, decay = MUON.learning_rate, MUON.weight_decay
    for name in ("attention.to_qkv.weight", "attention.to_out.weight", "mlp.0.weight", "mlp.2.weight"):
        moved = before[name] * (1 - rate * decay) - model.get_parameter(name).detach()
        update = moved / (rate * 0.2 * math.sqrt(max(moved.shape)))
        u, values, v = torch.linalg.svd(gradients[name], full_matrices=False)  # the first momentum's, scaled
        values = values / values.norm()
        for _ in range(5):  # Newton-Schulz brings each singular value to about 1 by this polynomial, in bfloat16
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(u.T @ update @ v.T, values.diag(), atol=0.03, rtol=0)
        if moved.shape[0] != moved.shape[1]:  # the smallest values of a square one are near 0 and stay small
            assert 0.65 < values.min() < values.max() < 1.25
        assert moved.square().mean().sqrt() == pytest.approx(0.2 * rate, rel=0.25), name
    for name in ("norm1.weight", "mlp.0.bias"):  # AdamW's first step is the sign of the gradient
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, rate * gradients[name].sign(), atol=1e-6, rtol=1e-3)


def test_every_group_follows_the_schedule_also_after_loading(configure):
    state = TokenizerState(configure(train={"optimizer": "muon", "warmup_steps": 4}), CPU)
    give_gradients(state.model)
    state.begin_step()
    state.descend()
    state.load_tensors(state.tensors())
    state.step = 1
    state.begin_step()
    assert [group["lr"] for group in state.optimizer.param_groups] == [pytest.approx(5e-4)] * 3
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    give_gradients(state.model)
    state.optimizer.step()
    name = "encoder.blocks.0.mlp.0.weight"
    moved = before[name] - state.model.get_parameter(name).detach()
    assert moved.square().mean().sqrt() == pytest.approx(0.2 * 5e-4, rel=0.25)


def test_what_muon_remembers_is_numbered_through(configure):
    state = TokenizerState(configure(train={"optimizer": "muon"}), CPU)
    give_gradients(state.model)
    state.descend()
    hidden = len(state.optimizer.param_groups[0]["params"])
    number = sum(p.requires_grad for p in state.model.parameters())
    names = {name for name in state.tensors() if name.startswith("optimizer.")}
    expected = {f"optimizer.{n}.momentum_buffer" for n in range(hidden)}
    expected |= {f"optimizer.{n}.{key}" for n in range(hidden, number) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == expected


@pytest.mark.parametrize("kind", [TokenizerState, TrainState], ids=["tokenizer", "generator"])
def test_a_loaded_state_takes_the_same_steps(configure, kind):
    def make() -> TrainState:
        if kind is TokenizerState:
            return TokenizerState(configure(train={"optimizer": "muon"}), CPU)
        torch.manual_seed(1)
        return TrainState(Generator(GENERATOR), MUON, Generator.from_pretrained)

    def take(state: TrainState, step: int) -> None:
        state.step = step
        state.begin_step()
        give_gradients(state.model, step)
        state.descend()

    whole, other = make(), make()
    assert isinstance(whole.optimizer, MuonAdamW)
    take(whole, 0)
    other.load_tensors(whole.tensors())
    for state in (whole, other):
        take(state, 1)
        take(state, 2)
    found, expected = other.tensors(), whole.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_muon_run_that_stopped_ends_with_the_weights_of_an_uninterrupted_one(configure, run_training):
    muon = {"optimizer": "muon"}
    whole = run_training(configure(train=muon), "whole")
    with pytest.raises(Stopped, match="max_minutes are over after step 1"):
        run_training(configure(train=muon | {"max_minutes": 1e-9}), "broken")
    with pytest.raises(BadInput, match=r"train\.optimizer is 'adamw'; expected 'muon', as this run was begun"):
        run_training(configure(), "broken", resume=True)
    resumed = run_training(configure(train=muon), "broken", resume=True)
    files = [(run.folder / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]


def test_a_run_begun_before_there_was_a_choice_of_optimisers_goes_on_with_adamw(configure, run_training):
    whole = run_training(configure(), "whole")
    with pytest.raises(Stopped):
        run_training(configure(train={"max_minutes": 1e-9}), "old")
    record = Path(configure().run.output) / "old" / "checkpoints" / "step-00000001" / "training_state.json"
    values = json.loads(record.read_text())
    del values["decides"]["train.optimizer"], values["decides"]["tokenizer.expected_fill"]
    record.write_text(json.dumps(values))
    with pytest.raises(BadInput, match=r"train\.optimizer is 'muon'; expected 'adamw', as this run was begun"):
        run_training(configure(train={"optimizer": "muon"}), "old", resume=True)
    resumed = run_training(configure(), "old", resume=True)
    files = [(run.folder / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]


@pytest.mark.parametrize("section", ["train", "train_generator"])
def test_other_optimisers_are_refused(configure, section):
    with pytest.raises(BadInput, match=rf"{section}\.optimizer is 'sgd'; expected adamw or muon"):
        configure(**{section: {"optimizer": "sgd"}})
