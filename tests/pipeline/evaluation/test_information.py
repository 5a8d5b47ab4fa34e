"""Known information, measured: an entropy model is planted whose distributions are given."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.shards import ShardDataset
from pipeline.errors import BadInput
from pipeline.evaluation.information import check_blind, measure_information
from tatok_model.tokenizer import TaTok

PLACES = np.arange(12)


def planted(tokenizer: TaTok, monkeypatch: pytest.MonkeyPatch, bits: Any) -> TaTok:
    """The tokenizer with an entropy model under which true codes cost `bits(global_indices, given)` each, (B,)."""
    model = TaTok(tokenizer.config)
    model.load_state_dict(tokenizer.state_dict())
    model.eval()

    def logits(tokens: Any, given: Tensor, at: Tensor, without_globals: Tensor | None = None) -> Tensor:
        wanted = bits(tokens.global_indices, given)[:, None].expand(at.shape)[at]  # (n,)
        true = tokens.patch_indices[at]
        p = 2.0 ** -wanted.double()
        q = ((1 - p) / 15)[:, None].expand(-1, 16).clone()
        return q.scatter(1, true[:, None], p[:, None]).log()

    monkeypatch.setattr(model, "_logits", logits)
    return model


@pytest.fixture
def blind_weights(tokenizer: TaTok) -> TaTok:
    torch.manual_seed(3)
    model = TaTok(replace(tokenizer.config, entropy_globals=False)).eval()
    weights = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("entropy_model.")}
    model.load_state_dict(weights, strict=False)
    return model


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


def test_what_global_tokens_tell_is_the_difference_between_two_models(
    tokenizer: TaTok, blind_weights: TaTok, heldout: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = planted(tokenizer, monkeypatch, lambda g, given: torch.full((len(given),), 2.5))
    monkeypatch.setattr(blind_weights, "_logits", seeing._logits)
    real = TaTok.code_lengths

    def lengths(self: TaTok, *arguments: Any) -> Tensor:
        return real(self, *arguments) + (8.0 if self is blind_weights else 0.0)  # 8 bits an image more

    monkeypatch.setattr(TaTok, "code_lengths", lengths)
    found = measure_information(seeing, blind_weights, heldout, PLACES, 5)
    assert found["information_mutual_bits"] == pytest.approx(8, abs=1e-6)
    assert found["information_mutual_low_bits"] == pytest.approx(8, abs=1e-6)
    assert found["information_h_c_bits"] == pytest.approx(48, abs=1e-4)
    assert found["information_mutual_limit_bits"] == 2 * math.log2(16)


def test_global_tokens_of_another_image_tell_nothing(
    tokenizer: TaTok, blind_weights: TaTok, heldout: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.from_numpy(heldout.images(PLACES.tolist()).transpose(0, 3, 1, 2).copy())
    own = {tuple(row.tolist()): None for row in tokenizer.encode(images).global_indices}
    first = next(iter(own))

    def bits(global_indices: Tensor, given: Tensor) -> Tensor:
        return torch.where((global_indices == torch.tensor(first)).all(1), 2.0, 3.0)

    model = planted(tokenizer, monkeypatch, bits)
    monkeypatch.setattr(blind_weights, "_logits", model._logits)
    found = measure_information(model, blind_weights, heldout, PLACES[:4], 4)
    # Whose global tokens are used changes who is cheap, not how many are: the mean stays.
    assert found["information_mutual_null_bits"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_not_of_this_tokenizer_is_refused(tokenizer: TaTok, blind_weights: TaTok) -> None:
    check_blind(tokenizer, blind_weights)
    with pytest.raises(BadInput, match="blind_checkpoint sees the global tokens"):
        check_blind(tokenizer, tokenizer)
    with torch.no_grad():
        blind_weights.mask_token.add_(1)
    with pytest.raises(BadInput, match="blind_checkpoint is another tokenizer"):
        check_blind(tokenizer, blind_weights)


def test_a_tokenizer_without_an_entropy_model_is_refused(tokenizer: TaTok, heldout: ShardDataset) -> None:
    without = TaTok(replace(tokenizer.config, entropy_layers=0)).eval()
    with pytest.raises(BadInput, match="has no entropy model"):
        measure_information(without, None, heldout, PLACES, 5)
