"""TiTok's code is brought in from a folder: here from one that a test has made."""

import sys

import pytest
import torch

from pipeline.benchmarks import titok
from pipeline.core.errors import BadInput
from tatok_model.config import TokenizerConfig

CONFIG = TokenizerConfig(16, 8, "small", global_tokens=2)
MODEL = """
import torch
from omegaconf import OmegaConf
from accelerate.utils.operations import gather
from modeling.modules.blocks import WIDTH

class TiTok(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.options = config.model.vq_model
        assert self.options.get("quantize_mode", "vq") == "vq"
        self.shift = torch.nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x + self.shift, {"quantizer_loss": self.shift.square() + 1}
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with files as the real one has them; what importing it leaves behind is taken away again."""
    for name, text in {
        "titok.py": MODEL,
        "modules/blocks.py": "WIDTH = 1",
        "modules/__init__.py": "raise ImportError('this imports all of its losses')",
        "quantizer/quantizer.py": "",
    }.items():
        path = tmp_path / "modeling" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return str(tmp_path)


def test_its_model_has_our_size_and_as_many_tokens(checkout):
    titok.check(checkout, CONFIG)
    model = titok.make(checkout, CONFIG)
    assert model.options.num_latent_tokens == CONFIG.max_tokens == 6
    assert model.options.vit_enc_model_size == "small"
    assert model.options.vit_dec_patch_size == 8
    loss = titok.loss_of(model, torch.rand(2, 3, 16, 16))
    loss.backward()
    assert loss.item() == 1


def test_a_folder_without_its_code_is_refused(tmp_path):
    with pytest.raises(BadInput, match="has no modeling/titok.py"):
        titok.check(str(tmp_path), CONFIG)


def test_a_size_that_it_has_not_is_refused(checkout):
    with pytest.raises(BadInput, match="tokenizer.size is 'nano'; expected one of small"):
        titok.check(checkout, TokenizerConfig(16, 8, "nano"))
