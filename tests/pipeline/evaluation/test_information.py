"""Known information, measured: an entropy model is planted whose distributions are given."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluation_checks import check_information
from pipeline.evaluation.information import check_blind, load_blind, measure_information
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

PLACES = np.arange(12)
INFORMATION = "evaluate.information=true"
Configure = Callable[..., Config]


def predicting(logits: Any) -> Any:
    """`TaTok._predict` of given logits, of 16 codes: what reads them is told of a head that changes nothing."""
    same = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    nn.init.eye_(same.weight)

    def predict(tokens: Tokens, given: Tensor, at: Tensor, read: Any, without_globals: Tensor | None = None) -> Any:
        return read(logits(tokens, given, at), same)

    return predict


def planted(tokenizer: TaTok, monkeypatch: pytest.MonkeyPatch, bits: Any) -> TaTok:
    """The tokenizer with an entropy model under which true codes cost `bits(global_indices, given)` each, (B,)."""
    model = TaTok(tokenizer.config)
    model.load_state_dict(tokenizer.state_dict())
    model.eval()

    def logits(tokens: Tokens, given: Tensor, at: Tensor) -> Tensor:
        wanted = bits(tokens.global_indices, given)[:, None].expand(at.shape)[at]  # (n,)
        true = tokens.patch_indices[at]
        p = 2.0 ** -wanted.double()
        q = ((1 - p) / 15)[:, None].expand(-1, 16).clone()
        return q.scatter(1, true[:, None], p[:, None]).log()

    monkeypatch.setattr(model, "_predict", predicting(logits))
    return model


@pytest.fixture
def blind_weights(tokenizer: TaTok) -> TaTok:
    return blind_of(tokenizer)


def test_codes_that_predict_one_another_are_redundant(
    tokenizer: TaTok, heldout: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bits each where nothing is given, 3 where something is: 16 codes cost 64 at once and 4 + 15 x 3 in a chain."""
    model = planted(tokenizer, monkeypatch, lambda g, given: 4.0 - given.any(1).double())
    found = measure_information(model, None, heldout, PLACES, 5)
    assert found["information_sum_h_ci_given_g_bits"] == pytest.approx(64, abs=1e-4)
    assert found["information_h_c_given_g_bits"] == pytest.approx(49, abs=1e-4)
    assert found["information_redundancy_given_g_bits"] == pytest.approx(15, abs=1e-4)
    assert "information_mutual_bits" not in found


