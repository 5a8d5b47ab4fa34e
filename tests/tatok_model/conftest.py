"""An untrained tokenizer with opinions, which the tests of filtering share."""

import dataclasses

import pytest
import torch

from tatok_model import TaTok, TokenizerConfig

CONFIG = TokenizerConfig(
    image_size=32, patch_size=8, global_tokens=4, codebook_size=16, codebook_dim=8, entropy_width=32
)


@pytest.fixture(scope="session")
def config():
    """16 patch positions, 4 global tokens, 16 codes, 4 decoder blocks."""
    return CONFIG


@pytest.fixture(scope="session")
def opinionated():
    """`opinionated(trunk_layers=2)`: weights so large that predictions differ between positions and images."""

    def make(**changes):
        torch.manual_seed(0)
        model = TaTok(dataclasses.replace(CONFIG, **changes)).train()
        model(torch.rand(8, 3, 32, 32))  # the codebook is drawn from data
        with torch.no_grad():
            if model.entropy_model is not None:
                for parameter in model.entropy_model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                if model.config.expected_fill:
                    model.fill_gate.fill_(1.0)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def images():
    """Noise of another contrast in every patch: flat and busy ones."""
    generator = torch.Generator().manual_seed(1)
    noise, contrast = (torch.rand(6, *shape, generator=generator) for shape in ((3, 32, 32), (1, 4, 4)))
    return 0.5 + (noise - 0.5) * contrast.repeat_interleave(8, 2).repeat_interleave(8, 3)
