import dataclasses

import pytest

from tatok_model.config import SIZES, LossConfig, TokenizerConfig


def test_counts_follow_from_sizes():
    config = TokenizerConfig(image_size=256, patch_size=16, global_tokens=32)
    assert (config.grid_size, config.patch_positions, config.max_tokens) == (16, 256, 288)
    assert dataclasses.replace(config, patch_tokens=False).max_tokens == 32


def test_the_cifar_setting_costs_717_bits():
    config = TokenizerConfig(image_size=32, patch_size=4, global_tokens=8, codebook_size=1000)
    assert int(config.max_tokens * config.bits_per_token) == 717


def test_the_sizes_are_there():
    assert list(SIZES) == ["nano", "tiny", "small", "base", "large"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "huge"}, "size is 'huge'; expected one of nano"),
        ({"patch_size": 5}, "image_size is 32; expected a multiple of patch_size, 5"),
        ({"patch_size": 0}, "expected both to be at least 1"),
        ({"global_tokens": -1}, "global_tokens is -1"),
        ({"global_tokens": 0, "patch_tokens": False}, "at least one kind of token"),
        ({"quantizer": "lfq"}, "expected vq or fsq"),
        ({"codebook_size": 1}, "expected at least 2"),
        ({"commitment_weight": -1.0}, r"commitment_weight is -1\.0; expected 0 or more"),
        ({"codebook_decay": 1.0}, r"codebook_decay is 1\.0; expected at least 0 and below 1"),
        ({"dead_code_share": -0.1}, r"dead_code_share is -0\.1"),
        ({"quantizer": "fsq", "codebook_size": 999}, r"make 1000 codes; expected codebook_size, 999"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": -1}, "l1 is -1; expected 0 or more"),
        ({"l2": float("nan")}, "l2 is nan; expected 0 or more"),
        ({"l2": 0}, "expected at least one reconstruction term"),
        ({"perceptual": 1.0}, "expected perceptual_backbone and perceptual_heads"),
        ({"gan_start_step": -1}, "gan_start_step is -1"),
    ],
)
def test_losses_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)
