"""Held-out bits are those of one pass over the held-out sequences; pictures are those that generate begins with."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig, GenerateConfig
from pipeline.generator.generator_training import GeneratorValidator
from pipeline.generator.token_data import TokenDataset
from tatok_model.config import GeneratorConfig
from tatok_model.generation.generator import Generator
from tatok_model.tokenizer import TaTok


@pytest.fixture(scope="module")
def heldout(stream_folder: Path) -> TokenDataset:
    return TokenDataset.load(str(stream_folder), "heldout", FilterConfig(threshold=0.6))


@pytest.fixture(scope="module")
def generator(heldout: TokenDataset) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig("nano", 0.0, 3, 2, grid_size=4, codebook_size=16, max_patch_tokens=heldout.longest)
    return Generator(config).eval()


def validator(heldout: TokenDataset, count: int = 99, pictures: int = 0, tokenizer: TaTok | None = None):
    return GeneratorValidator(heldout, count, GenerateConfig(), pictures, tokenizer, torch.device("cpu"))


def test_bits_are_means_over_the_held_out_images(heldout: TokenDataset, generator: Generator) -> None:
    found = validator(heldout).measure(generator)
    with torch.no_grad():
        bits = generator(heldout.sequences(range(12)), torch.from_numpy(heldout.labels))
    assert found["validation/bits_per_image"] == pytest.approx(float(bits.total().mean()), rel=1e-5)
    for name, kind in (("globals", bits.globals_), ("positions", bits.positions), ("codes", bits.codes)):
        assert found[f"validation/bits_{name}"] == pytest.approx(float(kind.sum(1).mean()), rel=1e-5)
    codes = heldout.counts.sum()
    assert found["validation/bits_per_code"] == pytest.approx(float(bits.codes.sum()) / codes, rel=1e-5)
    predictions = heldout.lengths().sum() + 12  # an end each
    assert found["validation/bits_per_token"] == pytest.approx(float(bits.total().sum()) / predictions, rel=1e-5)


def test_some_of_the_images_are_spread_over_the_split(heldout: TokenDataset, generator: Generator) -> None:
    found = validator(heldout, count=4).measure(generator)
    with torch.no_grad():
        rows = [0, 3, 6, 9]
        bits = generator(heldout.sequences(rows), torch.from_numpy(heldout.labels[rows]))
    assert found["validation/bits_per_image"] == pytest.approx(float(bits.total().mean()), rel=1e-5)


def test_pictures_are_sampled_of_each_class_in_turn(
    heldout: TokenDataset, generator: Generator, tokenizer_folder: Path
) -> None:
    tokenizer = TaTok.from_pretrained(tokenizer_folder)
    rows = validator(heldout, pictures=6, tokenizer=tokenizer).examples(generator)
    assert [row.shape for row in rows] == [(2, 16, 16, 3)] * 3, "a row for each class"
    again = validator(heldout, pictures=6, tokenizer=tokenizer).examples(generator)
    assert all(np.array_equal(one, other) for one, other in zip(rows, again, strict=True))
    assert validator(heldout, pictures=0, tokenizer=tokenizer).examples(generator) == []
    assert validator(heldout, pictures=6).examples(generator) == [], "another worker draws them"


def test_held_out_bits_that_rise_while_training_falls_are_warned_of(
    heldout: TokenDataset, generator: Generator
) -> None:
    told = validator(heldout)

    def warn(held_out: float, trained: float) -> list[str]:
        return told.warnings(generator, {"validation/bits_per_token": held_out, "train/loss": trained})

    assert warn(8.0, 9.0) == []
    assert warn(7.5, 8.0) == []
    assert warn(7.6, 8.1) == [], "training has not fallen either"
    (sentence,) = warn(7.6, 7.0)
    assert sentence == (
        "held-out tokens cost 7.600 bits and cost 7.500 before, while those of training fell from 8.000 to 7.000: the "
        "generator learns its training set by heart; expected more data, generator.dropout, or fewer steps"
    )
    assert warn(7.4, 6.9) == []
