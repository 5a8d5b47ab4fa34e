from dataclasses import replace

import pytest
import torch

from pipeline.training import distributed, validation
from tatok_model import TaTok, TokenizerConfig

CONFIG = TokenizerConfig(32, 8, global_tokens=2, quantizer="fsq", codebook_size=16, fsq_levels=(4, 4), entropy_width=32)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return TaTok(CONFIG).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_sums_of_two_halves_are_those_of_the_whole(tokenizer, images):
    whole = validation.measure(tokenizer, images)
    halves = distributed.summed(validation.measure(tokenizer, half) for half in images.split(2))
    for name, value in whole.items():
        if name != "psnr_quarter_shuffled":  # whose global tokens an image gets depends on its neighbours
            assert halves[name] == pytest.approx(value, rel=1e-4), name


def test_every_image_gets_the_global_tokens_of_another_one(tokenizer, images):
    tokens = tokenizer.encode(images)
    numbered = replace(tokens, global_indices=torch.arange(4)[:, None].expand(4, 2))
    received = validation.exchanged(numbered).global_indices[:, 0]
    assert sorted(received.tolist()) == [0, 1, 2, 3]
    assert not (received == torch.arange(4)).any()


def test_metrics_are_means_and_differences_in_bits(tokenizer, images):
    sums = validation.measure(tokenizer, images)
    found = validation.metrics(sums, unigram_bits=60.0)
    one_pass, chain = sums["bits_one_pass"] / 4, sums["bits_chain"] / 4
    assert found["validation/bits_one_pass"] == pytest.approx(one_pass)
    assert found["validation/bits_redundancy"] == pytest.approx(one_pass - chain)
    assert found["validation/bits_mutual"] == pytest.approx(sums["bits_blind"] / 4 - chain)
    assert one_pass == pytest.approx(16 * 4, rel=0.1)  # an untrained model says log2 16 bits for each of 16 codes


def test_an_untrained_tokenizer_is_warned_of():
    found = {
        "validation/psnr_quarter": 12.0,
        "validation/psnr_quarter_shuffled": 11.9,
        "validation/bits_one_pass": 64.0,
        "validation/bits_unigram": 60.0,
    }
    ignored, useless = validation.warnings(found, globals_exist=True)
    assert "those of other images cost 0.10 dB" in ignored
    assert "64 bits an image; expected fewer than 60" in useless
    assert validation.warnings(found, globals_exist=False) == [useless]
    good = {**found, "validation/psnr_quarter_shuffled": 9.0, "validation/bits_one_pass": 50.0}
    assert validation.warnings(good, globals_exist=True) == []


def test_maps_show_each_patch_in_its_place(tokenizer, images):
    tokens = tokenizer.encode(images)
    maps = validation.distortion_maps(tokenizer, tokens)
    assert maps.shape == images.shape
    ranking = tokenizer.rank(tokens).ranking
    top = ranking.order[0, 0].item()
    row, column = divmod(top, 4)
    patch = maps[0, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
    assert patch.min() == patch.max() == maps[0].max()
    codes = tokenizer.code_vectors()[1]
    spread = (codes - codes.mean(0)).square().sum(1).mean()
    distance = ranking.score_units[0, 0] / ranking.resolution
    assert int(patch[0, 0]) == int((distance / spread).clamp(max=1) * 255)