class Enumerated:
    """16 images, all pairs of a palette (8) and a shade (2).

    The first global token is 2 x palette, the other 0; every patch code is 2 x palette + shade. So H(g) = 3 bits,
    H(c) = 4, H(c | g) = 1, and one patch code says what all others are.
    """

    def images(self, indices: list[int]) -> np.ndarray:
        return np.array(indices, np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)

    def encode(self, images: Tensor) -> Tokens:
        code = images[:, 0, 0, 0].long()
        globals_ = torch.stack([code // 2 * 2, torch.zeros_like(code)], 1)
        patches = code[:, None].repeat(1, 16)
        return Tokens(globals_, patches, torch.ones_like(patches, dtype=torch.bool))

    def exact(self, sees_globals: bool) -> Any:
        """The true conditional distribution in logits; what cannot be costs 40 bits."""

        def logits(tokens: Tokens, given: Tensor, at: Tensor) -> Tensor:
            q = torch.full((len(given), 16), 1 / 16, dtype=torch.float64)
            if sees_globals:
                palette = tokens.global_indices[:, :1]
                q = torch.zeros_like(q).scatter(1, torch.cat([palette, palette + 1], 1), 0.5)
            known = torch.nn.functional.one_hot(tokens.patch_indices.where(given, 0).amax(1), 16).double()
            q = torch.where(given.any(1)[:, None], known, q).clamp(min=2.0**-40)
            return q.log2()[:, None].expand(-1, 16, -1)[at] * math.log(2)

        return logits


def test_known_entropies_redundancy_and_mutual_information_are_found(
    tokenizer: TaTok, blind_weights: TaTok, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Enumerated()
    monkeypatch.setattr(tokenizer, "encode", world.encode)
    monkeypatch.setattr(tokenizer, "_predict", predicting(world.exact(sees_globals=True)))
    monkeypatch.setattr(blind_weights, "_predict", predicting(world.exact(sees_globals=False)))
    found = measure_information(tokenizer, blind_weights, world, np.arange(16), 5)
    known = {
        "sum_h_ci_given_g_bits": 16,
        "h_c_given_g_bits": 1,
        "redundancy_given_g_bits": 15,
        "sum_h_ci_bits": 64,
        "h_c_bits": 4,
        "redundancy_bits": 60,
        "mutual_bits": 3,
        "mutual_low_bits": 3,  # every image gains the same
        "mutual_high_bits": 3,
        "mutual_limit_bits": 8,
        "unigram_bits": 64,
        "images": 16,
    }
    measured = {name: found[f"information_{name}"] for name in known}
    assert measured == pytest.approx(known, abs=1e-6)
    assert found["information_mutual_null_bits"] < 0, "global tokens of another image mislead"
    assert found.keys() == {f"information_{name}" for name in [*known, "mutual_null_bits"]}


@pytest.mark.parametrize("batch_size", [1, 7, 12])
def test_results_do_not_depend_on_the_batches(
    batch_size: int, tokenizer: TaTok, blind_weights: TaTok, heldout: ShardDataset
) -> None:
    told: list[int] = []
    found = measure_information(tokenizer, blind_weights, heldout, PLACES, batch_size, told.append)
    assert found == pytest.approx(measure_information(tokenizer, blind_weights, heldout, PLACES, 5), abs=1e-3)
    assert sum(told) == 12


def test_global_tokens_of_another_image_tell_nothing(
    tokenizer: TaTok, blind_weights: TaTok, heldout: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.from_numpy(heldout.images(PLACES.tolist()).transpose(0, 3, 1, 2).copy())
    own = {tuple(row.tolist()): None for row in tokenizer.encode(images).global_indices}
    first = next(iter(own))

    def bits(global_indices: Tensor, given: Tensor) -> Tensor:
        return torch.where((global_indices == torch.tensor(first)).all(1), 2.0, 3.0)

    model = planted(tokenizer, monkeypatch, bits)
    monkeypatch.setattr(blind_weights, "_predict", model._predict)
    found = measure_information(model, blind_weights, heldout, PLACES[:4], 4)
    # Whose global tokens are used changes who is cheap, not how many are: the mean stays.
    assert found["information_mutual_null_bits"] == pytest.approx(0, abs=1e-6)


def test_a_tokenizer_without_an_entropy_model_is_refused(tokenizer: TaTok, heldout: ShardDataset) -> None:
    without = TaTok(replace(tokenizer.config, entropy_layers=0)).eval()
    with pytest.raises(BadInput, match="has no entropy model"):
        measure_information(without, None, heldout, PLACES, 5)


def test_a_tokenizer_whose_model_does_not_see_the_global_tokens_is_refused(
    blind_weights: TaTok, heldout: ShardDataset
) -> None:
    with pytest.raises(BadInput, match="has entropy_globals false; expected true"):
        measure_information(blind_weights, None, heldout, PLACES, 5)


def blind_of(tokenizer: TaTok, **changes: Any) -> TaTok:
    torch.manual_seed(3)
    model = TaTok(replace(tokenizer.config, entropy_globals=False, **changes)).eval()
    weights = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("entropy_model.")}
    model.load_state_dict(weights, strict=False)
    return model


def test_a_model_that_belongs_to_the_tokenizer_is_loaded_and_noted(
    tokenizer: TaTok, configure: Configure, tmp_path: Path
) -> None:
    blind_of(tokenizer).save_pretrained(tmp_path / "blind" / "checkpoint")
    config = configure(INFORMATION, f"evaluate.blind_checkpoint={tmp_path / 'blind'}")
    check_information(config)
    run: Any = SimpleNamespace(config=config, inputs={})
    loaded = load_blind(run, tokenizer)
    assert loaded is not None
    assert not loaded.config.entropy_globals
    weights = sha256_file(tmp_path / "blind" / "checkpoint" / "model.safetensors")
    assert run.inputs["blind"] == {"path": str(tmp_path / "blind"), "sha256": weights}
    assert load_blind(SimpleNamespace(config=configure(INFORMATION), inputs={}), tokenizer) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.entropy_layers=0"], "evaluate.information is true; expected a tokenizer with an entropy model"),
        (["tokenizer.entropy_globals=false"], "tokenizer.entropy_globals is false; expected true"),
        (["evaluate.blind_checkpoint=/no"], "evaluate.blind_checkpoint '/no' does not exist; expected a checkpoint"),
    ],
)
def test_information_that_cannot_be_measured_is_refused(
    configure: Configure, overrides: list[str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        check_information(configure(INFORMATION, *overrides))
    check_information(configure(*overrides, "evaluate.information=false", "evaluate.blind_checkpoint="))


def test_another_architecture_is_refused_by_its_key(tokenizer: TaTok, configure: Configure, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "sees")
    with pytest.raises(BadInput, match="evaluate.blind_checkpoint sees the global tokens"):
        check_information(configure(INFORMATION, f"evaluate.blind_checkpoint={tmp_path / 'sees'}"))
    blind_of(tokenizer, entropy_layers=1, entropy_width=32).save_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match="evaluate.blind_checkpoint has entropy_layers 1; expected 2, as tokenizer"):
        check_information(configure(INFORMATION, f"evaluate.blind_checkpoint={tmp_path / 'small'}"))


def test_a_model_that_is_not_of_this_tokenizer_is_refused(tokenizer: TaTok) -> None:
    blind = blind_of(tokenizer)
    check_blind(tokenizer, blind)
    with pytest.raises(BadInput, match="blind_checkpoint sees the global tokens"):
        check_blind(tokenizer, tokenizer)
    with pytest.raises(BadInput, match="blind_checkpoint has entropy_width 32; expected 96"):
        check_blind(tokenizer, blind_of(tokenizer, entropy_width=32))
    with torch.no_grad():
        blind.mask_token.add_(1)
    with pytest.raises(BadInput, match="blind_checkpoint is another tokenizer"):
        check_blind(tokenizer, blind)
