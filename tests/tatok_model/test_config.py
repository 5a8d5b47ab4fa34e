import dataclasses
import math

import pytest

from tatok_model.config import (
    ORDERS,
    SIZES,
    GeneratorConfig,
    KeptSetConfig,
    LossConfig,
    SamplingConfig,
    TokenizerConfig,
)


def test_counts_follow_from_sizes():
    config = TokenizerConfig(image_size=256, patch_size=16, global_tokens=32)
    assert (config.grid_size, config.patch_positions, config.max_tokens) == (16, 256, 288)
    assert dataclasses.replace(config, patch_tokens=False).max_tokens == 32


def test_the_cifar_setting_costs_717_bits():
    config = TokenizerConfig(image_size=32, patch_size=4, global_tokens=8, codebook_size=1000)
    assert int(config.max_tokens * config.bits_per_token) == 717


def test_the_sizes_are_there():
    assert list(SIZES) == ["nano", "tiny", "small", "base", "large"]


REFUSED = [  # (configuration, changes, message)
    (TokenizerConfig, {"size": "huge"}, "size is 'huge'; expected one of nano"),
    (TokenizerConfig, {"patch_size": 5}, "image_size is 32; expected a multiple of patch_size, 5"),
    (TokenizerConfig, {"patch_size": 0}, "expected both to be at least 1"),
    (TokenizerConfig, {"global_tokens": -1}, "global_tokens is -1; expected 0 or more"),
    (TokenizerConfig, {"global_tokens": 0, "patch_tokens": False}, "at least one kind of token"),
    (TokenizerConfig, {"quantizer": "lfq"}, "quantizer is 'lfq'; expected vq or fsq"),
    (TokenizerConfig, {"codebook_size": 1}, "expected at least 2"),
    (TokenizerConfig, {"commitment_weight": -1.0}, r"commitment_weight is -1\.0; expected 0 or more"),
    (TokenizerConfig, {"codebook_decay": 1.0}, r"codebook_decay is 1\.0; expected at least 0 and below 1"),
    (TokenizerConfig, {"dead_code_share": -0.1}, r"dead_code_share is -0\.1"),
    (TokenizerConfig, {"entropy_width": 40}, "entropy_width 40; expected 0 or more, and a multiple of 32"),
    (TokenizerConfig, {"quantizer": "fsq", "codebook_size": 999}, "make 1000 codes; expected codebook_size, 999"),
    (
        TokenizerConfig,
        {"trunk_layers": -1},
        "trunk_layers is -1; expected 0 to 3, one decoder block of size 'tiny' less",
    ),
    (TokenizerConfig, {"trunk_layers": 4}, "trunk_layers is 4; expected 0 to 3, one decoder block of size"),
    (TokenizerConfig, {"size": "large", "trunk_layers": 24}, "trunk_layers is 24; expected 0 to 23"),
    (LossConfig, {"l1": -1}, "l1 is -1; expected 0 or more"),
    (LossConfig, {"l2": math.nan}, "l2 is nan; expected 0 or more"),
    (LossConfig, {"l2": 0}, "expected at least one reconstruction term"),
    (LossConfig, {"perceptual": 1.0}, "expected perceptual_backbone and perceptual_heads"),
    (LossConfig, {"gan_start_step": -1}, "gan_start_step is -1"),
    (KeptSetConfig, {"all": 0.5}, "expected shares that add up to 1"),
    (KeptSetConfig, {"random": -0.1}, r"random is -0\.1; expected a share from 0 to 1"),
    (KeptSetConfig, {"hide_globals": 2}, "hide_globals is 2; expected a share from 0 to 1"),
    (KeptSetConfig, {"hide_globals": 0.2}, r"hide_globals is 0\.2; expected at most 0\.15, the share all that it is"),
    (KeptSetConfig, {"order": "best"}, f"order is 'best'; expected one of {', '.join(ORDERS)}"),
    (KeptSetConfig, {"warmup_steps": -1}, "warmup_steps is -1; expected 0 or more"),
    (GeneratorConfig, {"size": "huge"}, "size is 'huge'; expected one of nano"),
    (GeneratorConfig, {"dropout": 1.0}, r"dropout is 1\.0; expected at least 0 and below 1"),
    (GeneratorConfig, {"classes": -1}, "classes is -1; expected 0 or more"),
    (GeneratorConfig, {"grid_size": 0}, "grid_size is 0; expected 1 or more"),
    (GeneratorConfig, {"codebook_size": 1}, "codebook_size is 1; expected 2 or more"),
    (GeneratorConfig, {"positions": "sent"}, "positions is 'sent'; expected generated or derived"),
    (GeneratorConfig, {"global_tokens": 0, "patch_tokens": False}, "expected at least one kind"),
    (GeneratorConfig, {"max_patch_tokens": 65}, "max_patch_tokens is 65; expected 0 to 64"),
    (GeneratorConfig, {"positions": "derived", "max_patch_tokens": 3}, "with derived positions; expected 64"),
    (SamplingConfig, {"temperature": -1}, "temperature is -1; expected 0 or more"),
    (SamplingConfig, {"position_temperature": math.nan}, "position_temperature is nan"),
    (SamplingConfig, {"guidance": -0.5}, r"guidance is -0\.5; expected 0 or more, 1 for none"),
    (SamplingConfig, {"top_k": -1}, "top_k is -1; expected 0 or more"),
    (SamplingConfig, {"top_p": 0}, "top_p is 0; expected more than 0 and at most 1"),
    (SamplingConfig, {"schedule": "cubic"}, "schedule is 'cubic'; expected one of constant, linear, power-cosine"),
    (SamplingConfig, {"schedule_power": 0}, "schedule_power is 0; expected more than 0"),
]


@pytest.mark.parametrize(("architecture", "changes", "message"), REFUSED)
def test_a_configuration_that_cannot_be_is_refused(architecture, changes, message):
    with pytest.raises(ValueError, match=message):
        architecture(**changes)
