"""The second entropy model is refused by its own key, before anything is measured."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.presets import load_config
from pipeline.evaluation.evaluation_checks import check_blind, check_information, load_blind
from tatok_model.tokenizer import TaTok

SHAPE = ["data.image_size=16", "tokenizer.patch_size=4", "tokenizer.global_tokens=2", "tokenizer.codebook_size=16"]
SHAPE += ["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[4,4]", "tokenizer.codebook_dim=16"]


def configured(*overrides: str) -> Config:
    return load_config("smoke", [*SHAPE, "evaluate.information=true", *overrides])


def blind_of(tokenizer: TaTok, **changes: Any) -> TaTok:
    torch.manual_seed(3)
    model = TaTok(replace(tokenizer.config, entropy_globals=False, **changes)).eval()
    weights = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("entropy_model.")}
    model.load_state_dict(weights, strict=False)
    return model


def test_a_model_that_belongs_to_the_tokenizer_is_loaded_and_noted(tokenizer: TaTok, tmp_path: Path) -> None:
    blind_of(tokenizer).save_pretrained(tmp_path / "blind" / "checkpoint")
    config = configured(f"evaluate.blind_checkpoint={tmp_path / 'blind'}")
    check_information(config)
    run: Any = SimpleNamespace(config=config, inputs={})
    loaded = load_blind(run, tokenizer)
    assert loaded is not None
    assert not loaded.config.entropy_globals
    weights = sha256_file(tmp_path / "blind" / "checkpoint" / "model.safetensors")
    assert run.inputs["blind"] == {"path": str(tmp_path / "blind"), "sha256": weights}
    assert load_blind(SimpleNamespace(config=configured(), inputs={}), tokenizer) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.entropy_layers=0"], "evaluate.information is true; expected a tokenizer with an entropy model"),
        (["tokenizer.entropy_globals=false"], "tokenizer.entropy_globals is false; expected true"),
        (["evaluate.blind_checkpoint=/no"], "evaluate.blind_checkpoint '/no' does not exist; expected a checkpoint"),
    ],
)
def test_information_that_cannot_be_measured_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_information(configured(*overrides))
    check_information(replace(configured(), evaluate=replace(configured().evaluate, information=False)))


def test_another_architecture_is_refused_by_its_key(tokenizer: TaTok, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "sees")
    with pytest.raises(BadInput, match="evaluate.blind_checkpoint sees the global tokens"):
        check_information(configured(f"evaluate.blind_checkpoint={tmp_path / 'sees'}"))
    blind_of(tokenizer, entropy_layers=1, entropy_width=32).save_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match="evaluate.blind_checkpoint has entropy_layers 1; expected 2, as tokenizer"):
        check_information(configured(f"evaluate.blind_checkpoint={tmp_path / 'small'}"))


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
