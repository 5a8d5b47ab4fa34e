"""What baselines cost is known, and what they cannot do refused, before anything is measured."""

import pytest
import torch

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.evaluation.evaluation_checks import check_baselines, fixed_bits
from pipeline.evaluation.measurements import Cuts
from tatok_model.tokenizer import TaTok

SHAPE = ["data.image_size=16", "tokenizer.patch_size=4", "tokenizer.global_tokens=2", "tokenizer.codebook_size=16"]
SHAPE += ["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[4,4]", "tokenizer.codebook_dim=16"]


def configured(*overrides: str) -> Config:
    return load_config("smoke", [*SHAPE, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["filter.threshold=0"],
        ["filter.rule=marginal", "filter.threshold=0"],
        ["filter.rule=count", "filter.threshold=16"],
        ["filter.rule=count", "filter.threshold=5"],
        ["filter.rule=count", "filter.threshold=5", "filter.score=grid"],
        ["filter.rule=count", "filter.threshold=5", "filter.score=entropy", "filter.replay=true"],
    ],
)
def test_bits_of_cuts_of_fixed_length_are_those_of_the_tokens(tokenizer: TaTok, overrides: list[str]) -> None:
    config = configured(*overrides)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    cuts = Cuts(config.filter)
    tokens = cuts.operating(cuts.rank(tokenizer, tokenizer.encode(images), images))
    assert tokens.bits(4).tolist() == pytest.approx([fixed_bits(config)] * 3)


def test_bits_that_vary_are_not_known() -> None:
    assert fixed_bits(configured("filter.rule=residual", "filter.threshold=20")) is None
    check_baselines(configured("filter.threshold=0.5", "evaluate.baselines=[kmeans]"), 1)


def test_global_tokens_alone_have_as_many_bits_as_are_kept() -> None:
    assert fixed_bits(configured("tokenizer.patch_tokens=false")) == 8
    assert fixed_bits(configured("tokenizer.patch_tokens=false", "filter.rule=count", "filter.threshold=1")) == 4


@pytest.mark.parametrize(
    ("overrides", "images", "message"),
    [
        (["evaluate.baselines=[jpeg,kmeans]"], 0, "evaluate.baselines has jpeg, kmeans, chosen or fitted on training"),
        (["evaluate.baselines=[kmeans]"], 1, "needs 22 codewords for 72.0 bits an image; expected 2 to 16"),
        (["evaluate.baselines=[kmeans]", "filter.threshold=0"], 20, "needs 1 codewords for 8.0 bits an image"),
    ],
)
def test_baselines_that_cannot_be_made_are_refused(overrides: list[str], images: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_baselines(configured(*overrides), images)
